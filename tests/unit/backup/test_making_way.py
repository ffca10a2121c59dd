"""Files and directories that take each other's place (row 10 of the policy table)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import ChangeKind
from airflow_mdbackup.scheme.history.journal import Transaction, recover
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.unit.backup.policy import whats


def test_entries_below_a_directory_that_went_as_a_whole_leave_the_index(pair: Pair) -> None:
    """Also those that are excluded now: the index must not claim what is no longer there."""
    pair.put("d/x", b"1")
    pair.backup()
    os.unlink(pair.path("d/x"))
    os.rmdir(pair.path("d"))
    pair.put("d", b"a file now")
    assert pair.backup(exclude=["d/x"]).added == 1
    assert list(pair.index_b()) == [pair.path("d")]


def test_directory_that_cannot_be_moved_out_of_the_way_loses_nothing(pair: Pair) -> None:
    """Something is mounted there; below it is an entry of which this run knows nothing, being excluded."""
    pair.put("d/excluded", b"1")
    pair.put("d/other", b"2")
    pair.put("z", b"3")
    pair.backup()
    shutil.rmtree(pair.a / "d")
    pair.put("d", b"a file now")
    run = pair.begin(exclude=[os.fsdecode(pair.path("d/excluded"))])
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
    run = pair.begin(**options)
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
