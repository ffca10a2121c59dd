"""What tests of a restore share: somebody who works on server A, restores, and the command."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.restore import Restored, restore
from tests.kept import Kept, files_in
from tests.pair import Pair


def files_of_a(pair: Pair) -> dict[bytes, Kept]:
    """Return the files of A, under the paths by which the provider knows them."""
    return {os.fsencode(pair.a) + path: kept for path, kept in files_in(pair.a).items()}


class Random:
    """Somebody who works on server A."""

    NAMES = ("a", "b", "c", "d")

    def __init__(self, pair: Pair, seed: int) -> None:
        self._pair = pair
        self._choose = random.Random(seed)

    def work(self) -> None:
        for _ in range(self._choose.randint(1, 6)):
            self._choose.choice((self._write, self._write, self._write, self._remove, self._rename))()

    def _path(self) -> Path:
        return self._pair.a.joinpath(
            *(self._choose.choice(self.NAMES) for _ in range(self._choose.randint(1, 3)))
        )

    def _write(self) -> None:
        path = self._path()
        for parent in path.parents:
            if parent.is_file():
                parent.unlink()
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # New bytes each time: of a file that only gets other times or another mode, nothing is pulled.
        path.write_bytes(self._choose.randbytes(16))
        path.chmod(self._choose.choice((0o644, 0o600, 0o755, 0o444)))
        time = 1_600_000_000 + self._choose.randint(1, 10**6)
        os.utime(path, (time, time))

    def _remove(self) -> None:
        path = self._path()
        if path.is_dir():
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()

    def _rename(self) -> None:
        source, target = self._path(), self._path()
        if source.exists() and not target.exists() and not target.is_relative_to(source):
            for parent in target.parents:
                if parent.is_file():
                    return
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)


def back(pair: Pair, target: Path, stamp: str = "9", *, sound: bool = True, **options: Any) -> list[Restored]:
    """Restore everything as of a stamp.

    :param sound: whether nothing is wrong with the history.
    """
    with Timeline(pair.mirror) as past:
        assert bool(past.problems) != sound
        moment = past.moment_at(stamp)
        contents = past.state(moment) if moment is not None else iter(())
        return list(restore(pair.mirror, past, contents, target, **options))


def two_runs(pair: Pair) -> tuple[str, dict[bytes, Kept]]:
    """Back up twice, and return the stamp of the first run and what A had then."""
    for name in ("same", "changed", "gone", "flipped/below", "twin"):
        pair.put(name, name.encode())
    pair.put("twin of changed", b"changed")
    pair.backup()
    stamp, kept = pair.mirror.last_commit(), files_of_a(pair)
    pair.put("changed", b"newer")
    os.unlink(pair.path("gone"))
    shutil.rmtree(pair.path("flipped"))
    pair.put("flipped", b"a file")
    pair.put("new", b"new")
    pair.backup()
    return stamp, kept


def outcomes(came: list[Restored]) -> dict[str, int]:
    return dict(Counter(each.outcome.value for each in came))


def mdbackup(*words: str) -> tuple[int, str, str]:
    """Run a command in a process without Airflow and without the packages that only Airflow needs."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('airflow', 'pydantic', 'croniter', 'yaml', 'jinja2'))\n"
        "from airflow_mdbackup.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr
