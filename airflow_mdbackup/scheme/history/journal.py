"""The write-ahead journal: every change of a backup is written down before it is carried out.

A :func:`transaction` holds the lock, finishes what a crash cut off, and then carries out its own changes::

    with transaction(mirror, "forget", OPERATOR_WAIT) as tx:
        tx.write(changes)      after manual edits of the index: a history file whose name ends in ``.pending``
        tx.carry_out()

    step 5   write the consumer index without the entries about to be replaced
    step 6   rename each file over its live name; syncfs
    step 7   write the final consumer index and a copy; give the history its final name, then the copy

A prune (``tx.prune``) does not touch the index, and records which versions are gone.

Every step can be repeated by whoever comes after a crash: see :mod:`.apply`. What did not happen is left out
of index and history.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from airflow_mdbackup.scheme.common.sorted_paths import PathsBelow, SortedLookup
from airflow_mdbackup.scheme.files.content import copy_of
from airflow_mdbackup.scheme.files.jsonl import (
    CorruptFile,
    RecordWriter,
    copy_records,
    read_header,
    read_records,
    write_records,
)
from airflow_mdbackup.scheme.files.syscalls import fsync_directory, not_followed
from airflow_mdbackup.scheme.history.apply import apply, is_gone, warn_of_missed
from airflow_mdbackup.scheme.history.changes import (
    PENDING,
    PRUNE,
    Change,
    ChangeKind,
    last,
    pending,
    run_id_of,
)
from airflow_mdbackup.scheme.history.consumer_index import consumer_index, hand_edits, is_index
from airflow_mdbackup.scheme.history.status_file import status_or_lost
from airflow_mdbackup.scheme.history.usage import DiskUsage, UsageChange
from airflow_mdbackup.scheme.index.canonical import Entry, IndexWriter, digest, merge, read_entries, revise
from airflow_mdbackup.scheme.store.locks import LOCK_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror

log = logging.getLogger(__name__)


class Transaction:
    """The changes that one holder of the lock makes.

    :ivar index: the consumer index in canonical form, as it is now; None if there is none.
    """

    def __init__(self, mirror: Mirror, who: str, scratch: Path) -> None:
        """
        :param who: what makes the changes; the id of a commit that is not a run's begins with it.
        :param scratch: where the canonical form of the index may be written.
        """
        self._mirror = mirror
        self._who = who
        self._scratch = scratch
        self._path = scratch  # of the history that was written ahead

    @cached_property
    def index(self) -> Path | None:
        return consumer_index(self._mirror, self._scratch)

    def header(
        self,
        stamp: str | None = None,
        run_id: str | None = None,
        order: str | None = None,
        before: str | None = None,
    ) -> dict[str, str]:
        """Return the header of a history file.

        :param stamp: of the commit; by default, a new one.
        :param run_id: of the run that makes it, if one does.
        :param order: when its provider index was fetched; by default, not later than any run's.
        :param before: digest of the consumer index before the commit; by default, of the present one.
        """
        mirror = self._mirror
        stamp = stamp or mirror.next_stamp()
        if order is None:
            order = max(str(state.get("order", "")) for state in (status_or_lost(mirror), last(mirror)))
        if before is None:
            before = digest(mirror.index) if self.index is not None else ""
        return {
            "run_id": run_id or run_id_of(self._who, stamp),
            "provider": mirror.provider,
            "stamp": stamp,
            "at": mirror.now(),
            "order": order,
            "before": before,
        }

    def draft(self, path: Path, changes: Iterable[Change], header: Mapping[str, str]) -> int:
        """Write changes to a file that is not yet a commit, and return their number.

        Manual edits of the index are written before them.
        """
        return write_records(path, chain(hand_edits(self._mirror, self.index), changes), **header)

    def publish(self, draft: Path, header: Mapping[str, str]) -> None:
        """Make a draft a commit, carried out now or after a crash. Its content must be durable."""
        self._path = self._pending(header)
        draft.replace(self._path)
        fsync_directory(self._mirror.history)

    def write(self, changes: Iterable[Change], header: Mapping[str, str] | None = None) -> None:
        """Write changes ahead whose content, if any, is durable already."""
        header = header or self.header()
        self._path = self._pending(header)
        self.draft(self._path, changes, header)

    def carry_out(
        self, *, replaces: bool = False, missed: Callable[[Change, str], None] | None = None
    ) -> int:
        """Carry out what was written ahead; return the number of entries in the consumer index afterwards.

        :param replaces: whether entries of the index will be untrue for a while.
        :param missed: called with each change that could not be applied, and why. Index and history leave it
            out.
        :raises OSError: the disk is full or broken; the next holder of the lock continues.
        """
        commit = _PendingCommit(self._mirror, self._path, verified=True)
        return commit.carry_out(self.index, replaces=replaces, missed=missed or warn_of_missed)

    def prune(self, going: Iterable[Change]) -> Callable[[], None]:
        """Write ahead which versions will be deleted; return a function that records those that are gone."""
        stamp = self._mirror.next_stamp()
        before = last(self._mirror).get("after", "")  # the consumer index stays as it is
        header = {**self.header(stamp, run_id_of(PRUNE, stamp), before=before), "kind": PRUNE}
        path = self._pending(header)
        write_records(path, going, **header)
        return _PendingCommit(self._mirror, path).record_pruned

    def _pending(self, header: Mapping[str, str]) -> Path:
        final = self._mirror.history_path(header["stamp"], header["run_id"])
        return final.with_name(final.name + PENDING)


@contextmanager
def transaction(
    mirror: Mirror, who: str, wait: float = LOCK_WAIT, *, scratch: Path | None = None
) -> Iterator[Transaction]:
    """Hold the lock, after finishing whatever a crash cut off.

    :param who: see :class:`Transaction`; also shown to those who wait for the lock.
    :param wait: seconds to wait for the lock.
    :param scratch: where the canonical form of the consumer index may be written, and stays.
    :raises DestinationBusy: somebody else holds the lock for too long.
    :raises CorruptFile: a history that was written ahead cannot be read.
    :raises ConsumerIndexDamaged: a commit was cut off, and the consumer index is damaged.
    """
    with mirror.lock(who, wait):
        try:
            recover(mirror, scratch or mirror.scratch_index)
            yield Transaction(mirror, who, scratch or mirror.scratch_index)
        finally:
            mirror.scratch_index.unlink(missing_ok=True)


# --- recovery ---------------------------------------------------------------------------------------


def recover(mirror: Mirror, target: Path) -> None:
    """Finish the commits that a crash cut off. Needs the lock.

    :param target: see :func:`consumer_index`.
    :raises CorruptFile: a history that was written ahead cannot be read.
    """
    for path in pending(mirror):
        log.warning("Finishing a commit that was cut off: %s", path.name)
        try:
            _recover_one(mirror, path, target)
        except CorruptFile as error:
            raise CorruptFile(
                f"{mirror.provider}: {error}. Move that file away: the next run does what it left undone"
            ) from None


def _recover_one(mirror: Mirror, path: Path, target: Path) -> None:
    """Finish one commit, and respect what was done to the consumer index by hand since.

    An edit is recorded with the commit. Deleting the index means that everything is to be copied again, so it
    is not written again, except where the next commit looks up what was deleted.
    """
    commit = _PendingCommit(mirror, path)
    if commit.final.exists():
        commit.clean_up()
        return
    header = read_header(path)
    if header.get("kind") == PRUNE:
        commit.record_pruned()
        return
    current = consumer_index(mirror, target)
    before = header["before"]
    if is_index(mirror.index, before) if before else current is None:
        _recover_with_same_index(commit, current)
    elif not is_index(mirror.committed, last(mirror).get("after")):
        log.warning("Whether the index was edited since is not known: %s is lost", mirror.committed)
        _recover_with_same_index(commit, current)
    elif current is None:
        _recover_with_deleted_index(commit, target)
    else:
        _recover_with_edited_index(commit, current, target)


def _recover_with_same_index(commit: _PendingCommit, current: Path | None) -> None:
    commit.carry_out(current, replaces=_replaces(current, commit.path))


def _recover_with_deleted_index(commit: _PendingCommit, target: Path) -> None:
    with IndexWriter(target) as writer:
        for entry in _as_found(commit):
            writer.add(*entry)
    commit.carry_out_without_index(target)


def _recover_with_edited_index(commit: _PendingCommit, current: Path, target: Path) -> None:
    kept, edits = target.with_name("kept.md5"), target.with_name("edited.jsonl")
    with IndexWriter(kept) as writer:
        for entry in _without_moved(current, commit.path):
            writer.add(*entry)
    write_records(edits, _edits_since(commit, kept))
    commit.carry_out(kept, replaces=_replaces(kept, commit.path), edits=read_records(edits, Change))


def _as_found(commit: _PendingCommit) -> Iterator[Entry]:
    """Yield the consumer index as a commit found it."""
    edits = (
        Entry(change.path, change.md5 or b"")
        for change in read_records(commit.path, Change)
        if change.what == ChangeKind.EDITED
    )
    for name, old, new in merge(read_entries(commit.mirror.committed), edits):
        md5 = old if new is None else new
        if md5:
            yield Entry(name, md5)


def _without_moved(current: Path, changes: Path) -> Iterator[Entry]:
    """Yield the entries of an index without those below what the commit moves, unless it sets them itself."""
    moves = sorted(change.path for change in read_records(changes, Change) if change.what == ChangeKind.MOVED)
    moved, updates = PathsBelow(iter(moves)), SortedLookup(_updates(changes))
    for entry in read_entries(current):
        if not moved.covers(entry.path) or updates.find(entry.path):
            yield entry


def _edits_since(commit: _PendingCommit, current: Path) -> Iterator[Change]:
    """Yield the manual edits of the index since the history of a commit was written ahead.

    Entries that the commit changes itself are left out: they become what it says.
    """
    updates = SortedLookup(_updates(commit.path))
    for name, old, new in merge(_as_found(commit), read_entries(current)):
        if old != new and updates.find(name) is None:
            yield Change(name, ChangeKind.EDITED, old_md5=old, md5=new)


# --- carrying out -----------------------------------------------------------------------------------


class _Applied(NamedTuple):
    """What applying a history came to.

    :ivar changed: how many changes the disk shows, apart from ``kept`` entries, which stay as they were.
    :ivar disk: what they add to the disk; None if that cannot be said.
    """

    changed: int
    kept: int
    disk: DiskUsage | None


class _PendingCommit:
    """A commit whose history was written ahead. Needs the lock.

    :param path: of that history.
    :param verified: whether its content was seen to be whole since the last crash, as by the transaction that
        wrote it. If not, content is hashed before it is put in place.
    """

    def __init__(self, mirror: Mirror, path: Path, *, verified: bool = False) -> None:
        self.mirror = mirror
        self.path = path
        self.final = path.with_suffix("")
        self._confirmed = path.with_suffix(".confirmed")
        self._verified = verified

    def carry_out(
        self,
        current: Path | None,
        *,
        replaces: bool,
        edits: Iterable[Change] = (),
        missed: Callable[[Change, str], None] = warn_of_missed,
    ) -> int:
        """Apply the changes, and return the number of entries in the consumer index afterwards.

        :param current: the consumer index in canonical form; None if there is none.
        :param replaces: whether entries of it will be untrue for a while.
        :param edits: manual edits of the index since the history was written.
        :param missed: see :meth:`Transaction.carry_out`.
        :raises OSError: the disk is full or broken; the next holder of the lock continues.
        """
        mirror = self.mirror
        mirror.next_committed.unlink(missing_ok=True)
        if current is None or replaces:
            # Step 5: the index must not claim what is about to be replaced.
            removed = (Entry(path, b"") for path, _ in _updates(self.path)) if current else ()
            _write_index(mirror.index, current, removed)
            current = mirror.index
        applied = self._apply(iter(edits), missed)
        files = _write_index(mirror.index, current, _updates(self._confirmed))
        if applied.changed:
            _copy(mirror.index, mirror.next_committed)
            self._publish(applied, after=digest(mirror.next_committed))
        self.clean_up()
        return files

    def carry_out_without_index(self, current: Path) -> None:
        """Apply the changes when the consumer index was deleted meanwhile: only the copy of it is written.

        :param current: the index as the commit found it.
        """
        mirror = self.mirror
        mirror.next_committed.unlink(missing_ok=True)
        applied = self._apply(iter(()), warn_of_missed)
        _write_index(mirror.next_committed, current, _updates(self._confirmed))
        if applied.changed:
            self._publish(applied, after=digest(mirror.next_committed))
        self.clean_up()

    def record_pruned(self) -> None:
        """Record which of the versions to be pruned are gone. The index stays.

        Nothing is deleted here: a prune that was cut off does not continue by itself.

        :raises OSError: the disk is full or broken; the next holder of the lock continues.
        """
        usage, changed = UsageChange(), 0
        with self.mirror.tree() as tree, RecordWriter[Change](self._confirmed) as writer:
            tree.sync()  # what is recorded as gone must not return after a power cut
            for change in read_records(self.path, Change):
                if is_gone(tree, change.version or b""):
                    writer.add(change)
                    usage.add(tree, change)
                    changed += 1
        if changed:
            self._publish(_Applied(changed, 0, usage.total()), after=read_header(self.path)["before"])
        self._remove()

    def clean_up(self) -> None:
        """Make the copy of the index final, and remove what was written ahead."""
        mirror = self.mirror
        if mirror.next_committed.exists():
            mirror.next_committed.replace(mirror.committed)
            fsync_directory(mirror.committed.parent)
        self._remove()

    def _remove(self) -> None:
        self._confirmed.unlink(missing_ok=True)
        self.path.unlink()
        fsync_directory(self.mirror.history)

    def _apply(self, edits: Iterator[Change], missed: Callable[[Change, str], None]) -> _Applied:
        """Apply the changes, and write down those that the disk shows."""
        total, kept, usage = 0, 0, UsageChange()
        with self.mirror.tree() as tree, RecordWriter[Change](self._confirmed) as writer:
            for change in apply(
                *(self.mirror, tree, self.path),
                verified=self._verified,
                edits=edits,
                missed=missed,
                usage=usage,
            ):
                writer.add(change)
                total += 1
                kept += change.what == ChangeKind.KEPT
            tree.sync()
        return _Applied(total - kept, kept, usage.total())

    def _publish(self, applied: _Applied, *, after: str) -> None:
        """Write what was applied as a finished history file."""
        header = {key: value for key, value in read_header(self.path).items() if key != "format"}
        header |= {"after": after, "disk": applied.disk}
        if applied.kept:  # which is not history
            changes = read_records(self._confirmed, Change)
            write_records(self.final, (c for c in changes if c.what != ChangeKind.KEPT), **header)
        else:
            copy_records(self._confirmed, self.final, **header)


# --- the index --------------------------------------------------------------------------------------


def _replaces(current: Path | None, changes: Path) -> bool:
    """Whether entries of the index are untrue for a while: their files are replaced or moved as a whole."""
    if current is None:
        return False
    if any(change.what == ChangeKind.MOVED for change in read_records(changes, Change)):
        return True
    return any(both.left and both.right for both in merge(read_entries(current), _updates(changes)))


def _write_index(index: Path, current: Path | None, updates: Iterable[Entry]) -> int:
    """Write an index durably and in one step, and return its number of entries.

    :param updates: what becomes of entries of ``current``, in path order; an empty md5 removes one.
    """
    temporary = index.with_name(f"{index.name}.tmp")
    with IndexWriter(temporary) as writer:
        revise(writer, current, updates)
    temporary.replace(index)
    fsync_directory(index.parent)
    return writer.files


def _updates(path: Path) -> Iterator[Entry]:
    """Yield what changes make of index entries, in path order; an empty md5 for forgotten ones."""
    for change in read_records(path, Change):
        if change.what not in (ChangeKind.EDITED, ChangeKind.MOVED, ChangeKind.IMPORTED):
            yield Entry(change.path, change.md5 or b"")


def _copy(index: Path, target: Path) -> None:
    """Copy an index durably."""
    with index.open("rb") as source, open(target, "wb", buffering=0, opener=not_followed) as copy:
        copy_of(source.fileno(), copy.fileno())
        os.fsync(copy.fileno())
    fsync_directory(target.parent)
