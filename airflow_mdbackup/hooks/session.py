"""Connections over asyncssh for blocking callers.

::

    Connection  a login, for any thread; asyncssh runs in a thread of its own
    Session     a command or subsystem, with the methods of a socket; what arrives is buffered

A server cannot fill the memory: what is not read is buffered only up to the window that was granted, and a
connection ends when the server does not accept our replies.

Limitations: a server may keep the processor busy with meaningless messages until the caller's timeout.

Sources: RFC 4252 to 4254; asyncssh's documentation of sessions.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, TypeVar

import asyncssh
from asyncssh.constants import OPEN_REQUEST_SESSION_FAILED

from airflow_mdbackup.hooks.connection import CONNECT, SshAccount
from airflow_mdbackup.hooks.failures import ended_here, message_of
from airflow_mdbackup.hooks.login import Client, PatientConnection, connect
from airflow_mdbackup.scheme.errors import ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.transfer.sftp import WINDOW

_WINDOW = 2 * WINDOW  # bytes; more than a reader ever requests, so that any round trip can be filled
_UNREAD = WINDOW // 2  # bytes buffered before no more of the window is granted
_UNSENT = 4 << 20  # bytes; a server that accepts less of our replies is hostile
_PACKET = 256 << 10
_ENDING = 5.0  # seconds for a connection to end
_RETRY_SESSION = (0.05, 0.2, 1.0, 3.0, 10.0)  # seconds
Result = TypeVar("Result")


class _BoundedConnection(PatientConnection):
    def pause_writing(self) -> None:
        self._force_close(asyncssh.ProtocolError("the server does not accept our replies"))


class _BoundedClient(Client):
    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        conn.__class__ = _BoundedConnection  # asyncssh has no option for it
        conn._transport.set_write_buffer_limits(_UNSENT)  # type: ignore[union-attr]


class Connection:
    """A connection to an account, for use by any thread once :meth:`connect` has returned."""

    def __init__(self, account: SshAccount) -> None:
        self.account = account
        self._connection: asyncssh.SSHClientConnection | None = None
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"ssh to {account.host}", daemon=True)
        self._thread.start()

    def connect(self) -> None:
        """Log in. :meth:`close` cancels it.

        :raises AccessRefused, ConnectionLost: see :func:`connect`.
        """
        try:
            connecting = connect(self.account, _BoundedClient)  # which has a timeout of its own
            self._connection = self.do(connecting, self.account.connect_timeout + 3 * CONNECT)
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
        """Cancel what is still running, such as a login, and give it a moment to end its proxy."""
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_ENDING)

    def do(self, coroutine: Coroutine[Any, Any, Result], seconds: float = 3 * CONNECT) -> Result:
        """Run a coroutine on the connection's event loop, and return its result.

        :raises ConnectionLost: it takes too long, or the connection has been closed.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
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
                raise ConnectionLost(f"{self.account.where}: {message_of(error)}") from error
            what = f"subsystem {subsystem!r}" if subsystem else "command"
            raise NotOnProvider(
                f"{self.account.where}: the server does not start the {what} ({message_of(error)})"
            ) from error
        except (asyncssh.Error, OSError) as error:
            raise ConnectionLost(f"{self.account.where}: {message_of(error)}") from error
        return session

    def close(self) -> None:
        """End the connection and all that waits on it. May be called again, and from any thread."""

        def end() -> None:
            if self._connection is not None:
                self._connection.abort()
            self._ended.set()

        with suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(end)


async def open_session(open_it: Callable[[], Awaitable[Result]]) -> Result:
    """Open a session. Retry while the server allows no further one, since an earlier one is still ending.

    It may allow only one at a time (``MaxSessions`` of sshd).
    """
    for pause in _RETRY_SESSION:
        try:
            return await open_it()
        except asyncssh.ChannelOpenError as error:
            if error.code == OPEN_REQUEST_SESSION_FAILED:  # another one is allowed, but not this command
                raise
            await asyncio.sleep(pause)
    return await open_it()


async def _within(coroutine: Coroutine[Any, Any, Result]) -> Result:
    async with asyncio.timeout(CONNECT):
        return await coroutine


class _Events(asyncssh.SSHClientSession[bytes]):
    """Receives asyncssh's events of a session, in its thread."""

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
        self._session.end(message_of(exc) if exc is not None else "")
        self._session.closed.set()


class Session:
    """A command or subsystem that runs on a server. One thread at a time may read, and one may send.

    Its output includes its standard error.

    :ivar exit_status: of the command, once the server has reported it.
    :ivar was_killed: whether the server has reported that a signal ended the command.
    :ivar closed: set once the server has closed the channel.
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
        self._ended: str | None = None  # why; empty after the server's end of file
        self._changed = threading.Condition()

    def opened(self, loop: asyncio.AbstractEventLoop, channel: Any) -> None:
        """Store the channel; in asyncssh's thread."""
        self._loop, self._channel = loop, channel

    def take(self, data: bytes) -> None:
        """Buffer what has arrived; in asyncssh's thread."""
        with self._changed:
            self._arrived.append(data)
            self._size += len(data)
            self._changed.notify()
            if self._size > _UNREAD:
                self._channel.pause_reading()
                self._is_paused = True

    def end(self, why: str) -> None:
        """Note that nothing more will arrive; in asyncssh's thread."""
        with self._changed:
            if self._ended is None:
                self._ended = why
            self._changed.notify()

    def sendall(self, data: bytes) -> None:
        """Send data, without waiting until the server accepts it.

        After a regular end of the session it is dropped; :meth:`recv` then returns nothing.
        """
        if self._ended:
            raise EOFError(self._ended)
        try:
            self._loop.call_soon_threadsafe(self._write, bytes(data))
        except RuntimeError:
            raise EOFError("the connection was closed on this side") from None

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # it has just been closed; recv reports why
            self._channel.write(data)

    def recv(self, size: int) -> bytes:
        """Return what has arrived, at most ``size`` bytes; empty at the end.

        :raises TimeoutError: nothing arrived in time.
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
        """Set how long a call may wait."""
        self.timeout = seconds

    def wait(self, seconds: float) -> int | None:
        """Wait until the server has closed it, and return its exit status; None if there is none."""
        self.closed.wait(seconds)
        return self.exit_status

    def close(self) -> None:
        """Close it; :meth:`wait` waits until the server has closed it, too."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._channel.close)
