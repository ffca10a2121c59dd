"""The policy table, row by row, with real files and OpenSSH's sftp-server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup.diff import format_changes
from airflow_mdbackup.scheme.backup.plan import Limits
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import (
    ConnectionLost,
    EntriesFailed,
    GuardTripped,
    IndexRefused,
    RunIncomplete,
)
from airflow_mdbackup.scheme.history.changes import ChangeKind
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.index.canonical import Entry, IndexWriter
from airflow_mdbackup.scheme.store import mirror as mirror_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import CutChannel
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair, ServerProcess

# Long before any index, so that a file with this time has not changed since.
LONG_AGO = 1_000_000_000


def put_old(pair: Pair, name: str, content: bytes) -> bytes:
    """Write a file on A that has not been changed for years."""
    path = pair.put(name, content)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def whats(pair: Pair) -> list[str]:
    """Return what the last commit did, in the order of its history."""
    return [change.what for change in pair.history()[-1]]


# --- rows 1 to 5 ------------------------------------------------------------------------------------


def test_new_files_are_pulled_and_an_unchanged_provider_costs_nothing(pair: Pair) -> None:
    """Rows 1, 2 and 5."""
    pair.put("alpha", b"1")
    pair.put("deep/er/bravo", b"22")
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 2}
    assert pair.live("alpha").read_bytes() == b"1"
    assert pair.live("deep/er/bravo").read_bytes() == b"22"
    assert summary.files == 2 and len(pair.index_b()) == 2
    again = pair.backup()
    assert again.outcomes == {} and again.files == 2
    assert len(pair.history()) == 1


def test_a_file_deleted_on_b_by_hand_is_not_copied_again(pair: Pair) -> None:
    """Row 2: the indexes alone decide."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.live("alpha").unlink()
    assert pair.backup().outcomes == {}
    assert not pair.live("alpha").exists() and pair.index_b() == pair.index_a()


def test_a_changed_file_is_replaced_and_its_old_versions_stay(pair: Pair) -> None:
    """Row 3, twice: two versions, none overwritten."""
    for content in (b"one", b"two", b"three"):
        pair.put("alpha", content)
        pair.backup()
    assert pair.live("alpha").read_bytes() == b"three"
    assert pair.versions("alpha") == [b"one", b"two"]
    last = pair.history()[-1][0]
    assert last.what == ChangeKind.REPLACED and last.version is not None
    version = Path(os.fsdecode(os.fsencode(pair.mirror.files) + last.version))
    assert version.read_bytes() == b"two"


def test_a_changed_file_that_was_deleted_on_b_gets_no_version(pair: Pair) -> None:
    """Row 3: only what is there can be archived."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.live("alpha").unlink()
    pair.put("alpha", b"two")
    assert pair.backup().added == 1
    assert pair.live("alpha").read_bytes() == b"two" and pair.versions("alpha") == []


def test_a_file_edited_on_b_is_archived_with_its_true_md5(pair: Pair) -> None:
    """Row 3: what the live file really had counts, not what the index said."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.live("alpha").write_bytes(b"mine")
    pair.put("alpha", b"two")
    pair.backup()
    assert pair.versions("alpha") == [b"mine"]
    assert pair.history()[-1][0].old_md5 == hashlib.md5(b"mine").hexdigest().encode()


def test_a_file_deleted_on_a_leaves_the_index_and_stays_on_disk(pair: Pair) -> None:
    """Row 4."""
    gone = pair.put("alpha", b"1")
    pair.put("bravo", b"2")
    pair.backup()
    os.unlink(gone)
    assert pair.backup().forgotten == 1
    assert pair.live("alpha").read_bytes() == b"1"
    assert pair.index_b() == pair.index_a()
    assert whats(pair) == [ChangeKind.FORGOTTEN]


def test_nothing_at_or_below_an_unreadable_path_is_forgotten(pair: Pair) -> None:
    """Row 4: what A could not read may well be there. The run fails, and all else is committed."""
    at, below = pair.put("closed/file", b"1"), pair.put("shut/deep/file", b"2")
    near = pair.put("shut-not/file", b"3")
    pair.backup()
    for path in (at, below, near):
        os.unlink(path)
    pair.put("new", b"4")
    summary = pair.backup(unreadable=[at, pair.path("shut")])
    assert set(pair.index_b()) == {at, below, pair.path("new")}
    assert (pair.plan.kept, pair.plan.gone, pair.plan.unreadable) == (2, 1, 2)
    assert summary.failed == 2 and summary.forgotten == 1
    with pytest.raises(EntriesFailed, match="closed/file"):
        summary.raise_for_failures("srv1")


@pytest.mark.parametrize("patterns", [["shut/", "!shut/keep"], ["shut", "!keep"]], ids=str)
def test_unreadable_path_is_told_if_a_pattern_takes_back_what_may_be_below(
    pair: Pair, patterns: list[str]
) -> None:
    """Nobody here knows whether it is a directory, and whether what is to be kept is in it."""
    pair.put("shut/keep", b"1")
    pair.put("other", b"2")
    pair.backup(exclude=patterns)
    summary = pair.backup(unreadable=[pair.path("shut")], exclude=patterns)
    assert (pair.plan.unreadable, summary.failed) == (1, 1)
    summary = pair.backup(unreadable=[pair.path("shut")], exclude=patterns[:1])
    assert (pair.plan.unreadable, summary.failed) == (0, 0)


def test_rotten_file_of_the_provider_never_replaces_the_good_copy_and_fails_the_run(pair: Pair) -> None:
    """What rotted there is told each time, until somebody touches it there; what is excluded is not told."""
    rotten, other = pair.put("photo", b"good"), pair.put("other", b"good too")
    pair.backup()
    was = {path: pair.index_b()[path] for path in (rotten, other)}
    pair.put("photo", b"goof")
    pair.put("other", b"goof too")
    pair.put("new", b"1")
    summary = pair.backup(rotten=was, exclude=[other.decode()])
    assert pair.live("photo").read_bytes() == b"good" and not pair.versions("photo")
    assert pair.live("new").read_bytes() == b"1"
    assert (pair.plan.rotten, summary.failed, summary.outcomes[Outcome.ROTTEN]) == (1, 1, 1)
    with pytest.raises(EntriesFailed, match=r"rotten .*photo .*`touch` it there"):
        summary.raise_for_failures("srv1")
    summary = pair.backup()  # touched: it is a changed file like any other
    assert not summary.failed and pair.live("photo").read_bytes() == b"goof"


# --- rows 6 and 7 -----------------------------------------------------------------------------------


def test_a_deleted_consumer_index_means_a_full_copy_without_versions_of_equal_files(pair: Pair) -> None:
    """Row 6: everything is transferred again; only a live file that differs becomes a version."""
    pair.put("equal", b"12345")
    pair.put("different", b"six789")
    pair.backup()
    pair.mirror.index.unlink()
    pair.live("different").write_bytes(b"edited on B")
    inode = pair.live("equal").stat().st_ino
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 2} and pair.transferred == 11
    assert pair.live("equal").read_bytes() == b"12345" and pair.live("equal").stat().st_ino == inode
    assert pair.live("different").read_bytes() == b"six789"
    assert pair.versions("equal") == [] and pair.versions("different") == [b"edited on B"]
    assert pair.index_b() == pair.index_a()
    assert list(pair.mirror.staging.iterdir()) == []


def test_a_file_that_returned_to_a_is_adopted_without_transfer(pair: Pair) -> None:
    """Row 7: the live file still has the bytes."""
    path = pair.put("alpha", b"1")
    pair.put("bravo", b"2")
    pair.backup()
    os.unlink(path)
    pair.backup()
    pair.put("alpha", b"1")
    assert pair.backup().outcomes == {"adopted": 1}
    assert pair.transferred == 0 and pair.versions("alpha") == []
    assert pair.index_b() == pair.index_a()


def test_a_file_that_returned_to_a_with_other_bytes_is_pulled_and_archived(pair: Pair) -> None:
    """Row 7: else."""
    path = pair.put("alpha", b"1")
    pair.put("bravo", b"2")
    pair.backup()
    os.unlink(path)
    pair.backup()
    pair.put("alpha", b"new")
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.live("alpha").read_bytes() == b"new" and pair.versions("alpha") == [b"1"]


# --- rows 8 and 9 -----------------------------------------------------------------------------------


def test_a_move_on_a_is_a_copy_on_b(pair: Pair) -> None:
    """Row 8: no transfer, and two files of their own."""
    pair.put("here", b"content")
    pair.put("stays", b"1")
    pair.backup()
    os.mkdir(pair.path("sub"))
    os.rename(pair.path("here"), pair.path("sub/there"))
    summary = pair.backup()
    assert summary.outcomes == {"copied": 1} and summary.forgotten == 1
    assert pair.transferred == 0
    assert pair.live("sub/there").read_bytes() == b"content" == pair.live("here").read_bytes()
    assert pair.live("sub/there").stat().st_ino != pair.live("here").stat().st_ino


def test_two_files_that_swapped_their_names_cost_no_transfer(pair: Pair) -> None:
    """Row 8: each is copied before the other is replaced."""
    pair.put("one", b"11111")
    pair.put("two", b"22222")
    pair.backup()
    os.rename(pair.path("one"), pair.path("three"))
    os.rename(pair.path("two"), pair.path("one"))
    os.rename(pair.path("three"), pair.path("two"))
    assert pair.backup().outcomes == {"copied": 2}
    assert pair.transferred == 0
    assert pair.live("one").read_bytes() == b"22222" and pair.live("two").read_bytes() == b"11111"
    assert pair.versions("one") == [b"11111"] and pair.versions("two") == [b"22222"]


def test_a_live_file_that_no_longer_has_the_bytes_is_no_source_of_a_copy(pair: Pair) -> None:
    """Row 8: the index is not believed; what is copied is hashed."""
    pair.put("here", b"content")
    pair.backup()
    pair.live("here").write_bytes(b"CONTENT")
    os.rename(pair.path("here"), pair.path("there"))
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.live("there").read_bytes() == b"content" and pair.live("here").read_bytes() == b"CONTENT"


def test_a_moved_file_that_was_deleted_on_b_is_pulled(pair: Pair) -> None:
    """Row 8: there is nothing to copy from, and the plan does not promise it."""
    pair.put("here", b"content")
    pair.backup()
    pair.live("here").unlink()
    os.rename(pair.path("here"), pair.path("there"))
    assert pair.backup().outcomes == {"pulled": 1} and pair.plan.copy == 0


def test_a_moved_and_kept_file_is_copied_however_often(pair: Pair) -> None:
    """Rows 8 and 9 together."""
    pair.put("a", b"content")
    pair.backup()
    for name in ("b", "c", "d"):
        pair.put(name, b"content")
    assert pair.backup().outcomes == {"copied": 3} and pair.transferred == 0
    assert len({pair.live(name).stat().st_ino for name in "abcd"}) == 4


@pytest.mark.parametrize("shards", [1, 3])
def test_equal_files_of_one_plan_are_transferred_once(pair: Pair, shards: int) -> None:
    """Row 9: shards are cut by md5, so that equal files meet; live files never share an inode."""
    for number in range(30):
        pair.put(f"{number:02}", b"content %d" % (number % 5))
    summary = pair.backup(shards=shards)
    assert len(pair.plan.shards) == shards and sum(pair.plan.shards) == 30
    assert summary.outcomes == {"pulled": 5, "copied": 25}
    assert pair.transferred == 5 * len("content 0")
    assert len({pair.live(f"{number:02}").stat().st_ino for number in range(30)}) == 30
    assert all(pair.live(f"{n:02}").read_bytes() == b"content %d" % (n % 5) for n in range(30))


def test_empty_files_are_backed_up_too(pair: Pair) -> None:
    """The seed's alpha and bravo: the same empty content under two names."""
    pair.put("alpha")
    pair.put("bravo")
    assert pair.backup().outcomes == {"pulled": 1, "copied": 1}
    assert pair.live("alpha").read_bytes() == pair.live("bravo").read_bytes() == b""


# --- row 10 -----------------------------------------------------------------------------------------


def test_a_file_that_became_a_directory_moves_out_of_the_way(pair: Pair) -> None:
    """Row 10: as a whole, into .old; history tells."""
    pair.put("x", b"file")
    pair.put("x-1", b"sorts between")
    pair.backup()
    os.unlink(pair.path("x"))
    pair.put("x/y/z", b"1")
    pair.put("x/w", b"2")
    pair.put("x-2", b"new, sorts between")
    assert pair.backup().failed == 0
    assert pair.live("x/y/z").read_bytes() == b"1" and pair.live("x/w").read_bytes() == b"2"
    assert pair.versions("x") == [b"file"]
    assert pair.index_b() == pair.index_a()
    moved = [change for change in pair.history()[-1] if change.what == ChangeKind.MOVED]
    assert [change.path for change in moved] == [pair.path("x")]


def test_a_directory_that_became_a_file_moves_with_its_versions(pair: Pair) -> None:
    """Row 10, the reverse: files, versions below, and files forgotten long ago stay together."""
    pair.put("x/changes", b"1")
    pair.put("x/gone", b"forgotten long ago")
    pair.backup()
    os.unlink(pair.path("x/gone"))
    pair.put("x/changes", b"2")
    pair.backup()
    os.unlink(pair.path("x/changes"))
    os.rmdir(pair.path("x"))
    pair.put("x", b"file")
    assert pair.backup().failed == 0
    assert pair.live("x").read_bytes() == b"file"
    (moved,) = (pair.live("x").parent / ".old").iterdir()
    assert (moved / "changes").read_bytes() == b"2"
    assert (moved / "gone").read_bytes() == b"forgotten long ago"
    assert [p.read_bytes() for p in (moved / ".old").iterdir()] == [b"1"]
    assert pair.index_b() == pair.index_a()


def test_what_is_excluded_leaves_the_index_with_what_goes_out_of_the_way(pair: Pair) -> None:
    """Row 10: and is counted, as the history tells of it."""
    pair.put("x/in", b"1")
    pair.put("x/out", b"2")
    pair.backup()
    shutil.rmtree(pair.path("x"))
    pair.put("x", b"a file now")
    summary = pair.backup(exclude=["out"])
    assert summary.outcomes == {"pulled": 1} and summary.forgotten == 2
    assert whats(pair).count("forgotten") == 2
    check_sound(pair)


@pytest.mark.parametrize("first", ["file", "directory"])
def test_what_was_forgotten_long_ago_still_makes_way(pair: Pair, first: str) -> None:
    """Row 10: judged by B's disk, for B's index no longer knows."""
    before, after = ("x", "x/y") if first == "file" else ("x/y", "x")
    pair.put("other", b"0")
    path = pair.put(before, b"before")
    pair.backup()
    os.unlink(path)
    if first == "directory":
        os.rmdir(pair.path("x"))
    pair.backup()
    pair.put(after, b"after")
    assert pair.backup().failed == 0
    assert pair.live(after).read_bytes() == b"after"
    (old,) = (pair.live("x").parent / ".old").iterdir()
    assert (old if first == "file" else old / "y").read_bytes() == b"before"


def test_a_name_may_change_between_file_and_directory_for_ever(pair: Pair) -> None:
    """Row 10, to and fro: every state stays somewhere."""
    for turn in range(3):
        pair.put("x", b"file %d" % turn)
        assert pair.backup().failed == 0
        os.unlink(pair.path("x"))
        pair.put("x/y", b"below %d" % turn)
        assert pair.backup().failed == 0
        os.unlink(pair.path("x/y"))
        os.rmdir(pair.path("x"))
    everything = {p.read_bytes() for p in pair.mirror.files.rglob("*") if p.is_file()}
    assert everything == {b"%s %d" % (what, turn) for what in (b"file", b"below") for turn in range(3)}


# --- rows 11 to 13 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".old/file", "deep/.old/er/file", ".old"])
def test_the_name_old_is_reserved(pair: Pair, name: str) -> None:
    """Row 11: refused, with the path in the message, and nothing is changed."""
    path = pair.put(name, b"1")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    with pytest.raises(IndexRefused, match=r"reserved") as caught:
        pair.diff(run)
    assert path.decode() in str(caught.value)
    assert not run.plan.exists() and not any(pair.mirror.files.iterdir())


def test_exclude_silences_a_reserved_name_on_purpose(pair: Pair) -> None:
    """Row 11: then the rest is backed up."""
    pair.put(".old/file", b"1")
    pair.put("other.old/file", b"2")
    assert pair.backup(exclude=[".old/"]).outcomes == {"pulled": 1}
    assert set(pair.index_b()) == {pair.path("other.old/file")}


def test_exclude_is_applied_to_both_indexes(pair: Pair) -> None:
    """What is excluded is neither pulled nor forgotten."""
    pair.put("keep.log", b"1")
    pair.put("a.txt", b"2")
    pair.backup()
    os.unlink(pair.path("keep.log"))
    pair.put("new.log", b"3")
    pair.put("cache/x", b"4")
    summary = pair.backup(exclude=["*.log", "cache/"])
    assert summary.outcomes == {} and summary.forgotten == 0
    assert set(pair.index_b()) == {pair.path("keep.log"), pair.path("a.txt")}


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 228, "n" * 229])
def test_a_file_with_a_long_name_can_be_replaced(pair: Pair, name: str) -> None:
    """Row 12: the version's name is shortened where it must be."""
    for content in (b"one", b"two", b"three"):
        pair.put(name, content)
        assert pair.backup().failed == 0
    assert pair.live(name).read_bytes() == b"three"
    old = sorted((pair.live("x").parent / ".old").iterdir(), key=lambda path: path.stat().st_ctime_ns)
    assert {path.read_bytes() for path in old} == {b"one", b"two"}
    recorded = [change.version for commit in pair.history() for change in commit if change.version]
    assert {os.path.basename(version) for version in recorded} == {os.fsencode(path.name) for path in old}


def test_versions_stay_distinct_when_the_clock_goes_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 13: stamps never go back, so that versions and history stay in order."""
    stamps = iter(["20300101T000000.000000Z", "20300101T000000.000000Z", "20200101T000000.000000Z"])
    frozen = [next(stamps)]
    monkeypatch.setattr(mirror_module, "now_stamp", lambda: frozen[0])
    for content in (b"one", b"two", b"three", b"four"):
        pair.put("alpha", content)
        pair.backup()
        frozen[0] = next(stamps, frozen[0])
    assert pair.versions("alpha") == [b"one", b"two", b"three"]
    assert [commit[0].md5 for commit in pair.history()][-1] == pair.index_a()[pair.path("alpha")]
    names = [path.name[:23] for path in sorted(pair.mirror.history.iterdir())]
    assert len(set(names)) == 4


def test_an_existing_version_name_is_never_overwritten(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 13: if the name is taken all the same, the next one is used."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.put("alpha", b"two")
    pair.build_index()
    run = pair.prepare()
    stamp = "20300101T000000.000000Z"
    monkeypatch.setattr(mirror_module, "now_stamp", lambda: stamp)
    taken = pair.live(f".old/alpha.{stamp}")
    taken.parent.mkdir()
    taken.write_bytes(b"mine")
    pair.finish(run)
    assert taken.read_bytes() == b"mine"
    assert pair.versions("alpha") == [b"mine", b"one"]


# --- rows 14 and 15 ---------------------------------------------------------------------------------


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


# --- row 16 -----------------------------------------------------------------------------------------


def guarded(pair: Pair, **options: object) -> list[str]:
    """Return why the guard stops a run with A as it is now, making sure that it changes nothing."""
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    before = pair.mirror.index.read_bytes() if pair.mirror.index.exists() else b""
    try:
        pair.diff(run, **options)
    except GuardTripped as error:
        assert not run.plan.exists()
        with pytest.raises(RunIncomplete):
            pair.commit(run)
        assert (pair.mirror.index.read_bytes() if pair.mirror.index.exists() else b"") == before
        assert "nothing was changed" in str(error)
        plan = pair.diff(run, may_trip=True, **options)
        assert plan.guard and all(reason in str(error) for reason in plan.guard)
        return plan.guard
    return []


def test_an_empty_provider_index_trips_the_guard_on_a_first_run_too(pair: Pair) -> None:
    """Row 16: unless that is allowed."""
    assert guarded(pair) == ["the provider's index is empty"]
    assert guarded(pair, allow_empty=True) == []
    assert pair.backup(allow_empty=True).files == 0
    assert pair.mirror.index.read_bytes() == b"# mdbackup end format=1 files=0 unreadable=0\n"


def test_an_index_whose_entries_are_all_excluded_is_empty(pair: Pair) -> None:
    """Row 16: the guard judges after exclude."""
    pair.put("a.log", b"1")
    assert guarded(pair, exclude=["*.log"]) == ["the provider's index is empty"]


def test_a_source_that_has_lost_all_its_entries_trips_the_guard(pair: Pair) -> None:
    """Row 16: however few they are; a source that never had any does not."""
    path = pair.put("one/file", b"1")
    pair.put("two/file", b"2")
    sources = {"source": [pair.path("one"), pair.path("two/"), pair.path("new")]}
    pair.backup(**sources)
    os.unlink(path)
    (reason,) = guarded(pair, **sources)
    assert reason == f"nothing is left of 1 entries in {pair.a}/one"
    assert guarded(pair, allow_empty=True, **sources) == []


def test_a_source_that_a_cannot_read_has_not_lost_its_entries(pair: Pair) -> None:
    """Rows 4 and 16: nothing of it would be forgotten, so that the rest can be backed up."""
    path = pair.put("one/file", b"1")
    pair.put("two/file", b"2")
    sources = {"source": [pair.path("one"), pair.path("two")]}
    pair.backup(**sources)
    os.unlink(path)
    pair.put("two/new", b"3")
    summary = pair.backup(unreadable=[pair.path("one")], **sources)
    assert summary.outcomes["pulled"] == 1 and summary.failed == 1
    assert path in pair.index_b()


def fill(pair: Pair, content: bytes, numbers: range) -> None:
    for number in numbers:
        pair.put(f"{number:03}", b"%d %s" % (number, content))


def test_a_source_that_could_not_be_read_is_named_when_nothing_is_left(pair: Pair) -> None:
    """Row 16: a source that is misspelt must not look like one that is empty."""
    pair.build_index(unreadable=[pair.path("misspelt")])
    run = pair.new_run()
    pair.fetch(run)
    with pytest.raises(GuardTripped, match=r"empty, because it could not read .*/misspelt\. .* allow_empty"):
        pair.diff(run)


def test_too_many_changed_entries_trip_the_guard(pair: Pair) -> None:
    """Row 16: over half of more than a hundred."""
    fill(pair, b"one", range(102))
    pair.backup()
    fill(pair, b"two", range(51))
    assert guarded(pair) == []
    fill(pair, b"two", range(52))
    told = "0 gone and 52 changed of 102 entries"
    first = ", ".join(pair.path(f"{number:03}").decode() for number in range(3))
    assert guarded(pair) == [f"{told}, over 50% (such as {first})"]
    assert guarded(pair, limits=Limits(share=1.0, number=51)) == [f"{told}, over 51 (such as {first})"]
    assert guarded(pair, limits=Limits(share=1.0, number=52)) == []
    assert guarded(pair, limits=Limits(above=102)) == []


def test_too_many_gone_entries_trip_the_guard_and_kept_ones_are_not_gone(pair: Pair) -> None:
    """Row 16, with row 4."""
    fill(pair, b"one", range(102))
    pair.backup()
    for number in range(52):
        os.unlink(pair.path(f"{number:03}"))
    (reason,) = guarded(pair)
    assert reason.startswith("52 gone and 0 changed of 102 entries, over 50% (such as ")
    assert pair.backup(unreadable=[pair.path("000")]).forgotten == 51


def test_gone_and_changed_entries_trip_the_guard_together(pair: Pair) -> None:
    """Row 16: who renames a third and spoils a third has spoiled two thirds."""
    fill(pair, b"one", range(102))
    pair.backup()
    for number in range(34):
        os.unlink(pair.path(f"{number:03}"))
    fill(pair, b"two", range(34, 68))
    (reason,) = guarded(pair)
    assert reason.startswith("34 gone and 34 changed of 102 entries, over 50% (such as ")


def test_a_source_that_is_one_file_trips_the_guard_when_it_is_gone(pair: Pair) -> None:
    """Row 16: a configured source that had entries has none."""
    pair.put("kept", b"1")
    path = pair.put("single", b"2")
    pair.backup()
    os.unlink(path)
    assert guarded(pair, source=[path]) == [f"nothing is left of 1 entries in {path.decode()}"]


def test_an_override_of_the_guard_is_for_one_index(pair: Pair) -> None:
    """For a retry too, but not for another index that the run gets when its tasks are cleared."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"1")
    pair.backup()
    os.unlink(pair.path("alpha"))
    pair.build_index()
    limits = Limits(share=0.1, above=0)
    run = pair.new_run()
    pair.fetch(run)
    for _ in range(2):
        plan = pair.diff(run, limits=limits, override=True)
        assert plan.guard and plan.overridden and plan.gone == 1
    with pytest.raises(GuardTripped):
        pair.diff(run, limits=limits)
    before = pair.index.decode() + ".before"
    os.rename(pair.index, before)
    os.unlink(pair.path("bravo"))
    pair.put("charlie", b"3")
    pair.build_index()
    pair.fetch(run)
    with pytest.raises(GuardTripped):
        pair.diff(run, limits=limits, override=True)
    plan = pair.diff(run, limits=limits, override=True, may_trip=True)
    assert plan.guard and not plan.overridden
    os.rename(before, pair.index)
    pair.fetch(run)
    pair.pull(run, pair.diff(run, limits=limits, override=True))
    assert pair.finish(run).forgotten == 1


def test_an_override_of_the_guard_is_used_up_though_the_runs_directory_is_gone(pair: Pair) -> None:
    """The run is cleared long after it was committed."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"1")
    pair.backup()
    limits = Limits(share=0.1, above=0)
    run = pair.new_run()
    for name in ("alpha", "bravo"):
        os.unlink(pair.path(name))
        pair.put("charlie", name.encode())
        pair.build_index()
        pair.fetch(run)
        if name == "alpha":
            pair.pull(run, pair.diff(run, limits=limits, override=True))
            pair.finish(run)
            shutil.rmtree(run.folder)
    with pytest.raises(GuardTripped):
        pair.diff(run, limits=limits, override=True)


def test_an_approved_plan_is_carried_out(pair: Pair) -> None:
    """Row 16: a plan that tripped the guard is there for a person to approve."""
    fill(pair, b"one", range(102))
    pair.backup()
    fill(pair, b"two", range(102))
    assert pair.backup(may_trip=True).replaced == 102


# --- row 17 -----------------------------------------------------------------------------------------


def test_a_symlinked_directory_in_the_mirror_is_never_followed(pair: Pair, tmp_path: Path) -> None:
    """Row 17: its files fail, named; all others are committed, and nothing lands outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"mine")
    pair.put("dir/victim", b"one")
    pair.backup()
    real = pair.live("dir")
    real.rename(tmp_path / "kept")
    real.symlink_to(outside)
    pair.put("dir/victim", b"two")
    pair.put("dir/new", b"3")
    pair.put("good", b"4")
    summary = pair.backup()
    assert summary.outcomes == {"failed": 2, "pulled": 1} and summary.failed == 2
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_bytes() == b"mine"
    assert pair.live("good").read_bytes() == b"4"
    assert all("is a symlink in the mirror" in failure for failure in summary.failures)


def test_a_symlink_at_a_live_name_moves_out_of_the_way(pair: Pair, tmp_path: Path) -> None:
    """Row 17: neither followed nor written through; it becomes a version as it is."""
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    pair.put("alpha", b"one")
    pair.backup()
    pair.live("alpha").unlink()
    pair.live("alpha").symlink_to(target)
    pair.put("alpha", b"two")
    assert pair.backup().failed == 0
    assert target.read_bytes() == b"mine"
    assert not pair.live("alpha").is_symlink() and pair.live("alpha").read_bytes() == b"two"
    (old,) = (pair.live("alpha").parent / ".old").iterdir()
    assert old.is_symlink()


def test_a_symlink_is_no_source_of_a_copy_and_is_not_adopted(pair: Pair, tmp_path: Path) -> None:
    """Rows 7, 8 and 17: its target's bytes are not ours."""
    (tmp_path / "target").write_bytes(b"content")
    pair.put("alpha", b"content")
    pair.backup()
    pair.live("alpha").unlink()
    pair.live("alpha").symlink_to(tmp_path / "target")
    pair.put("bravo", b"content")
    assert pair.backup().outcomes == {"pulled": 1}


@pytest.mark.parametrize("planted", ["symlink", "file"])
def test_a_thing_in_the_place_of_old_fails_only_the_files_beside_it(
    pair: Pair, tmp_path: Path, planted: str
) -> None:
    """Row 17: without a place for their versions they are not replaced."""
    pair.put("dir/alpha", b"one")
    pair.put("good", b"one")
    pair.backup()
    if planted == "symlink":
        pair.live("dir/.old").symlink_to(tmp_path)
    else:
        pair.live("dir/.old").write_bytes(b"")
    pair.put("dir/alpha", b"two")
    pair.put("good", b"more")
    summary = pair.backup()
    assert summary.outcomes == {"failed": 1, "pulled": 1}
    assert pair.live("dir/alpha").read_bytes() == b"one" and pair.live("good").read_bytes() == b"more"
    assert "dir/.old" in summary.failures[0]


def test_a_fifo_in_the_mirror_stops_nothing(pair: Pair) -> None:
    """Row 17: it is not opened in a way that waits, and moves out of the way."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.live("alpha").unlink()
    os.mkfifo(pair.live("alpha"))
    pair.put("alpha", b"two")
    assert pair.backup().failed == 0
    assert pair.live("alpha").read_bytes() == b"two"


# --- row 19 -----------------------------------------------------------------------------------------


# Only root's server can read a file that its owner may not.
UNREADABLE = 0o040 if os.geteuid() == 0 else 0o440


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(0o644, 0o644), (UNREADABLE, 0o440), (0o4755, 0o755), (0o2751, 0o751), (0o1600, 0o600)],
)
def test_time_and_mode_of_a_are_kept(pair: Pair, theirs: int, ours: int) -> None:
    """Row 19: the owner can always read, and no file is setuid here."""
    path = put_old(pair, "alpha", b"one")
    copy = put_old(pair, "copy", b"one")
    os.utime(copy, (LONG_AGO + 1, LONG_AGO + 1))
    os.chmod(path, theirs)
    os.chmod(copy, 0o600)
    pair.backup()
    status = pair.live("alpha").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (ours, LONG_AGO)
    status = pair.live("copy").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o600, LONG_AGO + 1)


def test_a_version_keeps_the_time_and_mode_that_it_had(pair: Pair) -> None:
    """Row 19."""
    path = put_old(pair, "alpha", b"one")
    os.chmod(path, 0o640)
    pair.backup()
    pair.put("alpha", b"two")
    os.chmod(path, 0o600)
    pair.backup()
    (version,) = (pair.live("alpha").parent / ".old").iterdir()
    status = version.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o640, LONG_AGO)


def test_dest_is_for_its_owner_only(pair: Pair) -> None:
    """What others could not read on A, they cannot read here."""
    pair.put("alpha", b"one")
    pair.backup()
    assert stat.S_IMODE(pair.mirror.dest.stat().st_mode) == 0o700


# --- names ------------------------------------------------------------------------------------------


def test_awkward_names_go_through_the_whole_scheme(pair: Pair) -> None:
    """Each byte that a name can have, changed and replaced, with history and versions."""
    every = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    awkward = [*every, b" lead", b"trail ", b"-rf", b"$(x)`y`;&|", b"*?[a]", b"a\nb\r\nc\\", b".\n", b"..\n"]
    for content in (b"one ", b"two "):
        for name in awkward:
            pair.put(b"names/" + name, content + name)
        assert pair.backup(may_trip=True).failed == 0
    assert pair.index_b() == pair.index_a() and len(pair.index_b()) == len(awkward)
    for name in awkward:
        assert pair.live(b"names/" + name).read_bytes() == b"two " + name
    assert len(list(pair.live("names/.old").iterdir())) == len(awkward)
    assert {change.path for change in pair.history()[-1]} == {pair.path(b"names/" + n) for n in awkward}


@pytest.mark.parametrize("depth", [100, 1900])
def test_a_very_deep_path_is_backed_up_or_fails_alone(pair: Pair, depth: int) -> None:
    """However many directories a path has. This one is gone from A."""
    pair.put("first", b"0")
    pair.backup()
    pair.put("good", b"1")
    deep = pair.path("/".join("d" * depth)) + b"/f"
    pair.build_index()
    entries = [Entry(path, md5) for path, md5 in pair.index_a().items()]
    entries.append(Entry(deep, entries[0].md5))
    with IndexWriter(Path(os.fsdecode(pair.index))) as writer:
        for entry in sorted(entries):
            writer.add(*entry)
    summary = pair.finish(pair.prepare())
    assert summary.outcomes == {"pulled": 1, "vanished": 1}


def test_deep_directories_are_told_apart_when_they_move(pair: Pair) -> None:
    """Row 10 more directories down than descriptors are kept open."""
    folder = "/".join(["d"] * 150)
    pair.put(f"{folder}/x", b"file")
    pair.put(f"{folder}/change", b"one")
    pair.backup()
    os.unlink(pair.path(f"{folder}/x"))
    pair.put(f"{folder}/x/y", b"below")
    pair.put(f"{folder}/change", b"two")
    assert pair.backup().failed == 0
    assert pair.live(f"{folder}/x/y").read_bytes() == b"below"
    assert pair.versions(f"{folder}/change") == [b"one"] and pair.versions(f"{folder}/x") == [b"file"]


def test_history_leads_from_nothing_to_the_consumer_index(pair: Pair) -> None:
    """Applied in the order of their names, the files of history give the index after each commit."""
    pair.put("a", b"1")
    pair.put("b", b"2")
    states = []
    for step in range(4):
        pair.put("a", b"%d" % step)
        pair.put(f"new{step}", b"x%d" % step)
        if step == 2:
            os.unlink(pair.path("b"))
        pair.backup()
        states.append(pair.index_b())
    state: dict[bytes, bytes] = {}
    for expected, changes in zip(states, pair.history(), strict=True):
        for change in changes:
            if change.what == ChangeKind.MOVED:
                continue
            state.pop(change.path, None)
            if change.md5:
                state[change.path] = change.md5
        assert state == expected


def test_status_tells_the_last_good_run_and_the_last_commit(pair: Pair) -> None:
    """A run with failures is a commit, and no good run."""
    pair.put("alpha", b"1")
    pair.backup()
    good = json.loads(pair.mirror.status.read_text())
    assert good["last_good"] == good["last_commit"] and good["last_good"]["run_id"] == "manual__1"
    pair.put("bravo", b"2")
    pair.backup(unreadable=[pair.path("x")])
    status = json.loads(pair.mirror.status.read_text())
    assert status["last_good"] == good["last_good"] and status["last_commit"]["run_id"] == "manual__2"
    assert status["last_commit"]["outcomes"] == {"pulled": 1, "unreadable": 1}


# --- a run that is limited to some paths ------------------------------------------------------------


def test_a_run_of_some_paths_touches_and_forgets_nothing_else(pair: Pair) -> None:
    """Both indexes are limited, so that what is outside is neither new nor gone; a file is a path, too."""
    for name in ("in/one", "in/two", "in-between", "out/three", "out/four", "single"):
        pair.put(name, name.encode())
    pair.backup()
    for name in ("in/one", "in-between", "out/three", "single"):
        pair.put(name, f"{name}, changed".encode())
    for name in ("in/two", "out/four"):
        os.unlink(pair.path(name))
    summary = pair.backup(only=[pair.path("in") + b"/", pair.path("single")])
    assert summary.outcomes == {"pulled": 2} and summary.forgotten == 1
    assert pair.live("in/one").read_bytes() == b"in/one, changed"
    assert pair.live("single").read_bytes() == b"single, changed"
    assert pair.live("in-between").read_bytes() == b"in-between"
    assert set(pair.index_b()) == set(
        map(pair.path, ("in/one", "in-between", "out/three", "out/four", "single"))
    )
    assert pair.backup().outcomes == {"pulled": 2}
    assert pair.index_b() == pair.index_a()
    check_sound(pair)


def test_a_plan_is_formatted_up_to_a_number_of_lines_of_each_kind(pair: Pair) -> None:
    """With rclone's marks, and names that act on nothing."""
    for name in ("changed", "gone"):
        pair.put(name, b"1")
    pair.backup()
    pair.put("changed", b"2")
    os.unlink(pair.path("gone"))
    for number in range(4):
        pair.put(f"new\x1b{number}", b"%d" % number)
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    a = os.fsdecode(pair.path(""))
    told = list(format_changes(run, pair.diff(run), most=3))
    new = [f"+ {a}new\\x1b{number}" for number in range(3)]
    assert told == [f"* {a}changed", *new, f"- {a}gone", "+ and 1 more"]


def test_a_run_of_some_paths_is_no_good_backup(pair: Pair) -> None:
    """Whoever watches must not take it for one."""
    pair.put("in/one", b"1")
    pair.put("out/two", b"2")
    pair.backup()
    good = pair.mirror.read_status()["last_good"]
    assert pair.backup(only=[pair.path("in")]).partial
    status = pair.mirror.read_status()
    assert status["last_good"] == good and status["last_commit"]["run_id"] != good["run_id"]


def test_a_run_of_some_paths_fails_only_for_what_is_unreadable_there(pair: Pair) -> None:
    """Or around it."""
    pair.put("in/one", b"1")
    pair.put("out/two", b"2")
    assert pair.backup(unreadable=[pair.path("out")], only=[pair.path("in")]).failed == 0
    assert pair.backup(unreadable=[pair.path("in/x")], only=[pair.path("in")]).failed == 1
    assert pair.backup(unreadable=[os.fsencode(pair.a)], only=[pair.path("in")]).failed == 1


def test_paths_of_which_nothing_is_anywhere_are_refused(pair: Pair) -> None:
    """A typing error must not look like a backup; while what is gone on A only is forgotten."""
    pair.put("in/one", b"1")
    pair.put("out/two", b"2")
    pair.backup()
    with pytest.raises(IndexRefused, match=r"neither index has anything at .*/inn"):
        pair.backup(only=[pair.path("inn")])
    os.unlink(pair.path("in/one"))
    assert pair.backup(only=[pair.path("in")]).forgotten == 1


def test_a_run_of_some_paths_supersedes_none_of_all(pair: Pair) -> None:
    """One that had begun before, and goes on later, brings the rest; what is newer here stays."""
    for name in ("in/one", "out/two"):
        pair.put(name, name.encode())
    pair.backup()
    for name in ("in/one", "out/two"):
        pair.put(name, f"{name}, changed".encode())
    pair.build_index()
    whole = pair.prepare()
    pair.put("in/one", b"changed again")
    pair.backup(only=[pair.path("in")])
    assert not pair.finish(whole).superseded
    assert pair.live("in/one").read_bytes() == b"changed again"
    assert pair.index_b() == pair.index_a()
    check_sound(pair)


def test_a_superseded_run_is_doubtful_if_the_newer_one_was_not_good(pair: Pair) -> None:
    """So that nobody is told of a good backup."""
    for good in (True, False):
        pair.put("a", b"new, %d" % good)
        pair.build_index()
        older, newer = pair.prepare(), pair.new_run()
        pair.fetch(newer)
        plan = pair.diff(newer)
        if good:
            pair.pull(newer, plan)
        assert (pair.finish(newer).failed == 0) is good
        summary = pair.finish(older)
        assert summary.superseded and summary.doubtful is not good
