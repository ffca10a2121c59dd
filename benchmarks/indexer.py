"""What it costs to build the provider index, against md5sum over the same files, and find, which only looks.

    cold    no cache: every file is hashed; md5sum hashes them too, with as many processes at a time
    warm    nothing changed: no file is opened; find looks at every file too

Everything is read from the page cache. The four take turns, so that a noisy moment hits all of them. If
``--dest`` is on another filesystem than the server's files, all is measured there too.

What this does not give: what a disk that is asked for every block costs; there, all four wait for it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from airflow_mdbackup.provider_side.programs import python_program
from airflow_mdbackup.provider_side.report import Done, parse_report
from benchmarks.data import Data, build, measure
from benchmarks.results import OURS, Measurement
from benchmarks.scene import Scene, filesystem
from benchmarks.work import Work

WARM = "ours, unchanged"
MD5SUM = "md5sum"
FIND = "find"
_SETTLED = 62  # seconds; a file that is hashed when it is younger is hashed once more
_LOOK = "%s %T@ %C@ %i %D %p\\n"


def indexing(scene: Scene, work: Work, rounds: int, parts: tuple[int, ...] = (1,)) -> Iterator[Measurement]:
    """Build the index of the work's data, or of such parts of it one after the other, cold and warm.

    :raises SystemExit: the index does not have all files.
    """
    for part in parts:
        data = replace(work.data, files=work.data.files // part)
        for folder, suffix in _places(scene):
            with _tree(folder, data):
                yield from _rounds(folder, suffix, rounds)


def _places(scene: Scene) -> Iterator[tuple[Path, str]]:
    yield scene.folder / "indexed", ""
    if os.stat(scene.dest).st_dev != os.stat(scene.folder).st_dev:
        yield scene.dest / "indexed", f" on {filesystem(scene.dest)}"


@contextmanager
def _tree(folder: Path, data: Data) -> Iterator[None]:
    """Have data below a folder, whose writing is over in every sense."""
    build(folder / "data", data)
    try:
        os.sync()
        time.sleep(_SETTLED)
        yield
    finally:
        shutil.rmtree(folder)


def _rounds(folder: Path, suffix: str, rounds: int) -> Iterator[Measurement]:
    files, size = measure(folder / "data")
    where = shlex.quote(str(folder / "data"))
    cores = len(os.sched_getaffinity(0))
    md5sum = f"find {where} -type f -print0 | xargs -0 -P {cores} md5sum >/dev/null"
    find = f"find {where} -printf '{_LOOK}' >/dev/null"
    _shell(md5sum)  # so that everything is in the page cache
    for number in range(rounds):
        shutil.rmtree(folder / ".mdbackup", ignore_errors=True)
        for who, seconds in (
            (OURS, _ours(folder, files, hashed=files)),
            (MD5SUM, _shell(md5sum)),
            (WARM, _ours(folder, files, hashed=0)),
            (FIND, _shell(find)),
        ):
            base = {OURS: "", WARM: "", MD5SUM: OURS + suffix, FIND: WARM + suffix}[who]
            hashed = size if who in (OURS, MD5SUM) else 0
            yield Measurement(who + suffix, number, seconds, files, hashed, base=base)
    for who in (OURS, WARM):
        if who == OURS:
            shutil.rmtree(folder / ".mdbackup")
        yield Measurement(f"memory of {who}{suffix}", 0, 0, files, peak=_peak(folder), base="")


def _command(folder: Path) -> list[str]:
    program = folder / "indexer.py"
    program.write_bytes(python_program())
    return [sys.executable, "-I", str(program), "--chroot", str(folder), "--source", "/data"]


def _ours(folder: Path, files: int, hashed: int) -> float:
    command = _command(folder)
    started = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - started
    last = parse_report(done.stdout.splitlines()[-1])
    if not isinstance(last, Done) or (last.files, last.hashed) != (files, hashed):
        raise SystemExit(f"The index should have {files} files, {hashed} of them hashed, but: {last}")
    return seconds


def _shell(command: str) -> float:
    started = time.monotonic()
    subprocess.run(["/bin/sh", "-c", command], check=True)
    return time.monotonic() - started


def _peak(folder: Path) -> int:
    """Build once more, and return the most memory that all its processes had together, in bytes."""
    most = 0
    with subprocess.Popen(_command(folder), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, sum(map(_memory, _family(process.pid))))
            time.sleep(0.05)
    return most


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *map(int, children)]


def _memory(pid: int) -> int:
    """Return the memory of a process in bytes, what it shares counted in proportion."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
