"""Pulling what is here already, in part, elsewhere, or twice; and what is told of it."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup import pull as pull_module
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.common import bloom as seen_module
from airflow_mdbackup.scheme.common.bloom import BloomFilter
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.errors import ConnectionLost, DestinationBusy
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history import journal as journal_module
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.staging import Staging
from airflow_mdbackup.scheme.transfer import sftp as sftp_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Wanted
from tests.guarantees.transport.channels import ATTRS, FAILURE, CutChannel, ScriptedServer, packet, status
from tests.pair import Pair, ServerProcess, md5


def planned(pair: Pair) -> Run:
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    pair.plan = pair.diff(run)
    return run


def pull_over(pair: Pair, run: Run, channel: Callable[[Any], Any]) -> int:
    """Pull with a channel around the real one, and return the bytes that were transferred."""

    def connect() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(channel(server.channel))

    return pull(pair.mirror, run, 0, connect).transferred


def left_in_staging(pair: Pair) -> list[str]:
    return [path.name for path in pair.mirror.staging.iterdir()]


# --- the same content several times -----------------------------------------------------------------


def test_equal_files_far_apart_all_arrive(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """So far that the content of the first is out of mind when the second comes."""
    monkeypatch.setattr(pull_module, "_MAX_REMEMBERED", 3)
    pair.put("00", b"old")
    pair.put("99", b"old too")
    pair.backup()
    for number in range(30):
        pair.put(f"{number:02}", b"%d" % number)
    for name in ("00", "50", "99"):
        pair.put(name, b"the same")
    summary = pair.backup()
    assert not summary.failed and summary.files == 32
    for name in ("00", "50", "99"):
        assert pair.live(name).read_bytes() == b"the same"
    assert pair.versions("99") == [b"old too"] and left_in_staging(pair) == []


def test_content_whose_try_was_killed_is_moved_into_place_and_not_copied(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One try could not connect, the next staged everything and was killed before its results were there."""
    for number in range(3):
        pair.put(f"{number}", b"%d" % number * 300_000)
    run = planned(pair)

    def refused() -> Reader:
        raise ConnectionLost("no")

    with pytest.raises(ConnectionLost):
        pull(pair.mirror, run, 0, refused)

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(syscalls_module, "syncfs", killed)
        pair.pull(run, pair.plan)
    assert len(left_in_staging(pair)) == 3
    pair.pull(run, pair.plan)
    assert not pair.finish(run).failed
    assert left_in_staging(pair) == []


def test_seen_never_takes_for_new_what_came_before_and_hardly_ever_the_reverse() -> None:
    seen = BloomFilter(20_000)
    md5s = [md5(b"%d" % number) for number in range(20_000)]
    assert sum(map(seen.seen_before, md5s)) < 20
    assert all(map(seen.seen_before, md5s))


def test_memory_of_seen_is_bounded_however_much_is_to_come() -> None:
    """Space is judged by it in a pull, whose memory does not grow with the number of files."""
    tracemalloc.start()
    try:
        seen = [BloomFilter(number) for number in (40_000_000, 10**12)]
        assert tracemalloc.get_traced_memory()[1] < len(seen) * (33 << 20)
    finally:
        tracemalloc.stop()
    assert not any(each.seen_before(md5(b"1")) for each in seen)
    assert all(each.seen_before(md5(b"1")) for each in seen)


def test_seen_that_is_overfull_still_takes_nothing_for_new_that_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with 40 million things, of which it takes one in 100 for another."""
    monkeypatch.setattr(seen_module, "_MOST", 1 << 17)
    seen = BloomFilter(20_000)
    md5s = [md5(b"%d" % number) for number in range(20_000)]
    assert sum(map(seen.seen_before, md5s)) < 600
    assert all(map(seen.seen_before, md5s))


# --- beginnings, and what looks like content --------------------------------------------------------


def test_live_file_that_is_not_what_the_index_says_costs_no_beginning(pair: Pair) -> None:
    """A moved file whose live original was damaged here: each try goes on with what the last one brought."""
    content = os.urandom(4_000_000)
    pair.put("old", content)
    pair.backup()
    pair.live("old").write_bytes(b"x" * 2_500_000)
    os.rename(pair.path("old"), pair.path("new"))
    run = planned(pair)
    assert pair.plan.copy == 1
    with pytest.raises(ConnectionLost):
        pull_over(pair, run, lambda channel: CutChannel(channel, 3_000_000))
    assert pair.part(md5(content)).stat().st_size > 2_500_000
    assert pull_over(pair, run, lambda channel: channel) < 1_500_000
    assert not pair.finish(run).failed
    assert pair.live("new").read_bytes() == content


def test_nothing_stays_of_a_copy_that_was_wrong_or_of_a_beginning_that_is_no_more_needed(pair: Pair) -> None:
    pair.put("old", b"moved")
    pair.backup()
    pair.live("old").write_bytes(b"x" * 5_000_000)
    os.rename(pair.path("old"), pair.path("new"))
    pair.put("small", b"small")
    pair.part(md5(b"small")).write_bytes(b"the beginning of a file that was large")
    assert not pair.backup().failed
    assert pair.live("new").read_bytes() == b"moved"
    assert left_in_staging(pair) == []


def test_read_that_fails_costs_no_beginning(pair: Pair) -> None:
    """A bad sector on A may be mended, and then the rest is all that comes."""
    content = os.urandom(1_000_000)
    path = pair.put("large", content)
    run = planned(pair)
    pair.part(md5(content)).write_bytes(content[:800_000])

    class Failing(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if offset >= 900_000:
                return status(number, FAILURE)
            return super().read(number, content, offset, length)

    assert pull(pair.mirror, run, 0, lambda: Reader(Failing({path: content}))).outcomes == {"failed": 1}
    assert pair.part(md5(content)).stat().st_size >= 800_000


def test_waiting_for_another_task_transfers_nothing(pair: Pair) -> None:
    content = os.urandom(300_000)
    pair.put("large", content)
    run = planned(pair)
    with pair.part(md5(content)).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        timer = threading.Timer(2, other.close)
        timer.start()
        transferred = pull_over(pair, run, lambda channel: channel)
        timer.join()
    assert transferred < 400_000  # in two seconds it looks ten times, at 32 KiB each


def test_results_that_wait_for_one_before_them_are_bounded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is another task's, for a while; memory must not depend on how many follow."""
    monkeypatch.setattr(pull_module, "_MAX_WAITING", 10)
    content = os.urandom(300_000)
    pair.put("00", content)
    for number in range(1, 100):
        pair.put(f"{number:02}", b"%d" % number)
    run = planned(pair)
    with pair.part(md5(content)).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        pulling = threading.Thread(target=pair.pull, args=(run, pair.plan))
        pulling.start()
        time.sleep(1)
        assert len(left_in_staging(pair)) <= 10
        other.close()
        pulling.join(30)
    assert not pair.finish(run).failed


# --- what is told -----------------------------------------------------------------------------------


def test_size_that_no_file_can_have_is_survived(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time left for 2**64 bytes is more than a duration can tell."""
    content = os.urandom(1_000_000)
    path = pair.put("large", content)
    run = planned(pair)

    class Lying(ScriptedServer):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 13, (1 << 64) - 1, 0o100644, 5, 5))

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            time.sleep(0.5 if offset == 0 else 0)  # a rate at which it would take for ever
            return super().read(number, content, offset, length)

    monkeypatch.setattr(ReportTimer, "due", lambda _: True)
    assert pull(pair.mirror, run, 0, lambda: Reader(Lying({path: content}))).outcomes == {"pulled": 1}


def test_rate_and_time_left_are_of_what_this_try_brings(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not of the files that an earlier try has brought."""
    for number in range(200):
        pair.put(f"{number:03}", b"%03d" % number)
    run = planned(pair)

    class Counting(CutChannel):
        def recv(self, size: int) -> bytes:
            return super().recv(min(size, 200))

    with pytest.raises(ConnectionLost):
        pull_over(pair, run, lambda channel: Counting(channel, 11_000))
    here = len(left_in_staging(pair))
    assert 100 < here < 200
    monkeypatch.setattr(ReportTimer, "due", lambda _: True)
    caplog.set_level(logging.INFO)
    caplog.clear()
    pair.pull(run, pair.plan)
    told = [re.search(r"(\d+) of 200 files, .*\(([\d,]+) files/s", text) for text in caplog.messages]
    rates = {int(match[1]): match[2] for match in told if match}
    assert here in rates and {rate for done, rate in rates.items() if done <= here} == {"0"}
    assert rates[200] != "0"


# --- what makes it durable --------------------------------------------------------------------------


@pytest.mark.real_disk
def test_everything_is_on_the_disk_before_it_is_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged before the results, written ahead before files are replaced, in place before the index."""
    steps: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            steps.append(name)
            return function(*arguments, **keywords)

        return noted

    pair.put("one", b"1")
    pair.backup()
    pair.put("one", b"2")
    pair.put("two", b"2")
    run = planned(pair)
    monkeypatch.setattr(syscalls_module, "syncfs", noting("sync", syscalls_module.syncfs))
    monkeypatch.setattr(journal_module, "_write_index", noting("index", journal_module._write_index))
    monkeypatch.setattr(Path, "replace", noting("named", Path.replace))
    monkeypatch.setattr(Tree, "put", noting("put", Tree.put))
    pair.pull(run, pair.plan)
    assert steps[-3:] == ["named", "sync", "named"]  # small files staged, synced, results
    steps.clear()
    pair.finish(run)
    ahead, *after = " ".join(steps).split(" put put ")
    assert ahead.endswith("sync named index named")  # synced, history, index without what is replaced
    assert after == ["sync named index named named named named named"]  # synced, index, history, status


def test_index_claims_nothing_that_is_about_to_be_replaced(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while files are put in place must find an index that is true."""
    same, other = pair.put("same", b"1"), pair.put("other", b"1")
    pair.backup()
    pair.put("other", b"2")
    indexes = []

    def put(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
        indexes.append({entry.path for entry in read_entries(pair.mirror.index)})
        real(tree, source, file, path)

    real = Tree.put
    monkeypatch.setattr(Tree, "put", put)
    pair.backup()
    assert indexes == [{same}] and set(pair.index_b()) == {same, other}


# --- servers ----------------------------------------------------------------------------------------


def test_round_trip_is_that_of_a_request_also_where_the_server_tells_no_limits() -> None:
    """Its first answer may have waited for a login."""

    class Slow(ScriptedServer):
        def on_init(self, number: int, body: bytes) -> bytes:
            time.sleep(0.2)
            return super().on_init(number, body)

    assert Reader(Slow({})).round_trip < 0.1


def test_server_that_never_says_that_it_closes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is asked would grow without end."""
    monkeypatch.setattr(sftp_module, "_MAX_CLOSING", 50)

    class Silent(ScriptedServer):
        def on_close(self, number: int, body: bytes) -> bytes:
            return b""

    reader = Reader(Silent({b"/f": b"x"}))
    with pytest.raises(ConnectionLost, match="does not confirm that it closes"):
        for _ in range(100):
            reader.submit(Wanted(b"/f", None, lambda _: None))
            reader.wait()


# --- beside other tasks -----------------------------------------------------------------------------


def test_content_that_another_task_has_just_staged_is_not_written_over(pair: Pair) -> None:
    """Its results tell of the very file that it has staged, which may be on the disk already."""
    contents = {name: os.urandom(size) for name, size in {"small": 5, "large": 300_000}.items()}
    for name, content in contents.items():
        pair.put(name, content)
    run = planned(pair)

    class Overtaken(Reader):
        def submit(self, wanted: Wanted) -> None:
            super().submit(wanted)
            pair.staged(wanted.md5 or b"").write_bytes(contents[os.path.basename(wanted.path).decode()])
            staged.add(pair.staged(wanted.md5 or b"").stat().st_ino)

    def connect() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Overtaken(server.channel)

    staged: set[int] = set()
    pull(pair.mirror, run, 0, connect)
    assert pair.finish(run).outcomes == {"pulled": 2}
    assert {pair.live(name).stat().st_ino for name in contents} == staged
    assert left_in_staging(pair) == []


def test_part_is_dropped_before_another_task_can_take_it_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that turned out wrong is taken away under its lock."""
    content = b"c" * 400_000
    pair.put("old", content)
    pair.backup()
    pair.put("new", content)
    run = planned(pair)
    pair.live("old").write_bytes(b"edited")
    drop, taken = Staging.drop_part, []

    def dropped(staging: Staging, digest: bytes) -> None:
        with pair.mirror.open_staging() as other:
            taken.append(other.lock_part(digest))
        drop(staging, digest)

    monkeypatch.setattr(Staging, "drop_part", dropped)
    pair.pull(run, pair.plan)
    assert taken == [None]
    assert pair.finish(run).outcomes == {"pulled": 1}


def test_beginning_at_which_another_task_is_stays(pair: Pair) -> None:
    """Also when the content has come as a small file meanwhile."""
    pair.put("small", b"small")
    run = planned(pair)
    with pair.part(md5(b"small")).open("wb") as other:
        other.write(b"sm")
        fcntl.flock(other, fcntl.LOCK_EX)
        pair.pull(run, pair.plan)
        assert pair.part(md5(b"small")).exists()
    assert pair.finish(run).outcomes == {"pulled": 1}


def test_beginning_that_is_not_ours_fails_its_file_alone(pair: Pair, tmp_path: Path) -> None:
    """The message says where it is."""
    pair.put("large", b"large" * 100_000)
    pair.put("other", b"other" * 100_000)
    run = planned(pair)
    part = pair.part(md5(b"large" * 100_000))
    part.symlink_to(tmp_path / "nowhere")
    pair.pull(run, pair.plan)
    summary = pair.finish(run)
    assert summary.outcomes == {"failed": 1, "pulled": 1}
    assert f"{part} cannot be written: Too many levels of symbolic links" in summary.failures[0]
    part.unlink()
    assert pair.backup().outcomes == {"pulled": 1}


def test_copy_is_made_of_a_live_file_where_what_is_staged_is_odd(pair: Pair, tmp_path: Path) -> None:
    """One source that cannot be opened hides no other."""
    run = pair.planned(old=b"same", new=(None, b"same"))
    pair.staged(md5(b"same")).unlink()
    pair.staged(md5(b"same")).symlink_to(tmp_path / "nowhere")
    assert pair.finish(run).outcomes == {"copied": 1}
    assert pair.live("new").read_bytes() == b"same"


def test_waiting_for_a_task_that_makes_no_progress_has_an_end(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told meanwhile what is waited for; and whatever can be done is done."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pull_module, "LOCK_WAIT", 1.0)
    monkeypatch.setattr(ReportTimer, "due", lambda pace: True)
    large = os.urandom(400_000)
    pair.put("large", large)
    pair.put("small", b"small")
    run = planned(pair)
    part = pair.part(md5(large))
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DestinationBusy, match=f"large is being written by another task.*{part} open"):
            pair.pull(run, pair.plan)
    assert re.search("1 of 2 files.*waiting for another task to write .*large", caplog.text)
    pair.pull(run, pair.plan)
    assert pair.finish(run).outcomes == {"pulled": 2}


def test_waiting_for_a_task_that_gets_on_has_no_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "LOCK_WAIT", 1.0)
    large = os.urandom(400_000)
    pair.put("large", large)
    run = planned(pair)

    def write() -> None:
        with pair.part(md5(large)).open("wb", buffering=0) as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            begun.set()
            for number in range(8):
                other.write(large[number * 50_000 : (number + 1) * 50_000])
                time.sleep(0.4)
            os.rename(pair.part(md5(large)), pair.staged(md5(large)))

    begun = threading.Event()
    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(10)
    pair.pull(run, pair.plan)
    thread.join()
    assert pair.finish(run).outcomes == {"pulled": 1}


# --- after a commit ---------------------------------------------------------------------------------


def test_run_that_is_pulled_again_after_its_own_commit_tells_the_same(pair: Pair) -> None:
    """Nobody has superseded it."""
    pair.put("one", b"1")
    pair.put("two", b"2")
    run = planned(pair)
    pair.pull(run, pair.plan)
    assert pair.finish(run).outcomes == {"pulled": 2}
    pair.pull(run, pair.plan)
    assert pair.transferred == 0
    assert pair.finish(run).outcomes == {"pulled": 2}


@pytest.mark.parametrize("clock", ["stands still", "was set back"])
def test_result_vouches_for_the_very_file_of_which_it_tells(pair: Pair, clock: str) -> None:
    """Another run may have staged the same bytes anew within the same tick, and a power cut torn them."""
    pair.put("alpha", b"the new content")
    run = planned(pair)
    pair.pull(run, pair.plan)
    staged = pair.staged(md5(b"the new content"))
    aside = staged.with_name("aside")
    aside.write_bytes(b"\0" * len(b"the new content"))
    aside.rename(staged)
    later = time.time() + (3600 if clock == "was set back" else 0)
    os.utime(run.results(0), (later, later))
    assert pair.finish(run).outcomes == {"failed": 1} and not pair.live("alpha").exists()
    assert pair.backup().outcomes == {"pulled": 1}
