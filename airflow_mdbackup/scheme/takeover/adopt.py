"""A tree that another tool made becomes the mirror, so that the first run transfers only what differs.

::

    walked    what lies in the mirror, and in trees that are to come there, into a table on the disk
    hashed    each regular file, several at a time; what was hashed before a crash is not hashed again
    moved     each tree to its place, by one rename
    ahead     the history of all that is adopted; then the marker, so that from now on it is a backup
    finished  consumer index and history, as every commit is (see settle)
    left      what the provider does not have leaves the index again, in a commit of its own

Before the marker nothing is adopted, and runs refuse ``dest``; behind it all is, since whoever comes next
finishes that commit. The same command again goes on in either case. No file is opened for writing, and none
is removed.

What this does not give: what the tree was before. History begins with the adoption.
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


# --- adopting ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of an adoption.

    :ivar files: entries in the consumer index.
    :ivar gone: how many of what was adopted have left it again, because the provider does not have them.
    """

    files: int
    gone: int


def is_begun(mirror: Mirror) -> bool:
    """Whether an adoption was cut off, which the same command goes on with."""
    return mirror.adopting.exists()


def is_adopted(mirror: Mirror) -> bool:
    """Whether an adoption that was cut off had got so far that it only has to be finished."""
    if not is_begun(mirror) or not mirror.is_marked():
        return False
    first = next(iter([*commits(mirror), *pending(mirror)]), None)
    return first is not None and str(read_header(first).get("run_id")).startswith(f"{_WHO}__")


def check_adoptable(mirror: Mirror, trees: Sequence[SourceTree]) -> None:
    """Make sure that ``dest`` has no backup yet, and that the trees can be moved there.

    :raises DestinationRefused: it has one, is another provider's, or holds something else; or a tree is not
        there, lies on another file system, or its place is taken.
    """
    if mirror.is_marked():
        mirror.check()
        if _has_backup(mirror):
            mirror.adopting.unlink(missing_ok=True)  # of one that was never carried out
            raise DestinationRefused(
                f"{mirror.provider}: {mirror.dest} has a backup already, and nothing was changed. More files "
                "can be put in place: the next run hashes what its index does not have, and pulls the rest"
            )
    elif any(commits(mirror)):
        raise DestinationRefused(
            f"{mirror.provider}: {mirror.dest} has the history of a backup, and no marker: another disk's "
            "rest? Move it away, or bring its provider-id back"
        )
    ours = [tree.directory.resolve() for tree in trees]
    for other in mirror.foreign():
        if not any(tree.is_relative_to(other.resolve()) for tree in ours):
            raise DestinationRefused(
                f"{mirror.provider}: {mirror.dest} holds {other.name!r}, which has no place in a backup. If "
                f"that is the tree: --tree {shlex.quote(str(other))} --at PATH; else move it away"
            )
    for one, two in permutations(trees, 2):
        if _place(mirror, one).is_relative_to(_place(mirror, two)):
            raise DestinationRefused(
                f"{mirror.provider}: {one.directory} would come into {two.directory}: move it there first"
            )
        if one.directory.resolve().is_relative_to(two.directory.resolve()):
            raise DestinationRefused(
                f"{mirror.provider}: {one.directory} is part of {two.directory}, and comes with it: leave it "
                "out, or move it away first"
            )
    for tree in trees:
        if not (is_begun(mirror) and _is_moved(mirror, tree)):
            _check_tree(mirror, tree)


def _has_backup(mirror: Mirror) -> bool:
    return mirror.index.exists() or any(commits(mirror)) or any(pending(mirror))


def _is_moved(mirror: Mirror, tree: SourceTree) -> bool:
    """Whether an adoption that was cut off has put a tree in its place."""
    return not os.path.lexists(tree.directory) and _place(mirror, tree).is_dir()


def sources_of(mirror: Mirror, trees: Sequence[SourceTree]) -> list[SourceTree]:
    """Return what an adoption looks at: what is in the mirror already, and the trees that are to come."""
    coming = [tree for tree in trees if not _is_moved(mirror, tree)]
    return [SourceTree(mirror.files), *coming] if mirror.files.is_dir() else coming


def _place(mirror: Mirror, tree: SourceTree) -> Path:
    return mirror.files / os.fsdecode(tree.at.lstrip(b"/"))


def _check_tree(mirror: Mirror, tree: SourceTree) -> None:
    directory, place = tree.directory, _place(mirror, tree)
    who = f"{mirror.provider}: {directory}"
    if directory.is_symlink() or not directory.is_dir():
        raise DestinationRefused(f"{who} is no directory of its own (a symlink, or not there): name the tree")
    if OLD in tree.at.split(b"/"):
        raise DestinationRefused(f"{who} cannot come to {to_text(tree.at)}: {OLD.decode()} is for versions")
    there, dest = directory.resolve(), mirror.dest.resolve()
    if dest.is_relative_to(there):
        raise DestinationRefused(
            f"{who} is the dest, or above it, and cannot be moved into itself. Move it aside first: mv "
            f"{shlex.quote(str(directory))} {shlex.quote(f'{directory}.tree')}, and name that"
        )
    if there.is_relative_to(mirror.files.resolve()):
        raise DestinationRefused(f"{who} lies in the mirror already: leave --tree out")
    blocked = None
    if mirror.files.exists():
        with mirror.tree() as files:
            blocked = files.blocker(tree.at + b"/.")
    if blocked is not None or (os.path.lexists(place) and any(place.iterdir())):
        raise DestinationRefused(f"{who} cannot come to {place}, where something is already: move that away")
    above = next(folder for folder in (mirror.dest, *mirror.dest.parents) if folder.exists())
    if above.stat().st_dev != directory.stat().st_dev:
        raise _elsewhere(mirror, tree)


def _elsewhere(mirror: Mirror, tree: SourceTree) -> DestinationRefused:
    place = _place(mirror, tree)
    source, target = shlex.quote(str(tree.directory)), shlex.quote(str(place))
    return DestinationRefused(
        f"{mirror.provider}: {tree.directory} is on another file system than {mirror.dest}, or is a mount "
        "point, so that no rename brings it there. Copy it (on one disk with btrfs or XFS that takes no "
        f"room), and adopt without --tree: mkdir -p {target} && cp --reflink=auto -a {source}/. {target}/"
    )


def adopt(mirror: Mirror, survey: Survey, trees: Sequence[SourceTree]) -> None:
    """Move the trees to their places, and make a backup of all that was surveyed.

    Before the first call of all, :func:`check_adoptable`. May be called again after a crash, with a new
    survey, or by :func:`go_on` if the adoption had got so far.

    :raises DestinationRefused: a backup has come meanwhile, or a tree cannot be moved.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors():
        mirror.make_directories()
        with mirror.lock(_WHO, OPERATOR_WAIT):
            if mirror.is_marked() and _has_backup(mirror):
                raise DestinationRefused(f"{mirror.provider}: {mirror.dest} has just got a backup by a run")
            for cut_off in pending(mirror):
                cut_off.unlink()  # without a marker nobody has begun to carry it out
            for tree in trees:
                if not _is_moved(mirror, tree):
                    _move(mirror, tree)
            tx = Transaction(mirror, _WHO, mirror.scratch_index)
            with mirror.tree() as files:
                files.sync()
                tx.write(survey.changes(files), tx.header(order=""))
            mirror.mark()
            _write_status(mirror, tx.carry_out(missed=partial(_missed, survey.told)))


def _missed(told: SurveyReport, change: Change, why: str) -> None:
    told.leave(SkipReason.UNREADABLE, change.path)


def go_on(mirror: Mirror) -> None:
    """Finish an adoption that was cut off in the middle of its commit, if nobody has.

    :raises DestinationBusy, DestinationFull, DestinationBroken, WorkerExhausted: see :func:`adopt`.
    """
    with mirror.translate_os_errors():
        mirror.check()
        with transaction(mirror, _WHO, OPERATOR_WAIT):
            _write_status(mirror, count_entries(mirror.index) if mirror.index.exists() else 0)


def conclude(mirror: Mirror, run: Run | None) -> Adopted:
    """Take out of the index again what the provider does not have, and end the adoption.

    :param run: with a plan that :func:`.preview` made; None if what the provider has is not known.
    :raises DestinationBusy, DestinationFull, DestinationBroken, WorkerExhausted: see :func:`adopt`.
    """
    gone: list[bytes] = []
    if run is not None:
        leaving = SortedLookup(read_records(run.forget, ForgottenEntry))
        gone = remove_entries(mirror, lambda entry: leaving.find(entry.path) is not None, _WHO, OPERATOR_WAIT)
    mirror.adopting.unlink(missing_ok=True)
    return Adopted(count_entries(mirror.index), len(gone))


def _move(mirror: Mirror, tree: SourceTree) -> None:
    """Give a tree its place, by a rename that replaces an empty directory at most."""
    _check_tree(mirror, tree)
    place = _place(mirror, tree)
    make_directory(place.parent, 0o755, parents=True)
    try:
        os.rename(tree.directory, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        raise _elsewhere(mirror, tree) from None


def _write_status(mirror: Mirror, files: int) -> None:
    """Write a status that knows of no good run, unless there is one."""
    if mirror.status.exists():
        refresh_status(mirror)
    else:
        status = {"provider": mirror.provider, "order": "", "files": files}
        write_state(mirror.status, {**status, **totals_state(mirror, status, files)})
