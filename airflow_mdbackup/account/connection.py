"""A connection to an account whose every refusal counts, over which all questions to it are asked.

One TCP connection per account: it asks in which ways the account could log in before it does so, and then
opens one channel after the other. All that paramiko would wait for without end is bounded here.

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

PATIENCE = 5.0
"""Seconds to wait for any one answer."""
_ALL = 60.0  # seconds for all questions to one account together
_MOST = 65536  # bytes of output that are looked at
_BROKEN = (paramiko.SSHException, OSError, EOFError)  # what paramiko raises when a connection ends

Asked = TypeVar("Asked")


class Unanswered(Exception):
    """The server gave no answer from which anything can be told; the printable message says what happened."""


class _Transport(BoundedTransport):
    """A transport that asks for the ways to log in before the first is tried, and keeps the server's remarks.

    On the very connection that logs in a moment later, because servers may punish one that never does
    (``PerSourcePenalties``, fail2ban).

    :ivar remarks: the texts of its debug messages (RFC 4253, section 11.3), in which OpenSSH says why it
        refuses. They come before the refusal itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_log_channel(_LOG)

    offered: tuple[str, ...] | None = None
    remarks: tuple[bytes, ...] = ()
    _payload = b""

    def auth_publickey(self, username: str, key: paramiko.PKey, event: threading.Event | None = None) -> Any:
        return [] if self._is_open(username) else super().auth_publickey(username, key, event)

    def auth_password(self, username: str, password: str, *args: Any, **kwargs: Any) -> Any:
        return [] if self._is_open(username) else super().auth_password(username, password, *args, **kwargs)

    def _is_open(self, username: str) -> bool:
        """Ask, once; the account is open if it needs no proof at all."""
        if self.offered is None:
            try:
                self.auth_none(username)
                self.offered = ("none",)
            except paramiko.BadAuthenticationType as error:
                self.offered = tuple(error.allowed_types)
        return self.offered == ("none",)

    def open_with(self, kind: str, payload: paramiko.Message) -> paramiko.Channel:
        """Open a channel of a kind whose further fields paramiko does not know."""
        self._payload = payload.asbytes()
        try:
            return self.open_channel(kind, timeout=PATIENCE)
        finally:
            self._payload = b""

    def _parse_debug(self, message: paramiko.Message) -> None:
        message.get_boolean()
        self.remarks = (*self.remarks[-9:], message.get_binary()[:100])

    def _send_user_message(self, data: paramiko.Message) -> None:
        if self._payload and data.asbytes()[0] == MSG_CHANNEL_OPEN:
            data.add_bytes(self._payload)
        super()._send_user_message(data)  # type: ignore[misc]


# Refusals are what is hoped for here; paramiko would log each of them as an error.
_LOG = "airflow_mdbackup.account.transport"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)


class Account:
    """An account of a provider, connected to. A context manager.

    :param conn_id: the Airflow connection.
    :raises AccessRefused: the host key is not the expected one, or the account is refused.
    :raises ConnectionLost: the server cannot be reached.
    """

    def __init__(self, conn_id: str) -> None:
        self.reached = account(conn_id)
        self._client = client_of(self.reached, _Transport)
        transport = self._client.get_transport()
        assert isinstance(transport, _Transport)
        self.transport = transport
        # Whatever paramiko waits for then, ends.
        self._bound = threading.Timer(_ALL, self._client.close)
        self._bound.daemon = True
        self._bound.start()

    def __enter__(self) -> Account:
        return self

    def __exit__(self, *error: object) -> None:
        self._bound.cancel()
        self._client.close()

    @property
    def login(self) -> str:
        """The name under which the account logs in."""
        return self.reached.user

    @property
    def offered(self) -> tuple[str, ...]:
        """The ways to log in that the server offers to who has proven nothing; ``none``: no proof needed."""
        return self.transport.offered or ()

    @property
    def is_openssh(self) -> bool:
        """Whether the server says that it is OpenSSH."""
        return str(self.transport.remote_version).startswith("SSH-2.0-OpenSSH")

    # --- channels -----------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[paramiko.Channel]:
        """Open a session channel, close it at the end, and see that the connection is still there.

        :raises Unanswered: the server opens none, or the connection has ended. To paramiko that looks like a
            refusal, or like the end of what ran, which would be evidence.
        """
        until = time.monotonic() + PATIENCE
        while True:
            try:
                channel = self.transport.open_session(timeout=PATIENCE)
                break
            except _BROKEN as error:
                # Where MaxSessions is small, the server may not be rid of the one before yet.
                if not self.transport.is_active() or time.monotonic() > until:
                    raise Unanswered("the server opens no session") from error
                time.sleep(0.2)
        channel.settimeout(PATIENCE)
        try:
            yield channel
        finally:
            with suppress(*_BROKEN):
                channel.close()
        # Any answer will do; this one is a refusal.
        self._request("keepalive@openssh.com")
        self._check_alive()

    def _request(self, kind: str, *values: object) -> Any:
        """Make a request that is of no channel; None if it is refused, or the connection ended.

        :raises Unanswered: the connection ended just now.
        """
        try:
            return self.transport.global_request(kind, values or None)
        except _BROKEN as error:
            raise Unanswered("the connection ended") from error

    def _check_alive(self) -> None:
        if not self.transport.is_active():
            raise Unanswered("the connection ended")

    def grants(self, channel: paramiko.Channel, ask: Callable[[], object]) -> bool:
        """Tell whether the server grants what ``ask`` asks for on the channel; a refusal closes it.

        :raises Unanswered: no answer came.
        """
        timer = threading.Timer(PATIENCE, channel.close)
        timer.daemon = True
        timer.start()
        asked = time.monotonic()
        try:
            ask()
            return True
        except _BROKEN as error:
            if time.monotonic() - asked >= PATIENCE:
                raise Unanswered(f"no answer within {PATIENCE:.0f} s") from error
            return False
        finally:
            timer.cancel()

    def grants_agent(self, channel: paramiko.Channel) -> bool:
        """Tell whether the server would forward an agent."""
        return self._grants_request(channel, "auth-agent-req@openssh.com")

    def grants_variable(self, channel: paramiko.Channel, name: str) -> bool:
        """Tell whether the server would give what runs on the channel an environment variable of ours."""
        return self._grants_request(channel, "env", name, "mdbackup-audit")

    def _grants_request(self, channel: paramiko.Channel, kind: str, *values: str) -> bool:
        """Make a request for which paramiko's own wants no answer."""

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

    def remarked(self, ask: Callable[[], Asked]) -> tuple[Asked, tuple[bytes, ...]]:
        """Return the answer to a question, and what the server remarked meanwhile."""
        self.transport.remarks = ()
        answer = ask()
        return answer, self.transport.remarks

    def open_code(self, kind: str, open_channel: Callable[[], paramiko.Channel]) -> int:
        """Return 0 if the server opens a channel (which is closed at once), else its reason code.

        :raises Unanswered: no answer came.
        """
        try:
            open_channel().close()
            return 0
        except paramiko.ChannelException as error:
            return int(error.code)
        except _BROKEN as error:
            raise Unanswered(f"no answer to {kind} within {PATIENCE:.0f} s") from error

    def open_tcp(self, host: str, port: int) -> int:
        """Ask for a connection from the server to there; see :meth:`open_code`."""
        here = ("127.0.0.1", 0)
        return self.open_code(
            "direct-tcpip",
            lambda: self.transport.open_channel("direct-tcpip", (host, port), here, timeout=PATIENCE),
        )

    def open_socket(self, path: bytes) -> int:
        """Ask for a connection to a socket in the server's file system; see :meth:`open_code`."""
        payload = paramiko.Message()
        payload.add_string(path)
        payload.add_string("")
        payload.add_int(0)
        kind = "direct-streamlocal@openssh.com"
        return self.open_code(kind, lambda: self.transport.open_with(kind, payload))

    def open_tunnel(self) -> int:
        """Ask for a network device of the server; see :meth:`open_code`."""
        payload = paramiko.Message()
        payload.add_int(1)  # point to point
        payload.add_int(0x7FFFFFFF)  # any device
        return self.open_code("tun@openssh.com", lambda: self.transport.open_with("tun@openssh.com", payload))

    def listens(self) -> bool:
        """Tell whether the server would listen on a port for us; it stops at once.

        :raises Unanswered: the connection ended.
        """
        answer = self._request("tcpip-forward", "localhost", 0)
        if answer is None:
            self._check_alive()
            return False
        self._request("cancel-tcpip-forward", "localhost", answer.get_int())
        return True

    def listens_on_socket(self, path: bytes) -> bool:
        """Tell whether the server makes a socket for us. It stops at once, but the socket stays.

        :raises Unanswered: the connection ended.
        """
        granted = self._request("streamlocal-forward@openssh.com", path) is not None
        if granted:
            self._request("cancel-streamlocal-forward@openssh.com", path)
        self._check_alive()
        return granted


def output_of(channel: paramiko.Channel, until: Sequence[bytes]) -> bytes:
    """Return what comes on a channel to its end, or until one of ``until`` is in it.

    :raises Unanswered: neither happened within :data:`PATIENCE`.
    """
    said, ended = listen(channel, until, PATIENCE)
    if not ended:
        raise Unanswered(
            f"what ran has not ended within {PATIENCE:.0f} s and {_MOST >> 10} KiB;"
            f' it said "{to_text(said[:100])}"'
        )
    return said


def listen(channel: paramiko.Channel, until: Sequence[bytes], patience: float) -> tuple[bytes, bool]:
    """Return what comes on a channel within ``patience`` seconds, and whether that is the end of it.

    It ends, too, when one of ``until`` is in it. What is too much has no end.
    """
    end = time.monotonic() + patience
    said = b""
    while not any(word in said for word in until):
        if len(said) >= _MOST:
            return said, False
        channel.settimeout(max(0.01, end - time.monotonic()))
        try:
            data = channel.recv(4096)
        except TimeoutError:
            return said, False
        except (OSError, EOFError):
            break
        if not data:
            break
        said += data
    return said, True
