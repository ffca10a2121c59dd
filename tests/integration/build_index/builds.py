"""How tests build an index, from a worker and from a triggerer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from airflow_mdbackup.hooks.provider import IndexHook
from airflow_mdbackup.provider_side.programs import python_program
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger
from demo.sshd import ProviderServer
from tests.waiting import until

SetConnection = Callable[[str, dict[str, Any]], None]
SLOW = 1 << 20  # bytes per second
DONE = "mdbackup done files=1 bytes=1 hashed=1 unreadable=0 rotten=0 seconds=1.0"


def request(server: ProviderServer, **options: Any) -> IndexRequest:
    prefix = os.fsencode(server.prefix)
    return IndexRequest(
        os.fsencode(server.chroot), (prefix + b"/backups",), prefix + b"/.mdbackup/index.md5", **options
    )


def index(server: ProviderServer) -> Path:
    return server.tree / ".mdbackup" / "index.md5"


def make_slow(server: ProviderServer) -> None:
    """Give the provider a file that takes six seconds to hash at the rate of `SLOW`."""
    (server.tree / "backups" / "big").write_bytes(os.urandom(6 * SLOW))


def build(request: IndexRequest) -> Done:
    with IndexHook("index") as hook:
        return hook.build_index(request)


@contextmanager
def building(server: ProviderServer, request: IndexRequest) -> Iterator[tuple[IndexHook, Any]]:
    """A build that has begun, in a thread: its hook, and the future result."""
    with ThreadPoolExecutor(1) as pool, IndexHook("index") as hook:
        future = pool.submit(hook.build_index, request)
        until(lambda: (hook._building and hook._building[1].started and running(server)) or future.done())
        yield hook, future


def break_off(hook: IndexHook) -> None:
    """Break a hook's connection, as a network does."""
    hook.connected()._connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def running(server: ProviderServer) -> list[int]:
    """Return the processes of the index account that are indexers."""
    found = []
    for pid in server.processes():
        process = Path(f"/proc/{pid}")
        try:
            command = (process / "cmdline").read_bytes()
            if process.stat().st_uid == index(server).parent.stat().st_uid and b"python3" in command:
                found.append(pid)
        except OSError:
            pass
    return found


def install(server: ProviderServer, **options: Any) -> None:
    """Install the indexer on the provider as provision does, and force it on the index account's key."""
    folder = server.tree / "installed"
    folder.mkdir()
    (folder / "indexer.py").write_bytes(python_program())
    configuration = json.loads(request_line(request(server, **options)))
    del configuration["id"]
    (folder / "web.json").write_text(json.dumps(configuration))
    (folder / "web.json").chmod(0o644)
    where = f"{server.chroot.rstrip('/')}{server.prefix}/installed"
    server.force_index_command(f"/usr/bin/python3 -I {where}/indexer.py --serve --config {where}/web.json")


async def fire(trigger: BuildProviderIndexTrigger) -> dict[str, Any]:
    """Run a trigger as a triggerer does, and return what its one event carries."""
    try:
        events = [event async for event in trigger.run()]
    finally:
        await trigger.cleanup()
    (event,) = events
    assert isinstance(event.payload, dict)
    return event.payload


def trigger(request: IndexRequest) -> BuildProviderIndexTrigger:
    """Return a trigger as it is after a journey through the database."""
    _, values = BuildProviderIndexTrigger("index", request_line(request).decode()).serialize()
    return BuildProviderIndexTrigger(**values)


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Processes that do nothing for a while."""
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def fire_within(trigger: BuildProviderIndexTrigger, seconds: float) -> dict[str, Any]:
    return await asyncio.wait_for(fire(trigger), seconds)
