"""Ours and others copy the same, in turn.

Of ours it counts everything from before PullChanged connects to after CommitBackup: verified, archived,
committed, durable. Not the imports of a task, nor the index and its comparison, which the others lack; but of
a day's changes all six steps count. Of the others it counts the program from start to end: they verify
nothing against an index, and sync nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks import ours
from benchmarks.data import measure, write
from benchmarks.delay import delayed
from benchmarks.peers import Line, clock, is_installed
from benchmarks.results import OURS, Measurement
from benchmarks.scene import DATA, Scene
from benchmarks.work import Against, Work

_ONE_IN = 100  # files of a day's changes


def copying(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Copy everything into new directories.

    :raises SystemExit: a copy failed, or is not complete.
    """
    others = [other for other in work.against if is_installed(other.peer)]
    with scene.offering(work.data):
        ours.run(scene, ("build",), scene.dest)
        for number, rtt in product(range(rounds), work.rtt):
            with delayed(scene.server.port, rtt) as port:
                scene.trust(port)
                measurement = partial(Measurement, round=number, rtt=rtt)
                for shards in work.shards:
                    yield _ours(scene, port, shards, measurement)
                for other in others:
                    yield _other(scene, port, other, measurement)


def _ours(scene: Scene, port: int, shards: int, measurement: partial[Measurement]) -> Measurement:
    with scene.new_dest("ours") as dest:
        # Over the same line, since it is here that a run learns how long it is.
        ours.run(scene, ("fetch", "diff"), dest, port=port, shards=shards)
        answer = ours.run(scene, ("pull", "archive", "commit"), dest, port=port, shards=shards)
        files, size = _same(scene.data, dest / "files", OURS)
    return measurement(OURS, files=files, size=size, shards=shards, **answer.figures)


def _other(scene: Scene, port: int, other: Against, measurement: partial[Measurement]) -> Measurement:
    with scene.new_dest("other") as dest:
        seconds = clock(other.peer, Line(scene, port, DATA + other.part, dest))
        files, size = _same(scene.data / other.part.lstrip("/"), dest, other.peer)
    all_files, _ = measure(scene.data)
    return measurement(other.peer, seconds=seconds, files=files, size=size, portion=all_files / files)


def percent(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Bring two copies up to date after one file in a hundred has changed.

    :raises SystemExit: a copy failed, or is not complete.
    """
    (other,) = (against.peer for against in work.against)
    scene.trust(scene.server.port)
    with scene.offering(work.data), scene.new_dest("ours") as mine, scene.new_dest("other") as theirs:
        line = Line(scene, scene.server.port, DATA, theirs)
        ours.run(scene, ours.STEPS, mine, run_id="first")
        clock(other, line)
        for number in range(rounds):
            files, size = _change(scene.data, number)
            answer = ours.run(scene, ours.STEPS, mine, run_id=str(number))
            _same(scene.data, mine / "files", OURS)
            yield Measurement(OURS, number, files=files, size=size, **answer.figures)
            seconds = clock(other, line)
            _same(scene.data, theirs, other)
            yield Measurement(other, number, seconds, files, size)


def _change(folder: Path, number: int) -> tuple[int, int]:
    """Give one file in a hundred other bytes, as many as it had, and return the files and bytes of that."""
    chance = random.Random(f"change {number}")
    changed = sorted(path for path in folder.rglob("*") if path.is_file())[number % _ONE_IN :: _ONE_IN]
    sizes = [path.stat().st_size for path in changed]
    for path, size in zip(changed, sizes, strict=True):
        write(path, chance, size)
    return len(changed), sum(sizes)


def _same(source: Path, dest: Path, who: str) -> tuple[int, int]:
    """Return the number of files and their bytes, which must be the same on both sides."""
    wanted, found = measure(source), measure(dest)
    if wanted != found:
        raise SystemExit(f"{who}: {wanted} files and bytes were to be copied, {found} were.")
    return found
