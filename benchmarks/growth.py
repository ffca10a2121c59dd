"""What it costs when there is much of it: ten million lines, a million files.

``python -m benchmarks.growth DEST SOURCE`` plans a run in a process of its own, with the scheme alone: so the
peak is that of the comparison, not of Airflow. It prints seconds, peak and what differs as JSON.

What this does not give: the memory of the peers.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from airflow_mdbackup.scheme.backup.diff import make_plan
from airflow_mdbackup.scheme.backup.plan import PlanOptions
from airflow_mdbackup.scheme.files.jsonl import write_records
from airflow_mdbackup.scheme.index.canonical import IndexWriter, digest
from airflow_mdbackup.scheme.index.received import canonicalise
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from benchmarks import ours
from benchmarks.data import Data, measure, name
from benchmarks.results import OURS, Measurement
from benchmarks.scene import DATA, REPOSITORY, Scene
from benchmarks.work import Work

_ONE_IN = 400  # lines: two of them changed, one gone, one new


def diff(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Compare two indexes of which one line in a hundred differs, with make_plan and with comm.

    :raises SystemExit: they do not find the same.
    """
    prefix = scene.server.prefix
    provider_index = scene.server.tree / ".mdbackup" / "index.md5"
    with scene.new_dest("ours") as dest:
        mirror, run = _place(dest)
        mirror.claim()
        _write_indexes(provider_index, mirror.index, f"{prefix}{DATA}/".encode(), work.data.files)
        after = digest(mirror.index)
        write_records(mirror.history_path(mirror.next_stamp(), "first"), (), after=after)
        ours.run(scene, ("fetch",), dest)
        for number in range(rounds):
            command = [sys.executable, "-m", "benchmarks.growth", str(dest), prefix + DATA]
            planned = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE)
            told = json.loads(planned.stdout)
            yield Measurement(
                OURS, number, told["seconds"], work.data.files, run.index.stat().st_size, peak=told["peak"]
            )
            found = scene.folder / "comm"
            seconds = _comm(run.index, mirror.index, found)
            with found.open("rb") as lines:
                differing = sum(not line.startswith((b"\t\t", b"#", b"\t#")) for line in lines)
            if differing != told["lines"]:
                raise SystemExit(f"comm finds {differing} lines that differ, make_plan {told['lines']}.")
            yield Measurement("comm", number, seconds, work.data.files, run.index.stat().st_size)


def _write_indexes(provider: Path, consumer: Path, folder: bytes, lines: int) -> None:
    """Write two indexes. Their md5s ascend with the paths, so that they are sorted for comm too."""
    chance = random.Random(1)
    with ExitStack() as stack:
        theirs, mine = (stack.enter_context(IndexWriter(path)) for path in (provider, consumer))
        for number in range(lines):
            path = folder + name(number).encode()
            digits = chance.randbytes(24).hex().encode()
            first, kind = b"%08x" % ((number << 32) // lines), number % _ONE_IN
            if kind != 1:
                theirs.add(path, first + digits[:24])
            if kind != 2:
                mine.add(path, first + (digits[24:] if kind in (0, _ONE_IN // 2) else digits[:24]))


def _comm(left: Path, right: Path, found: Path) -> float:
    # The end line, which begins with #, is out of order.
    command = ["comm", "--nocheck-order", str(left), str(right)]
    with found.open("wb") as output:
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=output, env={**os.environ, "LC_ALL": "C"})
        return time.monotonic() - started


def memory(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Take every step in a process of its own, with few files and with many, with small ones and large."""
    many = work.data
    with scene.new_dest("ours") as dest:
        idle = ours.run(scene, (), dest)
    yield Measurement("idle", 0, 0, 0, peak=idle.peak)
    for data in (replace(many, files=many.files // 100), many, Data(4, 256 * many.files, 256 * many.files)):
        with scene.offering(data), scene.new_dest("ours") as dest:
            files, size = measure(scene.data)
            for step in ours.STEPS:
                answer = ours.run(scene, (step,), dest)
                yield Measurement(step, 0, answer.total, files, size, peak=answer.peak)


def growth(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Take all steps of a first run, with ten times as many files each time."""
    for files in (work.data.files // 1000, work.data.files // 100, work.data.files // 10, work.data.files):
        with scene.offering(replace(work.data, files=files)):
            for number in range(rounds):
                with scene.new_dest("ours") as dest:
                    answer = ours.run(scene, ours.STEPS, dest)
                    found, size = measure(dest / "files")
                    _, run = _place(dest)
                    started = time.monotonic()
                    canonicalise(run.index, dest / "canonical", name="the index")
                    reading = {"reading": time.monotonic() - started}
                yield Measurement(
                    OURS, number, answer.total, found, size, peak=answer.peak, parts=answer.seconds | reading
                )


def _place(dest: Path) -> tuple[Mirror, Run]:
    mirror = Mirror(dest, ours.PROVIDER)
    return mirror, mirror.run(ours.run_name("1"))


def main() -> None:
    """Plan the run of `ours.run` in the directory that is named."""
    mirror, run = _place(Path(sys.argv[1]))
    started = time.monotonic()
    plan = make_plan(mirror, run, PlanOptions(source=[sys.argv[2].encode()]))
    seconds = time.monotonic() - started
    lines = plan.new + 2 * plan.changed + plan.gone
    print(json.dumps({"seconds": seconds, "peak": ours.peak(), "lines": lines}))


if __name__ == "__main__":
    main()
