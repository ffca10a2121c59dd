"""Removes what runs leave behind, by count, size and age. Never live files, versions or history.

A run's directory is needed until the run has finished, or can only be superseded because a run with a newer
provider index was committed. After that it is kept for a while, so that operators can look at it and clear
its tasks. The last finished one is kept whatever its size. Staged files are removed by age alone, since any
run may need them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from airflow_mdbackup.scheme.backup.archive import discard_unused
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.files.tree import Tree, remove_tree
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run

log = logging.getLogger(__name__)

_MAX_RUNS = 10  # finished runs whose directories are kept
_INDEXES_PER_RUN = 2  # their average size, in sizes of the consumer index
_MIN_SIZE = 1 << 20  # bytes that all of them may have, however small the index is
_MAX_AGE = 14 * 86400.0  # seconds


def clean(mirror: Mirror, tree: Tree) -> None:
    """Remove what is no longer needed. Needs the lock. What cannot be removed is left for the next time."""
    with _postpone_on_error("the leftovers of earlier runs"):
        finished = size = 0
        index_size = mirror.index.stat().st_size if mirror.index.exists() else 0
        max_size = max(_MIN_SIZE, _MAX_RUNS * _INDEXES_PER_RUN * index_size)
        for changed, run in mirror.out_of_use():
            done = run.done.exists()
            if done:
                finished += 1
                size += run.size()
            too_many = finished > _MAX_RUNS or (finished > 1 and size > max_size)
            if (done and too_many) or time.time() - changed > _MAX_AGE:
                with _postpone_on_error(f"the directory {run.folder} of an earlier run"):
                    _remove(mirror, run, tree)
        for folder in mirror.removed_runs():
            remove_tree(folder)
        long_ago = min(time.time() - _MAX_AGE, mirror.in_use_since())
        for staged in mirror.staging.iterdir():
            with _postpone_on_error(f"{staged}, staged long ago"), suppress(FileNotFoundError):
                # It is missing if a task that pulls has just renamed it.
                if staged.lstat().st_ctime < long_ago:
                    staged.unlink()
        for incomplete in mirror.history.glob("*.tmp"):
            with _postpone_on_error(f"{incomplete}"):
                incomplete.unlink()


@contextmanager
def _postpone_on_error(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, BackupError) as error:
        log.warning("Could not remove %s: %s", what, error)


def _remove(mirror: Mirror, run: Run, tree: Tree) -> None:
    with run.unused() as unused:
        if not unused:  # its tasks were cleared, and run again
            return
        # Without its state it is unknown which versions are its own.
        if run.state.exists():
            discard_unused(mirror, run, tree)
        # In one step, for whoever is waiting for its lock.
        run.remove()
