"""What people and machines leave in ``dest`` that does not belong there ends no run in a traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.errors import BackupError, ConsumerIndexDamaged
from airflow_mdbackup.scheme.history.timeline import Timeline
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.unit.cli.terminal import GOOD

# --- in history -------------------------------------------------------------------------------------


def copy_as(form: str) -> Callable[[Path], object]:
    """Return what copies a file of history under another name."""
    return lambda path: shutil.copy(path, path.with_name(form.format(name=path.name, stem=path.stem)))


@pytest.mark.parametrize(
    "leave",
    [
        copy_as("copy-of-{name}"),
        copy_as("{stem} (copy).jsonl"),
        copy_as("{stem}-copy.jsonl"),
        copy_as("old_{name}.pending"),
        lambda path: path.with_name("notes.jsonl").write_bytes(b"what I did yesterday"),
        lambda path: path.with_name("zzz.pending").write_bytes(b""),
        lambda path: path.with_name("zzz.jsonl").mkdir(),
        lambda path: path.with_name("zzz.jsonl").symlink_to("nowhere"),
    ],
)
def test_what_is_no_file_of_history_is_left_alone(pair: Pair, leave: Callable[[Path], object]) -> None:
    pair.put("file", b"1")
    pair.backup()
    (history,) = pair.mirror.history.iterdir()
    leave(history)
    strays = {path.name for path in pair.mirror.history.iterdir()} - {history.name}
    for content in (b"2", b"3"):
        pair.put("file", content)
        assert pair.backup().outcomes == {"pulled": 1}
    assert strays < {path.name for path in pair.mirror.history.iterdir()} and len(pair.history()) == 3
    with Timeline(pair.mirror) as past:
        assert past.problems == [] and len(past.moments) == 3
    check_sound(pair)


# --- something else than a file ---------------------------------------------------------------------


def become_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def become_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("become", [become_directory, become_fifo])
def test_an_index_that_is_no_file_is_told_with_the_ways_out(
    pair: Pair, become: Callable[[Path], None], tmp_path: Path
) -> None:
    """As where a container mounts a file that is not there. To get files back it is not needed."""
    pair.put("file", b"1")
    pair.backup()
    become(pair.mirror.index)
    pair.put("file", b"2")
    with pytest.raises(ConsumerIndexDamaged, match=r"index\.md5 is .*Remove it.*committed\.md5"):
        pair.backup()
    dest = ["--dest", str(pair.mirror.dest)]
    assert main(["restore", *dest, "--to", str(tmp_path / "back")]) == GOOD
    assert (tmp_path / "back" / str(pair.path("file"), "utf-8").lstrip("/")).read_bytes() == b"1"
    for command in ("verify", "log", "rebuild"):
        assert main([command, *dest]) in ((GOOD,) if command != "rebuild" else (GOOD, 2))
    if pair.mirror.index.is_dir():
        pair.mirror.index.rmdir()
    else:
        pair.mirror.index.unlink()
    shutil.copy(pair.mirror.committed, pair.mirror.index)
    assert pair.backup().outcomes == {"pulled": 1}
    check_sound(pair)


@pytest.mark.parametrize("name", ["status.json", "provider-id", "order", "committed.md5", "upcoming.md5"])
def test_a_directory_in_place_of_a_file_of_ours_is_told_with_its_name(pair: Pair, name: str) -> None:
    """Or is of no account, as a lost copy of the index is; when it is gone, all is as before."""
    pair.put("file", b"1")
    pair.backup()
    place = pair.mirror.status.with_name(name)
    kept = place.read_bytes() if place.exists() else None
    become_directory(place)
    pair.put("file", b"2")
    with pytest.raises(BackupError, match=name):
        pair.backup()
    place.rmdir()
    if kept is not None:
        place.write_bytes(kept)
    pair.backup()
    assert pair.live("file").read_bytes() == b"2" and set(pair.versions("file")) == {b"1"}
    check_sound(pair)


def test_a_file_in_place_of_a_directory_of_ours_is_told_with_its_name(pair: Pair) -> None:
    pair.put("file", b"1")
    pair.backup()
    history = pair.mirror.history
    history.rename(history.with_name("aside"))
    history.write_bytes(b"")
    pair.put("file", b"2")
    with pytest.raises(BackupError, match="history"):
        pair.backup()
    history.unlink()
    history.with_name("aside").rename(history)
    assert pair.backup().outcomes == {"pulled": 1}
    check_sound(pair)
