"""Versions that a run archives, and takes back where nothing was replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.files.tree import Tree
from tests.pair import Pair, md5


def test_a_file_that_was_replaced_by_hand_after_archiving_is_archived_again(pair: Pair) -> None:
    """Both the file that was archived and the one that is live by then stay."""
    run = pair.planned(alpha=(b"one", b"two"))
    pair.archive(run)
    pair.live("alpha").unlink()
    pair.live("alpha").write_bytes(b"mine")
    assert pair.commit(run).replaced == 1
    assert sorted(pair.versions("alpha")) == [b"mine", b"one"]
    assert pair.history()[-1][0].old_md5 == md5(b"mine")


def test_a_version_lost_between_archive_and_commit_is_made_again(pair: Pair) -> None:
    """Whatever took it away: what history names must be there."""
    run = pair.planned(alpha=(b"1", b"2"))
    pair.archive(run)
    (version,) = (pair.live("alpha").parent / ".old").iterdir()
    version.unlink()
    assert pair.commit(run).replaced == 1
    assert pair.versions("alpha") == [b"1"]


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
    run = pair.begin(override=True)
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
