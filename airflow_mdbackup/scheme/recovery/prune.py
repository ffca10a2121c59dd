"""Versions are taken away because a person wants their room. Nothing else in the scheme ever deletes.

::

    judged    each version that history knows: it is there, it is what history says, and no rule keeps it
    ahead     under the lock: the history of what is to go is written, and gets its name, .pending
    taken     each of them; then directories in .old that are empty
    recorded  what is gone; the history gets its final name (see settle)

That is done for some versions at a time, so that little room is needed while the disk is full. What is cut
off has taken some of them; whoever settles it records those, and takes no more.

A live file is never touched, nor what is reached through a symlink, nor a file with another name (a hard
link), which would free nothing. A file whose bytes are not what history says stays, for nobody knows whose
they are; it is hashed only if its size or time leave a doubt.

What this does not give: a look at what the bytes that stay are worth. Verify first.
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

# Versions that go at a time: few at first, while there is no room for a long history.
_FIRST, _MOST = 10, 10_000


class PruneOutcome(StrEnum):
    """What becomes of a version."""

    GOES = "goes"
    PRUNED = "pruned"
    KEPT = "kept"  # by a rule
    CHANGED = "changed"  # it is not what history says, by hand or by a bad disk
    LINKED = "linked"  # it has another name as well
    FAILED = "failed"  # the disk refuses to look at it, or to let it go


@dataclass(frozen=True, slots=True)
class PrunableVersion:
    """A version, and what becomes of it.

    :ivar place: where it lies, as a path of the mirror's tree.
    :ivar size: in bytes; ``room`` is what it takes on the disk.
    :ivar detail: for people: why it failed.
    :ivar seen: what tells whether somebody has touched the file since it was judged.
    """

    content: FileVersion
    place: bytes
    fate: PruneOutcome
    size: int = 0
    room: int = 0
    detail: str = ""
    seen: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KeepRules:
    """Which versions of each path stay: those that any of these keeps.

    :ivar last: so many of the newest.
    :ivar daily: the newest of each of the last so many days (UTC) on which any was displaced; ``monthly``
        likewise.
    :ivar since: a stamp: what was displaced then or later. Empty: nothing is kept for that.
    """

    last: int = 0
    daily: int = 0
    monthly: int = 0
    since: str = ""

    def keeper(self) -> Callable[[str], bool]:
        """Return what tells of the versions of one path, the newest first, by their stamps, which stay."""
        periods = _Newest(len("20261123"), self.daily), _Newest(len("202611"), self.monthly)
        number = count(1)  # imported versions may have the same stamp

        def keeps(stamp: str) -> bool:
            # Each of them counts, whatever the others say.
            kept = [next(number) <= self.last, *(period.keeps(stamp) for period in periods)]
            return any(kept) or (self.since != "" and stamp >= self.since)

        return keeps


class _Newest:
    """The newest version of each of some periods, which are the beginning of its stamp."""

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
    """Yield the history, and all versions of some paths, the oldest of each path first, with their fates.

    :param carry_out: hold the lock, and take away what goes while they are iterated over. Else nothing is
        changed.
    :raises DestinationBusy: a run holds the lock for too long.
    :raises DestinationFull: there is no room even for the history of what goes.
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    with _full_told(mirror), mirror.translate_os_errors(), ExitStack() as stack:
        tx = stack.enter_context(transaction(mirror, "prune", OPERATOR_WAIT)) if carry_out else None
        past = stack.enter_context(Timeline(mirror, wanted))
        if past.clock_doubt is not None:
            raise DestinationRefused(f"{mirror.provider}: nothing is pruned: {past.clock_doubt}")
        wanted.settle(past.knows)
        tree = stack.enter_context(mirror.tree())
        versions = _judged(tree, past, wanted, rules)
        if tx is None:
            yield past, versions
            return
        yield past, _carried_out(tx, tree, versions)
        refresh_status(mirror)


@contextmanager
def _full_told(mirror: Mirror) -> Iterator[None]:
    """Say what to do if the disk is too full for making room on it."""
    try:
        yield
    except DestinationFull as error:
        raise DestinationFull(
            f"{mirror.provider}: the disk of {mirror.dest} has no room even for the history of what goes. "
            f"Make room for some 100 kB, and try again: what is in {mirror.staging} may be removed, a run "
            "pulls it again."
        ) from error


def _judged(tree: Tree, past: Timeline, wanted: Selection, rules: KeepRules) -> Iterator[PrunableVersion]:
    for path, contents in groupby(past.contents(), key=attrgetter("path")):
        if wanted.take(path):
            keeps = rules.keeper()
            there = (_version(tree, content) for content in reversed(list(contents)) if content.until)
            yield from reversed([_judge(version, keeps) for version in there if version is not None])


def _judge(version: PrunableVersion, keeps: Callable[[str], bool]) -> PrunableVersion:
    """Return a version with its fate, given one that goes, or stays for what it is."""
    if version.fate in (PruneOutcome.GOES, PruneOutcome.LINKED) and keeps(version.content.until):
        return replace(version, fate=PruneOutcome.KEPT)
    return version


def _version(tree: Tree, content: FileVersion) -> PrunableVersion | None:
    """Return the version that has a content, and whether it may go; None if it is not there."""
    for place in content.places:
        try:
            found = tree.lstat(place)
            if found is None or OLD not in place.split(b"/"):
                continue
            if not is_file(found) or not _is_as_it_was(tree, place, content, found):
                fate = PruneOutcome.CHANGED
            else:
                fate = PruneOutcome.LINKED if found.st_nlink > 1 else PruneOutcome.GOES
            size, room = found.st_size, found.st_blocks * 512
            return PrunableVersion(content, place, fate, size, room, seen=_seen(found))
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return PrunableVersion(content, place, PruneOutcome.FAILED, detail=os.strerror(error.errno or 0))
    return None


def _seen(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes when somebody touches a file."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_as_it_was(tree: Tree, place: bytes, content: FileVersion, found: os.stat_result) -> bool:
    """Whether a file is what history says, by size and time; where these leave a doubt, by hashing it."""
    if content.size == found.st_size and content.mtime == seconds(found):
        return True
    if content.size not in (None, found.st_size):
        return False
    with tree.opened(place) as descriptor:
        return md5_of(descriptor) == content.md5


# --- taking away ------------------------------------------------------------------------------------


def _carried_out(
    tx: Transaction, tree: Tree, versions: Iterable[PrunableVersion]
) -> Iterator[PrunableVersion]:
    """Take away what goes, some at a time, and yield all versions in their order."""
    batch: list[PrunableVersion] = []
    goes, most = 0, _FIRST
    for version in versions:
        batch.append(version)
        goes += version.fate == PruneOutcome.GOES
        if goes >= most or len(batch) >= _MOST:
            yield from _taken_away(tx, tree, batch)
            most = min(10 * most, _MOST) if goes else most
            batch, goes = [], 0
    yield from _taken_away(tx, tree, batch)


def _taken_away(tx: Transaction, tree: Tree, batch: list[PrunableVersion]) -> list[PrunableVersion]:
    """Take away those of a batch that go, and return all with their fates."""
    going = [version for version in batch if version.fate == PruneOutcome.GOES]
    if not going:
        return batch
    record = tx.prune(_pruned(each.content, each.place, each.size) for each in going)
    done = [_take_away(tree, version) if version.fate == PruneOutcome.GOES else version for version in batch]
    for folder in {version.place.rpartition(b"/")[0] for version in going}:
        _tidy_up(tree, folder)
    record()
    return done


def _pruned(content: FileVersion, place: bytes, size: int | None) -> Change:
    return Change(content.path, ChangeKind.PRUNED, old_md5=content.md5, size=size, version=place)


def let_go(mirror: Mirror, missing: Iterable[tuple[FileVersion, bytes]], wait: float) -> list[bytes]:
    """Note in history that contents are gone for good, and return the places where they lay.

    Nothing is taken away: what is there after all stays, and is none of them.

    :param missing: versions, and files that have left the index, each with the place that is empty.
    :param wait: seconds that a run may hold the lock meanwhile.
    :raises BackupError: as :func:`pruning`.
    """
    asked = [(content, place) for content, place in missing if content.until or content.left]
    if not asked:
        return []
    with (
        mirror.translate_os_errors(),
        transaction(mirror, "verify", wait) as tx,
        mirror.tree() as tree,
    ):
        # A run may have brought, or moved, one of them since.
        with Timeline(mirror, {content.path for content, _ in asked}.__contains__) as past:
            known = {
                (now.path, now.md5, place)
                for now in past.contents()
                for place in now.places
                if now.until or now.left
            }
        gone = [
            (content, place)
            for content, place in asked
            if (content.path, content.md5, place) in known and is_gone(tree, place)
        ]
        if gone:
            tx.prune(_pruned(content, place, None) for content, place in gone)()
            refresh_status(mirror)
    return [place for _, place in gone]


def _take_away(tree: Tree, version: PrunableVersion) -> PrunableVersion:
    """Take a version away, if it is still what was judged."""
    try:
        found = tree.lstat(version.place)
        if found is None or _seen(found) != version.seen:
            return replace(version, fate=PruneOutcome.CHANGED)
        tree.unlink(version.place)
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return replace(version, fate=PruneOutcome.FAILED, detail=os.strerror(error.errno or 0))
    return replace(version, fate=PruneOutcome.PRUNED)


def _tidy_up(tree: Tree, folder: bytes) -> None:
    """Take away a directory that is empty, and those above it that are so then, in ``.old`` only."""
    while OLD in folder.split(b"/") and tree.remove_empty(folder):
        folder = folder.rpartition(b"/")[0]
