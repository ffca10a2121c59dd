"""Logging in over asyncssh: through a proxy if need be, and with a precise error if it fails.

Sources: RFC 4252, RFC 4253; asyncssh's documentation of connections.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from contextlib import suppress
from tempfile import TemporaryFile

import asyncssh

from airflow_mdbackup.hooks.connection import SshAccount
from airflow_mdbackup.hooks.failures import (
    NoCommonAlgorithm,
    hint,
    last_lines,
    lost,
    message_of,
    mismatch,
    refused,
    wrong_host_key,
)
from airflow_mdbackup.hooks.ssh_config import environment
from airflow_mdbackup.scheme.errors import BackupError, ConnectionLost

_LAST_WORDS = 1.0  # seconds for a proxy to report what is wrong


class Proxy:
    """A running ``ProxyCommand``, whose input and output are a socket.

    :raises OSError: it cannot be started.
    """

    def __init__(self, account: SshAccount) -> None:
        self._words = TemporaryFile()  # noqa: SIM115 - until it ends
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                account.proxy_command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._words.fileno(),
                env=environment(),
                start_new_session=True,  # so that everything it starts can be ended
            )

    def last_words(self) -> str:
        """Return its last error messages, which may still be on their way."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS)
        self._words.seek(0)
        return last_lines(self._words.read())

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.socket.close()
        self._words.close()


class Client(asyncssh.SSHClient):
    """What asyncssh reports about a connection.

    :ivar untrusted_key: the server's host key, if it is not a trusted one.
    :ivar proxy: the proxy that makes the connection, if any. It ends with the connection.
    """

    untrusted_key: asyncssh.SSHKey | None = None
    proxy: Proxy | None = None
    is_connected = False

    def auth_completed(self) -> None:
        self.is_connected = True

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_connected and self.proxy is not None:
            self.proxy.end()

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.untrusted_key = key
        return False


class PatientConnection(asyncssh.SSHClientConnection):
    """A connection that handles what has arrived before it handles the end of the stream.

    A server that has no algorithm in common with us says so and hangs up at once.
    """

    def eof_received(self) -> None:
        """Leave it to ``connection_lost``, which follows a turn later."""


async def connect(account: SshAccount, client: type[Client]) -> asyncssh.SSHClientConnection:
    """Log in to an account.

    :param client: receives asyncssh's events.
    :raises AccessRefused: the host key is not the expected one, or the login is refused.
    :raises ConnectionLost: the server cannot be reached, or does not answer.
    """
    events = client()
    try:
        events.proxy = Proxy(account) if account.proxy is not None else None
        return await asyncssh.connect(
            account.address,
            account.port,
            sock=events.proxy.socket if events.proxy is not None else None,
            username=account.user,
            config=None,
            client_factory=lambda: events,
            options=account.options,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        if account.host_keys.trusted and account.host_keys.authorities:
            # Its certificate is not accepted, but its key may be, as with ssh.
            return await connect(account.without_authorities(), client)
        key = events.untrusted_key
        why = mismatch(account, key.get_fingerprint()) if key is not None else message_of(error)
        raise wrong_host_key(account, why) from error
    except (asyncssh.Error, OSError, EOFError) as error:
        if failure := _known_failure(account, error):
            raise failure from error
        # Off the loop, since a proxy's last words may take a moment.
        words = await asyncio.to_thread(events.proxy.last_words) if events.proxy is not None else ""
        raise lost(account, words or f"{message_of(error)}{hint(error)}") from error
    finally:
        if not events.is_connected and events.proxy is not None:
            events.proxy.end()


def _known_failure(account: SshAccount, error: Exception) -> BackupError | None:
    """Return our error for one of asyncssh's whose cause is known."""
    where = account.where
    if isinstance(error, asyncssh.PermissionDenied) or "Too many authentication failures" in message_of(
        error
    ):
        return refused(account, message_of(error))
    if isinstance(error, asyncssh.KeyExchangeFailed):
        return NoCommonAlgorithm(
            f"{where}: the server and this side have no algorithm in common ({message_of(error)}). Allow a"
            " current one in the server's sshd_config, or see the connection's extras ciphers and"
            " disabled_algorithms"
        )
    if isinstance(error, TimeoutError):
        return ConnectionLost(f"{where}: no login within {account.options.connect_timeout} seconds")
    if isinstance(error, socket.gaierror):
        return ConnectionLost(f"{where}: cannot resolve the name {account.address}: {error.strerror}")
    return None
