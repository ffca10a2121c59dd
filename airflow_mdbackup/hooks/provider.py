"""A connection to a provider, as the backup scheme wants it: verified, uncompressed, with a fast cipher.

Both accounts of a provider are reached through ordinary Airflow connections of type ``ssh`` or ``sftp``;
their extras are those of Airflow's SSH provider package, and ``subsystem``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import paramiko
from airflow.providers.ssh.hooks.ssh import SSHHook
from airflow.sdk.exceptions import AirflowException, AirflowNotFoundException
from paramiko.ssh_exception import IncompatiblePeer

from airflow_mdbackup.hooks.bounded import (
    BoundedTransport,
    Overrun,
    ToldChannel,
    clients_with,
    raise_for_overrun,
)
from airflow_mdbackup.hooks.ssh_program import SshChannel, program_for
from airflow_mdbackup.provider_side import STOP, Done, IndexRequest
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.sftp import PATIENCE, WINDOW, Reader

_LONGEST = 4096  # characters of what paramiko or asyncssh logs


class Printable(logging.Filter):
    """Keeps a server's own words, which paramiko and asyncssh log as they come, from acting on a terminal.

    Nor do they fill the log: a greeting may be of any size.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()[:_LONGEST]
        record.msg, record.args = to_text(said.encode("utf-8", "backslashreplace")), ()
        return True


logging.getLogger("paramiko.transport").addFilter(Printable())

_FAST = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
_BROKEN = (paramiko.SSHException, OSError, EOFError)  # what paramiko raises when a connection ends
_CONNECT = 30  # seconds for each of: TCP connection, banner, authentication
# Seconds of a round trip from which on paramiko, whose window we choose, outruns ssh, whose window is 2 MiB.
_LONG = 0.03
_SILENCES = 5  # stall timeouts in which more than a trickle must come
_LISTEN = 10.0  # seconds between two looks whether a silent connection is still alive
_STOPPING = 3.0  # seconds that a build gets to stop; Airflow kills a task after five


class ProviderHook(SSHHook):
    """An SSH connection to one of a provider's accounts. Use as a context manager.

    Host keys are verified. Compression is off unless the connection asks for it (``"compress": true``).

    :param conn_id: the Airflow connection.
    :param stall_timeout: seconds that an SFTP transfer may be silent. In five times as many, and at least
        five minutes, more than a trickle must come.
    :cvar transport_class: of paramiko's transport, by which it connects.
    """

    transport_class: type[BoundedTransport] = BoundedTransport

    def __init__(self, conn_id: str, *, stall_timeout: float = 60.0) -> None:
        try:
            extra = self.get_connection(conn_id).extra_dejson
            if not isinstance(extra, dict):
                raise ValueError("its extra is no JSON object")
            super().__init__(
                ssh_conn_id=conn_id,
                conn_timeout=_CONNECT,
                banner_timeout=_CONNECT,
                auth_timeout=_CONNECT,
                conn_retry_attempts=1,
            )
        except AirflowNotFoundException as error:
            raise AccessRefused(
                f"the connection {conn_id} does not exist. Make it in the Airflow UI, or by: airflow "
                f"connections add {conn_id} ..."
            ) from error
        except (ValueError, AirflowException, paramiko.SSHException) as error:
            raise AccessRefused(
                f"the connection {conn_id} is of no use: {_said(error)}. Its extra host_key must look like "
                '"ssh-ed25519 AAAA...", and key_file or private_key hold a private key.'
            ) from error
        self.stall_timeout = stall_timeout
        self._patience = max(PATIENCE, _SILENCES * stall_timeout)
        self.compress = str(extra.get("compress", "false")).lower() == "true"
        self.subsystem = str(extra.get("subsystem", "sftp"))
        self._key_text = None if extra.get("private_key_passphrase") else extra.get("private_key")
        self._channels: list[SshChannel] = []
        self._building: tuple[paramiko.Channel, Conversation] | None = None
        self._ended = False
        if self.allow_host_key_change:
            raise AccessRefused(
                f"the connection {conn_id} sets allow_host_key_change, which trusts any server. Remove that, "
                "and pin the key in its extra host_key."
            )

    def __enter__(self) -> ProviderHook:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection for good, and what waits on it. May be called from another thread."""
        self._ended = True
        channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
        if self.client is not None:
            self.client.close()

    # --- connecting ---------------------------------------------------------------------------------

    def get_conn(self) -> paramiko.SSHClient:
        """Return the connected client.

        :raises AccessRefused: the host key is not the expected one, or the account is refused.
        :raises ConnectionLost: the server cannot be reached, or the connection has been ended.
        """
        where = self._where
        try:
            client = self._connected_fast()
            if self._ended:  # meanwhile, so that nobody would end this one
                client.close()
                raise ConnectionLost(f"{where}: the connection was ended on this side")
        except paramiko.BadHostKeyException as error:
            raise AccessRefused(
                f"{where}: the server's host key is not the expected one: it has {error.key.fingerprint}, "
                f"expected was {error.expected_key.fingerprint}. Somebody may be in between. If the server "
                "really has a new key, pin that in the connection's extra host_key."
            ) from error
        except paramiko.SSHException as error:
            raise _classified(where, error) from error
        except (FileNotFoundError, PermissionError) as error:
            if error.filename is None:  # it is of the network, as where a firewall rejects
                raise ConnectionLost(f"{where}: {_said(error)}") from error
            raise AccessRefused(f"{where}: the key cannot be read on this worker: {_said(error)}") from error
        except (paramiko.hostkeys.InvalidHostKey, UnicodeError) as error:
            raise AccessRefused(
                f"{where}: known_hosts on this worker, or the host's name, is malformed: {_said(error)}"
            ) from error
        except (OSError, EOFError) as error:
            raise ConnectionLost(f"{where}: {_said(error)}") from error
        self._check_pinned(client)
        return client

    def _check_pinned(self, client: paramiko.SSHClient) -> None:
        """Refuse a server that only known_hosts knows, where the connection pins another key."""
        transport: Any = client.get_transport()
        if self.host_key is None or transport is None or not transport.is_active():
            return
        shown = transport.get_remote_server_key()
        if shown != self.host_key:
            self.close()
            raise AccessRefused(
                f"{self._where}: the server's host key is not the expected one: it has {shown.fingerprint}, "
                f"as has known_hosts on this worker, but the connection's extra host_key is "
                f"{self.host_key.fingerprint}. Correct whichever of the two is wrong."
            )

    @property
    def _where(self) -> str:
        return f"{self.username}@{self.remote_host}:{self.port} (connection {self.ssh_conn_id})"

    def _connected_fast(self) -> paramiko.SSHClient:
        """Connect with a cipher that today's processors are fast at, or with what the server has.

        The only way to a preference that holds from the first key exchange is to disable the other ciphers.
        """
        if self.client is not None or self.ciphers or (self.disabled_algorithms or {}).get("ciphers"):
            return self._connected()
        asked = self.disabled_algorithms
        others = [name for name in _known_ciphers() if name not in _FAST]
        self.disabled_algorithms = {**(asked or {}), "ciphers": others}
        try:
            return self._connected()
        except IncompatiblePeer as error:
            if "ciphers" not in str(error):
                raise
            self.log.info("Connecting again, with any cipher: %s", _said(error))
            self.disabled_algorithms = asked
            # A proxy command is of use for one connection only, and SSHHook keeps it.
            self.__dict__.pop("host_proxy", None)
            return self._connected()
        finally:
            self.disabled_algorithms = asked

    def _connected(self) -> paramiko.SSHClient:
        if self.client is not None:  # no more than a look at it, unless it has broken
            transport = self.client.get_transport()
            if transport is not None and transport.is_active():
                return self.client
        with clients_with(self.transport_class):
            return super().get_conn()

    def _session(self, window: int | None = None) -> paramiko.Channel:
        transport = self.get_conn().get_transport()
        if transport is None:
            raise ConnectionLost(f"the connection {self.ssh_conn_id} broke while it was made")
        try:
            return transport.open_session(window_size=window, timeout=_CONNECT)
        except _BROKEN as error:
            raise ConnectionLost(f"the server opens no session: {_said(error)}") from error

    # --- the backup account -------------------------------------------------------------------------

    def reader(
        self, throttle: Callable[[int], int | None] | None = None, round_trip: float | None = None
    ) -> Reader:
        """Return an SFTP reader on a new channel: of the ``ssh`` program if that will do, or of paramiko.

        :param throttle: as for a reader.
        :param round_trip: seconds, as an earlier reader found, so that a long line is known as such.
        :raises AccessRefused: the host key is not the expected one, or the account is refused.
        :raises NotOnProvider: the server has no such subsystem.
        :raises ConnectionLost: the connection broke, or what answers is no SFTP server.
        """
        is_long = round_trip is not None and round_trip > _LONG
        reader = (None if is_long else self._fast_reader()) or self._paramiko_reader()
        reader.throttle = throttle  # not before, since what waits does not tell how long the line is
        return reader

    def _fast_reader(self) -> Reader | None:
        """Return a reader over ``ssh``, or None where paramiko must do, or has to tell what is wrong."""
        channel = None
        try:
            program = program_for(self, self._key_text)
            if program is None:
                return None
            with program:  # it has read its files before the server answers
                channel = SshChannel(program.command, self.stall_timeout)
                self._channels.append(channel)
                reader = Reader(channel, patience=self._patience)
                if reader.round_trip < _LONG:
                    return reader
            why = "the line is long"
        except (OSError, ValueError) as error:  # it does not start
            why = _said(error)
        except ConnectionLost as error:
            assert channel is not None
            if channel not in self._channels:  # it was closed meanwhile, and is not wanted any more
                raise
            why = channel.said() or str(error)
        if channel is not None:
            channel.close()
        if "connect to host" in why or "resolve hostname" in why:
            raise ConnectionLost(f"{self._where}: {why}")
        self.log.info("Connecting again, without the program ssh: %s", why)
        return None

    def _paramiko_reader(self) -> Reader:
        channel = self._session(window=2 * WINDOW)
        channel.settimeout(self.stall_timeout)
        asked = time.monotonic()
        try:
            with _at_most(_CONNECT, channel):
                channel.invoke_subsystem(self.subsystem)
        except _BROKEN as error:
            overrun = isinstance(error, Overrun)
            if overrun or not self._alive(channel) or time.monotonic() - asked >= _CONNECT:
                raise ConnectionLost(f"no SFTP server answered: {_said(error)}") from error
            raise NotOnProvider(
                f"connection {self.ssh_conn_id}: the server does not start the subsystem {self.subsystem!r} "
                f"({_said(error)}). Check `Subsystem` in its sshd_config, and the connection's extra "
                "subsystem."
            ) from error
        return Reader(ToldChannel(channel), patience=self._patience)

    # --- the index account --------------------------------------------------------------------------

    def build_index(self, request: IndexRequest) -> Done:
        """Have the provider build its index, and return what it reports.

        :raises NotOnProvider: the index could not be built; the old one is still there.
        :raises AccessRefused: the account runs no indexer.
        :raises ConnectionLost: the connection broke. The build goes on without us, and the same request
            joins it.
        """
        conversation = Conversation(request, f"connection {self.ssh_conn_id}", self.log)
        while not conversation.ends(self._converse(conversation)):
            pass
        return conversation.result()

    def _converse(self, conversation: Conversation) -> int | None:
        """Run the command of a conversation to its end, and return its exit status, if the server tells."""
        channel = self._session()
        try:
            channel.set_combine_stderr(True)
            with _at_most(_CONNECT, channel):
                channel.exec_command(conversation.command)
                channel.sendall(conversation.opening)
            self._building = channel, conversation
            for data in self._output(channel, conversation):
                if answer := conversation.hear(data):
                    with _at_most(_CONNECT, channel):
                        channel.sendall(answer)
            # Its output has ended; a server that then tells no status has none to tell.
            return channel.recv_exit_status() if channel.status_event.wait(_CONNECT) else None
        except _BROKEN as error:
            raise ConnectionLost(f"the connection broke: {_said(error)}") from error
        finally:
            self._building = None
            _close(channel)

    def _output(self, channel: paramiko.Channel, conversation: Conversation) -> Iterator[bytes]:
        """Yield what the other side writes, to its end."""
        conversation.listen()
        while True:
            channel.settimeout(min(_LISTEN, conversation.patience()))
            try:
                data = channel.recv(65536)
            except TimeoutError:
                if self._alive(channel):
                    continue
                data = b""
            if not data:
                raise_for_overrun(channel)
                # A server ends the output before the channel. And where the connection breaks, paramiko ends
                # the channels first, while it still says that it is alive.
                if channel.exit_status == -1 and not (channel.eof_received and self._alive(channel)):
                    raise ConnectionLost("the connection broke while the provider was building its index")
                return
            yield data

    def stop_build(self) -> None:
        """Have a running build stop, and end the connection. May be called from a signal's handler."""

        def stop() -> None:
            with suppress(*_BROKEN):
                # What has not been given its request yet ends with the connection.
                if building is not None and building[1].begun:
                    building[0].sendall(STOP)
                    building[0].status_event.wait(_STOPPING)

        building = self._building
        # A thread of its own, because the interrupted one may be holding a lock of paramiko's.
        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(_STOPPING)
        self.close()

    @staticmethod
    def _alive(channel: paramiko.Channel) -> bool:
        transport: Any = channel.get_transport()
        return bool(transport.is_active())


def _known_ciphers() -> tuple[str, ...]:
    return tuple(paramiko.Transport._preferred_ciphers)  # type: ignore[attr-defined]


@contextmanager
def _at_most(seconds: float, channel: paramiko.Channel) -> Iterator[None]:
    """Close the channel if what is asked of the server takes longer; paramiko itself would wait for ever."""
    timer = threading.Timer(seconds, _close, [channel])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _close(channel: paramiko.Channel) -> None:
    """Close a channel, of whose end the server need not hear any more."""
    with suppress(*_BROKEN):
        channel.close()


def _classified(where: str, error: paramiko.SSHException) -> AccessRefused | ConnectionLost:
    """Tell a refusal, which no retry heals, from a connection that broke on the way."""
    said = _said(error)
    # paramiko has the same type for a refused key as for a server that went away in the middle.
    broken = "timeout" in said.lower() or "EOF" in said
    if isinstance(error, paramiko.AuthenticationException) and not broken:
        return AccessRefused(
            f"{where}: the server refuses the account's key or password ({said}). Check login and key_file "
            "of the connection, the AuthorizedKeysFile on the server, and whether from= of the key there "
            "names this machine's address as the server sees it; the server's log says which."
        )
    if "known_hosts" in said:
        return AccessRefused(
            f"{where}: the host key is unknown. Pin it in the connection's extra host_key (ssh-keyscan shows "
            "it; compare it with the server's own), or add it to known_hosts."
        )
    if "private key" in said:
        return AccessRefused(f"{where}: the key is of no use: {said}")
    return ConnectionLost(f"{where}: {said}")


def _said(error: BaseException) -> str:
    """Return what an error says. A server's own words may be in it, so that nothing may act on a terminal."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is None and error.strerror:
        text = error.strerror  # paramiko's have no number, which would be told as None
    return to_text(text.encode("utf-8", "backslashreplace")) or type(error).__name__
