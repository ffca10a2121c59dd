"""A tree that another tool made becomes the mirror, so that the first run transfers only what differs.

::

    walk      what is in the mirror, and in trees that are to be moved there; listed in a table on the disk
    hash      each regular file, several at a time; what was hashed before a crash is not hashed again
    move      each tree to its place, by one rename
    log       the history of everything adopted is written ahead; then the marker makes it a backup
    carry out consumer index and history, as for every commit (see journal)
    conclude  what the provider does not have leaves the index again, in a commit of its own

Before the marker nothing is adopted, and runs refuse ``dest``; after it everything is, because whoever comes
next finishes that commit. In both cases the same command resumes. No file is opened for writing, and none is
removed.

Limitations: what the tree contained before is not known. History starts with the adoption.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import SortedLookup
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.files.jsonl import read_header, read_records, write_state
from airflow_mdbackup.scheme.files.syscalls import make_directory
from airflow_mdbackup.scheme.history.changes import Change, commits, pending
from airflow_mdbackup.scheme.history.forget import ForgottenEntry, remove_entries
from airflow_mdbackup.scheme.history.journal import Transaction, transaction
from airflow_mdbackup.scheme.history.status_file import refresh_status
from airflow_mdbackup.scheme.history.usage import totals_state
from airflow_mdbackup.scheme.index.canonical import count_entries
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.version_names import OLD
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree, Survey, SurveyReport

_WHO = "adopt"


# --- checks -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adopted:
    """The result of an adoption.

    :ivar files: entries in the consumer index.
    :ivar gone: how many adopted files have left it again, because the provider does not have them.
    """

    files: int
    gone: int


def is_started(mirror: Mirror) -> bool:
    """Whether an adoption was cut off, so that the same command resumes it."""
    return mirror.adopting.exists()


def is_committing(mirror: Mirror) -> bool:
    """Whether an adoption was cut off so late that its commit only has to be finished."""
    if not is_started(mirror) or not mirror.is_marked():
        return False
    first = next(iter([*commits(mirror), *pending(mirror)]), None)
    return first is not None and str(read_header(first).get("run_id")).startswith(f"{_WHO}__")


def check_adoptable(mirror: Mirror, trees: Sequence[SourceTree]) -> None:
    """Make sure that ``dest`` has no backup yet, and that the trees can be moved there.

    :raises DestinationRefused: it has a backup, is another provider's, or contains something else; or a tree
        does not exist, is on another file system, or its place is taken.
    """
    if mirror.is_marked():
        mirror.check()
        if _has_backup(mirror):
            mirror.adopting.unlink(missing_ok=True)  # of an adoption that was never carried out
            raise DestinationRefused(
                f"{mirror.provider}: {mirror.dest} already has a backup, and nothing was changed. You can "
                "put more files in place: the next run hashes those not in its index, and pulls the rest"
            )
    elif any(commits(mirror)):
        raise DestinationRefused(
            f"{mirror.provider}: {mirror.dest} has the history of a backup but no marker: is it what is left "
            "of another disk? Move it away, or restore its provider-id"
        )
    directories = [tree.directory.resolve() for tree in trees]
    for other in mirror.foreign():
        if not any(directory.is_relative_to(other.resolve()) for directory in directories):
            raise DestinationRefused(
                f"{mirror.provider}: {mirror.dest} contains {other.name!r}, which is not part of a backup. "
                f"If that is the tree: --tree {shlex.quote(str(other))} --at PATH; otherwise move it away"
            )
    _check_overlap(mirror, trees)
    for tree in trees:
        if not (is_started(mirror) and _is_moved(mirror, tree)):
            _check_tree(mirror, tree)


def _check_overlap(mirror: Mirror, trees: Sequence[SourceTree]) -> None:
    """Make sure that no tree is in another one, now or after the move."""
    for one, two in permutations(trees, 2):
        if _place(mirror, one).is_relative_to(_place(mirror, two)):
            raise DestinationRefused(
                f"{mirror.provider}: {one.directory} would be moved into {two.directory}: move it there first"
            )
        if one.directory.resolve().is_relative_to(two.directory.resolve()):
            raise DestinationRefused(
                f"{mirror.provider}: {one.directory} is part of {two.directory} and is moved with it: leave "
                "it out, or move it away first"
            )


def _has_backup(mirror: Mirror) -> bool:
    return mirror.index.exists() or any(commits(mirror)) or any(pending(mirror))


def _is_moved(mirror: Mirror, tree: SourceTree) -> bool:
    """Whether an adoption that was cut off had already moved a tree to its place."""
    return not os.path.lexists(tree.directory) and _place(mirror, tree).is_dir()


def survey_sources(mirror: Mirror, trees: Sequence[SourceTree]) -> list[SourceTree]:
    """Return what an adoption surveys: what is in the mirror already, and the trees to be moved there."""
    to_move = [tree for tree in trees if not _is_moved(mirror, tree)]
    return [SourceTree(mirror.files), *to_move] if mirror.files.is_dir() else to_move


def _place(mirror: Mirror, tree: SourceTree) -> Path:
    return mirror.files / os.fsdecode(tree.at.lstrip(b"/"))


def _check_tree(mirror: Mirror, tree: SourceTree) -> None:
    directory, place = tree.directory, _place(mirror, tree)
    prefix = f"{mirror.provider}: {directory}"
    if directory.is_symlink() or not directory.is_dir():
        raise DestinationRefused(f"{prefix} is a symlink, missing, or not a directory: name the tree itself")
    if OLD in tree.at.split(b"/"):
        raise DestinationRefused(
            f"{prefix} cannot be moved to {to_text(tree.at)}: {OLD.decode()} is for versions"
        )
    resolved, dest = directory.resolve(), mirror.dest.resolve()
    if dest.is_relative_to(resolved):
        raise DestinationRefused(
            f"{prefix} is the dest or above it, and cannot be moved into itself. Move it aside first: mv "
            f"{shlex.quote(str(directory))} {shlex.quote(f'{directory}.tree')}, and name that"
        )
    if resolved.is_relative_to(mirror.files.resolve()):
        raise DestinationRefused(f"{prefix} is in the mirror already: leave out --tree")
    blocked = None
    if mirror.files.exists():
        with mirror.tree() as files:
            blocked = files.blocker(tree.at + b"/.")
    if blocked is not None or (os.path.lexists(place) and any(place.iterdir())):
        raise DestinationRefused(
            f"{prefix} cannot be moved to {place}, where something already exists: move that away"
        )
    above = next(folder for folder in (mirror.dest, *mirror.dest.parents) if folder.exists())
    if above.stat().st_dev != directory.stat().st_dev:
        raise _cannot_rename(mirror, tree)


def _cannot_rename(mirror: Mirror, tree: SourceTree) -> DestinationRefused:
    place = _place(mirror, tree)
    source, target = shlex.quote(str(tree.directory)), shlex.quote(str(place))
    return DestinationRefused(
        f"{mirror.provider}: {tree.directory} is on another file system than {mirror.dest}, or is a mount "
        "point, so it cannot be moved by a rename. Copy it (on one disk with btrfs or XFS a copy takes no "
        f"space), and adopt without --tree: mkdir -p {target} && cp --reflink=auto -a {source}/. {target}/"
    )


# --- adopting ---------------------------------------------------------------------------------------


def adopt(mirror: Mirror, survey: Survey, trees: Sequence[SourceTree]) -> None:
    """Move the trees to their places, and make a backup of everything surveyed.

    Call :func:`check_adoptable` before the first attempt. May be called again after a crash with a new
    survey; or :func:`resume`, if the commit had been started.

    :raises DestinationRefused: a run has created a backup meanwhile, or a tree cannot be moved.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors():
        mirror.make_directories()
        with mirror.lock(_WHO, OPERATOR_WAIT):
            if mirror.is_marked() and _has_backup(mirror):
                raise DestinationRefused(
                    f"{mirror.provider}: a run has created a backup in {mirror.dest} meanwhile"
                )
            for cut_off in pending(mirror):
                cut_off.unlink()  # without a marker nobody has started to carry it out
            for tree in trees:
                if not _is_moved(mirror, tree):
                    _move(mirror, tree)
            tx = Transaction(mirror, _WHO, mirror.scratch_index)
            with mirror.tree() as files:
                files.sync()
                tx.write(survey.changes(files), tx.header(order=""))
            mirror.mark()
            _write_status(mirror, tx.carry_out(missed=partial(_report_missed, survey.report)))


def _report_missed(report: SurveyReport, change: Change, why: str) -> None:
    report.skip(SkipReason.UNREADABLE, change.path)


def resume(mirror: Mirror) -> None:
    """Finish an adoption that was cut off in its commit, unless somebody has finished it.

    :raises DestinationBusy, DestinationFull, DestinationBroken, WorkerExhausted: see :func:`adopt`.
    """
    with mirror.translate_os_errors():
        mirror.check()
        with transaction(mirror, _WHO, OPERATOR_WAIT):
            _write_status(mirror, count_entries(mirror.index) if mirror.index.exists() else 0)


def conclude(mirror: Mirror, run: Run | None) -> Adopted:
    """Remove what the provider does not have from the index, and end the adoption.

    :param run: with a plan that :func:`.preview` made; None if it is not known what the provider has.
    :raises DestinationBusy, DestinationFull, DestinationBroken, WorkerExhausted: see :func:`adopt`.
    """
    gone: list[bytes] = []
    if run is not None:
        leaving = SortedLookup(read_records(run.forget, ForgottenEntry))
        gone = remove_entries(mirror, lambda entry: leaving.find(entry.path) is not None, _WHO, OPERATOR_WAIT)
    mirror.adopting.unlink(missing_ok=True)
    return Adopted(count_entries(mirror.index), len(gone))


def _move(mirror: Mirror, tree: SourceTree) -> None:
    """Move a tree to its place, by a rename that replaces an empty directory at most."""
    _check_tree(mirror, tree)
    place = _place(mirror, tree)
    make_directory(place.parent, 0o755, parents=True)
    try:
        os.rename(tree.directory, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        raise _cannot_rename(mirror, tree) from None


def _write_status(mirror: Mirror, files: int) -> None:
    """Write a status without a last good run, unless there already is a status."""
    if mirror.status.exists():
        refresh_status(mirror)
    else:
        status = {"provider": mirror.provider, "order": "", "files": files}
        write_state(mirror.status, {**status, **totals_state(mirror, status, files)})
