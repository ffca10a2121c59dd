"""The policy table, row by row, with real files and OpenSSH's sftp-server."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import EntriesFailed, IndexRefused
from airflow_mdbackup.scheme.history.changes import ChangeKind
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.index.canonical import Entry, IndexWriter
from airflow_mdbackup.scheme.store import mirror as mirror_module
from tests.pair import Pair
from tests.unit.backup.policy import LONG_AGO, put_old, whats

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
    run = pair.planned(alpha=(b"one", b"two"))
    stamp = "20300101T000000.000000Z"
    monkeypatch.setattr(mirror_module, "now_stamp", lambda: stamp)
    taken = pair.live(f".old/alpha.{stamp}")
    taken.parent.mkdir()
    taken.write_bytes(b"mine")
    pair.finish(run)
    assert taken.read_bytes() == b"mine"
    assert pair.versions("alpha") == [b"mine", b"one"]


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
