"""BuildProviderIndex against a real SSH server: by shell and forced command, from a worker.

What is slow here is so because the provider was told to read slowly (``limit``).
"""

from __future__ import annotations

import asyncio
import os
import pkgutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mdbackup.hooks.session import Session
from airflow_mdbackup.operators import BuildProviderIndex
from airflow_mdbackup.provider_side import conversation
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from demo.sshd import ProviderServer
from tests.integration.build_index.builds import (
    SLOW,
    break_off,
    build,
    building,
    fire,
    fire_within,
    index,
    install,
    make_slow,
    request,
    running,
    trigger,
)
from tests.waiting import until

# --- two accounts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", [False, True], ids=["shell", "forced command"])
def test_second_build_hashes_only_what_changed(server: ProviderServer, forced: bool) -> None:
    """With a forced command nothing of the program is sent, and the account needs no shell of its own."""
    for name in ("one", "two"):
        os.utime(server.tree / "backups" / name, (1e9, 1e9))
    if forced:
        install(server)
    time.sleep(2.1)  # what was changed just now is not trusted
    assert build(request(server, id="1")).hashed == 2
    (server.tree / "backups" / "two").write_text("2")
    done = build(request(server, id="2"))
    assert (done.files, done.hashed, done.bytes, done.unreadable, done.rotten) == (2, 1, 4, 0, 0)


def test_forced_command_runs_whatever_is_asked_for(server: ProviderServer, tmp_path: Path) -> None:
    """What the request says of paths is not what is indexed."""
    (server.tree / "private").mkdir()
    (server.tree / "private" / "secret").write_text("s")
    install(server)
    asked = request(server, id="1")
    prefix = os.fsencode(server.prefix)
    done = build(IndexRequest(asked.chroot, (prefix + b"/private",), prefix + b"/elsewhere.md5", id="1"))
    assert done.files == 2 and b"/backups/one" in index(server).read_bytes()
    assert not (server.tree / "elsewhere.md5").exists()


# --- what happens meanwhile -------------------------------------------------------------------------


def test_retry_joins_the_build_that_a_lost_connection_left_behind(
    server: ProviderServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost connection does not stop a build, and its retry does not begin another one."""
    make_slow(server)
    same = request(server, id="run 1", limit=SLOW)
    with building(server, same) as (hook, first):
        break_off(hook)
        with pytest.raises(ConnectionLost, match="broke"):
            first.result(20)
    assert running(server)
    done = build(same)
    assert (done.files, done.hashed) == (3, 3)
    assert "Joined on the provider: the running build of this request" in capsys.readouterr().out


@pytest.mark.parametrize("deferred", [False, True], ids=["worker", "triggerer"])
def test_connection_that_breaks_is_told_as_such_at_whatever_moment(
    server: ProviderServer, deferred: bool, impatient: list[float]
) -> None:
    """The output has ended well, and before the server tells how the command did, it is gone."""
    server.force_index_command("echo mdbackup ready request; read x; exec >&- 2>&-; sleep 0.5; kill -9 $PPID")
    if deferred:
        event = asyncio.run(fire_within(trigger(request(server, id="1")), 20))
        assert (event["error"], "broke" in event["message"]) == ("ConnectionLost", True)
    else:
        with pytest.raises(ConnectionLost, match="broke"):
            build(request(server, id="1"))


@pytest.mark.parametrize("deferred", [False, True], ids=["worker", "triggerer"])
def test_indexer_that_is_killed_is_worth_a_retry(server: ProviderServer, deferred: bool) -> None:
    """As where memory is short: it is no matter of the account, which nothing but a person could heal."""
    server.force_index_command("echo mdbackup ready request; read x; kill -9 $$")
    if deferred:
        event = asyncio.run(fire(trigger(request(server, id="1"))))
        assert event["error"] == "NotOnProvider" and "ended without a result" in event["message"]
    else:
        with pytest.raises(NotOnProvider, match="ended without a result"):
            build(request(server, id="1"))


def test_build_that_is_stopped_leaves_the_old_index_and_nothing_running(server: ProviderServer) -> None:
    """As when Airflow kills the task."""
    build(request(server, id="run 1"))
    before = index(server).read_bytes()
    make_slow(server)
    with building(server, request(server, id="run 2", limit=SLOW)) as (hook, future):
        hook.stop_build()
        with pytest.raises((NotOnProvider, ConnectionLost), match=r"stopped on request|broke"):
            future.result(10)
    until(lambda: not running(server), 30)
    assert index(server).read_bytes() == before


def test_killed_task_stops_its_build_by_a_forced_command_too(server: ProviderServer) -> None:
    make_slow(server)
    install(server, limit=SLOW)
    with building(server, request(server, id="run 1")) as (hook, future):
        hook.stop_build()
        with pytest.raises((NotOnProvider, ConnectionLost), match=r"stopped on request|broke"):
            future.result(10)
    until(lambda: not running(server), 30)
    assert not index(server).exists()


def test_connection_that_ends_while_it_is_closed_is_told_as_one_that_broke(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a task is killed just as its build stops: the other side's end comes in between."""

    def close(session: Session) -> None:
        until(session._loop.is_closed, 30, every=0.02)
        really_close(session)

    really_close = Session.close
    monkeypatch.setattr(Session, "close", close)
    make_slow(server)
    with building(server, request(server, id="run 1", limit=SLOW)) as (hook, future):
        hook.stop_build()
        with pytest.raises((NotOnProvider, ConnectionLost), match=r"stopped on request|broke"):
            future.result(10)
    until(lambda: not running(server), 30)


@pytest.mark.parametrize("moment", ["operators.build_provider_index.index_hook", "hooks.provider.Connection"])
def test_task_that_is_killed_before_it_is_connected_begins_no_build(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It goes on for up to five seconds, and what it began then would outlive it."""
    operator = BuildProviderIndex(
        task_id="build", provider="srv1", ssh_conn_id="index", chroot="/", source=["/backups"]
    )
    go_on = pkgutil.resolve_name(f"airflow_mdbackup.{moment}")

    def killed(*arguments: Any) -> Any:
        operator.on_kill()
        return go_on(*arguments)

    monkeypatch.setattr(f"airflow_mdbackup.{moment}", killed)
    dag_run = SimpleNamespace(dag_id="mdbackup_srv1", run_id="manual__1", start_date=None)
    with pytest.raises(ConnectionLost, match="was closed on this side"):
        operator.execute({"dag_run": dag_run, "params": {}})  # type: ignore[typeddict-item]
    assert not running(server) and not index(server).exists()


@pytest.mark.parametrize("command", ["cat", "while sleep 0.1; do echo hi; done", "yes"])
def test_account_that_does_not_answer_as_an_indexer_is_given_up(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A forced command that is something else, and waits for input, or talks for ever."""
    monkeypatch.setattr(conversation, "READY_WITHIN", 1)
    server.force_index_command(command)
    with pytest.raises(ConnectionLost, match="no indexer answers there"):
        build(request(server, id="1"))


def test_indexer_that_hangs_is_given_up_and_a_retry_joins_it(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is alive, and says nothing: here it is frozen, as by a dead disk."""
    make_slow(server)
    same = request(server, id="run 1", limit=SLOW)
    with building(server, same) as (_, future):
        frozen = running(server)
        for process in frozen:
            os.kill(process, signal.SIGSTOP)
        monkeypatch.setattr(conversation, "SILENT_FOR", 1)
        try:
            with pytest.raises(ConnectionLost, match="connection index: no output from the build for 1"):
                future.result(25)
        finally:
            monkeypatch.setattr(conversation, "SILENT_FOR", 60)
            for process in frozen:
                os.kill(process, signal.SIGCONT)
    assert build(same).files == 3


def test_account_that_chatters_after_the_request_is_given_up(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what an indexer says counts."""
    monkeypatch.setattr(conversation, "SILENT_FOR", 1)
    server.force_index_command("echo mdbackup ready request; while sleep 0.1; do echo hi; done")
    with pytest.raises(ConnectionLost, match="no output from the build"):
        build(request(server, id="1"))


def test_account_whose_forced_command_is_no_indexer_is_told(server: ProviderServer) -> None:
    server.force_index_command("echo hello")
    with pytest.raises(AccessRefused, match=r"did not run the indexer \(exit status 0\): hello"):
        build(request(server, id="1"))
