"""The write-ahead journal: whatever changes a backup is written down before it is carried out.

A :func:`transaction` holds the lock, finishes what a crash cut off, and then carries out its own changes::

    with transaction(mirror, "forget", OPERATOR_WAIT) as tx:
        tx.write(changes)      behind what was edited by hand: a history, whose name ends in ``.pending``
        tx.carry_out()

    step 5   write the consumer index without the entries about to be replaced
    step 6   put each file over its live name; syncfs
    step 7   write the final consumer index, and a copy; give the history its final name, then the copy

A pruning (``tx.prune``) leaves the index alone, and records what is gone.

Every step may be done again, by whoever comes after a crash: see :mod:`.apply`. What did not happen is left
out of index and history.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

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
    """What one holder of the lock changes.

    :ivar index: the consumer index in canonical form, as it is now; None if there is none.
    """

    def __init__(self, mirror: Mirror, who: str, scratch: Path) -> None:
        """
        :param who: what makes the changes; the id of a commit that no run makes begins with it.
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
        self, stamp: str | None = None, run_id: str | None = None, order: str | None = None
    ) -> dict[str, str]:
        """Return the header of a history.

        :param stamp: of the commit; a new one by default.
        :param run_id: what makes it, if that is a run.
        :param order: when its provider index was fetched. By default it is newer than no run's.
        """
        return {
            **self._header(stamp or self._mirror.next_stamp(), run_id, order),
            "before": digest(self._mirror.index) if self.index is not None else "",
        }

    def _header(self, stamp: str, run_id: str | None, order: str | None) -> dict[str, str]:
        mirror = self._mirror
        if order is None:
            order = max(str(state.get("order", "")) for state in (status_or_lost(mirror), last(mirror)))
        return {
            "run_id": run_id or run_id_of(self._who, stamp),
            "provider": mirror.provider,
            "stamp": stamp,
            "at": mirror.now(),
            "order": order,
        }

    def draft(self, path: Path, changes: Iterable[Change], header: Mapping[str, str]) -> int:
        """Write changes where nobody takes them for a commit yet, and return their number.

        What was edited by hand is written before them.
        """
        return write_records(path, chain(hand_edits(self._mirror, self.index), changes), **header)

    def publish(self, draft: Path, header: Mapping[str, str]) -> None:
        """Make a draft a commit that is carried out, now or after a crash. Its content must be durable."""
        self._path = self._pending(header)
        draft.replace(self._path)
        fsync_directory(self._mirror.history)

    def write(self, changes: Iterable[Change], header: Mapping[str, str] | None = None) -> None:
        """Write changes ahead that need no content but what is durable already."""
        header = header or self.header()
        self._path = self._pending(header)
        self.draft(self._path, changes, header)

    def carry_out(
        self, *, replaces: bool = False, missed: Callable[[Change, str], None] | None = None
    ) -> int:
        """Carry out what was written ahead, and return how many entries the consumer index has then.

        :param replaces: whether entries of the index will be untrue for a while.
        :param missed: is called with each change that did not come about, and why. Index and history leave it
            out.
        :raises OSError: the disk is full or broken; the next holder of the lock takes it up again.
        """
        return _finish(self._mirror, self._path, self.index, replaces=replaces, fresh=True, missed=missed)

    def prune(self, going: Iterable[Change]) -> Callable[[], None]:
        """Write ahead which versions are to go; return what records those that are gone then."""
        stamp = self._mirror.next_stamp()
        header = {
            **self._header(stamp, run_id_of(PRUNE, stamp), None),
            "before": last(self._mirror).get("after", ""),  # the consumer index stays as it is
            "kind": PRUNE,
        }
        path = self._pending(header)
        write_records(path, going, **header)
        return partial(_finish_pruning, self._mirror, path)

    def _pending(self, header: Mapping[str, str]) -> Path:
        final = self._mirror.history_path(header["stamp"], header["run_id"])
        return final.with_name(final.name + PENDING)


@contextmanager
def transaction(
    mirror: Mirror, who: str, wait: float = LOCK_WAIT, *, scratch: Path | None = None
) -> Iterator[Transaction]:
    """Hold the lock, with everything finished that a crash cut off.

    :param who: see :class:`Transaction`; those who wait meanwhile are told of it.
    :param wait: seconds that it may take to get the lock.
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


def recover(mirror: Mirror, target: Path) -> None:
    """Finish the commits that a crash cut off. Needs the lock.

    :param target: see :func:`consumer_index`.
    :raises Damaged: a history that was written ahead cannot be read.
    """
    for path in pending(mirror):
        log.warning("Finishing the commit of an earlier run that was cut off: %s", path.name)
        try:
            _take_up(mirror, path, target)
        except CorruptFile as error:
            raise CorruptFile(
                f"{mirror.provider}: {error}. Move that file away: the next run sees to what it left undone"
            ) from None


def _take_up(mirror: Mirror, path: Path, target: Path) -> None:
    """Finish a commit that was cut off, and take what somebody did to the index since for what it is.

    An edit is recorded with the commit. An index that was deleted is a wish to have everything copied again;
    it is written only where the next commit looks up what was deleted.
    """
    if path.with_suffix("").exists():  # but for what is tidied up, it came to its end
        _finish(mirror, path, None)
        return
    header = read_header(path)
    if header.get("kind") == PRUNE:
        _finish_pruning(mirror, path)
        return
    current = consumer_index(mirror, target)
    before = header["before"]
    if is_index(mirror.index, before) if before else current is None:
        _finish(mirror, path, current, replaces=_replaces(current, path))
    elif not is_index(mirror.committed, last(mirror).get("after")):
        log.warning("Whether somebody edited the index meanwhile is not known: %s is lost", mirror.committed)
        _finish(mirror, path, current, replaces=_replaces(current, path))
    elif current is None:
        with IndexWriter(target) as writer:
            for entry in _as_found(mirror, path):
                writer.add(*entry)
        _finish(mirror, path, target, index=mirror.next_committed)
    else:
        kept, edited = target.with_name("kept.md5"), target.with_name("edited.jsonl")
        with IndexWriter(kept) as writer:
            for entry in _without_moved(current, path):
                writer.add(*entry)
        write_records(edited, _edited_meanwhile(mirror, path, kept))
        _finish(mirror, path, kept, replaces=_replaces(kept, path), edited=read_records(edited, Change))


def _as_found(mirror: Mirror, path: Path) -> Iterator[Entry]:
    """Yield the index as the commit with the history at ``path`` found it."""
    edits = (
        Entry(change.path, change.md5 or b"")
        for change in read_records(path, Change)
        if change.what == ChangeKind.EDITED
    )
    for name, old, new in merge(read_entries(mirror.committed), edits):
        md5 = old if new is None else new
        if md5:
            yield Entry(name, md5)


def _without_moved(current: Path, changes: Path) -> Iterator[Entry]:
    """Yield the entries of an index but for those of which the commit knows nothing, below what it moves."""
    moves = sorted(change.path for change in read_records(changes, Change) if change.what == ChangeKind.MOVED)
    moved, claims = PathsBelow(iter(moves)), SortedLookup(_claims(changes))
    for entry in read_entries(current):
        if not moved.covers(entry.path) or claims.find(entry.path):
            yield entry


def _edited_meanwhile(mirror: Mirror, path: Path, current: Path) -> Iterator[Change]:
    """Yield what somebody changed in the index since the history at ``path`` was written ahead.

    Entries that the commit changes itself are left out: they become what it says.
    """
    claims = SortedLookup(_claims(path))
    for name, old, new in merge(_as_found(mirror, path), read_entries(current)):
        if old != new and claims.find(name) is None:
            yield Change(name, ChangeKind.EDITED, old_md5=old, md5=new)


def _finish(
    mirror: Mirror,
    path: Path,
    current: Path | None,
    *,
    replaces: bool = False,
    fresh: bool = False,
    index: Path | None = None,
    edited: Iterable[Change] = (),
    missed: Callable[[Change, str], None] | None = None,
) -> int:
    """Carry out the history at ``path`` and return how many entries the consumer index has then.

    Needs the lock.

    :param current: the consumer index in canonical form, if there is one.
    :param replaces: whether entries of the consumer index will be untrue for a while.
    :param fresh: the commit that asks has written this history, and has seen its content to be there. That of
        another commit is hashed before it is put in place.
    :param index: where the new index goes, if somebody has deleted the consumer index meanwhile.
    :param edited: what somebody changed in the index since the history was written.
    :param missed: is told of each change that did not come about, and why. Index and history leave it out.
    :raises OSError: the disk is full or broken; the next run takes it up again.
    """
    final = path.with_suffix("")
    confirmed = path.with_suffix(".confirmed")
    files = 0
    if not final.exists():
        mirror.next_committed.unlink(missing_ok=True)
        # Step 5: the index must not claim what is about to be replaced.
        if index is None and (current is None or replaces):
            _write_index(mirror.index, current, path if current else None, keep_replaced=False)
            current = mirror.index
        changed, kept, tally = 0, 0, UsageChange()
        with mirror.tree() as tree, RecordWriter[Change](confirmed) as writer:
            for change in apply(mirror, tree, path, fresh, iter(edited), missed or warn_of_missed, tally):
                writer.add(change)
                changed += 1
                kept += change.what == ChangeKind.KEPT
            tree.sync()
        files = _write_index(index or mirror.index, current, confirmed, keep_replaced=True)
        if changed > kept:
            if index is None:
                _copy(mirror.index, mirror.next_committed)
            _name(path, confirmed, tally.total(), after=digest(mirror.next_committed), kept=bool(kept))
    if mirror.next_committed.exists():
        mirror.next_committed.replace(mirror.committed)
        fsync_directory(mirror.committed.parent)
    confirmed.unlink(missing_ok=True)
    path.unlink()
    fsync_directory(mirror.history)
    return files


def _finish_pruning(mirror: Mirror, path: Path) -> None:
    """Record which of the versions are gone that the history at ``path`` says are to go. Needs the lock.

    Nothing is taken away here: a pruning that was cut off goes no further by itself. The index stays.

    :raises OSError: the disk is full or broken; the next run takes it up again.
    """
    confirmed = path.with_suffix(".confirmed")
    tally, changed = UsageChange(), 0
    with mirror.tree() as tree, RecordWriter[Change](confirmed) as writer:
        # What is told to be gone must not come back with a cut of the power.
        tree.sync()
        for change in read_records(path, Change):
            if is_gone(tree, change.version or b""):
                writer.add(change)
                tally.add(tree, change)
                changed += 1
    if changed:
        _name(path, confirmed, tally.total(), after=read_header(path)["before"])
    confirmed.unlink(missing_ok=True)
    path.unlink()
    fsync_directory(mirror.history)


def _name(path: Path, confirmed: Path, grown: DiskUsage | None, *, after: str, kept: bool = False) -> None:
    """Give what came about of a history that was written ahead its final name, and the rest of its header.

    :param kept: whether it also has what stayed as it was, which is no history.
    """
    header = {key: value for key, value in read_header(path).items() if key != "format"}
    header |= {"after": after, "disk": grown}
    if kept:
        came = (change for change in read_records(confirmed, Change) if change.what != ChangeKind.KEPT)
        write_records(path.with_suffix(""), came, **header)
    else:
        copy_records(confirmed, path.with_suffix(""), **header)


# --- the index --------------------------------------------------------------------------------------


def _replaces(current: Path | None, changes: Path) -> bool:
    """Whether entries of the index are untrue for a while: their files are replaced, or go as a whole."""
    if current is None:
        return False
    if any(change.what == ChangeKind.MOVED for change in read_records(changes, Change)):
        return True
    return any(both.left and both.right for both in merge(read_entries(current), _claims(changes)))


def _write_index(index: Path, current: Path | None, changes: Path | None, *, keep_replaced: bool) -> int:
    """Write an index anew, durably and in one step, and return its number of entries."""
    temporary = index.with_name(f"{index.name}.tmp")
    with IndexWriter(temporary) as writer:
        revise(writer, current, _revisions(changes, keep_replaced) if changes else ())
    temporary.replace(index)
    fsync_directory(index.parent)
    return writer.files


def _revisions(changes: Path, keep_replaced: bool) -> Iterator[Entry]:
    """Return what becomes of index entries, in path order; an empty md5 for those that leave."""
    return _claims(changes) if keep_replaced else (Entry(path, b"") for path, _ in _claims(changes))


def _claims(path: Path) -> Iterator[Entry]:
    """Yield what changes make of index entries, in path order; an empty md5 for what is forgotten."""
    for change in read_records(path, Change):
        if change.what not in (ChangeKind.EDITED, ChangeKind.MOVED, ChangeKind.IMPORTED):
            yield Entry(change.path, change.md5 or b"")


def _copy(index: Path, target: Path) -> None:
    """Copy an index durably."""
    with index.open("rb") as source, open(target, "wb", buffering=0, opener=not_followed) as copy:
        copy_of(source.fileno(), copy.fileno())
        os.fsync(copy.fileno())
    fsync_directory(target.parent)
