"""Connections by asyncssh, for code that waits as well as for code that does not.

::

    connect     logs in, and tells what went wrong: in words, and whether another try may help
    Connection  the same from any thread; asyncssh runs in one of its own
    Session     a command or subsystem on it, with the calls of a socket: what arrives waits until it is read

A server can fill no memory: what nobody reads is taken until the window that it was granted is used up, and a
connection ends where the server does not take our answers to what it sends.

What this does not give: a server may keep the processor busy with messages that mean nothing, until the
caller's patience ends.

Sources: RFC 4252 to 4254; asyncssh's documentation of sessions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any, TypeVar

import asyncssh
from asyncssh.constants import OPEN_REQUEST_SESSION_FAILED

from airflow_mdbackup.hooks.connection import CONNECT, SshAccount
from airflow_mdbackup.hooks.ssh_config import environment
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.transfer.sftp import WINDOW

_WINDOW = 2 * WINDOW  # more than a reader asks for, so that no line is too long
_UNREAD = WINDOW // 2  # bytes that wait here before no more of the window is granted
_UNSENT = 4 << 20  # bytes; whoever does not take so much of what we say has ill in mind
_PACKET = 256 << 10
_LAST_WORDS = 1.0  # seconds that a proxy gets to say what is wrong
_ENDING = 5.0  # seconds that a connection gets to end
_MAKING_ROOM = (0.05, 0.2, 1.0, 3.0)  # seconds
Result = TypeVar("Result")


class NoCommonAlgorithm(AccessRefused):
    """The server and asyncssh have no algorithm of some kind in common. The program ssh may have one."""


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
                start_new_session=True,  # so that all that the line starts can be ended
            )

    def last_words(self) -> str:
        """Return the last that it wrote for people, which it may be doing just now."""
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
    """What asyncssh reports of a connection.

    :ivar shown: the server's host key, if it is none of those that are trusted.
    :ivar proxy: what makes the connection, if that is a proxy. It ends with the connection.
    """

    shown: asyncssh.SSHKey | None = None
    proxy: Proxy | None = None
    is_connected = False

    def auth_completed(self) -> None:
        self.is_connected = True

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_connected and self.proxy is not None:
            self.proxy.end()

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.shown = key
        return False


class PatientConnection(asyncssh.SSHClientConnection):
    """One that works off what has arrived before it takes in that no more will.

    A server that has no algorithm in common with us says so, and hangs up at once.
    """

    def eof_received(self) -> None:
        """Leave it to ``connection_lost``, which follows a turn later."""


class _BoundedConnection(PatientConnection):
    def pause_writing(self) -> None:
        self._force_close(asyncssh.ProtocolError("the server does not take our answers to what it sends"))


class _BoundedClient(Client):
    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        conn.__class__ = _BoundedConnection  # asyncssh lets nobody choose it
        conn._transport.set_write_buffer_limits(_UNSENT)  # type: ignore[union-attr]


async def connect(account: SshAccount, client: type[Client]) -> asyncssh.SSHClientConnection:
    """Log in to an account.

    :param client: what asyncssh tells of the connection.
    :raises AccessRefused: the host key is not the expected one, or the account is refused.
    :raises ConnectionLost: the server cannot be reached, or does not answer.
    """
    where, told = account.where, client()
    try:
        told.proxy = Proxy(account) if account.proxy is not None else None
        return await asyncssh.connect(
            account.address,
            account.port,
            sock=told.proxy.socket if told.proxy is not None else None,
            username=account.user,
            config=None,
            client_factory=lambda: told,
            options=account.options,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        if account.host_keys.trusted and account.host_keys.authorities:
            # Its certificate is not good enough, but its key may be, as ssh has it, too.
            return await connect(account.without_authorities(), client)
        raise wrong_host_key(account, _shown(told, account) or said(error)) from error
    except asyncssh.PermissionDenied as error:
        raise refused(account, said(error)) from error
    except asyncssh.KeyExchangeFailed as error:
        raise NoCommonAlgorithm(
            f"{where}: the server and this side have no algorithm in common ({said(error)}). Have sshd_config"
            " of the server allow one of today's, or see the connection's extras ciphers and"
            " disabled_algorithms"
        ) from error
    except TimeoutError:
        seconds = account.options.connect_timeout
        raise ConnectionLost(f"{where}: the server does not let us in within {seconds} seconds") from None
    except socket.gaierror as error:
        raise ConnectionLost(f"{where}: the name {account.address} is not known: {error.strerror}") from error
    except (asyncssh.Error, OSError, EOFError) as error:
        if "Too many authentication failures" in said(error):
            raise refused(account, said(error)) from error
        words = await asyncio.to_thread(told.proxy.last_words) if told.proxy is not None else ""
        raise lost(account, words or f"{said(error)}{_hint(error)}") from error
    finally:
        if not told.is_connected and told.proxy is not None:
            told.proxy.end()


def last_lines(output: bytes) -> str:
    """Return the last that a program wrote for people, as printable text."""
    lines = [to_text(words) for line in output.splitlines() if (words := line.strip(b" @"))]
    return " / ".join(lines[-2:])[-2000:]


def lost(account: SshAccount, why: str) -> AccessRefused | ConnectionLost:
    """Return what a connection that does not come about is reported as: final, if a jump host refuses us."""
    if account.jumps and ("Permission denied" in why or "Host key verification failed" in why):
        return AccessRefused(
            f"{account.where}: the jump host does not let us through ({why}). It is reached by ~/.ssh/config"
            " alone: see its Host there (User, IdentityFile) and known_hosts, and what plain ssh to it says"
        )
    return ConnectionLost(f"{account.where}: {why}")


def _hint(error: Exception) -> str:
    """Return what may be the cause where a server does not say, and what to do."""
    if "timeout" in said(error).lower():
        return (
            f": something accepts the connection there, and does not log us in within {CONNECT} seconds. Is"
            " that an SSH port?"
        )
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError | EOFError):
        return (
            ": the server closed the connection before we were logged in. Is that an SSH port? If so, it may"
            " refuse this address for now: see its log, MaxStartups and PerSourcePenalties of sshd, fail2ban,"
            " and firewalls on the way"
        )
    return ""


def _shown(told: Client, account: SshAccount) -> str:
    """Return which host key a server has, and which ones it may have; nothing if that is not the matter."""
    if told.shown is None:
        return ""
    trusted = " or ".join(key.get_fingerprint() for key in account.host_keys.trusted[:3])
    expected = trusted or "one that its authority signed"
    return f"it has {told.shown.get_fingerprint()}, expected was {expected}"


def wrong_host_key(account: SshAccount, why: str) -> AccessRefused:
    """Return what is reported of a server that has none of the host keys that it may have."""
    return AccessRefused(
        f"{account.where}: the server's host key is not the expected one ({why}). Somebody may be in"
        " between. If the server really has a new key, pin that in the connection's extra host_key"
        " (ssh-keyscan shows it; compare it with the server's own), or correct known_hosts"
    )


def refused(account: SshAccount, why: str) -> AccessRefused:
    """Return what a server's refusal of an account is told as."""
    return AccessRefused(
        f"{account.where}: the server refuses the account's {'key' if account.keys else 'password'} ({why})."
        " Check login and key_file of the connection, the AuthorizedKeysFile on the server, and whether from="
        " of the key there names this machine's address as the server sees it; the server's log says which"
    )


def ended_here(account: SshAccount) -> ConnectionLost:
    """Return what is told to whoever waits for a connection that has been closed."""
    return ConnectionLost(f"{account.where}: the connection was ended on this side")


def said(error: BaseException) -> str:
    """Return what an error says. A server's own words may be in it, so that nothing may act on a terminal."""
    return to_text(str(error).encode("utf-8", "backslashreplace")) or type(error).__name__


class Connection:
    """A connection to an account, to be used by any thread. It is there once :meth:`connect` returns."""

    def __init__(self, account: SshAccount) -> None:
        self.account = account
        self._connection: asyncssh.SSHClientConnection | None = None
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"ssh to {account.host}", daemon=True)
        self._thread.start()

    def connect(self) -> None:
        """Log in. :meth:`close` ends the attempt, too.

        :raises AccessRefused, ConnectionLost: see :func:`connect`.
        """
        try:
            connecting = connect(self.account, _BoundedClient)  # which has its own limit
            self._connection = self.do(connecting, self.account.patience + 3 * CONNECT)
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._ended.wait())
            self._loop.run_until_complete(self._end_attempts())
        finally:
            self._loop.close()

    async def _end_attempts(self) -> None:
        """End what goes on here, such as a login, which ends its proxy, and wait a while until it has."""
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_ENDING)

    def do(self, what: Coroutine[Any, Any, Result], seconds: float = 3 * CONNECT) -> Result:
        """Return what a coroutine comes to on the connection's loop.

        :raises ConnectionLost: it takes too long, or the connection has been closed.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(what, self._loop)
        except RuntimeError:  # the loop is closed
            what.close()
            raise ended_here(self.account) from None
        try:
            return future.result(seconds)
        except CancelledError:
            raise ended_here(self.account) from None
        except TimeoutError:
            future.cancel()
            raise ConnectionLost(f"{self.account.where}: the server does not answer") from None

    @property
    def alive(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    def session(self, timeout: float, *, command: str | None = None, subsystem: str | None = None) -> Session:
        """Start a command, or a subsystem.

        :param timeout: seconds that a call of the session may wait.
        :raises NotOnProvider: the server does not start it.
        :raises ConnectionLost: the connection broke.
        """
        session = Session(timeout)
        connection = self._connection
        assert connection is not None

        def open_it() -> Coroutine[Any, Any, Any]:
            return connection.create_session(
                lambda: session.events,
                command,
                subsystem=subsystem,
                encoding=None,
                window=_WINDOW,
                max_pktsize=_PACKET,
            )

        try:
            self.do(_within(open_session(open_it)))
        except asyncssh.ChannelOpenError as error:
            if not self.alive:
                raise ConnectionLost(f"{self.account.where}: {said(error)}") from error
            what = f"subsystem {subsystem!r}" if subsystem else "command"
            raise NotOnProvider(
                f"{self.account.where}: the server does not start the {what} ({said(error)})"
            ) from error
        except (asyncssh.Error, OSError) as error:
            raise ConnectionLost(f"{self.account.where}: {said(error)}") from error
        return session

    def close(self) -> None:
        """End the connection, and what waits on it. May be called again, and from another thread."""

        def end() -> None:
            if self._connection is not None:
                self._connection.abort()
            self._ended.set()

        with suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(end)


async def open_session(open_it: Callable[[], Awaitable[Result]]) -> Result:
    """Open a session; where the server has no room for one yet, because an earlier one is just ending, again.

    It may allow only one at a time (``MaxSessions`` of sshd), which has not ended for it when it has for us.
    """
    for pause in _MAKING_ROOM:
        try:
            return await open_it()
        except asyncssh.ChannelOpenError as error:
            if error.code == OPEN_REQUEST_SESSION_FAILED:  # there was room, but not for such a command
                raise
            await asyncio.sleep(pause)
    return await open_it()


async def _within(what: Coroutine[Any, Any, Result]) -> Result:
    async with asyncio.timeout(CONNECT):
        return await what


class _Events(asyncssh.SSHClientSession[bytes]):
    """What asyncssh tells of a session, in its own thread."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def connection_made(self, chan: Any) -> None:
        self._session.opened(asyncio.get_running_loop(), chan)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._session.take(data)

    def eof_received(self) -> bool:
        self._session.end("")
        return True

    def exit_status_received(self, status: int) -> None:
        self._session.exit_status = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        self._session.was_killed = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._session.end(said(exc) if exc is not None else "")
        self._session.closed.set()


class Session:
    """A command or subsystem that runs on a server. One thread at a time reads, and one sends.

    Its standard error is its output, too.

    :ivar exit_status: of the command, once the server has told it.
    :ivar was_killed: whether the server has told that a signal ended the command.
    :ivar closed: set once the server has ended the channel.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout: float | None = timeout
        self.events = _Events(self)
        self.exit_status: int | None = None
        self.was_killed = False
        self.closed = threading.Event()
        self._arrived: deque[bytes] = deque()
        self._size = 0
        self._is_paused = False
        self._ended: str | None = None  # why; empty if the server has sent all
        self._changed = threading.Condition()

    def opened(self, loop: asyncio.AbstractEventLoop, channel: Any) -> None:
        """Take the channel that this session is."""
        self._loop, self._channel = loop, channel

    def take(self, data: bytes) -> None:
        """Take in what has arrived; in asyncssh's thread."""
        with self._changed:
            self._arrived.append(data)
            self._size += len(data)
            self._changed.notify()
            if self._size > _UNREAD:
                self._channel.pause_reading()
                self._is_paused = True

    def end(self, why: str) -> None:
        """Note that nothing more comes; in asyncssh's thread."""
        with self._changed:
            if self._ended is None:
                self._ended = why
            self._changed.notify()

    def sendall(self, data: bytes) -> None:
        """Send data. They wait here until the server takes them, which no call waits for.

        What has ended by itself needs them no more; :meth:`recv` tells.
        """
        if self._ended:
            raise EOFError(self._ended)
        try:
            self._loop.call_soon_threadsafe(self._write, bytes(data))
        except RuntimeError:
            raise EOFError("the connection was ended on this side") from None

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # it has just been closed, and recv says why
            self._channel.write(data)

    def recv(self, size: int) -> bytes:
        """Return what has arrived, at most ``size`` bytes; nothing once all has come.

        :raises TimeoutError: nothing came in time.
        :raises EOFError: the connection broke.
        """
        with self._changed:
            while not self._arrived:
                if self._ended:
                    raise EOFError(self._ended)
                if self._ended is not None:
                    return b""
                if not self._changed.wait(self.timeout):
                    raise TimeoutError("timed out")
            data = self._arrived.popleft()
            parts, room = [data], size - len(data)
            while room > 0 and self._arrived:
                parts.append(self._arrived.popleft())
                room -= len(parts[-1])
            if room < 0:
                self._arrived.appendleft(parts[-1][room:])
                parts[-1] = parts[-1][:room]
            data = b"".join(parts) if len(parts) > 1 else parts[0]
            self._size -= len(data)
            if self._is_paused and self._size <= _UNREAD // 2:
                self._is_paused = False
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._channel.resume_reading)
            return data

    def settimeout(self, seconds: float | None) -> None:
        """Have a call wait no longer than so."""
        self.timeout = seconds

    def wait(self, seconds: float) -> int | None:
        """Wait at most so many seconds until the server has ended it, and return its exit status, if told."""
        self.closed.wait(seconds)
        return self.exit_status

    def close(self) -> None:
        """End it; :meth:`wait` tells when the server has, too."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._channel.close)
