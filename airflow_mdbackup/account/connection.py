"""A connection to an account, over which an audit makes its requests and records each refusal.

One TCP connection per account: it queries the login methods before it logs in, and then opens one channel
after another. Every wait of paramiko's has a timeout here.

Sources: RFC 4252 (section 5.2, the ``none`` method), RFC 4254 (channels and forwarding), OpenSSH ``PROTOCOL``
sections 2.3 (``tun@openssh.com``) and 2.4 (sockets).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import paramiko
from paramiko.common import MSG_CHANNEL_OPEN, MSG_CHANNEL_REQUEST

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.hooks.provider import account
from airflow_mdbackup.scheme.common.paths import to_text

ANSWER_TIMEOUT = 5.0
"""Seconds to wait for one answer."""
_TOTAL_TIMEOUT = 60.0  # seconds for all requests to one account together
_MAX_OUTPUT = 65536  # bytes
_CONNECTION_ERRORS = (paramiko.SSHException, OSError, EOFError)  # raised by paramiko when a connection ends

Answer = TypeVar("Answer")


class Unanswered(Exception):
    """The server gave no answer that proves anything. The message, which is printable, says what happened."""


class _Transport(BoundedTransport):
    """A transport that queries the login methods before it logs in, and keeps the server's debug messages.

    It uses the connection that then logs in, because servers may penalise one that never does
    (``PerSourcePenalties``, fail2ban).

    :ivar login_methods: the methods that the server offers; ``none``: it needs no authentication.
    :ivar remarks: the server's debug messages (RFC 4253, section 11.3), in which OpenSSH says why it refuses
        a request. They arrive before the refusal itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_log_channel(_LOGGER)

    login_methods: tuple[str, ...] | None = None
    remarks: tuple[bytes, ...] = ()
    _payload = b""

    def auth_publickey(self, username: str, key: paramiko.PKey, event: threading.Event | None = None) -> Any:
        return [] if self._needs_no_authentication(username) else super().auth_publickey(username, key, event)

    def auth_password(self, username: str, password: str, *args: Any, **kwargs: Any) -> Any:
        return (
            []
            if self._needs_no_authentication(username)
            else super().auth_password(username, password, *args, **kwargs)
        )

    def _needs_no_authentication(self, username: str) -> bool:
        """Query the login methods, once."""
        if self.login_methods is None:
            try:
                self.auth_none(username)
                self.login_methods = ("none",)
            except paramiko.BadAuthenticationType as error:
                self.login_methods = tuple(error.allowed_types)
        return self.login_methods == ("none",)

    def open_with(self, kind: str, payload: paramiko.Message) -> paramiko.Channel:
        """Open a channel of a type whose extra fields paramiko does not support."""
        self._payload = payload.asbytes()
        try:
            return self.open_channel(kind, timeout=ANSWER_TIMEOUT)
        finally:
            self._payload = b""

    def _parse_debug(self, message: paramiko.Message) -> None:
        message.get_boolean()
        self.remarks = (*self.remarks[-9:], message.get_binary()[:100])

    def _send_user_message(self, data: paramiko.Message) -> None:
        if self._payload and data.asbytes()[0] == MSG_CHANNEL_OPEN:
            data.add_bytes(self._payload)
        super()._send_user_message(data)  # type: ignore[misc]


# paramiko would log each refusal as an error, but here refusals are expected.
_LOGGER = "airflow_mdbackup.account.transport"
logging.getLogger(_LOGGER).setLevel(logging.CRITICAL)


class Account:
    """A connected account of a provider. A context manager.

    :param conn_id: the Airflow connection.
    :raises AccessRefused: the host key is not the expected one, or the login is refused.
    :raises ConnectionLost: the server cannot be reached.
    """

    def __init__(self, conn_id: str) -> None:
        self.ssh_account = account(conn_id)
        self._client = client_of(self.ssh_account, _Transport)
        transport = self._client.get_transport()
        assert isinstance(transport, _Transport)
        self.transport = transport
        # Closing the connection ends whatever paramiko is waiting for.
        self._deadline = threading.Timer(_TOTAL_TIMEOUT, self._client.close)
        self._deadline.daemon = True
        self._deadline.start()

    def __enter__(self) -> Account:
        return self

    def __exit__(self, *error: object) -> None:
        self._deadline.cancel()
        self._client.close()

    @property
    def login(self) -> str:
        """The user name with which the account logs in."""
        return self.ssh_account.user

    @property
    def login_methods(self) -> tuple[str, ...]:
        """The methods that the server offers; ``none``: it needs no authentication."""
        return self.transport.login_methods or ()

    @property
    def is_openssh(self) -> bool:
        """Whether the server identifies as OpenSSH."""
        return str(self.transport.remote_version).startswith("SSH-2.0-OpenSSH")

    # --- channels -----------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[paramiko.Channel]:
        """Open a session channel, close it at the end, and check that the connection is still alive.

        :raises Unanswered: the server opens none, or the connection has ended. To paramiko that looks like a
            refusal, or like the end of a program, which would count as evidence.
        """
        until = time.monotonic() + ANSWER_TIMEOUT
        while True:
            try:
                channel = self.transport.open_session(timeout=ANSWER_TIMEOUT)
                break
            except _CONNECTION_ERRORS as error:
                # With a small MaxSessions, the server may not have released the previous session yet.
                if not self.transport.is_active() or time.monotonic() > until:
                    raise Unanswered("the server does not open a session") from error
                time.sleep(0.2)
        channel.settimeout(ANSWER_TIMEOUT)
        try:
            yield channel
        finally:
            with suppress(*_CONNECTION_ERRORS):
                channel.close()
        # Any answer proves that it is alive; this one is a refusal.
        self._request("keepalive@openssh.com")
        self._check_alive()

    def _request(self, kind: str, *values: object) -> Any:
        """Make a global request. None: it is refused, or the connection had already ended.

        :raises Unanswered: the connection ended meanwhile.
        """
        try:
            return self.transport.global_request(kind, values or None)
        except _CONNECTION_ERRORS as error:
            raise Unanswered("the connection ended") from error

    def _check_alive(self) -> None:
        if not self.transport.is_active():
            raise Unanswered("the connection ended")

    def grants(self, channel: paramiko.Channel, ask: Callable[[], object]) -> bool:
        """Return whether the server grants the request that ``ask`` makes. A refusal closes the channel.

        :raises Unanswered: no answer.
        """
        timer = threading.Timer(ANSWER_TIMEOUT, channel.close)
        timer.daemon = True
        timer.start()
        asked = time.monotonic()
        try:
            ask()
            return True
        except _CONNECTION_ERRORS as error:
            if time.monotonic() - asked >= ANSWER_TIMEOUT:
                raise Unanswered(f"no answer within {ANSWER_TIMEOUT:.0f} s") from error
            return False
        finally:
            timer.cancel()

    def grants_agent(self, channel: paramiko.Channel) -> bool:
        """Return whether the server would forward an agent."""
        return self._grants_request(channel, "auth-agent-req@openssh.com")

    def grants_variable(self, channel: paramiko.Channel, name: str) -> bool:
        """Return whether the server would set an environment variable for a program on the channel."""
        return self._grants_request(channel, "env", name, "mdbackup-audit")

    def _grants_request(self, channel: paramiko.Channel, kind: str, *values: str) -> bool:
        """Make a request for which paramiko itself does not request an answer."""

        def ask() -> None:
            raw: Any = channel
            request = paramiko.Message()
            request.add_byte(bytes([MSG_CHANNEL_REQUEST]))
            request.add_int(raw.remote_chanid)
            request.add_string(kind)
            request.add_boolean(True)
            for value in values:
                request.add_string(value)
            raw._event_pending()
            self.transport._send_user_message(request)
            raw._wait_for_event()

        return self.grants(channel, ask)

    def with_remarks(self, ask: Callable[[], Answer]) -> tuple[Answer, tuple[bytes, ...]]:
        """Make a request; return the answer, and the server's debug messages meanwhile."""
        self.transport.remarks = ()
        answer = ask()
        return answer, self.transport.remarks

    def open_code(self, kind: str, open_channel: Callable[[], paramiko.Channel]) -> int:
        """Return 0 if the server opens a channel, which is closed at once; else its reason code.

        :raises Unanswered: no answer.
        """
        try:
            open_channel().close()
            return 0
        except paramiko.ChannelException as error:
            return int(error.code)
        except _CONNECTION_ERRORS as error:
            raise Unanswered(f"no answer to {kind} within {ANSWER_TIMEOUT:.0f} s") from error

    def open_tcp(self, host: str, port: int) -> int:
        """Request a connection from the server to a host; see :meth:`open_code`."""
        origin = ("127.0.0.1", 0)
        return self.open_code(
            "direct-tcpip",
            lambda: self.transport.open_channel("direct-tcpip", (host, port), origin, timeout=ANSWER_TIMEOUT),
        )

    def open_socket(self, path: bytes) -> int:
        """Request a connection to a socket in the server's file system; see :meth:`open_code`."""
        payload = paramiko.Message()
        payload.add_string(path)
        payload.add_string("")
        payload.add_int(0)
        kind = "direct-streamlocal@openssh.com"
        return self.open_code(kind, lambda: self.transport.open_with(kind, payload))

    def open_tunnel(self) -> int:
        """Request a network device on the server; see :meth:`open_code`."""
        payload = paramiko.Message()
        payload.add_int(1)  # point to point
        payload.add_int(0x7FFFFFFF)  # any device
        return self.open_code("tun@openssh.com", lambda: self.transport.open_with("tun@openssh.com", payload))

    def listens(self) -> bool:
        """Return whether the server listens on a port for us. It stops at once.

        :raises Unanswered: the connection ended.
        """
        answer = self._request("tcpip-forward", "localhost", 0)
        if answer is None:
            self._check_alive()
            return False
        self._request("cancel-tcpip-forward", "localhost", answer.get_int())
        return True

    def listens_on_socket(self, path: bytes) -> bool:
        """Return whether the server creates a socket for us. It stops at once, but the socket remains.

        :raises Unanswered: the connection ended.
        """
        granted = self._request("streamlocal-forward@openssh.com", path) is not None
        if granted:
            self._request("cancel-streamlocal-forward@openssh.com", path)
        self._check_alive()
        return granted


def read_output(channel: paramiko.Channel, until: Sequence[bytes]) -> bytes:
    """Read a channel to its end, or until the output contains one of ``until``.

    :raises Unanswered: neither happened within :data:`ANSWER_TIMEOUT`.
    """
    output, ended = read_for(channel, until, ANSWER_TIMEOUT)
    if not ended:
        raise Unanswered(
            f"the program did not end within {ANSWER_TIMEOUT:.0f} s and {_MAX_OUTPUT >> 10} KiB;"
            f' it printed "{to_text(output[:100])}"'
        )
    return output


def read_for(channel: paramiko.Channel, until: Sequence[bytes], patience: float) -> tuple[bytes, bool]:
    """Read a channel for ``patience`` seconds; return the output, and whether it has ended.

    It also counts as ended if it contains one of ``until``, and as not ended if it is too long.
    """
    end = time.monotonic() + patience
    output = b""
    while not any(word in output for word in until):
        if len(output) >= _MAX_OUTPUT:
            return output, False
        channel.settimeout(max(0.01, end - time.monotonic()))
        try:
            data = channel.recv(4096)
        except TimeoutError:
            return output, False
        except (OSError, EOFError):
            break
        if not data:
            break
        output += data
    return output, True
