"""Files that change, vanish or cannot be read while a run pulls them (rows 14 and 15 of the policy table)."""

from __future__ import annotations

import os

import pytest

from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import ConnectionLost, EntriesFailed
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import CutChannel
from tests.pair import Pair, ServerProcess
from tests.unit.backup.policy import put_old


def test_a_file_that_changed_after_the_index_is_a_warning(pair: Pair) -> None:
    """Row 14: the live file and its entry stay, and the next run gets it."""
    pair.put("alpha", b"one")
    pair.put("steady", b"0")
    pair.backup()
    before = pair.index_b()
    pair.put("alpha", b"two")
    pair.build_index()
    pair.put("alpha", b"three, since")
    summary = pair.finish(pair.prepare())
    assert summary.outcomes == {"changed": 1} and summary.failed == 0
    assert pair.live("alpha").read_bytes() == b"one" and pair.index_b() == before
    assert pair.versions("alpha") == []
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.live("alpha").read_bytes() == b"three, since"


def test_other_bytes_with_an_old_time_are_corrupt(pair: Pair) -> None:
    """Row 14: nothing on A says that the file was changed, so that it arrived wrong or A's disk is bad."""
    put_old(pair, "alpha", b"one")
    pair.backup()
    before = pair.index_b()
    put_old(pair, "alpha", b"two")
    pair.put("good", b"2")
    pair.build_index()
    put_old(pair, "alpha", b"tvo")
    summary = pair.finish(pair.prepare())
    assert summary.outcomes == {"corrupt": 1, "pulled": 1} and summary.failed == 1
    assert pair.live("alpha").read_bytes() == b"one"
    assert pair.index_b() == {**before, pair.path("good"): pair.index_a()[pair.path("good")]}
    assert list(pair.mirror.staging.iterdir()) == []
    with pytest.raises(EntriesFailed, match=r"corrupt .*alpha.*all others|all others.*corrupt .*alpha"):
        summary.raise_for_failures("srv1")


def test_a_file_that_changes_in_three_runs_in_a_row_is_a_failure(pair: Pair) -> None:
    """Row 14: a file that never holds still is worth a person's look. A quiet run begins the count anew."""

    def run() -> int:
        pair.put("busy", os.urandom(8))
        pair.build_index()
        pair.put("busy", os.urandom(8))
        summary = pair.finish(pair.prepare())
        assert summary.outcomes == {"changed": 1}
        return summary.failed

    assert [run(), run()] == [0, 0]
    assert pair.backup().failed == 0
    assert [run(), run(), run()] == [0, 0, 1]


@pytest.mark.parametrize("without", ["limited", "lost shard", "failed"])
def test_a_run_that_does_not_come_to_a_file_says_nothing_of_it(pair: Pair, without: str) -> None:
    """Row 14: the count of runs in a row goes on."""
    for name in ("busy", "calm", "zealous"):
        pair.put(name, b"0")
    for number in (1, 2, 3):
        pair.put("busy", b"%d" % number)
        pair.put("zealous", b"%d" % number)
        pair.build_index()
        pair.put("busy", b"%d, since" % number)
        pair.put("zealous", b"%d, since" % number)
        summary = pair.finish(pair.prepare())
        assert summary.outcomes["changed"] == 2 and summary.failed == (2 if number == 3 else 0)
        pair.put("calm", b"%d" % number)
        pair.build_index()
        if without == "limited":
            pair.finish(pair.prepare(only=[pair.path("calm")]))
        elif without == "lost shard":
            run = pair.new_run()
            pair.fetch(run)
            assert pair.diff(run).shards == [3]
            pair.finish(run)
        else:
            run = pair.new_run()
            pair.fetch(run)
            pair.diff(run)
            pair.servers.append(ServerProcess())
            with pytest.raises(ConnectionLost):
                pull(pair.mirror, run, 0, lambda: Reader(CutChannel(pair.servers[-1].channel, 1)))
            pair.finish(run)


def test_runs_that_had_the_same_index_count_as_one_for_what_changed_after_it(pair: Pair) -> None:
    """Row 14: a backfill is planned side by side, and cron on A builds an index less often than we run."""
    pair.put("busy", b"1")
    pair.build_index()
    runs = [pair.new_run() for _ in range(4)]
    for run in runs:
        pair.fetch(run)
    pair.put("busy", b"2")
    for run in runs:
        pair.pull(run, pair.diff(run))
        summary = pair.finish(run)
        assert summary.outcomes == {"changed": 1} and summary.failed == 0


def test_committing_one_run_again_does_not_count_as_another_change(pair: Pair) -> None:
    """Row 14: three runs, not three tries."""
    pair.put("busy", b"1")
    pair.build_index()
    pair.put("busy", b"2")
    run = pair.prepare()
    assert [pair.finish(run).failed for _ in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 50, b"[]\n", b'{"format": 1}\n', b'{"format": 1, "run_id": "x"}\n{"path": 1}\n', b"\xff"],
)
def test_a_spoilt_count_of_changes_is_as_if_it_were_not_there(
    pair: Pair, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """It fails no commit; the counting begins anew, and somebody is told unless nothing was lost."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.mirror.changing.write_bytes(content)
    for runs in (1, 2, 3):
        pair.put("alpha", b"new %d" % runs)
        pair.build_index()
        pair.put("alpha", b"newer %d" % runs)
        summary = pair.finish(pair.prepare())
        assert summary.outcomes == {"changed": 1} and summary.failed == (runs == 3)
    assert ("It is unknown which files changed in earlier runs" in caplog.text) == (
        content != b'{"format": 1}\n'
    )


def test_a_file_that_is_gone_from_a_is_a_warning(pair: Pair) -> None:
    """Row 15."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.put("alpha", b"two")
    new = pair.put("new", b"3")
    pair.build_index()
    os.unlink(new)
    os.unlink(pair.path("alpha"))
    summary = pair.finish(pair.prepare())
    assert summary.outcomes == {"vanished": 2} and summary.failed == 0
    assert pair.live("alpha").read_bytes() == b"one" and not pair.live("new").exists()


def test_a_file_that_may_not_be_read_fails_the_run_and_no_other_file(limited_pair: Pair) -> None:
    """Denied: the rest is committed."""
    pair = limited_pair
    pair.put("open", b"1")
    pair.put("closed", b"2")
    pair.put("twin of closed", b"2")
    pair.build_index()
    os.chmod(pair.path("closed"), 0)
    summary = pair.finish(pair.prepare())
    assert summary.outcomes == {"pulled": 2, "denied": 1} and summary.failed == 1
    assert set(pair.index_b()) == {pair.path("open"), pair.path("twin of closed")}
    with pytest.raises(EntriesFailed, match=r"denied .*closed"):
        summary.raise_for_failures("srv1")
