"""One build at a time: joining, waiting, stopping, and what is left by builds that were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side.programs import STOP
from airflow_mdbackup.provider_side.report import Done, Failed, Joined, Progress, Unreadable, Waiting
from airflow_mdbackup.provider_side.request import request_line
from tests.unit.provider_side.indexing import (
    FOLDER,
    INDEX,
    beside_index,
    finish,
    indexer,
    make_large,
    md5,
    read_index,
    read_until,
    run_patched,
    wait_for_temporary,
    wanted,
    without_root_power,
    write,
)


def slow(chroot: bytes, python_program, size: int = 1 << 40, **options) -> subprocess.Popen:
    """Start a build that takes long, and wait until it is on its way."""
    make_large(chroot + b"/backups/large", size)
    process = python_program.start(wanted(chroot, **options), without_root_power())
    wait_for_temporary(chroot)
    return process


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_same_request_again_joins_the_running_build_and_reports_its_result(chroot, python_program):
    """Also what it could not read, which the first one has already reported; with the same exit status."""
    write(chroot + b"/backups/closed")
    os.chmod(chroot + b"/backups/closed", 0)
    first = slow(chroot, python_program, id="run 1", limit=20 << 20, size=60 << 20)
    second = python_program.run(wanted(chroot, id="run 1"), without_root_power())
    one = finish(first)
    assert one.status == second.status == 3
    assert isinstance(second.report[0], Joined)
    assert second.report[1] == Unreadable(b"/backups/closed", "Permission denied")
    assert second.report[-1] == one.report[-1]
    assert isinstance(second.report[-1], Done)
    assert not any(isinstance(report, Waiting) for report in second.report)


@pytest.mark.parametrize("ids", [("run 1", "run 2"), ("run 1", None), (None, None), (None, "run 1")], ids=str)
def test_another_request_waits_and_then_builds(chroot, python_program, ids):
    """Its files may be newer than the first one's walk."""
    first = slow(chroot, python_program, id=ids[0], limit=10 << 20, size=30 << 20)
    second = python_program.start(wanted(chroot, id=ids[1]))
    read_until(second, Waiting)
    write(chroot + b"/backups/0 new")
    assert finish(first).status == 0
    assert b"/backups/0 new" not in read_index(chroot)[0]
    assert finish(second).status == 0
    assert b"/backups/0 new" in read_index(chroot)[0]


def test_finished_build_is_not_joined(chroot, python_program):
    """A task that is cleared wants an index of now."""
    write(chroot + b"/backups/file", b"1")
    assert python_program.run(wanted(chroot, id="run 1")).status == 0
    write(chroot + b"/backups/file", b"22")
    run = python_program.run(wanted(chroot, id="run 1"))
    assert [type(report) for report in run.report] == [Done]
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"22")}


def test_killed_build_is_replaced_by_one_that_had_joined_it(chroot, python_program):
    """The one that followed it takes over."""
    first = slow(chroot, python_program, id="run 1")
    second = python_program.start(wanted(chroot, id="run 1"))
    read_until(second, Joined)
    os.unlink(chroot + b"/backups/large")
    write(chroot + b"/backups/file")
    kill(first)
    run = finish(second)
    assert (run.status, type(run.report[-1])) == (0, Done)
    assert list(read_index(chroot)[0]) == [b"/backups/file"]


@pytest.mark.parametrize("joined", [False, True], ids=["builder", "joined"])
def test_stop_ends_the_build_and_the_old_index_stays(chroot, python_program, joined):
    """Whether the builder or a follower gets it, both soon end and report that."""
    write(chroot + b"/backups/file")
    assert python_program.run(wanted(chroot)).status == 0
    before = read_index(chroot)
    processes = [slow(chroot, python_program, id="run 1")]
    if joined:
        processes.append(python_program.start(wanted(chroot, id="run 1")))
        read_until(processes[1], Joined)
    processes[-1].stdin.write(STOP)
    processes[-1].stdin.flush()
    for process in reversed(processes):
        run = finish(process)
        assert (run.status, run.report[-1]) == (1, Failed("stopped on request"))
    assert read_index(chroot) == before
    assert beside_index(chroot) == [b"index.md5"]
    os.unlink(chroot + b"/backups/large")
    assert python_program.run(wanted(chroot, id="run 1")).status == 0


def test_stop_while_waiting_ends_the_waiting_one_only(chroot, python_program):
    """The build that is running is somebody else's."""
    first = slow(chroot, python_program, id="run 1", limit=10 << 20, size=30 << 20)
    second = python_program.start(wanted(chroot, id="run 2"))
    read_until(second, Waiting)
    second.stdin.write(STOP)
    second.stdin.flush()
    assert finish(second).report[-1] == Failed("stopped on request")
    assert finish(first).status == 0


def test_request_to_stop_another_build_is_ignored(chroot, python_program):
    """A file that is left from a stopped build, or of another request, stops nothing."""
    os.makedirs(chroot + FOLDER)
    same = wanted(chroot, id="run 1", limit=10 << 20)
    claim = indexer.build_key(indexer.validated(json.loads(request_line(same))))
    write(chroot + FOLDER + b"/.index.md5.stop", claim)
    first = slow(chroot, python_program, id="run 1", limit=10 << 20, size=30 << 20)
    assert Path(os.fsdecode(chroot + FOLDER + b"/.index.md5.lock")).read_bytes() == claim + b"\n"
    time.sleep(1)
    write(chroot + FOLDER + b"/.index.md5.stop", claim.replace(b"run 1", b"run 2"))
    assert finish(first).status == 0


def test_same_id_with_another_request_is_not_joined(chroot, python_program):
    """A task that was changed before it is tried again gets what it asks for now."""
    write(chroot + b"/more/file")
    first = slow(chroot, python_program, id="run 1", limit=10 << 20, size=20 << 20)
    request = wanted(chroot, b"/backups", b"/more", id="run 1", limit=10 << 20)
    second = python_program.run(request)
    assert finish(first).status == 0
    assert isinstance(second.report[0], Waiting)
    assert (second.status, list(read_index(chroot)[0])) == (0, [b"/backups/large", b"/more/file"])


def test_lock_that_somebody_removed_is_not_held_twice(chroot, python_program):
    """Who waited for the old file takes its turn at the new one."""
    first = slow(chroot, python_program)
    second = python_program.start(wanted(chroot, limit=10 << 20))
    read_until(second, Waiting)
    os.unlink(chroot + FOLDER + b"/.index.md5.lock")
    third = slow(chroot, python_program, id="run 3", limit=10 << 20, size=40 << 20)
    kill(first)
    time.sleep(1)
    assert third.poll() is None
    assert finish(third).status == 0
    assert finish(second).status == 0
    assert beside_index(chroot) == [b"index.md5"]


def test_worker_that_cannot_be_ended_holds_up_nothing(chroot):
    """One that hangs in a read, of a dead disk or server, does not even hear SIGKILL: here it is not sent."""
    make_large(chroot + b"/backups/large")
    patch = """
        os.kill = lambda *_: None
        indexer.Hasher.run = lambda *_: indexer.time.sleep(60)
        indexer.KILL_SECONDS = 0.5
        real = indexer.Builder._pump
        def pump(self, seconds):
            if seconds:
                raise indexer.Failure("stopped on request")
            return real(self, seconds)
        indexer.Builder._pump = pump
    """
    begun = time.monotonic()
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups", b"--jobs", b"1")
    assert (run.status, run.report[-1]) == (1, Failed("stopped on request"))
    assert time.monotonic() - begun < 50
    os.unlink(chroot + b"/backups/large")
    write(chroot + b"/backups/file")
    assert run_patched("", b"--chroot", chroot, b"--source", b"/backups").status == 0


def test_reader_that_has_stopped_reading_holds_up_neither_build_nor_stop(chroot, python_program):
    """Nor the next build: standard output is full, and the lock is free soon."""
    for number in range(18):
        write(chroot + b"/backups/" + b"/".join([b"\xfc" * 200] * 15) + b"/%d" % number)
        os.chmod(chroot + b"/backups/" + b"/".join([b"\xfc" * 200] * 15) + b"/%d" % number, 0)
    make_large(chroot + b"/backups/zz")
    process = python_program.start(wanted(chroot, id="run 1"), without_root_power())
    wait_for_temporary(chroot)
    time.sleep(1)
    second = python_program.start(wanted(chroot, id="run 1"), without_root_power())
    read_until(second, Joined)
    second.stdin.write(STOP)
    second.stdin.flush()
    assert finish(second).report[-1] == Failed("stopped on request")
    os.unlink(chroot + b"/backups/zz")
    assert python_program.run(wanted(chroot), without_root_power()).status == 3
    run = finish(process)  # who reads at last gets it all
    assert run.report[-1] == Failed("stopped on request")
    assert len([report for report in run.report if isinstance(report, Unreadable)]) == 18


def test_other_input_and_its_end_stop_nothing(chroot, python_program):
    """Only a whole line does; a lost connection does not."""
    first = slow(chroot, python_program, id="run 1", limit=20 << 20, size=40 << 20)
    first.stdin.write(b"stop it\nplease stop\n" + b"x" * 100_000 + b"\nstop")
    first.stdin.close()
    assert first.wait() == 0
    first.stdout.close()


@pytest.mark.parametrize("limit", [None, 100])
def test_builder_that_is_killed_takes_its_workers_along(chroot, python_program, limit):
    """Even if only itself is killed, and they wait for their turn to read; they would go on for hours."""
    for number in range(100 if limit else 0):
        write(chroot + b"/backups/%d" % number, b"x" * 1000)
    process = slow(chroot, python_program, limit=limit)
    children = process_tree(process.pid)
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and not is_zombie(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()


def process_tree(pid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(name), *process_tree(int(name))]
    return found


def is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_workers_hold_neither_output_nor_lock(chroot, python_program):
    """Else a session would stay open, and the next build wait, for one that is stuck in a read."""
    process = slow(chroot, python_program)
    ours = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (0, 1)}
    ours.add(os.fsdecode(chroot + FOLDER + b"/.index.md5.lock"))
    children = process_tree(process.pid)
    held = {
        os.readlink(f"/proc/{pid}/fd/{number}")
        for pid in children
        for number in os.listdir(f"/proc/{pid}/fd")
    }
    kill(process)
    assert children
    assert not held & ours


def test_worker_that_is_killed_fails_the_build(chroot, python_program):
    """Out of memory, perhaps. No file is missing from an index because of that."""
    write(chroot + b"/backups/file")
    assert python_program.run(wanted(chroot)).status == 0
    before = read_index(chroot)
    process = slow(chroot, python_program)
    for pid in process_tree(process.pid):
        os.kill(pid, signal.SIGKILL)
    run = finish(process)
    assert (run.status, type(run.report[-1])) == (1, Failed)
    assert read_index(chroot) == before


def test_next_build_removes_the_files_of_killed_ones(chroot, python_program):
    """Temporary files and directories of any earlier build, and nothing else."""
    os.makedirs(chroot + FOLDER + b"/.index.md5.1.2.tmp/x")
    for name in (b".index.md5.3.4.tmp", b".index.md5.cache.3.4.tmp", b".other.3.4.tmp", b"index.md5.3.4.tmp"):
        write(chroot + FOLDER + b"/" + name)
    assert python_program.run(wanted(chroot)).status == 0
    assert beside_index(chroot) == [b".other.3.4.tmp", b"index.md5", b"index.md5.3.4.tmp"]


@pytest.mark.parametrize("moment", range(12))
def test_build_that_is_killed_at_any_moment_leaves_a_whole_index(chroot, python_program, moment):
    """Old or new, and the next build works, with a cache that is as good."""
    for number in range(500):
        write(chroot + b"/backups/%d" % number)
    assert python_program.run(wanted(chroot)).status == 0
    os.unlink(chroot + b"/backups/7")
    process = python_program.start(wanted(chroot))
    time.sleep(0.02 + moment * 0.012)
    kill(process)
    assert len(read_index(chroot)[0]) in (499, 500)
    run = python_program.run(wanted(chroot))
    assert (run.status, run.report[-1].files) == (0, 499)
    assert len(read_index(chroot)[0]) == 499
    assert beside_index(chroot) == [b"index.md5"]


def test_limit_holds_for_all_workers_together_and_for_one_big_file(chroot, python_program):
    """40 MB at 20 MB/s take two seconds, however many workers there are."""
    for size in (40_000_000, 1_000_000):
        for name in os.listdir(chroot + b"/backups"):
            os.unlink(chroot + b"/backups/" + name)
        for number in range(40_000_000 // size):
            make_large(chroot + b"/backups/%d" % number, size)
        run = python_program.run(wanted(chroot, limit=20_000_000, jobs=4, rehash="all"))
        assert 0.8 < run.report[-1].seconds < 4


def test_nice_and_jobs_are_kept(chroot, python_program):
    """So many workers, all of lower priority."""
    process = slow(chroot, python_program, nice=7, jobs=3)
    children = process_tree(process.pid)
    priorities = {os.getpriority(os.PRIO_PROCESS, pid) for pid in children}
    kill(process)
    assert len(children) == 3
    assert priorities == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)}


def test_big_file_does_not_hold_up_the_others(chroot, python_program):
    """With two workers, thousands of small files are done while one is at a file that takes for ever."""
    make_large(chroot + b"/backups/0 first")
    for number in range(25_000 // 5):
        write(chroot + b"/backups/%d" % number)
    process = python_program.start(wanted(chroot, jobs=2))
    progress = read_until(process, Progress)[-1]
    kill(process)
    assert progress.files == progress.hashed == 5000
    assert progress.bytes > 5000 * 7


def test_index_can_be_read_while_it_is_built(chroot, python_program):
    """The old one, whole, the whole time."""
    write(chroot + b"/backups/file")
    assert python_program.run(wanted(chroot)).status == 0
    inode = os.stat(chroot + INDEX).st_ino
    process = slow(chroot, python_program)
    assert os.stat(chroot + INDEX).st_ino == inode
    assert list(read_index(chroot)[0]) == [b"/backups/file"]
    kill(process)
