"""Waits, without a worker's slot, until a provider has built its index."""

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

from airflow_mdbackup.hooks.failures import NoCommonAlgorithm, said
from airflow_mdbackup.hooks.provider import IndexHookAsync
from airflow_mdbackup.hooks.session import open_session
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.provider_side.programs import STOP
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import read_request
from airflow_mdbackup.scheme.errors import BackupError, ConnectionLost
from airflow_mdbackup.triggers import bounded

_CONNECT = 60.0  # seconds for connection and login
_LOST = (ConnectionLost, asyncssh.Error, OSError, EOFError)
_TRIES = 6  # connections in a row that come to nothing: ...
_LASTING = 300.0  # ... no further than those before, and broken before so many seconds
_STOPPING = 10.0  # seconds that a build gets to stop
_BLOCK = 16384  # bytes of output to look at before other triggers get their turn
# Seconds before which no event is fired. Where a scheduler hears of the event before it hears that the task
# was deferred, it fails that: "finished with state success, but the task instance's state ... is queued".
_SOONEST = 5.0
_pause = asyncio.sleep

Result = TypeVar("Result")


class BuildProviderIndexTrigger(BaseTrigger):
    """Have the provider build its index, and fire once with what became of it.

    The event's payload has ``done``, the fields of a :class:`.Done`, and ``ended``, when that came, in Unix
    seconds; or ``error`` and ``message``, the class and the text of a :class:`.BackupError`; or ``no_way``,
    why asyncssh has none to this server: the task may have one, by the program ``ssh``. A lost
    connection does not stop the build: the trigger connects again and joins it, as does the same trigger in a
    triggerer that was started anew. When a person ends the task, the build is stopped.

    Host keys are verified: by the connection's extra ``host_key``, else by ``known_hosts`` of the triggerer.

    :param ssh_conn_id: connection of the index account.
    :param request: what to index, as :func:`.request_line` gives it.
    """

    def __init__(self, ssh_conn_id: str, request: str) -> None:
        super().__init__()
        self.ssh_conn_id = ssh_conn_id
        self.request = request
        self._where = f"connection {ssh_conn_id}"
        self._connection: asyncssh.SSHClientConnection | None = None
        self._running: tuple[asyncssh.SSHClientProcess[bytes], Conversation] | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what is needed to make this trigger again, in another process."""
        kind = type(self)
        values = {"ssh_conn_id": self.ssh_conn_id, "request": self.request}
        return f"{kind.__module__}.{kind.__qualname__}", values

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event."""
        clock = asyncio.get_running_loop().time
        began = clock()
        event: dict[str, Any]
        try:
            done = await self._build()
        except NoCommonAlgorithm as error:
            event = {"no_way": str(error)}
        except BackupError as error:
            # The task looks for it among those, whatever hooks make of it.
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == BackupError.__module__)
            event = {"error": kind.__name__, "message": str(error)}
        else:
            event = {"done": asdict(done), "ended": time.time()}
        if (early := began + _SOONEST - clock()) > 0:
            await _pause(early)
        yield TriggerEvent(event)

    async def on_kill(self) -> None:
        """Stop the build, because a person has ended the task."""
        async with asyncio.timeout(_STOPPING):
            if self._running is None:
                # It may be between two connections; the same request joins its build, and can so stop it.
                await self._connect()
                await self._converse(self._conversation(), stop=True)
                return
            process, conversation = self._running
            if conversation.started:  # else it ends with the connection
                _send(process, STOP)
                await process.wait_closed()

    async def cleanup(self) -> None:
        """End the connection. Not before, because :meth:`on_kill` has a use for it."""
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
            except _LOST as broken:
                error = bounded.overrun_of(self._connection) or broken
                await self.cleanup()
                lasted = conversation.started and clock() - began >= _LASTING
                tries = 1 if lasted or conversation.progress > reached else tries + 1
                reached = max(reached, conversation.progress)
                why = said(error)
                if tries >= _TRIES and isinstance(error, ConnectionLost):
                    raise
                if tries >= _TRIES:
                    raise ConnectionLost(f"{self._where}: {why}") from error
                pause = random.uniform(1, 2) * 2**tries  # noqa: S311 - so that not all come back at once
                self.log.warning("The connection broke (%s); again in %.0f s, to join the build", why, pause)
                await _pause(pause)

    def _conversation(self) -> Conversation:
        return Conversation(read_request(self.request), self._where, self.log)

    async def _connect(self) -> None:
        """Connect with the index account.

        :raises AccessRefused: the host key is not the expected one, or the account is refused.
        :raises ConnectionLost: the server cannot be reached.
        """
        self._connection = await IndexHookAsync(self.ssh_conn_id).get_conn()

    async def _converse(self, conversation: Conversation, *, stop: bool = False) -> int | None:
        """Run the command of a conversation to its end, and return its exit status, if the server tells.

        :param stop: have the build stop as soon as it knows which it is.
        :raises ConnectionLost: nothing there answers as an indexer does, or not any more.
        """
        assert self._connection is not None
        create = self._connection.create_process
        opening = open_session(lambda: create(conversation.command, stderr=asyncssh.STDOUT, encoding=None))
        process = await _within(opening, f"{self._where}: the server opens no session")
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
            # What has arrived already is read without waiting, and all triggers share this loop.
            await asyncio.sleep(0)
        # Its output has ended; a server that then tells no status has none to tell.
        with suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT):
                await process.wait_closed()
        process.close()
        if process.exit_status is None and process.exit_signal is None and self._connection.is_closed():
            raise ConnectionLost(f"{self._where}: it broke while the provider was building its index")
        return process.exit_status


def _send(process: asyncssh.SSHClientProcess[bytes], data: bytes) -> None:
    """Send data, if there are any; a command that has ended needs them no more, and its output says why."""
    with suppress(BrokenPipeError):
        process.stdin.write(data)


async def _within(what: Awaitable[Result], otherwise: str) -> Result:
    """Return what is awaited, or raise ConnectionLost, saying the other words, if that takes too long."""
    try:
        async with asyncio.timeout(_CONNECT):
            return await what
    except TimeoutError:
        raise ConnectionLost(f"{otherwise}, for {_CONNECT:.0f} seconds") from None
