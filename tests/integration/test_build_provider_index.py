"""BuildProviderIndex against a real SSH server: by shell and forced command, from worker and triggerer.

What is slow here is so because the provider was told to read slowly (``limit``).
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import pkgutil
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest
from airflow.sdk.exceptions import TaskDeferred

from airflow_mdbackup.hooks.provider import IndexHook
from airflow_mdbackup.hooks.session import Session, open_session
from airflow_mdbackup.operators import BuildProviderIndex
from airflow_mdbackup.provider_side import conversation
from airflow_mdbackup.provider_side.programs import python_program
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger
from demo.sshd import ProviderServer
from tests.integration.conftest import SOONEST
from tests.waiting import until

SetConnection = Callable[[str, dict[str, Any]], None]
SLOW = 1 << 20  # bytes per second
DONE = "mdbackup done files=1 bytes=1 hashed=1 unreadable=0 rotten=0 seconds=1.0"


@pytest.fixture
def server(provider: ProviderServer, set_connection: SetConnection) -> Iterator[ProviderServer]:
    """A provider with two small files, reached by the connection ``index``."""
    set_connection("index", provider.ssh_connection())
    (provider.tree / "backups").mkdir()
    for name in ("one", "two"):
        (provider.tree / "backups" / name).write_text(name)
    yield provider
    provider.force_index_command(None)


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


# --- in a triggerer ---------------------------------------------------------------------------------


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


# --- a triggerer that gives up ----------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have triggers wait shortly and try three times. Gives the pauses between the tries, left out here."""
    module = "airflow_mdbackup.triggers.build_provider_index"
    monkeypatch.setattr(conversation, "READY_WITHIN", 1)
    monkeypatch.setattr(conversation, "SILENT_FOR", 1)
    monkeypatch.setattr(f"{module}._CONNECT", 2.0)
    monkeypatch.setattr(f"{module}._TRIES", 3)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(f"{module}._pause", pause)
    return pauses


async def fire_within(trigger: BuildProviderIndexTrigger, seconds: float) -> dict[str, Any]:
    return await asyncio.wait_for(fire(trigger), seconds)


@pytest.mark.parametrize(
    "command",
    [
        "while sleep 0.1; do echo hi; done",
        "yes",
        "echo mdbackup ready request; read x; kill -9 $PPID",
        "echo mdbackup ready request; sleep 60",
        # A build that makes progress, but no more than the one before, is not worth it either.
        "echo mdbackup ready request; read x; echo mdbackup progress files=5 bytes=7 hashed=5 seconds=5;"
        " sleep 0.2; kill -9 $PPID",
    ],
    ids=["chatters", "floods", "begins and breaks", "begins and hangs", "breaks at the same place"],
)
def test_trigger_gives_up_where_nothing_comes_of_it(
    server: ProviderServer, impatient: list[float], command: str
) -> None:
    """After some tries, so that a task does not hang for ever where no timeout ends it."""
    server.force_index_command(command)
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 40))
    assert event["error"] == "ConnectionLost"
    assert event["message"].count("connection index") == 1
    assert len(impatient) == 2


@pytest.mark.parametrize("line", [b"\n", b"mdbackup progress files=1 bytes=1 hashed=1 seconds=1\n"])
def test_flood_of_lines_leaves_other_triggers_their_turns(
    impatient: list[float], monkeypatch: pytest.MonkeyPatch, set_connection: SetConnection, line: bytes
) -> None:
    """Each piece that is looked at costs them one turn, and there are few before the trigger gives up."""
    looked_at: list[int] = []
    turns: list[int] = []
    receive = conversation.Conversation.receive

    def heard(self: conversation.Conversation, data: bytes) -> bytes:
        looked_at.append(len(turns))
        return receive(self, data)

    monkeypatch.setattr(conversation.Conversation, "receive", heard)

    async def flood(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(b"mdbackup ready request\n")
        await process.stdin.readline()
        with suppress(asyncssh.Error, OSError):
            while True:
                process.stdout.write(DONE.replace("done", "progress").encode() + line * (65536 // len(line)))
                await process.stdout.drain()

    class Open(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

    async def other() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def go() -> dict[str, Any]:
        key = asyncssh.generate_private_key("ssh-ed25519")
        options: dict[str, Any] = {"server_host_keys": [key], "process_factory": flood, "encoding": None}
        async with asyncssh.listen("127.0.0.1", 0, server_factory=Open, **options) as server:
            host_key = " ".join(key.export_public_key().decode().split()[:2])
            connection = {
                "conn_type": "ssh",
                "host": "127.0.0.1",
                "port": server.get_port(),
                "login": "x",
                "password": "x",
            }
            set_connection("index", connection | {"extra": {"host_key": host_key}})
            beside = asyncio.create_task(other())
            try:
                return await fire_within(trigger(IndexRequest(b"/", (b"/a",), b"/i", id="1")), 60)
            finally:
                beside.cancel()

    event = asyncio.run(go())
    assert (event["error"], "far more than an indexer does" in event["message"]) == ("ConnectionLost", True)
    assert len(impatient) == 2
    assert len(set(looked_at)) == len(looked_at), "two pieces were looked at in one turn"


def test_trigger_goes_on_while_each_connection_gets_further(
    server: ProviderServer, impatient: list[float]
) -> None:
    """A build of hours over a bad line ends well."""
    count = server.tree / "count"
    count.write_text("0")
    count.chmod(0o666)
    where = f"{server.chroot.rstrip('/')}{server.prefix}/count"
    server.force_index_command(
        f"n=$(($(cat {where}) + 1)); echo $n >{where}; echo mdbackup ready request; read x;"
        f" [ $n -lt 8 ] || {{ echo {DONE}; exit; }};"
        " echo mdbackup progress files=1 bytes=$n hashed=0 seconds=5; sleep 0.2; kill -9 $PPID"
    )
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 60))
    assert event["done"]["files"] == 1
    assert len(impatient) == 7


def test_trigger_does_not_wait_for_a_command_whose_output_has_ended(
    server: ProviderServer, impatient: list[float]
) -> None:
    """As in a worker: a server that tells no status has none to tell."""
    server.force_index_command(f"echo mdbackup ready request; echo {DONE}; exec >&- 2>&-; exec sleep 60")
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 20))
    assert event["done"]["files"] == 1


def test_trigger_gives_up_a_server_that_opens_no_session(
    impatient: list[float], set_connection: SetConnection
) -> None:
    """It lets everybody in, and then does not answer."""

    class Mute(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

        def session_requested(self) -> Any:
            async def never() -> None:
                await asyncio.sleep(1e6)

            return never()

    async def go() -> dict[str, Any]:
        key = asyncssh.generate_private_key("ssh-ed25519")
        listener = await asyncssh.create_server(Mute, "127.0.0.1", 0, server_host_keys=[key])
        host_key = key.export_public_key().decode().strip()
        connection = {
            "conn_type": "ssh",
            "host": "127.0.0.1",
            "port": listener.get_port(),
            "login": "x",
            "password": "x",
        }
        set_connection("index", connection | {"extra": {"host_key": host_key}})
        try:
            return await fire_within(trigger(IndexRequest(b"/", (b"/a",), b"/i", id="1")), 20)
        finally:
            listener.close()

    event = asyncio.run(go())
    assert (event["error"], "does not open a session" in event["message"]) == ("ConnectionLost", True)
    assert len(impatient) == 2


def test_words_of_a_server_act_on_no_terminal_that_shows_the_log_of_a_triggerer(
    impatient: list[float], set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncssh logs them as they come."""
    caplog.set_level(logging.INFO, "asyncssh")
    logging.getLogger("asyncssh").addHandler(caplog.handler)

    class Rude(asyncssh.SSHServer):
        def connection_made(self, connection: asyncssh.SSHServerConnection) -> None:
            self.connection = connection

        def begin_auth(self, username: str) -> bool:
            return False

        def session_requested(self) -> bool:
            self.connection.disconnect(asyncssh.DISC_PROTOCOL_ERROR, "\x1b]0;owned\x07")
            return False

    async def against_it() -> dict[str, Any]:
        key = asyncssh.generate_private_key("ssh-ed25519")
        async with asyncssh.listen("127.0.0.1", 0, server_factory=Rude, server_host_keys=[key]) as server:
            host_key = key.export_public_key().decode().strip()
            extra = {"host_key": " ".join(host_key.split()[:2])}
            set_connection(
                "index",
                {
                    "conn_type": "ssh", "host": "127.0.0.1", "port": server.get_port(), "login": "x",
                    "password": "x", "extra": extra,
                },
            )  # fmt: skip
            request = IndexRequest(b"/", (b"/a",), b"/i")
            return await fire_within(trigger(request), 40)

    try:
        event = asyncio.run(against_it())
    finally:
        logging.getLogger("asyncssh").removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if "owned" in record.getMessage()]
    assert said and all(message.isprintable() for message in [*said, event["message"]])


def test_network_that_forbids_the_connection_is_no_matter_of_keys(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, impatient: list[float]
) -> None:
    """What a firewall answers looks like a file that may not be read, but for the name of one."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    with pytest.raises(ConnectionLost, match="Permission denied"):
        build(request(server, id="1"))
    monkeypatch.setattr("asyncssh.connect", forbidden)
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 20))
    assert (event["error"], "Permission denied" in event["message"]) == ("ConnectionLost", True)
