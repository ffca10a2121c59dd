"""Wait for a provider to build its index, without occupying a worker slot."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

import asyncssh
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mdbackup.hooks.failures import NoCommonAlgorithm, message_of
from airflow_mdbackup.hooks.provider import IndexHookAsync
from airflow_mdbackup.hooks.session import open_session
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.provider_side.programs import STOP
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import read_request
from airflow_mdbackup.scheme.errors import BackupError, ConnectionLost
from airflow_mdbackup.triggers import bounded

_CONNECT = 60.0  # seconds for connection and login
_CONNECTION_ERRORS = (ConnectionLost, asyncssh.Error, OSError, EOFError)
# Give up after so many connections in a row that made no progress, and each broke within so many seconds.
_TRIES = 6
_STABLE = 300.0
_STOPPING = 10.0  # seconds for a build to stop
_BLOCK = 16384  # bytes of output to process before other triggers get their turn
# Seconds before which no event is fired. If a scheduler receives the event before it knows that the task was
# deferred, it fails the task: "finished with state success, but the task instance's state ... is queued".
_EARLIEST_EVENT = 5.0
_pause = asyncio.sleep

Result = TypeVar("Result")


class BuildProviderIndexTrigger(BaseTrigger):
    """Have the provider build its index, and fire one event with the result.

    The event's payload has either ``done``, the fields of a :class:`.Done`, and ``ended``, when it arrived,
    in Unix seconds; or ``error`` and ``message``, the class and text of a :class:`.BackupError`; or
    ``no_way``, why asyncssh cannot connect to this server although the program ``ssh`` may, in the task.

    A lost connection does not stop the build: the trigger connects again and joins it, and so does the same
    trigger after a restart of the triggerer. Killing the task stops the build.

    Host keys are verified: by the connection's extra ``host_key``, else by ``known_hosts`` of the triggerer.

    :param ssh_conn_id: connection of the index account.
    :param request: what to index, as returned by :func:`.request_line`.
    """

    def __init__(self, ssh_conn_id: str, request: str) -> None:
        super().__init__()
        self.ssh_conn_id = ssh_conn_id
        self.request = request
        self._where = f"connection {ssh_conn_id}"
        self._connection: asyncssh.SSHClientConnection | None = None
        self._running: tuple[asyncssh.SSHClientProcess[bytes], Conversation] | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what another process needs to create this trigger again."""
        kind = type(self)
        values = {"ssh_conn_id": self.ssh_conn_id, "request": self.request}
        return f"{kind.__module__}.{kind.__qualname__}", values

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the event."""
        clock = asyncio.get_running_loop().time
        began = clock()
        event: dict[str, Any]
        try:
            done = await self._build()
        except NoCommonAlgorithm as error:
            event = {"no_way": str(error)}
        except BackupError as error:
            # The class from scheme.errors, since the task looks it up there; hooks raise subclasses.
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == BackupError.__module__)
            event = {"error": kind.__name__, "message": str(error)}
        else:
            event = {"done": asdict(done), "ended": time.time()}
        if (early := began + _EARLIEST_EVENT - clock()) > 0:
            await _pause(early)
        yield TriggerEvent(event)

    async def on_kill(self) -> None:
        """Stop the build, because the task was killed."""
        async with asyncio.timeout(_STOPPING):
            if self._running is None:
                # It may be between two connections. The same request joins the build, and can then stop it.
                await self._connect()
                await self._converse(self._conversation(), stop=True)
                return
            process, conversation = self._running
            if conversation.started:  # otherwise it ends with the connection
                _send(process, STOP)
                await process.wait_closed()

    async def cleanup(self) -> None:
        """End the connection. :meth:`on_kill` still needs it before."""
        self._running = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- building -----------------------------------------------------------------------------------

    async def _build(self) -> Done:
        tries = 0
        reached = (0, 0)
        clock = asyncio.get_running_loop().time
        while True:
            conversation = self._conversation()
            began = clock()
            try:
                await self._connect()
                while not conversation.is_over(await self._converse(conversation)):
                    pass
                return conversation.result()
            except _CONNECTION_ERRORS as broken:
                error = bounded.overrun_of(self._connection) or broken
                await self.cleanup()
                was_stable = conversation.started and clock() - began >= _STABLE
                tries = 1 if was_stable or conversation.progress > reached else tries + 1
                reached = max(reached, conversation.progress)
                why = message_of(error)
                if tries >= _TRIES and isinstance(error, ConnectionLost):
                    raise
                if tries >= _TRIES:
                    raise ConnectionLost(f"{self._where}: {why}") from error
                pause = random.uniform(1, 2) * 2**tries  # noqa: S311 - so that not all reconnect at once
                self.log.warning(
                    "The connection broke (%s); reconnecting in %.0f s to join the build", why, pause
                )
                await _pause(pause)

    def _conversation(self) -> Conversation:
        return Conversation(read_request(self.request), self._where, self.log)

    async def _connect(self) -> None:
        """Connect to the index account.

        :raises AccessRefused: the host key is not the expected one, or the login is refused.
        :raises ConnectionLost: the server cannot be reached.
        """
        self._connection = await IndexHookAsync(self.ssh_conn_id).get_conn()

    async def _converse(self, conversation: Conversation, *, stop: bool = False) -> int | None:
        """Run the command of a conversation, and return its exit status; None if the server reports none.

        :param stop: stop the build as soon as it is joined.
        :raises ConnectionLost: no indexer answers, or it has stopped answering.
        """
        assert self._connection is not None
        create = self._connection.create_process
        opening = open_session(lambda: create(conversation.command, stderr=asyncssh.STDOUT, encoding=None))
        process = await _within(opening, f"{self._where}: the server does not open a session")
        self._running = process, conversation
        _send(process, conversation.opening)
        conversation.restart_timer()
        while True:
            try:
                async with asyncio.timeout(conversation.seconds_left()):
                    data = await process.stdout.read(_BLOCK)
            except TimeoutError:
                continue
            if not data:
                break
            _send(process, conversation.receive(data))
            if stop and conversation.started:
                _send(process, STOP)
            # Reading buffered output does not yield to the other triggers on this loop.
            await asyncio.sleep(0)
        # Its output has ended, and the exit status follows at once if the server reports one.
        with suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT):
                await process.wait_closed()
        process.close()
        if process.exit_status is None and process.exit_signal is None and self._connection.is_closed():
            raise ConnectionLost(
                f"{self._where}: the connection broke while the provider was building its index"
            )
        return process.exit_status


def _send(process: asyncssh.SSHClientProcess[bytes], data: bytes) -> None:
    """Send data. If the command has already ended, its output says why."""
    with suppress(BrokenPipeError):
        process.stdin.write(data)


async def _within(awaitable: Awaitable[Result], message: str) -> Result:
    """Return the result, or raise ConnectionLost with the message if that takes too long."""
    try:
        async with asyncio.timeout(_CONNECT):
            return await awaitable
    except TimeoutError:
        raise ConnectionLost(f"{message} within {_CONNECT:.0f} seconds") from None
