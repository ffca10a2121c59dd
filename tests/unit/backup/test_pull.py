"""Pulling into staging, over lines and disks that fail."""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.backup.pull_progress import PullProgress
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.errors import ConnectionLost, DestinationFull, RunIncomplete
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.transfer import partial_file as part_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import FAILURE, READ, CutChannel, ScriptedServer, status
from tests.pair import Pair
from tests.unit.backup.pulling import SIZE, check_whole, plan_files, pull_over, results, staged

# --- the connection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 100, 20_000, 2_000_000, 4_000_000, 5_900_000])
def test_a_cut_connection_is_raised_and_a_retry_takes_up_the_rest(pair: Pair, limit: int) -> None:
    """The results of what was done are written, and what is staged is not transferred again."""
    run = plan_files(pair)
    with pytest.raises(ConnectionLost):
        pull_over(pair, run, lambda channel: CutChannel(channel, limit))
    if limit:
        told = results(run)
        assert len(told) == 20
        assert sum(result.outcome == Outcome.PULLED for result in told) == len(staged(pair))
        assert all("not reached" in str(r.detail) for r in told if r.outcome != Outcome.PULLED)
    here = len(staged(pair))
    assert (here > 0) == (limit >= 2_000_000)
    begun = sum(part.stat().st_size for part in pair.mirror.staging.glob("*.part"))
    summary = pair.pull(run, pair.plan)[0]
    assert summary.outcomes == {"pulled": 20}
    # The first block of a file is asked for before it is known that an earlier try has its beginning.
    again = summary.transferred - ((20 - here) * SIZE - begun)
    assert 0 <= again <= 20 * (32 << 10)
    assert pair.finish(run).outcomes == {"pulled": 20}
    check_whole(pair)


def test_what_was_done_before_the_connection_was_lost_can_be_committed(pair: Pair) -> None:
    """Also if no retry succeeds: the rest fails, and the next run gets it."""
    run = plan_files(pair)
    with pytest.raises(ConnectionLost):
        pull_over(pair, run, lambda channel: CutChannel(channel, 4_000_000))
    here = len(staged(pair))
    assert here
    summary = pair.finish(run)
    assert summary.outcomes == {"pulled": here, "failed": 20 - here}
    assert len(pair.index_b()) == here
    assert pair.backup().outcomes == {"pulled": 20 - here}
    check_whole(pair)


def test_retries_over_a_bad_line_get_there_in_the_end(pair: Pair) -> None:
    """Each gets a little further, and no byte of a finished file comes twice."""
    run = plan_files(pair)
    tries = 0
    while True:
        tries += 1
        assert tries < 20
        try:
            pull_over(pair, run, lambda channel: CutChannel(channel, 1_500_000))
            break
        except ConnectionLost:
            continue
    assert tries > 2
    assert pair.finish(run).outcomes == {"pulled": 20}
    check_whole(pair)


def test_a_connection_that_is_refused_leaves_results_for_a_retry(pair: Pair) -> None:
    """Nothing is pulled, and the error of the connection is what the caller sees."""
    run = plan_files(pair)

    def refuse() -> Reader:
        raise ConnectionLost("srv1: no route to host")

    with pytest.raises(ConnectionLost, match="no route"):
        pull(pair.mirror, run, 0, refuse)
    assert {result.outcome for result in results(run)} == {"failed"}
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 20}


def test_nothing_to_pull_needs_no_connection(pair: Pair) -> None:
    """An unchanged provider, or a plan of adoptions only."""
    path = pair.put("alpha", b"1")
    pair.put("bravo", b"2")
    pair.backup()
    os.unlink(path)
    pair.backup()
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    assert pair.diff(run).adopt == 1

    def refuse() -> Reader:
        raise AssertionError("a connection was made")

    assert pull(pair.mirror, run, 0, refuse).outcomes == {"adopted": 1}


def test_a_server_that_fails_to_read_one_file_fails_that_file(pair: Pair) -> None:
    """With the server's word as the reason."""
    run = plan_files(pair, files=3)
    bad = pair.path("01")

    class Broken(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if content == self.files[bad]:
                return status(number, FAILURE, b"Input/output error")
            return super().read(number, content, offset, length)

    server = Broken({path: Path(os.fsdecode(path)).read_bytes() for path in pair.index_a()})
    summary = pull(pair.mirror, run, 0, lambda: Reader(server))
    assert summary.outcomes == {"pulled": 2, "failed": 1}
    assert [r.detail for r in results(run) if r.outcome == "failed"] == ["Input/output error"]
    assert pair.finish(run).failed == 1


def test_a_file_that_arrives_wrong_once_is_read_once_more(pair: Pair) -> None:
    """And is good then."""
    run = plan_files(pair, files=2)

    class Flaky(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if self.requests.count(READ) == 1:
                content = bytes(len(content))
            return super().read(number, content, offset, length)

    server = Flaky({path: Path(os.fsdecode(path)).read_bytes() for path in pair.index_a()})
    assert pull(pair.mirror, run, 0, lambda: Reader(server)).outcomes == {"pulled": 2}
    pair.finish(run)
    check_whole(pair)


# --- the disk ---------------------------------------------------------------------------------------


def test_a_full_disk_is_raised_and_a_retry_takes_up_the_rest(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was staged before it was full stays."""
    run = plan_files(pair)
    written = 0

    def write(descriptor: int, data: bytes) -> None:
        nonlocal written
        written += len(data)
        if written > 5 * SIZE:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.write(descriptor, data)

    monkeypatch.setattr(part_module, "write_sparse", write)
    with pytest.raises(DestinationFull, match="No space left"):
        pair.pull(run, pair.plan)
    here = len(staged(pair))
    assert 0 < here <= 5
    monkeypatch.undo()
    assert pair.pull(run, pair.plan)[0].transferred <= (20 - here) * SIZE
    pair.finish(run)
    check_whole(pair)


# --- telling ----------------------------------------------------------------------------------------


def test_progress_tells_files_bytes_rate_and_time_left_also_within_one_file(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of hours is not silent until its end; the time left is that of the bytes."""
    monkeypatch.setattr(ReportTimer, "due", lambda pace: True)
    caplog.set_level(logging.INFO)
    pair.put("large", os.urandom(40 * SIZE))
    pair.backup()
    within = r"0 of 1 files, (\d+\.\d) MB in \d+ s \(0 files/s, [\d,.]+ MB/s\), about 0:00:0\d left"
    told = [float(found[1]) for found in map(re.compile(within).search, caplog.messages) if found]
    assert len(set(told)) > 3 and told == sorted(told) and told[-1] > 1


@pytest.mark.parametrize(
    ("done", "seconds", "left"), [(1, 10.0, "0:16:30"), (50, 10.0, "0:00:10"), (100, 10.0, ""), (0, 10.0, "")]
)
def test_time_left_follows_the_files_when_there_are_many(done: int, seconds: float, left: str) -> None:
    """By the rate so far; nothing is said before there is any, or when nothing is left."""
    progress = PullProgress(100)
    progress.summary.transferred = 1000 if done else 0
    assert progress.time_left(done, seconds, []) == (f", about {left} left" if left else "")


# --- a plan there must be ---------------------------------------------------------------------------


def test_a_run_without_a_plan_pulls_nothing(pair: Pair) -> None:
    """The message names the task to clear."""
    pair.mirror.claim()
    run = pair.new_run()
    with pytest.raises(RunIncomplete, match="clear its task fetch_index"):
        pull(pair.mirror, run, 0, pair.connect)
    run.folder.mkdir()
    with pytest.raises(RunIncomplete, match="clear its task diff_indexes"):
        pull(pair.mirror, run, 0, pair.connect)


def test_thousands_of_small_files_and_their_copies_come_in_order(pair: Pair) -> None:
    """More at a time than fit on the channel; results are in path order."""
    for number in range(1500):
        pair.put(f"{number % 7}/{number}", b"%d" % (number // 3))
    assert pair.backup(shards=2).outcomes == {"pulled": 500, "copied": 1000}
    run = pair.mirror.run("manual__1")
    for shard in range(2):
        paths = [result.path for result in read_records(run.results(shard), Result)]
        assert paths == sorted(paths)
    check_whole(pair)
