"""Symlinks and other things that are no files in the mirror (row 17 of the policy table)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pair import Pair


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
