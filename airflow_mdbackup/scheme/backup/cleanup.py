"""What runs leave behind is taken away, by count, size and age. Never live files, versions or history.

A run's directory is of use until the run is finished, or can only be superseded because a run with a newer
provider index was committed. Then it stays for a while, so that people can look at it and clear its tasks.
The last one that was finished stays whatever its size.
Staged files go by age alone, since any run may need them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from airflow_mdbackup.scheme.backup.archive import withdraw_unused
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.files.tree import Tree, remove_tree
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run

log = logging.getLogger(__name__)

_RUNS = 10  # finished runs whose directories are kept
_INDEXES = 2  # times the size of the index that each of them may have, on average; and
_SMALL = 1 << 20  # bytes for all of them, however small that is
_SECONDS = 14 * 86400.0


def clean(mirror: Mirror, tree: Tree) -> None:
    """Take away what is no longer of use. Needs the lock. What resists is left for the next time."""
    with _left_for_next_time("What earlier runs left"):
        finished = size = 0
        most = (
            max(_SMALL, _RUNS * _INDEXES * mirror.index.stat().st_size) if mirror.index.exists() else _SMALL
        )
        for changed, run in mirror.out_of_use():
            done = run.done.exists()
            if done:
                finished += 1
                size += run.size()
            too_many = finished > _RUNS or (finished > 1 and size > most)
            if (done and too_many) or time.time() - changed > _SECONDS:
                with _left_for_next_time(f"The directory {run.folder} of an earlier run"):
                    _take_away(mirror, run, tree)
        for folder in mirror.removed_runs():
            remove_tree(folder)
        long_ago = min(time.time() - _SECONDS, mirror.in_use_since())
        for staged in mirror.staging.iterdir():
            with _left_for_next_time(f"{staged}, staged long ago,"), suppress(FileNotFoundError):
                # If it is not there, a task that pulls has just renamed it.
                if staged.lstat().st_ctime < long_ago:
                    staged.unlink()
        for incomplete in mirror.history.glob("*.tmp"):
            with _left_for_next_time(f"{incomplete}"):
                incomplete.unlink()


@contextmanager
def _left_for_next_time(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, BackupError) as error:
        log.warning("%s could not be taken away: %s", what, error)


def _take_away(mirror: Mirror, run: Run, tree: Tree) -> None:
    with run.unused() as unused:
        if not unused:  # its tasks have been cleared
            return
        # Without it, whose versions they were is not known.
        if run.state.exists():
            withdraw_unused(mirror, run, tree)
        # Whoever waits for its lock finds it gone as a whole.
        run.remove()
