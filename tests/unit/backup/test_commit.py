"""Archive and commit: overlapping, repeated, and crashed at every step."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import airflow_mdbackup.scheme.backup.commit as commit_module
from airflow_mdbackup.scheme.backup import commit_content
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged, RunIncomplete
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import ChangeKind, commits, last, pending
from airflow_mdbackup.scheme.history.journal import Transaction, recover
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crash_at, numbers_to_try
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair, md5


def files_of(mirror: Mirror) -> dict[str, tuple[int, bytes]]:
    """Return inode and content of all live files and versions, by path."""
    return {
        str(path.relative_to(mirror.files)): (path.stat().st_ino, path.read_bytes())
        for path in mirror.files.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


# --- overlapping runs -------------------------------------------------------------------------------


def test_a_run_with_an_older_index_is_superseded_and_changes_nothing(pair: Pair) -> None:
    """Its index was fetched before that of one committed since; what it archived is taken back."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.put("alpha", b"two")
    pair.build_index()
    old = pair.prepare()
    pair.archive(old)
    pair.put("alpha", b"three")
    assert pair.backup().outcomes == {"pulled": 1}
    before = pair.mirror.index.read_bytes()
    assert pair.versions("alpha") == [b"one", b"one"]
    summary = pair.commit(old)
    assert summary.superseded and summary.files == 1
    assert summary.outcomes == {"superseded": 1} and summary.failed == 0
    assert pair.mirror.index.read_bytes() == before
    assert pair.live("alpha").read_bytes() == b"three" and pair.versions("alpha") == [b"one"]
    (change,) = pair.history()[-1]
    assert change.version is not None and change.version.endswith(b"Z")
    assert os.path.exists(os.fsencode(pair.mirror.files) + change.version)


def test_what_was_committed_last_is_known_without_the_status(pair: Pair) -> None:
    """A kill may come between the history and the status."""
    pair.put("alpha", b"one")
    pair.backup()
    status = pair.mirror.status.read_bytes()
    pair.put("bravo", b"two")
    pair.build_index()
    old = pair.prepare()
    os.unlink(pair.path("bravo"))
    pair.put("alpha", b"three")
    pair.backup()
    pair.mirror.status.write_bytes(status)
    assert pair.finish(old).outcomes == {"superseded": 1}
    assert pair.index_b() == pair.index_a()


def test_a_version_that_was_archived_for_a_superseded_run_is_withdrawn(pair: Pair) -> None:
    """A version is what was displaced; a file that is still live is none."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"1")
    pair.backup()
    pair.put("alpha", b"two")
    pair.build_index()
    old = pair.prepare()
    pair.archive(old)
    assert pair.versions("alpha") == [b"one"]
    pair.put("alpha", b"one")
    pair.put("bravo", b"2")
    pair.backup()
    assert pair.commit(old).outcomes == {"superseded": 1}
    assert pair.versions("alpha") == [] and pair.live("alpha").read_bytes() == b"one"


@pytest.mark.parametrize("links", ["links", "no links"])
def test_a_version_whose_bytes_are_nowhere_else_is_never_taken_back(
    pair: Pair, links: str, request: pytest.FixtureRequest
) -> None:
    """Its run is superseded, but somebody has replaced the live file on B meanwhile, by one of its size."""
    if links == "no links":
        request.getfixturevalue("no_links")
    pair.put("alpha", b"one")
    pair.backup()
    pair.put("alpha", b"two")
    pair.build_index()
    old = pair.prepare()
    pair.archive(old)
    pair.live("alpha").unlink()
    pair.live("alpha").write_bytes(b"own")
    pair.put("bravo", b"1")
    pair.put("alpha", b"one")
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.commit(old).superseded
    assert pair.versions("alpha") == [b"one"]


def test_an_entry_that_a_run_in_between_has_changed_is_judged_again(pair: Pair) -> None:
    """The run with the older index commits first; the newer one finds another predecessor than planned."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"1")
    pair.backup()
    pair.put("alpha", b"two")
    pair.build_index()
    first = pair.prepare()
    pair.put("bravo", b"2")
    pair.build_index()
    second = pair.prepare()
    pair.archive(second)
    assert pair.finish(first).outcomes == {"pulled": 1}
    assert pair.commit(second).outcomes == {"superseded": 1, "pulled": 1}
    assert pair.live("alpha").read_bytes() == b"two" and pair.live("bravo").read_bytes() == b"2"
    # Both runs archived it; what is not known to be live is not taken back.
    assert set(pair.versions("alpha")) == {b"one"} and pair.versions("bravo") == [b"1"]
    assert pair.index_b() == pair.index_a()


def test_versions_get_the_stamp_of_the_commit_that_displaced_them(pair: Pair) -> None:
    """Also when another run was committed between archive and commit; and no stamp is used twice."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"1")
    pair.backup()
    pair.put("bravo", b"2")
    pair.build_index()
    first = pair.prepare()
    pair.put("bravo", b"1")
    pair.put("alpha", b"two")
    pair.build_index()
    second = pair.prepare()
    pair.archive(second)
    pair.finish(first)
    pair.commit(second)
    stamps = [path.name[:23] for path in commits(pair.mirror)]
    assert stamps == sorted(set(stamps))
    for path, changes in zip(commits(pair.mirror), pair.history(), strict=True):
        for change in changes:
            if change.version is not None:
                assert change.version.endswith(b"." + path.name[:23].encode())
                assert Path(os.fsdecode(os.fsencode(pair.mirror.files) + change.version)).exists()
    assert pair.versions("alpha") == [b"one"]


def test_a_file_that_was_replaced_by_hand_after_archiving_is_archived_again(pair: Pair) -> None:
    """Both the file that was archived and the one that is live by then stay."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.put("alpha", b"two")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    pair.live("alpha").unlink()
    pair.live("alpha").write_bytes(b"mine")
    assert pair.commit(run).replaced == 1
    assert sorted(pair.versions("alpha")) == [b"mine", b"one"]
    assert pair.history()[-1][0].old_md5 == md5(b"mine")


def test_content_that_left_staging_is_found_elsewhere_or_fails(pair: Pair) -> None:
    """Another live file with these bytes will do; else the entry fails, and the next run pulls it."""
    pair.put("here", b"content")
    pair.backup()
    pair.put("there", b"content")
    pair.put("nowhere", b"lost")
    pair.build_index()
    run = pair.prepare()
    for path in pair.mirror.staging.iterdir():
        path.unlink()
    summary = pair.finish(run)
    assert summary.outcomes == {"copied": 1, "failed": 1} and "nowhere" in summary.failures[0]
    assert pair.live("there").read_bytes() == b"content" and not pair.live("nowhere").exists()
    assert pair.backup().outcomes == {"pulled": 1}


def test_a_run_without_a_plan_commits_and_archives_nothing(pair: Pair) -> None:
    """The message names the step to clear."""
    pair.put("alpha", b"one")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    for step in (pair.archive, pair.commit):
        with pytest.raises(RunIncomplete, match="diff_indexes"):
            step(run)


def test_a_shard_that_left_no_results_fails_the_run_and_all_else_is_committed(pair: Pair) -> None:
    """The message names the shard."""
    for number in range(20):
        pair.put(f"{number:02}", b"%d" % number)
    pair.build_index()
    run = pair.prepare(shards=3)
    run.results(1).unlink()
    summary = pair.finish(run)
    lost = pair.plan.shards[1]
    assert summary.outcomes == {"pulled": 20 - lost, "failed": lost} and summary.failed == lost
    assert "shard 1" in summary.failures[0]
    assert len(pair.index_b()) == 20 - lost
    assert pair.backup().outcomes == {"pulled": lost} and pair.transferred == 0


# --- the consumer index by hand ---------------------------------------------------------------------


def test_an_index_deleted_by_hand_is_told_of_in_history(pair: Pair) -> None:
    """The difference is recorded first, so that history still leads to the index."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.mirror.index.unlink()
    pair.backup()
    edited, adopted = pair.history()[-1]
    assert (edited.what, edited.old_md5, edited.md5) == (ChangeKind.EDITED, md5(b"one"), None)
    assert (adopted.what, adopted.md5) == (ChangeKind.ADOPTED, md5(b"one"))


def test_an_index_edited_by_hand_is_believed_and_told_of(pair: Pair) -> None:
    """A line taken out, one put in, one changed."""
    for name in ("a", "b", "c"):
        pair.put(name, name.encode())
    pair.backup()
    lines = pair.mirror.index.read_text().splitlines(keepends=True)
    del lines[0]
    lines[1] = "0" * 32 + lines[1][32:]
    lines[2] = "# mdbackup end format=1 files=2 unreadable=0\n"
    pair.mirror.index.write_text("".join(lines))
    assert pair.backup().outcomes == {"adopted": 1, "pulled": 1}
    edited = [change for change in pair.history()[-1] if change.what == ChangeKind.EDITED]
    assert [(change.path, change.old_md5, change.md5) for change in edited] == [
        (pair.path("a"), md5(b"a"), None),
        (pair.path("c"), md5(b"c"), b"0" * 32),
    ]
    assert pair.index_b() == pair.index_a()


@pytest.mark.parametrize("damage", ["cut", "line", "end", "binary"])
def test_a_damaged_consumer_index_stops_the_run_and_names_both_ways_out(pair: Pair, damage: str) -> None:
    """Nothing is changed; restoring what the last commit wrote, or deleting it, goes on."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"two")
    pair.backup()
    whole = pair.mirror.index.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = {
        "cut": whole[:50],
        "line": lines[0].upper() + b"".join(lines[1:]),
        "end": b"".join(lines[:-1]),
        "binary": os.urandom(100),
    }
    pair.put("alpha", b"three")
    pair.build_index()
    prepared = pair.prepare()
    pair.mirror.index.write_bytes(damaged[damage])
    before = files_of(pair.mirror)
    run = pair.new_run()
    pair.fetch(run)
    for step in (pair.diff, pair.commit):
        with pytest.raises(ConsumerIndexDamaged) as caught:
            step(run if step == pair.diff else prepared)
        assert "restore it" in str(caught.value) and "delete it" in str(caught.value)
        assert str(pair.mirror.committed) in str(caught.value)
    assert files_of(pair.mirror) == before and pair.mirror.index.read_bytes() == damaged[damage]
    shutil.copy(pair.mirror.committed, pair.mirror.index)
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.index_b() == pair.index_a()


def test_history_is_a_chain_from_commit_to_commit(pair: Pair) -> None:
    """Each header says by digest which index it found and which it left; the last is the one on disk."""
    for number in range(3):
        pair.put("alpha", b"%d" % number)
        pair.put(f"new{number}", b"x")
        pair.backup()
    headers = [read_header(path) for path in commits(pair.mirror)]
    assert headers[0]["before"] == ""
    assert [header["before"] for header in headers[1:]] == [header["after"] for header in headers[:-1]]
    assert headers[-1]["after"] == hashlib.sha256(pair.mirror.index.read_bytes()).hexdigest()
    assert pair.mirror.committed.read_bytes() == pair.mirror.index.read_bytes()
    assert [header["run_id"] for header in headers] == ["manual__1", "manual__2", "manual__3"]


# --- cleared tasks ----------------------------------------------------------------------------------


def eventful(pair: Pair) -> None:
    """Bring about each kind of change between a first backup, which this does, and A as it is then."""
    pair.put("same", b"same")
    pair.put("changed", b"changed, old")
    pair.put("changed too", b"changed too, old")
    pair.put("gone", b"gone")
    pair.put("returns", b"returns")
    pair.put("moves", b"moves")
    pair.put("file", b"file")
    pair.put("folder/below", b"below")
    pair.put("edited on B", b"edited, old")
    pair.backup()
    pair.put("folder/below", b"below, changed")
    os.rename(pair.path("returns"), pair.a.parent / "aside")
    pair.backup()
    pair.put("changed", b"changed, new")
    pair.put("changed too", b"twins")
    pair.put("twin", b"twins")
    pair.put("new/deep", b"new")
    pair.put("edited on B", b"edited, new")
    pair.live("edited on B").write_bytes(b"edited on B")
    os.unlink(pair.path("gone"))
    os.rename(pair.a.parent / "aside", pair.path("returns"))
    os.rename(pair.path("moves"), pair.path("moved"))
    os.unlink(pair.path("file"))
    pair.put("file/below", b"now below")
    os.unlink(pair.path("folder/below"))
    os.rmdir(pair.path("folder"))
    pair.put("folder", b"now a file")
    pair.build_index()


# What must be somewhere among the versions in the end, and how often.
DISPLACED = sorted([
    *(b"changed, old", b"changed too, old", b"edited on B", b"file", b"below", b"below, changed"),
])  # fmt: skip


def check_end(pair: Pair, *, exactly: bool = True) -> None:
    """Make sure that B is as A wants it, nothing is lost, and history tells how it came to be.

    :param exactly: whether each displaced content is there just once.
    """
    mirror = pair.mirror
    assert dict(read_entries(mirror.index)) == pair.index_a()
    for path, digest in pair.index_a().items():
        live = Path(os.fsdecode(os.fsencode(mirror.files) + path))
        assert md5(live.read_bytes()) == digest
    files = files_of(mirror)
    versions = sorted(content for path, (_, content) in files.items() if "/.old/" in path)
    assert (versions if exactly else sorted(set(versions))) == DISPLACED
    live = [inode for path, (inode, _) in files.items() if "/.old/" not in path]
    assert len(set(live)) == len(live)
    state: dict[bytes, bytes] = {}
    told: dict[bytes, bytes | None] = {}  # versions, by where they lie after all moves
    for changes in pair.history():
        for change in changes:
            if change.what == ChangeKind.MOVED:
                assert change.version is not None
                assert os.path.lexists(os.fsencode(mirror.files) + change.version)
                below = change.path + b"/"
                told = {v.replace(below, change.version + b"/", 1): m for v, m in told.items()}
                continue
            if change.version is not None:
                told[change.version] = change.old_md5
            state.pop(change.path, None)
            if change.md5:
                state[change.path] = change.md5
    assert state == pair.index_a()
    for version, digest in told.items():
        assert md5(Path(os.fsdecode(os.fsencode(mirror.files) + version)).read_bytes()) == digest
    assert last(mirror)["after"] == hashlib.sha256(mirror.index.read_bytes()).hexdigest()
    assert sorted(mirror.staging.iterdir()) == []
    assert not [path for path in mirror.history.iterdir() if path.suffix != ".jsonl"]


OUTCOMES = {"pulled": 6, "copied": 2, "adopted": 1}


def test_a_run_with_every_kind_of_change_ends_as_it_should(pair: Pair) -> None:
    """The scenario that the tests below repeat and crash."""
    eventful(pair)
    assert pair.finish(pair.prepare()).outcomes == OUTCOMES
    check_end(pair)


def test_each_step_done_twice_ends_the_same(pair: Pair) -> None:
    """A task may be retried, or cleared, at any time."""
    eventful(pair)
    run = pair.new_run()
    for _ in range(2):
        pair.fetch(run)
    for _ in range(2):
        plan = pair.diff(run)
    for _ in range(2):
        pair.pull(run, plan)
    assert pair.transferred == 0
    for _ in range(2):
        pair.archive(run)
    for _ in range(2):
        assert pair.commit(run).outcomes == OUTCOMES
    check_end(pair)
    assert len(pair.history()) == 3


@pytest.mark.parametrize("start", ["fetch", "diff", "pull", "archive", "commit"])
def test_a_finished_run_cleared_from_any_step_on_ends_the_same(pair: Pair, start: str) -> None:
    """Without a transfer, and without another version."""
    eventful(pair)
    run = pair.prepare()
    pair.finish(run)
    before = files_of(pair.mirror), pair.mirror.index.read_bytes()
    pair.transferred = 0
    steps: dict[str, Callable[[], object]] = {
        "fetch": lambda: pair.fetch(run),
        "diff": lambda: pair.diff(run),
        "pull": lambda: pair.pull(run, pair.diff(run) if start in ("fetch", "diff") else pair.plan),
        "archive": lambda: pair.archive(run),
        "commit": lambda: pair.commit(run),
    }
    names = list(steps)
    for name in names[names.index(start) :]:
        steps[name]()
    assert pair.transferred == 0 and pair.outcome.failed == 0
    assert (files_of(pair.mirror), pair.mirror.index.read_bytes()) == before
    assert len(pair.history()) == 3
    check_end(pair)


def test_a_commit_killed_before_its_last_word_counts_its_own_changes_on_retry(pair: Pair) -> None:
    """What a run brought in itself is not taken for the work of a newer one."""
    eventful(pair)
    run = pair.prepare()
    pair.finish(run)
    run.done.unlink()
    outcomes = pair.commit(run).outcomes
    assert "superseded" not in outcomes and sum(outcomes.values()) == sum(OUTCOMES.values())


# --- filesystems without hard links -----------------------------------------------------------------


@pytest.mark.usefixtures("no_links")
def test_where_there_are_no_hard_links_versions_are_copies(pair: Pair) -> None:
    """All ends the same; an existing version is not overwritten there either."""
    eventful(pair)
    assert pair.finish(pair.prepare()).outcomes == OUTCOMES
    check_end(pair)
    for content in (b"again", b"and again"):
        pair.put("changed", content)
        pair.backup()
    assert pair.versions("changed") == [b"changed, old", b"changed, new", b"again"]


@pytest.mark.usefixtures("no_links")
def test_archiving_twice_without_hard_links_makes_one_copy(pair: Pair) -> None:
    """A retry finds the copies of the try before."""
    eventful(pair)
    run = pair.prepare()
    for _ in range(3):
        pair.archive(run)
    pair.commit(run)
    check_end(pair)


# --- crashes ----------------------------------------------------------------------------------------


class Scene:
    """Copies of one prepared ``dest``, each to be crashed at another step."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self._pair = pair
        self._template = pair.mirror.dest
        self._folder = folder
        self.old = {path: content for path, (_, content) in files_of(pair.mirror).items()}
        self.new = {os.fsdecode(path)[1:]: digest for path, digest in pair.index_a().items()}

    def renew(self, number: int) -> None:
        """Let the pair go on with a fresh copy of the prepared ``dest``."""
        dest = self._folder / str(number)
        subprocess.run(["cp", "-a", "--", self._template, dest], check=True)
        if self._pair.mirror.dest != self._template:
            shutil.rmtree(self._pair.mirror.dest)
        self._pair.mirror = Mirror(dest, "srv1")

    def check_promises(self) -> None:
        """Make sure of what holds at any moment, before anybody has settled anything."""
        mirror = self._pair.mirror
        files = {path: content for path, (_, content) in files_of(mirror).items()}
        for path, content in files.items():
            if "/.old/" not in path:
                whole = content == self.old.get(path) or md5(content) == self.new.get(path)
                assert whole, f"{path} is neither old nor new: {content!r}"
        # A name vanishes only where a file becomes a directory, or the reverse.
        for path in self.old:
            if not path.endswith(("/file", "/folder/below")) and "/folder/.old/" not in path:
                assert path in files, f"{path} is lost"
        contents = sorted(files.values())
        for content in self.old.values():
            assert content in contents, f"the bytes {content!r} are lost"
        if mirror.index.exists():
            for path, digest in read_entries(mirror.index):
                assert md5(files[os.fsdecode(path)[1:]]) == digest or path.endswith(b"edited on B")


@pytest.fixture
def scene(pair: Pair, tmp_path: Path) -> Scene:
    """A run with every kind of change, prepared up to the point where the mirror would change."""
    eventful(pair)
    run = pair.new_run()
    pair.fetch(run)
    pair.plan = pair.diff(run)
    return Scene(pair, tmp_path)


def each_crash(
    scene: Scene,
    act: Callable[[], object],
    ready: Callable[[], object] = lambda: None,
    numbers: Iterable[int] | None = None,
) -> Iterator[int]:
    """Crash ``act`` at one step after the other, each time on a fresh copy; the last time it ends well.

    :param ready: makes the copy ready.
    :param numbers: the steps; default: those of `numbers_to_try`.
    """
    if numbers is None:
        scene.renew(0)
        ready()
        numbers = numbers_to_try(act)
    for number in numbers:
        scene.renew(number)
        ready()
        crashed = crash_at(number, act)
        scene.check_promises()
        yield number
        if not crashed:
            print(f"{number} steps")
            assert number > 20
            return


def run_of(pair: Pair) -> Run:
    return pair.mirror.run(f"manual__{pair.runs}")


def pull_again(pair: Pair) -> None:
    """Pull into a copy of ``dest``, for results tell of inodes."""
    pair.pull(run_of(pair), pair.plan)


@pytest.mark.guarantee("1. Crash at every step")
def test_a_crash_while_settling_a_crash_is_settled_too(pair: Pair, scene: Scene, tmp_path: Path) -> None:
    """At every step, after a first crash in the middle of putting files in place."""
    appearing = [path for path in scene.new if path not in scene.old]
    for _ in each_crash(scene, lambda: pair.finish(run_of(pair)), lambda: pull_again(pair), count(1)):
        if sum((pair.mirror.files / path).is_file() for path in appearing) == 2:
            break
    (tmp_path / "again").mkdir()
    scene = Scene(pair, tmp_path / "again")

    def act() -> None:
        with pair.mirror.lock("test"):
            recover(pair.mirror, pair.mirror.dest / "consumer.md5")

    runs = pair.runs
    for _ in each_crash(scene, act):
        assert pair.finish(pair.prepare()).failed == 0 and pair.transferred == 0
        check_end(pair, exactly=False)
        pair.runs = runs


def test_content_that_a_power_cut_tore_is_not_put_in_place(pair: Pair) -> None:
    """A crash may leave the history written ahead, and bytes of waiting content not on the disk."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"1")
    pair.backup()
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, b"the new content")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    pending = pair.mirror.history
    number = 0
    while not [path for path in pending.iterdir() if path.suffix == ".pending"]:
        number += 1
        crash_at(number, lambda: commit(pair.mirror, run))
    waiting = [*pair.mirror.staging.iterdir(), *run.copies.iterdir()]
    assert len(waiting) == 3
    for path in waiting:
        os.truncate(path, 5)
    with pair.mirror.lock("test"):
        recover(pair.mirror, pair.mirror.dest.parent / "consumer.md5")
    assert pair.live("alpha").read_bytes() == b"one" and pair.live("bravo").read_bytes() == b"1"
    assert not pair.live("charlie").exists()
    assert md5(b"the new content") not in pair.index_b().values()
    assert pair.finish(pair.prepare()).failed == 0
    assert pair.index_b() == pair.index_a() and pair.live("alpha").read_bytes() == b"the new content"


def test_archiving_again_leaves_the_versions_that_a_cut_off_commit_tells_of(pair: Pair) -> None:
    """The history written ahead names them; its files may be in place or not when the tasks are cleared."""
    for name in ("alpha", "bravo"):
        pair.put(name, name.encode())
    pair.backup()
    for name in ("alpha", "bravo"):
        pair.put(name, b"new " + name.encode())
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    number = 0
    while not any(path.suffix == ".pending" for path in pair.mirror.history.iterdir()):
        number += 1
        assert crash_at(number, lambda: commit(pair.mirror, run))
    pair.archive(run)
    check_sound(pair)
    assert pair.finish(run).failed == 0
    check_sound(pair)
    assert pair.versions("alpha") == [b"alpha"] and pair.versions("bravo") == [b"bravo"]


def test_results_do_not_vouch_for_what_was_staged_after_them(pair: Pair) -> None:
    """Another run may have staged the same bytes anew, and a power cut torn them since."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.put("alpha", b"the new content")
    pair.build_index()
    run = pair.prepare()
    staged = pair.staged(md5(b"the new content"))
    staged.unlink()
    staged.write_bytes(b"the new")
    pair.archive(run)
    assert pair.commit(run).outcomes == {"failed": 1}
    assert pair.live("alpha").read_bytes() == b"one" and pair.versions("alpha") == []
    pair.pull(run, pair.plan)
    assert pair.finish(run).outcomes == {"pulled": 1}
    assert pair.live("alpha").read_bytes() == b"the new content"


def test_content_for_which_no_result_vouches_is_hashed_and_taken_all_the_same(pair: Pair) -> None:
    """Some filesystems give a file another inode now and then. Nothing is left of it then, and not copied."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"two" * 100_000)
    pair.build_index()
    run = pair.prepare()
    inodes = set()
    for staged in pair.mirror.staging.iterdir():
        os.chmod(staged, 0o640)  # it has another change time since
        inodes.add(staged.stat().st_ino)
    assert pair.finish(run).outcomes == {"pulled": 2}
    assert {pair.live(name).stat().st_ino for name in ("alpha", "bravo")} == inodes
    assert not list(pair.mirror.staging.iterdir())


def test_a_retried_commit_finds_versions_that_it_had_given_another_stamp(pair: Pair) -> None:
    """A crash after the versions of an overlapped run were renamed does not stop its retry."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"1")
    pair.backup()
    pair.put("bravo", b"2")
    pair.build_index()
    first = pair.prepare()
    pair.put("alpha", b"two")
    pair.build_index()
    second = pair.prepare()
    pair.archive(second)
    pair.finish(first)
    planned = pair.versions("alpha")
    number = 0
    while crash_at(number := number + 1, lambda: commit(pair.mirror, second)):
        assert pair.versions("alpha") == planned
    assert pair.commit(second).failed == 0
    assert pair.live("alpha").read_bytes() == b"two" and pair.versions("alpha") == [b"one"]
    assert pair.index_b() == pair.index_a()


# --- one entry's trouble is that entry's alone --------------------------------------------------------


def test_a_version_lost_between_archive_and_commit_is_made_again(pair: Pair) -> None:
    """Whatever took it away: what history names must be there."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.put("alpha", b"2")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    (version,) = (pair.live("alpha").parent / ".old").iterdir()
    version.unlink()
    assert pair.commit(run).replaced == 1
    assert pair.versions("alpha") == [b"1"]


def test_a_run_whose_content_was_gone_archives_anew_when_it_is_cleared(pair: Pair) -> None:
    """Its first commit took the version back; the second must not believe the old record."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.put("alpha", b"2")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    staged = pair.staged(b"c81e728d9d4c2f636f067f89cc14862c")
    staged.unlink()
    summary = pair.commit(run)
    assert summary.failed == 1 and "no longer in staging" in summary.failures[0]
    assert pair.versions("alpha") == []
    staged.write_bytes(b"2")
    assert pair.commit(run).replaced == 1
    assert pair.versions("alpha") == [b"1"] and pair.live("alpha").read_bytes() == b"2"


def test_a_name_that_the_disk_refuses_fails_alone_and_the_next_run_is_free(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some filesystems forbid names that others have; no pending commit may stay behind for that."""
    pair.put("alpha", b"1")
    pair.put("bad:name", b"2")
    put = Tree.put

    def picky(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
        if b":" in path:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        put(tree, source, file, path)

    monkeypatch.setattr(Tree, "put", picky)
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 1, "failed": 1} and summary.added == 1 and summary.failed == 1
    assert "bad:name (Invalid argument on this side)" in summary.failures[0]
    assert list(pair.index_b()) == [pair.path("alpha")]
    assert [change.path for change in pair.history()[-1]] == [pair.path("alpha")]
    os.unlink(pair.path("bad:name"))
    assert pair.backup().outcomes == {}


def test_a_version_is_taken_back_when_the_disk_refuses_the_new_file(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not replaced has no version."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.put("alpha", b"2")

    def refuses(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Tree, "put", refuses)
    summary = pair.backup()
    assert summary.outcomes == {"failed": 1} and summary.replaced == summary.size == 0
    assert pair.versions("alpha") == [] and pair.live("alpha").read_bytes() == b"1"
    monkeypatch.undo()
    assert pair.backup().replaced == 1


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("meanwhile", ["nothing", "kill", "hands"])
def test_a_file_that_could_not_be_replaced_stays_in_the_index_if_it_is_what_that_said(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, alone: bool, meanwhile: str
) -> None:
    """So that a restore has it, though the entry is out of the index while files are replaced."""
    pair.put("alpha", b"1")
    pair.put("bravo", b"1")
    pair.backup()
    before, histories = pair.index_b(), len(commits(pair.mirror))
    pair.put("alpha", b"2")
    if not alone:
        pair.put("bravo", b"3")
    put = Tree.put

    def refuses(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
        if path.endswith(b"/alpha"):
            if meanwhile == "hands":
                pair.live("alpha").write_bytes(b"by hand")
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        put(tree, source, file, path)

    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    monkeypatch.setattr(Tree, "put", refuses)
    if meanwhile == "kill":
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(Tree, "sync", interrupted)
            pair.commit(run)
        recover(pair.mirror, run.folder / "consumer.md5")
        assert not any(pending(pair.mirror))
    else:
        assert pair.commit(run).outcomes == {"failed": 1} | ({} if alone else {"pulled": 1})
    is_there = meanwhile != "hands"
    expected = before | ({} if alone else {pair.path("bravo"): md5(b"3")})
    if not is_there:
        del expected[pair.path("alpha")]
    assert pair.index_b() == expected
    assert len(commits(pair.mirror)) == histories + (not alone or not is_there)
    if not alone:
        told = [(change.what, change.path) for change in pair.history()[-1]]
        gone = [] if is_there else [(ChangeKind.FORGOTTEN, pair.path("alpha"))]
        assert told == [*gone, (ChangeKind.REPLACED, pair.path("bravo"))]
    monkeypatch.undo()
    assert not pair.backup().failed and pair.live("alpha").read_bytes() == b"2"
    check_sound(pair)


def interrupted(_: object) -> None:
    raise KeyboardInterrupt


def test_a_live_file_that_cannot_be_read_fails_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector under one old file does not keep the others from being backed up."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"1")
    pair.backup()
    for name in ("alpha", "bravo"):
        pair.put(name, b"2 " + name.encode())
    opened = Tree.open

    def broken(tree: Tree, path: bytes) -> int:
        if path.endswith(b"/alpha"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return opened(tree, path)

    monkeypatch.setattr(Tree, "open", broken)
    summary = pair.backup()
    assert summary.replaced == 1 and summary.failed == 1
    assert "alpha (Input/output error on this side)" in summary.failures[0]
    assert pair.live("bravo").read_bytes() == b"2 bravo" and pair.live("alpha").read_bytes() == b"1"


def test_entries_below_a_directory_that_went_as_a_whole_leave_the_index(pair: Pair) -> None:
    """Also those that are excluded now: the index must not claim what is no longer there."""
    pair.put("d/x", b"1")
    pair.backup()
    os.unlink(pair.path("d/x"))
    os.rmdir(pair.path("d"))
    pair.put("d", b"a file now")
    assert pair.backup(exclude=["d/x"]).added == 1
    assert list(pair.index_b()) == [pair.path("d")]


def test_an_adopted_file_that_is_edited_before_the_commit_is_not_claimed(pair: Pair) -> None:
    """Of the same size, in place: only its time tells."""
    pair.put("alpha", b"1")
    pair.put("bravo", b"x")
    pair.backup()
    os.unlink(pair.path("alpha"))
    pair.backup()
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    pair.live("alpha").write_bytes(b"!")
    os.utime(pair.live("alpha"), (1, 1))
    assert pair.commit(run).failed == 1
    assert list(pair.index_b()) == [pair.path("bravo")]


def test_content_missing_in_staging_is_looked_up_once_for_all(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look costs a walk through the whole consumer index."""
    for number in range(5):
        pair.put(f"old{number}", b"%d" % number)
    pair.backup()
    for number in range(5):
        pair.put(f"new{number}", b"%d" % number)
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    for staged in pair.mirror.staging.iterdir():
        staged.unlink()
    walks = 0
    entries = commit_module.read_entries

    def counted(path: Path) -> object:
        nonlocal walks
        walks += 1
        return entries(path)

    for module in (commit_module, commit_content):
        monkeypatch.setattr(module, "read_entries", counted)
    assert pair.commit(run).outcomes == {"copied": 5}
    assert walks <= 4
    assert pair.live("new3").read_bytes() == b"3"


def test_directory_that_cannot_be_moved_out_of_the_way_loses_nothing(pair: Pair) -> None:
    """Something is mounted there; below it is an entry of which this run knows nothing, being excluded."""
    pair.put("d/excluded", b"1")
    pair.put("d/other", b"2")
    pair.put("z", b"3")
    pair.backup()
    shutil.rmtree(pair.a / "d")
    pair.put("d", b"a file now")
    pair.build_index()
    run = pair.prepare(exclude=[os.fsdecode(pair.path("d/excluded"))])
    directory = str(pair.live("d"))
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        summary = pair.finish(run)
        assert summary.failed == 1 and summary.outcomes == {"failed": 1}
        assert pair.live("d/excluded").read_bytes() == b"1"
        check_sound(pair)
    finally:
        subprocess.run(["umount", directory], check=True)
    assert pair.backup(exclude=[os.fsdecode(pair.path("d/excluded"))]).outcomes == {"pulled": 1}
    assert pair.live("d").read_bytes() == b"a file now"
    check_sound(pair)


@contextmanager
def immovable(path: Path) -> Iterator[None]:
    """Something is mounted there, so that no rename takes it away."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "hidden"),
    [("d/keep", "d", {"exclude": ["keep"]}), ("d", "d/below", {"only": "new"})],
    ids=["below", "above"],
)
def test_an_entry_stays_if_what_it_was_to_make_way_for_does_not_come(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, old: str, new: str, hidden: dict[str, Any], killed: bool
) -> None:
    """What has its place cannot be moved away: its file is whole, and comes back with a restore."""
    for name in (old, "d-1", "z"):
        pair.put(name, name.encode())
    pair.backup()
    remove(pair.a / "d")
    pair.put(new, b"now")
    options = hidden if "exclude" in hidden else {"only": [pair.path(new)]}
    pair.build_index()
    run = pair.prepare(**options)
    with immovable(pair.live("d")):
        if killed:
            pair.archive(run)
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Transaction, "carry_out", interrupt)
                pair.commit(run)
            recover(pair.mirror, run.folder / "settled.md5")
        else:
            summary = pair.finish(run)
            assert summary.outcomes == {"failed": 1} and summary.forgotten == 0
        assert set(pair.index_b()) == {pair.path(name) for name in (old, "d-1", "z")}
        assert pair.live(old).read_bytes() == old.encode()
        check_sound(pair)
    summary = pair.backup(**options)
    assert (summary.outcomes, summary.forgotten) == ({"pulled": 1}, 1)
    assert set(pair.index_b()) == {pair.path(name) for name in (new, "d-1", "z")}
    check_sound(pair)


def test_an_entry_leaves_with_what_was_moved_though_nothing_comes_in_its_place(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is no longer there; while nothing was moved, an entry without file stays."""
    for name in ("d/keep", "e/keep", "z"):
        pair.put(name, name.encode())
    pair.backup()
    for name in ("d", "e"):
        remove(pair.a / name)
        pair.put(name, f"now {name}".encode())
    remove(pair.live("e"))

    def refuse(tree: Tree, folder: object, name: bytes, path: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Tree, "put", refuse)
        summary = pair.backup(exclude=["keep"])
    assert (summary.outcomes, summary.forgotten) == ({"failed": 2}, 1)
    assert set(pair.index_b()) == {pair.path("e/keep"), pair.path("z")}
    assert pair.backup(exclude=["keep"]).outcomes == {"pulled": 2}
    assert set(pair.index_b()) == {pair.path("d"), pair.path("e"), pair.path("z")}
    check_sound(pair)


@pytest.mark.parametrize("live", ["as archived", "other bytes", "gone"])
def test_many_versions_of_a_directory_are_taken_back_without_reading_it_for_each(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, live: str
) -> None:
    """Directories may lie between the files, in path order. What is not live any more stays."""
    names = [f"d/{number}{below}" for number in range(20) for below in ("", "-/file")]
    for name in names:
        pair.put(name, b"old " + name.encode())
    pair.backup()
    for name in names:
        pair.put(name, b"new " + name.encode())
    pair.build_index()
    run = pair.prepare(override=True)
    assert pair.archive(run).archived == len(names)
    if live != "as archived":
        for name in names:
            pair.live(name).unlink()
            if live == "other bytes":
                pair.live(name).write_bytes(b"by hand")
    read: list[int] = []
    scandir = os.scandir

    def counted(directory: Any) -> Any:
        if isinstance(directory, int):
            read.append(os.fstat(directory).st_ino)
        return scandir(directory)

    monkeypatch.setattr(os, "scandir", counted)
    pair.archive(run)
    monkeypatch.undo()
    assert len(read) == len(set(read)), "a directory was read twice"
    assert len(read) == (0 if live == "as archived" else 21)
    for name in names:
        versions = pair.versions(name)
        assert versions == [b"old " + name.encode(), b"by hand"][: 1 + (live == "other bytes")]


def test_a_second_name_is_known_as_long_as_it_is_there(tmp_path: Path) -> None:
    """Whoever takes it away, and whoever makes it, as long as that is us."""
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(b"1")
    with Tree(tmp_path) as tree:
        assert not tree.has_twin(b"/one")
        tree.link(b"/one", b"/two")
        assert tree.has_twin(b"/one") and tree.has_twin(b"/two") and not tree.has_twin(b"/other")
        tree.link(b"/one", b"/three")
        assert tree.has_twin(b"/one")
        tree.unlink(b"/two")
        assert tree.has_twin(b"/one") and tree.has_twin(b"/three")
        (tmp_path / "three").unlink()  # by hand
        assert not tree.has_twin(b"/one")
        tree.link(b"/one", b"/two")
        assert tree.has_twin(b"/one")
        (tmp_path / "two").unlink()
        (tmp_path / "two").write_bytes(b"1")
        assert not tree.has_twin(b"/one")
        with pytest.raises(FileNotFoundError):
            tree.has_twin(b"/three")


def test_an_entry_leaves_if_hands_take_away_what_was_to_be_moved(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just before: no version has it, and the index must not have a path and one below it."""
    pair.put("d", b"1")
    pair.put("z", b"2")
    pair.backup()
    remove(pair.a / "d")
    pair.put("d/below", b"3")
    finish = Transaction.carry_out

    def late(*arguments: Any, **options: Any) -> int:
        pair.live("d").unlink()
        return finish(*arguments, **options)

    monkeypatch.setattr(Transaction, "carry_out", late)
    assert pair.backup(only=[pair.path("d/below")]).outcomes == {"pulled": 1}
    assert set(pair.index_b()) == {pair.path("d/below"), pair.path("z")}


def interrupt(*arguments: object, **options: object) -> int:
    raise KeyboardInterrupt


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[]\n", b'{"format": 1}\n'])
def test_a_spoilt_status_is_as_if_it_were_not_there(pair: Pair, content: bytes) -> None:
    """The next good run writes it anew; which run is newer than which, history tells as well."""
    pair.put("alpha", b"1")
    pair.build_index()
    late = pair.prepare()
    pair.put("alpha", b"2")
    pair.backup()
    pair.mirror.status.write_bytes(content)
    assert pair.finish(late).superseded
    pair.put("alpha", b"3")
    assert pair.backup().replaced == 1
    status = pair.mirror.read_status()
    assert status["last_good"] == status["last_commit"]
    assert pair.versions("alpha") == [b"2"]


def without_status(pair: Pair, run: Run, monkeypatch: pytest.MonkeyPatch, *, spoilt: bool) -> None:
    """Commit, but lose the status: by a kill before it is written, or by a bad disk."""
    if spoilt:
        pair.finish(run)
        pair.mirror.status.write_bytes(b"")
        return

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    pair.archive(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(commit_module, "write_status", die)
        pair.commit(run)


@pytest.mark.parametrize("spoilt", [False, True])
def test_an_older_run_is_superseded_also_where_the_status_knows_less_than_history(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    """A limited run in between takes the place of the newest full one, whatever tells of that."""
    pair.put("alpha", b"1")
    pair.put("side", b"1")
    pair.backup()
    pair.put("temporary", b"soon gone from A")
    pair.build_index()
    old = pair.prepare()
    os.unlink(pair.path("temporary"))
    pair.put("alpha", b"2")
    pair.build_index()
    without_status(pair, pair.prepare(), monkeypatch, spoilt=spoilt)
    pair.put("side", b"2")
    pair.build_index()
    pair.finish(pair.prepare(only=[pair.path("side")]))
    assert pair.finish(old).superseded


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_superseded_run_is_doubtful_where_the_status_knows_less_than_history(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    """The run that superseded it may not have been good."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.put("alpha", b"2")
    pair.build_index()
    late = pair.prepare()
    pair.put("beta", b"1")
    pair.build_index(unreadable=[pair.path("hidden")])
    without_status(pair, pair.prepare(), monkeypatch, spoilt=spoilt)
    summary = pair.finish(late)
    assert summary.superseded and summary.doubtful


@pytest.mark.parametrize(
    ("old", "new", "hidden"),
    [("x/out", "x", {"exclude": ["**/x/out"]}), ("out", "out/below", {"only": "new"})],
    ids=["below", "above"],
)
def test_a_hidden_entry_cannot_stay_where_something_comes_above_or_below(
    pair: Pair, old: str, new: str, hidden: dict[str, Any]
) -> None:
    """Though hands took its file away, so that nothing goes out of the way: the index would be malformed."""
    for name in (old, "y", "z"):
        pair.put(name, name.encode())
    pair.backup()
    for top in (pair.live(old.partition("/")[0]), pair.a / old.partition("/")[0]):
        shutil.rmtree(top) if top.is_dir() else top.unlink()
    pair.put(new, b"now")
    summary = pair.backup(**(hidden if "exclude" in hidden else {"only": [pair.path(new)]}))
    assert (summary.added, summary.forgotten) == (1, 1)
    assert set(pair.index_b()) == {pair.path(new), pair.path("y"), pair.path("z")}
    check_sound(pair)
