"""BuildProviderIndex against a real SSH server, in a triggerer."""

from __future__ import annotations

import asyncio
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred

from airflow_mdbackup.hooks.session import open_session
from airflow_mdbackup.operators import BuildProviderIndex
from airflow_mdbackup.scheme.errors import AccessRefused
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger
from demo.sshd import ProviderServer
from tests.integration.build_index.builds import (
    SLOW,
    SetConnection,
    fire,
    index,
    make_slow,
    request,
    running,
    stopped,
    trigger,
)
from tests.integration.conftest import SOONEST
from tests.waiting import until


def test_a_trigger_fires_no_sooner_than_a_scheduler_knows_of_the_deferral(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast the build is, or fails."""
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    module = BuildProviderIndexTrigger.__module__
    monkeypatch.setattr(f"{module}._EARLIEST_EVENT", 1000.0)
    monkeypatch.setattr(f"{module}._pause", pause)
    assert SOONEST >= 5
    assert "done" in asyncio.run(fire(trigger(request(server))))
    server.force_index_command("echo hello")
    assert "error" in asyncio.run(fire(trigger(request(server, id="2"))))
    # Others, of seconds, are those after lost connections.
    of_events = [seconds for seconds in waited if seconds > 900]
    assert len(of_events) == 2 and max(of_events) <= 1000, waited


def test_command_that_has_ended_before_it_is_sent_anything_is_heard_out(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy triggerer comes late to it, and takes no lost connection for the reason."""

    async def opened_late(open_it: Any) -> Any:
        process = await open_session(open_it)
        while not process.stdin.is_closing():
            await asyncio.sleep(0.01)
        return process

    module = BuildProviderIndexTrigger.__module__
    monkeypatch.setattr(f"{module}._TRIES", 1)
    monkeypatch.setattr(f"{module}.open_session", opened_late)
    server.force_index_command("echo hello")
    event = asyncio.run(fire(trigger(request(server))))
    assert event["error"] == "AccessRefused"
    assert "did not run the indexer (exit status 0): hello" in event["message"]


def test_deferred_task_takes_up_what_the_trigger_found(server: ProviderServer) -> None:
    prefix = server.prefix
    operator = BuildProviderIndex(
        task_id="build",
        provider="srv1",
        ssh_conn_id="index",
        chroot=server.chroot,
        source=[f"{prefix}/backups"],
        index=f"{prefix}/.mdbackup/index.md5",
        deferrable=True,
    )
    dag_run = SimpleNamespace(dag_id="mdbackup_srv1", run_id="manual__1", start_date=None)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute({"dag_run": dag_run, "params": {}})  # type: ignore[typeddict-item]
    event = asyncio.run(fire(deferred.value.trigger))  # type: ignore[arg-type]
    # The worker for this may come much later.
    assert 0 <= time.time() - event["ended"] < 600
    told = getattr(operator, deferred.value.method_name)({}, event | {"ended": 1795402800.4})
    assert (told["files"], told["unreadable"], told["rotten"]) == (2, 0, 0)
    assert told["ended"] == 1795402800


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJHv6ZrIrX0XxfVb0tD7bIsVWmI8o4yvfVZqfT4mFtKk"},
            AccessRefused,
            "host key is not the expected one",
        ),
        ({"key_file": "backupop"}, AccessRefused, "refuses the account's key"),
        ({"key_file": "/nowhere"}, AccessRefused, "cannot be read on this machine"),
    ],
    ids=["host key", "key", "no key"],
)
def test_trigger_refuses_what_the_hook_refuses(
    server: ProviderServer,
    set_connection: SetConnection,
    change: dict[str, str],
    error: type[Exception],
    words: str,
) -> None:
    """And the task then fails at once, by its retry policy."""
    if change.get("key_file") == "backupop":
        change = {"key_file": str(server.backupop_key)}
    set_connection("index", server.ssh_connection(**change))
    event = asyncio.run(fire(trigger(request(server, id="1"))))
    assert (event["error"], words in event["message"]) == (error.__name__, True), event
    operator = BuildProviderIndex(
        task_id="build", provider="srv1", ssh_conn_id="index", chroot="/", source=["/b"]
    )
    with pytest.raises(error, match=re.escape(words)):
        operator.execute_complete({}, event)


def test_trigger_joins_its_build_again_when_the_connection_breaks(server: ProviderServer) -> None:
    """As in a triggerer that is started anew: in both cases a new connection makes the same request."""
    make_slow(server)

    async def go() -> dict[str, Any]:
        waiting = trigger(request(server, id="run 1", limit=SLOW))
        result = asyncio.create_task(fire(waiting))
        await asyncio.to_thread(until, lambda: running(server))
        first, builders = waiting._connection, running(server)
        assert first is not None and builders
        with stopped(builders):  # so that the build is still running when it is joined
            first.abort()
            await asyncio.to_thread(until, lambda: waiting._connection not in (None, first))
        return await result

    event = asyncio.run(go())
    assert event["done"]["files"] == 3 and event["done"]["hashed"] == 3


def test_triggerer_that_is_shut_down_leaves_the_build_and_a_person_stops_it(server: ProviderServer) -> None:
    """Airflow cancels the trigger in both cases, and calls on_kill in the second only."""
    make_slow(server)
    same = request(server, id="run 1", limit=SLOW)

    async def cancelled(*, by_a_person: bool) -> None:
        waiting = trigger(same)
        result = asyncio.create_task(anext(waiting.run()))
        await asyncio.to_thread(
            until, lambda: running(server) and waiting._running and waiting._running[1].started
        )
        await asyncio.sleep(0.5)
        result.cancel()
        with pytest.raises(asyncio.CancelledError):
            await result
        if by_a_person:
            await waiting.on_kill()
        await waiting.cleanup()

    asyncio.run(cancelled(by_a_person=False))
    assert running(server)
    asyncio.run(cancelled(by_a_person=True))
    until(lambda: not running(server), 30)
    assert not index(server).exists()
