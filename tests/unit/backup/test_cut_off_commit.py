"""A commit that a crash cuts off at any step, and what settles it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crash_at, numbers_to_try
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair, md5
from tests.unit.backup.eventful import check_end, eventful, files_of


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
    run = pair.begin()
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
    run = pair.begin()
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
