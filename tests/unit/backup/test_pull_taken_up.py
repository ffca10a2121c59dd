"""Pulling into staging: killed, cut off, and taken up again, also beside other tasks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import threading
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.errors import ConnectionLost, DestinationBusy
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.index.canonical import IndexWriter
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.staging import Staging
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.crash.crash import crash_at, numbers_to_try
from tests.guarantees.transport.channels import ScriptedServer
from tests.pair import Pair
from tests.unit.backup.pulling import SIZE, check_whole, plan_files

# --- kills ------------------------------------------------------------------------------------------


@pytest.mark.guarantee("1. Crash at every step")
def test_a_kill_at_any_step_of_a_first_run_is_mended_by_the_next(pair: Pair, tmp_path: Path) -> None:
    """From the making of dest to the last word, each time on a new dest; what is here is not pulled again."""
    for number in range(6):
        pair.put(f"folder/{number}", b"%d" % (number // 2) * 40_000)
    pair.build_index()

    def whole_run() -> None:
        pair.finish(pair.prepare())

    for number in numbers_to_try(whole_run):
        pair.mirror = Mirror(tmp_path / f"b{number}", "srv1")
        crashed = crash_at(number, whole_run)
        content = [
            path.read_bytes()
            for folder in (pair.mirror.staging, pair.mirror.files)
            if folder.exists()
            for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".part"
        ]
        here = len({c for c in content if len(c) == 40_000})
        assert len(set(content)) == here, "a file is live or staged in part"
        pair.runs += 1
        summary = pair.finish(pair.prepare())
        assert summary.failed == 0
        assert pair.transferred == (3 - here) * 40_000
        check_whole(pair)
        assert len(pair.history()) == 1
        if not crashed:
            break
    print(f"{number} steps")
    assert number > 80


def test_a_kill_at_any_step_of_a_pull_is_mended_by_a_retry(pair: Pair) -> None:
    """The same run goes on from staging, each time on what the last kill left."""
    run = plan_files(pair, files=8)
    number = 0
    while crash_at(number := number + 4, lambda: pair.pull(run, pair.plan)):
        assert number < 500
    pair.pull(run, pair.plan)
    assert pair.transferred == 0
    assert pair.finish(run).outcomes == {"pulled": 8}
    check_whole(pair)
    print(f"{number} steps")


def test_a_staged_file_that_no_result_vouches_for_is_hashed_before_use(pair: Pair) -> None:
    """A kill or power cut may have left it in part."""
    run = plan_files(pair, files=3)
    good, bad, _ = pair.index_a().values()
    pair.staged(good).write_bytes(Path(os.fsdecode(pair.path("00"))).read_bytes())
    pair.staged(bad).write_bytes(b"torn")
    summary = pair.pull(run, pair.plan)[0]
    assert summary.outcomes == {"pulled": 3} and summary.transferred == 2 * SIZE
    pair.finish(run)
    check_whole(pair)


@pytest.mark.parametrize("size", [3, SIZE], ids=["small", "large"])
def test_what_another_task_has_just_staged_is_not_written_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Its results vouch for that very file, which may be on the disk already; also in the last moment."""
    pair.put("alpha", bytes(size))
    pair.build_index()
    (md5,) = pair.index_a().values()
    first, second = pair.new_run(), pair.new_run()
    for run in (first, second):
        pair.fetch(run)
        pair.plan = pair.diff(run)
    take_in = Staging._rename_to_md5
    staged = []

    def take_in_late(*args: Any) -> None:
        monkeypatch.setattr(Staging, "_rename_to_md5", take_in)
        if size == SIZE:
            pair.staged(md5).write_bytes(bytes(size))
        else:
            pair.pull(first, pair.plan)
        staged.append(pair.staged(md5).stat().st_ino)
        take_in(*args)

    monkeypatch.setattr(Staging, "_rename_to_md5", take_in_late)
    pair.pull(second, pair.plan)
    (result,) = read_records(second.results(0), Result)
    assert [pair.staged(md5).stat().st_ino] == [result.inode] == staged
    assert [path.name for path in pair.mirror.staging.iterdir()] == [md5.decode()]
    assert not any("arriving" in path.name for path in second.folder.iterdir())
    pair.finish(second)
    check_whole(pair)


def test_no_empty_placeholder_is_taken_for_content(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a filesystem cannot rename unless a name is taken, and a task is killed beside another one."""

    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(syscalls_module._libc, "renameat2", refuse)
    pair.put("alpha", b"old")
    pair.backup()
    pair.put("alpha", b"new")
    pair.build_index()
    first, second = pair.new_run(), pair.new_run()
    for run in (first, second):
        pair.fetch(run)
        pair.plan = pair.diff(run)
    take_in = Staging._rename_to_md5

    def killed_beside_it(*args: Any) -> None:
        monkeypatch.setattr(Staging, "_rename_to_md5", take_in)
        staged = pair.staged(args[-1])
        for number in count(1):
            if not crash_at(number, partial(pair.pull, first, pair.plan)) or (
                staged.exists() and not staged.stat().st_size
            ):
                break
            staged.unlink(missing_ok=True)
        take_in(*args)

    monkeypatch.setattr(Staging, "_rename_to_md5", killed_beside_it)
    pair.pull(second, pair.plan)
    pair.finish(second)
    check_whole(pair)


@pytest.mark.parametrize("size", [3, SIZE], ids=["small", "large"])
def test_a_dangling_symlink_in_staging_gives_way(pair: Pair, tmp_path: Path, size: int) -> None:
    pair.put("alpha", bytes(size))
    pair.build_index()
    pair.mirror.claim()
    (md5,) = pair.index_a().values()
    pair.staged(md5).symlink_to(tmp_path / "nowhere")
    assert pair.backup().outcomes == {"pulled": 1}
    check_whole(pair)


@pytest.mark.parametrize("size", [3, SIZE], ids=["small", "large"])
def test_a_directory_in_staging_fails_its_file_alone(pair: Pair, size: int) -> None:
    """It says what to remove."""
    pair.put("alpha", bytes(size))
    pair.put("beta", b"beta")
    pair.build_index()
    pair.mirror.claim()
    pair.staged(pair.index_a()[pair.path("alpha")]).mkdir()
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 1, "failed": 1}
    assert "is a directory: find out whose it is, and remove it" in summary.failures[0]


def test_results_of_another_plan_vouch_for_nothing(pair: Pair) -> None:
    """After a new diff of the same run, what an earlier pull told is of no account."""
    run = plan_files(pair, files=3)
    pair.pull(run, pair.plan)
    pair.put("new", b"1")
    pair.build_index()
    pair.fetch(run)
    plan = pair.diff(run)
    pair.staged(pair.index_a()[pair.path("00")]).write_bytes(b"torn")
    assert pair.archive(run).archived == 0
    assert pair.commit(run).outcomes == {"failed": 4}
    assert pair.pull(run, plan)[0].outcomes == {"pulled": 4}
    pair.finish(run)
    check_whole(pair)


# --- tasks side by side -----------------------------------------------------------------------------


def test_content_that_another_task_is_writing_is_waited_for(pair: Pair) -> None:
    """The .part file is locked by its writer; when that one has finished, nothing is transferred."""
    run = plan_files(pair, files=1)
    (digest,) = pair.index_a().values()
    with open(pair.part(digest), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def finish() -> None:
            other.write(Path(os.fsdecode(pair.path("00"))).read_bytes())
            other.flush()
            os.rename(pair.part(digest), pair.staged(digest))
            other.close()

        timer = threading.Timer(0.5, finish)
        timer.start()
        summary = pair.pull(run, pair.plan)[0]
        timer.join()
    assert summary.outcomes == {"pulled": 1} and summary.transferred < SIZE


def test_content_that_another_task_gave_up_is_gone_on_with(pair: Pair) -> None:
    """Its lock ends with it, and what it has written so far is not pulled again."""
    run = plan_files(pair, files=1)
    (digest,) = pair.index_a().values()
    other = open(pair.part(digest), "wb")  # noqa: SIM115
    fcntl.flock(other, fcntl.LOCK_EX)
    other.write(Path(os.fsdecode(pair.path("00"))).read_bytes()[: SIZE - 10])
    other.flush()
    timer = threading.Timer(0.1, other.close)
    timer.start()
    summary = pair.pull(run, pair.plan)[0]
    timer.join()
    assert summary.outcomes == {"pulled": 1} and summary.transferred < SIZE
    pair.finish(run)
    check_whole(pair)


# --- going on where a try was cut off ---------------------------------------------------------------


@pytest.mark.parametrize("there", [1, 1000, 32 << 10, 100_000, SIZE * 10 - 1, SIZE * 10])
def test_a_later_run_goes_on_where_a_transfer_was_cut_off(pair: Pair, there: int) -> None:
    """By offset, after what is there was hashed; only the first block may come for nothing."""
    content = os.urandom(SIZE * 10)
    pair.put("large", content)
    pair.mirror.claim()
    pair.part(hashlib.md5(content).hexdigest().encode()).write_bytes(content[:there])
    assert pair.backup().outcomes == {"pulled": 1}
    assert len(content) - there <= pair.transferred <= len(content) - there + (32 << 10)
    check_whole(pair)


@pytest.mark.parametrize("garbage", [b"x", b"x" * SIZE, b"x" * SIZE * 3], ids=len)
def test_a_beginning_that_is_none_is_pulled_anew(pair: Pair, garbage: bytes) -> None:
    """After a power cut, what was not synced may be anything; it is not held against the provider."""
    run = plan_files(pair, files=2)
    for digest in pair.index_a().values():
        pair.part(digest).write_bytes(garbage)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 2}
    assert pair.finish(run).outcomes == {"pulled": 2}
    check_whole(pair)


def test_a_beginning_does_not_hide_that_a_file_arrives_wrong(pair: Pair) -> None:
    """It is read from its start, and then once more, before it is called corrupt."""
    run = plan_files(pair, files=1)
    ((path, digest),) = pair.index_a().items()
    pair.part(digest).write_bytes(Path(os.fsdecode(path)).read_bytes()[:100_000])

    class Spoilt(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return super().read(number, bytes(len(content)), offset, length)

    server = Spoilt({path: Path(os.fsdecode(path)).read_bytes()})
    assert pull(pair.mirror, run, 0, lambda: Reader(server)).outcomes == {"corrupt": 1}
    assert server.handles and len(server.handles) == 3
    assert list(pair.mirror.staging.iterdir()) == []


def test_two_runs_side_by_side_pull_each_content_once(pair: Pair) -> None:
    """Both end well; staging is shared."""
    run = plan_files(pair, files=30)
    other = pair.new_run()
    pair.fetch(other)
    plan = pair.diff(other)
    sums: list[int] = []

    def task(which: Run) -> None:
        sums.append(pull(pair.mirror, which, 0, pair.connect).transferred)

    threads = [threading.Thread(target=task, args=(which,)) for which in (run, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Whoever waits for the other asks for the first block, and again now and then.
    assert plan.pull == 30 and sum(sums) < 45 * SIZE
    assert pair.finish(run).outcomes == {"pulled": 30}
    # The first one was given an older index, and took the staged files along.
    assert pair.finish(other).outcomes == {"superseded": 30}
    check_whole(pair)


def test_a_symlink_planted_in_staging_is_not_written_through(pair: Pair, tmp_path: Path) -> None:
    """Neither as a part nor as a staged file."""
    run = plan_files(pair, files=1)
    (digest,) = pair.index_a().values()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    pair.part(digest).symlink_to(victim)
    pair.pull(run, pair.plan)
    assert victim.read_bytes() == b"mine"


# --- a plan there must be ---------------------------------------------------------------------------


def test_a_retry_that_cannot_connect_keeps_what_the_first_try_brought(pair: Pair) -> None:
    """What is staged and vouched for needs no connection."""
    for number in range(20):
        pair.put(f"{number:02}", b"%d" % number)
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    plan = pair.diff(run)
    os.unlink(pair.path("07"))
    pair.pull(run, plan)
    pair.put("07", b"7")

    def refused() -> Reader:
        raise ConnectionLost("nobody there")

    with pytest.raises(ConnectionLost):
        pull(pair.mirror, run, 0, refused)
    pair.archive(run)
    summary = pair.commit(run)
    assert summary.outcomes == {"pulled": 19, "failed": 1}
    assert "07 (not reached: nobody there)" in summary.failures[0]


def test_two_tasks_never_pull_one_shard_at_once(pair: Pair) -> None:
    """One that is thought dead and its retry: the second waits, and says for whom."""
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    pair.diff(run)
    with (
        run.shard_lock(0, "srv1"),
        pytest.raises(DestinationBusy, match=r"shard 0 of manual__1 .*by shard 0 \(process"),
        run.shard_lock(0, "srv1", wait=0.3),
    ):
        raise AssertionError


def test_results_vouch_for_nothing_that_was_staged_while_all_was_synced(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may stage the same bytes anew meanwhile, and a power cut tear them."""
    pair.put("alpha", b"the new content")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    plan = pair.diff(run)
    staged = pair.staged(hashlib.md5(b"the new content").hexdigest().encode())
    really = syscalls_module.syncfs

    def slow(descriptor: int) -> None:
        really(descriptor)
        time.sleep(0.05)
        staged.unlink()
        staged.write_bytes(b"the new")

    monkeypatch.setattr(syscalls_module, "syncfs", slow)
    pair.pull(run, plan)
    monkeypatch.undo()
    assert pair.finish(run).outcomes == {"failed": 1} and not pair.live("alpha").exists()
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.live("alpha").read_bytes() == b"the new content"


@pytest.mark.parametrize("changed_since", [False, True])
def test_a_file_that_differs_in_size_from_what_has_its_md5_is_left_unless_it_changed_since(
    pair: Pair, changed_since: bool
) -> None:
    """It was replaced by an older one, as by logrotate, or two files have one md5, which is no accident."""
    path = pair.put("one", b"content")
    pair.backup()
    other = pair.put("other", b"of another size")
    seconds = time.time() + 10 if changed_since else 1_000_000_000
    os.utime(other, (seconds, seconds))
    md5 = hashlib.md5(b"content").hexdigest().encode()
    with IndexWriter(Path(os.fsdecode(pair.index))) as writer:
        for each in sorted((path, other)):
            writer.add(each, md5)
    summary = pair.finish(pair.prepare())
    if changed_since:
        assert summary.outcomes == {"copied": 1}
    else:
        assert summary.outcomes == {"changed": 1} and not pair.live("other").exists()
