"""Deletes old versions to free space, when an operator asks for it. Nothing else deletes what was backed up.

::

    judge     each version that the history knows: it exists, is what history says, and no rule keeps it
    log       under the lock: the history of the deletions is written ahead, as .pending
    delete    each of them; then directories in .old that are empty now
    record    what is gone; the history gets its final name (see journal)

This is done in batches, so that a full disk needs little space for it. After a crash, whoever recovers
records the versions that are gone, and deletes no more.

A live file is never touched, nor anything reached through a symlink, nor a file with a second name (a hard
link), which would free nothing. A file whose content is not what history says stays, because nobody knows
whose it is; it is hashed only if its size or time leave a doubt.

Limitations: the content of the versions that stay is not checked. Verify first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count, groupby
from operator import attrgetter

from airflow_mdbackup.scheme.errors import DestinationFull, DestinationRefused
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, is_file, seconds
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.apply import is_gone
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind
from airflow_mdbackup.scheme.history.journal import Transaction, transaction
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.status_file import refresh_status
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import OLD

# Versions deleted per batch: few at first, while there is no space for a long history.
_FIRST_BATCH, _MAX_BATCH = 10, 10_000


class PruneOutcome(StrEnum):
    """What becomes of a version."""

    GOES = "goes"  # a dry run: it would be pruned
    PRUNED = "pruned"
    KEPT = "kept"  # by a rule
    CHANGED = "changed"  # it is not what history says: edited by hand, or corrupted by a bad disk
    LINKED = "linked"  # it has a second name
    FAILED = "failed"  # the disk refused to read or delete it


@dataclass(frozen=True, slots=True)
class PrunableVersion:
    """A version, and what becomes of it.

    :ivar place: its path in the mirror's tree.
    :ivar size: in bytes; ``disk_size`` is the space that it takes on the disk.
    :ivar detail: why it failed; for people.
    :ivar fingerprint: shows whether the file was touched since it was judged.
    """

    content: FileVersion
    place: bytes
    outcome: PruneOutcome
    size: int = 0
    disk_size: int = 0
    detail: str = ""
    fingerprint: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KeepRules:
    """Which versions of each path are kept: those that at least one of these keeps.

    :ivar last: that many of the newest.
    :ivar daily: for each of the last that many days (UTC) on which a version was displaced, the newest;
        ``monthly`` likewise.
    :ivar since: a stamp: versions displaced then or later. Empty: none.
    """

    last: int = 0
    daily: int = 0
    monthly: int = 0
    since: str = ""

    def for_one_path(self) -> Callable[[str], bool]:
        """Return a predicate over the stamps of one path's versions, newest first: whether one is kept."""
        periods = _NewestPerPeriod(len("20261123"), self.daily), _NewestPerPeriod(len("202611"), self.monthly)
        number = count(1)  # imported versions may have the same stamp

        def keeps(stamp: str) -> bool:
            # Each rule must see every stamp, whatever the others say.
            kept = [next(number) <= self.last, *(period.keeps(stamp) for period in periods)]
            return any(kept) or (self.since != "" and stamp >= self.since)

        return keeps


class _NewestPerPeriod:
    """The newest version of each of the last periods. A period is the first characters of a stamp.

    :param length: how many characters; ``number`` is how many periods.
    """

    def __init__(self, length: int, number: int) -> None:
        self._length = length
        self._left = number
        self._period = ""

    def keeps(self, stamp: str) -> bool:
        if not self._left or stamp[: self._length] == self._period:
            return False
        self._period = stamp[: self._length]
        self._left -= 1
        return True


@contextmanager
def pruning(
    mirror: Mirror, wanted: Selection, rules: KeepRules, *, carry_out: bool
) -> Iterator[tuple[Timeline, Iterator[PrunableVersion]]]:
    """Yield the history, and the selected versions with their outcomes, the oldest of each path first.

    :param carry_out: hold the lock, and delete versions while they are iterated over. Otherwise nothing is
        changed.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull: there is no space even for the history of the deletions.
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    with _explain_full_disk(mirror), mirror.translate_os_errors(), ExitStack() as stack:
        tx = stack.enter_context(transaction(mirror, "prune", OPERATOR_WAIT)) if carry_out else None
        timeline = stack.enter_context(Timeline(mirror, wanted))
        if timeline.clock_doubt is not None:
            raise DestinationRefused(f"{mirror.provider}: nothing is pruned: {timeline.clock_doubt}")
        wanted.resolve(timeline.knows)
        tree = stack.enter_context(mirror.tree())
        versions = _judge_all(tree, timeline, wanted, rules)
        if tx is None:
            yield timeline, versions
            return
        yield timeline, _delete_in_batches(tx, tree, versions)
        refresh_status(mirror)


@contextmanager
def _explain_full_disk(mirror: Mirror) -> Iterator[None]:
    """Say what to do if the disk is too full even for making space on it."""
    try:
        yield
    except DestinationFull as error:
        raise DestinationFull(
            f"{mirror.provider}: the disk of {mirror.dest} has no space even for the history of the "
            f"deletions. Free some 100 kB and try again: you may delete what is in {mirror.staging}; a run "
            "pulls it again."
        ) from error


def _judge_all(
    tree: Tree, timeline: Timeline, wanted: Selection, rules: KeepRules
) -> Iterator[PrunableVersion]:
    for path, contents in groupby(timeline.contents(), key=attrgetter("path")):
        if wanted.take(path):
            keeps = rules.for_one_path()
            newest_first = reversed([content for content in contents if content.until])
            found = (_find_version(tree, content) for content in newest_first)
            yield from reversed([_apply_rules(version, keeps) for version in found if version is not None])


def _apply_rules(version: PrunableVersion, keeps: Callable[[str], bool]) -> PrunableVersion:
    # Only existing, unchanged versions count: they alone use up the numbers of the rules.
    if version.outcome in (PruneOutcome.GOES, PruneOutcome.LINKED) and keeps(version.content.until):
        return replace(version, outcome=PruneOutcome.KEPT)
    return version


def _find_version(tree: Tree, content: FileVersion) -> PrunableVersion | None:
    """Return the version that has a content, and whether it could be deleted; None if it does not exist."""
    for place in content.places:
        try:
            found = tree.lstat(place)
            if found is None or OLD not in place.split(b"/"):
                continue
            if not is_file(found) or not _is_unchanged(tree, place, content, found):
                outcome = PruneOutcome.CHANGED
            else:
                outcome = PruneOutcome.LINKED if found.st_nlink > 1 else PruneOutcome.GOES
            size, disk_size = found.st_size, found.st_blocks * 512
            fingerprint = _fingerprint(found)
            return PrunableVersion(content, place, outcome, size, disk_size, fingerprint=fingerprint)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return PrunableVersion(content, place, PruneOutcome.FAILED, detail=os.strerror(error.errno or 0))
    return None


def _fingerprint(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes when somebody touches a file."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_unchanged(tree: Tree, place: bytes, content: FileVersion, found: os.stat_result) -> bool:
    """Whether a file is what history says, by size and time; if they leave a doubt, by hashing it."""
    if content.size == found.st_size and content.mtime == seconds(found):
        return True
    if content.size not in (None, found.st_size):
        return False
    with tree.opened(place) as descriptor:
        return md5_of(descriptor) == content.md5


# --- deleting ---------------------------------------------------------------------------------------


def _delete_in_batches(
    tx: Transaction, tree: Tree, versions: Iterable[PrunableVersion]
) -> Iterator[PrunableVersion]:
    """Delete what is to go, a batch at a time, and yield all versions in their order."""
    batch: list[PrunableVersion] = []
    going, limit = 0, _FIRST_BATCH
    for version in versions:
        batch.append(version)
        going += version.outcome == PruneOutcome.GOES
        if going >= limit or len(batch) >= _MAX_BATCH:
            yield from _delete_batch(tx, tree, batch)
            limit = min(10 * limit, _MAX_BATCH) if going else limit
            batch, going = [], 0
    yield from _delete_batch(tx, tree, batch)


def _delete_batch(tx: Transaction, tree: Tree, batch: list[PrunableVersion]) -> list[PrunableVersion]:
    """Delete what is to go of a batch, and return all of it with final outcomes."""
    going = [version for version in batch if version.outcome == PruneOutcome.GOES]
    if not going:
        return batch
    record = tx.prune(_pruned(each.content, each.place, each.size) for each in going)
    done = [_delete(tree, version) if version.outcome == PruneOutcome.GOES else version for version in batch]
    for folder in {version.place.rpartition(b"/")[0] for version in going}:
        _remove_empty_directories(tree, folder)
    record()
    return done


def _pruned(content: FileVersion, place: bytes, size: int | None) -> Change:
    return Change(content.path, ChangeKind.PRUNED, old_md5=content.md5, size=size, version=place)


def _delete(tree: Tree, version: PrunableVersion) -> PrunableVersion:
    """Delete a version if it is still the file that was judged."""
    try:
        found = tree.lstat(version.place)
        if found is None or _fingerprint(found) != version.fingerprint:
            return replace(version, outcome=PruneOutcome.CHANGED)
        tree.unlink(version.place)
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return replace(version, outcome=PruneOutcome.FAILED, detail=os.strerror(error.errno or 0))
    return replace(version, outcome=PruneOutcome.PRUNED)


def _remove_empty_directories(tree: Tree, folder: bytes) -> None:
    """Remove a directory in ``.old`` if it is empty, and then those above it that are empty too."""
    while OLD in folder.split(b"/") and tree.remove_empty(folder):
        folder = folder.rpartition(b"/")[0]


# --- acknowledging ----------------------------------------------------------------------------------


def acknowledge_missing(
    mirror: Mirror, missing: Iterable[tuple[FileVersion, bytes]], wait: float
) -> list[bytes]:
    """Record in the history that contents are lost for good, and return the places where they were.

    Nothing is deleted: a file that exists after all stays, and is not recorded.

    :param missing: versions, and files that have left the index, each with its empty place. Others are
        ignored.
    :param wait: seconds that a run may hold the lock meanwhile.
    :raises BackupError: as for :func:`pruning`.
    """
    candidates = [(content, place) for content, place in missing if content.until or content.left]
    if not candidates:
        return []
    with (
        mirror.translate_os_errors(),
        transaction(mirror, "verify", wait) as tx,
        mirror.tree() as tree,
    ):
        # A run may have brought or moved one of them since.
        with Timeline(mirror, {content.path for content, _ in candidates}.__contains__) as timeline:
            known = {
                (now.path, now.md5, place)
                for now in timeline.contents()
                for place in now.places
                if now.until or now.left
            }
        gone = [
            (content, place)
            for content, place in candidates
            if (content.path, content.md5, place) in known and is_gone(tree, place)
        ]
        if gone:
            tx.prune(_pruned(content, place, None) for content, place in gone)()
            refresh_status(mirror)
    return [place for _, place in gone]
