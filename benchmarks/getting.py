"""Getting a backup back, and reading it again, against those who copy or read the same directory.

    restore    everything, as it is now, each file by its md5; rsync and rclone copy the live files
    verify     everything; md5sum reads the live files, by a list that it gets, and so does a bare loop

Counted is the whole program in each case, from its start to its end, with hot page cache. Ours syncs what it
restored. rclone compares the md5 of each file that it copied, rsync verifies nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from benchmarks import ours
from benchmarks.data import measure
from benchmarks.peers import is_installed
from benchmarks.results import OURS, Measurement
from benchmarks.scene import REPOSITORY, Scene
from benchmarks.work import Work

MD5SUM = "md5sum -c"
BARE = "bare Python, 2 processes"


def restoring(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Restore all of a backup into new directories.

    :raises SystemExit: something did not come back.
    """
    with _backup(scene, work) as dest:
        files = dest / "files"
        commands: dict[str, Sequence[str | Path]] = {
            OURS: _ours("restore", dest, "--to"),
            "rsync -a": ("rsync", "-a", f"{files}/"),
            "rclone": ("rclone", "copy", "--config=", files),
        }
        for number in range(rounds):
            for who, command in commands.items():
                if is_installed(who):
                    with scene.new_dest("back") as target:
                        seconds = _clock((*command, target))
                        if (found := measure(target)) != measure(files):
                            raise SystemExit(f"{who}: only {found} files and bytes have come back.")
                    yield Measurement(who, number, seconds, *found)


def verifying(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Read all of a backup again.

    :raises SystemExit: something is not as the index says.
    """
    with _backup(scene, work) as dest:
        size = measure(dest / "files")
        entries = read_entries(Mirror(dest, ours.PROVIDER).index)
        lines = b"".join(entry.md5 + b"  ." + entry.path + b"\n" for entry in entries)
        listed = scene.folder / "listed.md5"
        listed.write_bytes(lines)
        commands: dict[str, Sequence[str | Path]] = {
            OURS: _ours("verify", dest),
            MD5SUM: ("md5sum", "--quiet", "-c", listed),
            BARE: (sys.executable, "-m", "benchmarks.bare", listed),
        }
        for number in range(rounds):
            for who, command in commands.items():
                yield Measurement(who, number, _clock(command, dest / "files"), *size)


@contextmanager
def _backup(scene: Scene, work: Work) -> Iterator[Path]:
    """Have a backup of the work's data."""
    with scene.offering(work.data), scene.new_dest("backup") as dest:
        ours.run(scene, ours.STEPS, dest)
        yield dest


def _ours(command: str, dest: Path, *options: str) -> Sequence[str | Path]:
    return (sys.executable, "-m", "airflow_mdbackup", command, "--dest", dest, *options)


def _clock(command: Sequence[str | Path], folder: Path = REPOSITORY) -> float:
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.decode(errors='replace')}")
    return seconds
