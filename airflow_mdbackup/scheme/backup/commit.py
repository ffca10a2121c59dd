"""Staged files become live files, and a new consumer index is written.

In this order, under the lock, so that a crash anywhere leaves each live file whole, every version, and an
index that never claims what the disk lacks (the steps are those of docs/architecture.md)::

    recover  finish a commit that a crash cut off, entry by entry, by what is on the disk (step 0)
    judge    check each result again: the index must still have what the plan replaces, the live file must
             still be the archived one (else archive it now), and the content must be there (step 3)
    ahead    write the history of all changes; syncfs; then rename it to .pending (step 4)
    finish   index without the entries about to be replaced, files, final index, final history (steps 5 to 7)
    report   write the status; remove old run directories

A run whose provider index is older than the last committed one changes nothing: it is superseded.

Limitations: between a file's replacement and the end, the index lacks the entry. A crash there costs the next
run a hash of that file, never a transfer.

Source: the seed's sections "Copy Process" and "Index Files" ("Server B Index").
"""

from __future__ import annotations

import heapq
import logging
import os
import time
from collections.abc import Collection, Iterator
from itertools import count
from operator import attrgetter
from typing import Any

from airflow_mdbackup.scheme.backup.archive import (
    Archived,
    Archiver,
    colliding_paths,
    discard_unused,
    is_used,
    read_archived,
    used_stamps,
    version_stamp,
)
from airflow_mdbackup.scheme.backup.cleanup import clean
from airflow_mdbackup.scheme.backup.commit_content import CannotCommit, CommitContent
from airflow_mdbackup.scheme.backup.commit_summary import CommitSummary, write_status
from airflow_mdbackup.scheme.backup.name_collisions import explain_collision
from airflow_mdbackup.scheme.backup.plan import Plan, read_plan
from airflow_mdbackup.scheme.backup.results import Result, finished_shards, results
from airflow_mdbackup.scheme.backup.unstable_files import UnstableFiles
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.sorted_paths import PathsBelow, Prefixes, SortedLookup
from airflow_mdbackup.scheme.files.jsonl import read_header, read_records, write_state
from airflow_mdbackup.scheme.files.syscalls import (
    concerns_one_file,
    is_file,
)
from airflow_mdbackup.scheme.files.tree import Tree, remove_tree
from airflow_mdbackup.scheme.history.apply import STAGING, reason_of
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, last
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.history.journal import Transaction, transaction
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.history.status_file import status_or_lost
from airflow_mdbackup.scheme.index.canonical import Entry, count_entries, merge, read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.staging import Staging
from airflow_mdbackup.scheme.store.version_names import version_path

log = logging.getLogger(__name__)

_UNREADABLE = "on the provider; build_provider_index says why"
_ROTTEN = (
    "damaged on the provider: its content changed, its times did not. The good copy here is kept; copy it "
    "back, or `touch` it there to accept its present content"
)


def commit(mirror: Mirror, run: Run) -> CommitSummary:
    """Commit what a run has pulled. May be called again, after a crash or for a cleared task.

    :return: the summary; to fail for failed entries, call its :meth:`CommitSummary.raise_for_failures`.
    :raises RunIncomplete: the run has no accepted plan.
    :raises ConsumerIndexDamaged: the consumer index is damaged.
    :raises DestinationBusy: another run holds the lock for too long.
    :raises DestinationFull: there is no room for copies, or for the index; a retry resumes from there.
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    """
    started = time.monotonic()
    with (
        mirror.translate_os_errors(),
        run.lock("commit_backup", mirror.provider),
        transaction(mirror, f"commit_backup of {run.run_id}", scratch=run.consumer_index) as tx,
        mirror.tree() as tree,
        mirror.open_staging() as staging,
    ):
        plan = read_plan(run)
        state = read_header(run.state)
        order = str(state["order"])
        summary = CommitSummary(partial=plan.partial, clock=state["index"].get("clock"))
        status = status_or_lost(mirror)
        # A kill between history and status may have left the status behind.
        newest = max(str(status.get("order", "")), str(last(mirror).get("order", "")))
        if newest > order:
            _supersede(mirror, plan, summary, status, newest)
            discard_unused(mirror, run, tree)
        else:
            if plan.partial:
                # It is newer than others only at its own paths; entries of others are judged one by one.
                order = newest
            _Commit(tx, mirror, run, plan, tree, staging, summary).carry_out(order)
            summary.fail_remarks(Outcome.UNREADABLE, plan.unreadable, plan.unreadable_paths, _UNREADABLE)
            summary.fail_remarks(Outcome.ROTTEN, plan.rotten, plan.rotten_paths, _ROTTEN)
            summary.seconds = round(time.monotonic() - started, 3)
            write_status(mirror, run, summary, status, order)
        write_state(run.done, {"outcomes": summary.outcomes})
        clean(mirror, tree)
    return summary


def _supersede(
    mirror: Mirror, plan: Plan, summary: CommitSummary, status: dict[str, Any], newest: str
) -> None:
    """Fill the summary of a run whose provider index is older than the last committed one."""
    log.info("A run with a newer provider index has been committed: this one is superseded")
    summary.superseded = True
    is_behind = newest > str(status.get("order", ""))
    summary.doubtful = is_behind or status.get("last_good") != status.get("last_commit")
    summary.count(Outcome.SUPERSEDED, plan.pull)
    summary.files = int(status.get("files", 0))


class _Commit:
    """One commit: judges each result, and has the transaction carry out what remains."""

    def __init__(
        self,
        tx: Transaction,
        mirror: Mirror,
        run: Run,
        plan: Plan,
        tree: Tree,
        staging: Staging,
        summary: CommitSummary,
    ) -> None:
        self._tx = tx
        self._mirror = mirror
        self._run = run
        self._plan = plan
        self._tree = tree
        self._staging = staging
        self._summary = summary
        self._current = tx.index
        self._colliding = colliding_paths(run, plan, lambda: tx.index)
        self._was_committed = mirror.has_committed(run)
        archived_at, archived = read_archived(run)
        stamp = version_stamp(mirror, run)
        self._is_restamped = stamp != archived_at
        self._used = is_used(mirror, run, archived_at)
        self._archiver = Archiver(run, tree, stamp)
        self._archived = SortedLookup(archived)
        self._index = SortedLookup(self._entries())
        self._moved: set[bytes] = set()  # what moves out of the way as a whole
        self._replaces = False  # whether entries of the index will be wrong for a while
        self._content = CommitContent(run, plan, tree, staging, tx.index)

    def _entries(self) -> Iterator[Entry]:
        return read_entries(self._current) if self._current else iter(())

    def carry_out(self, order: str) -> None:
        """Judge, write the history ahead, and finish."""
        run, tx, stamp = self._run, self._tx, self._archiver.stamp
        remove_tree(run.copies)
        header = tx.header(stamp, run.run_id, order)
        changes = tx.draft(run.changes, self._all_changes(), header)
        if self._moved or (self._plan.hides and self._current is not None):
            changes = tx.draft(run.changes, self._with_all_below(), header)
        self._count_missing()
        if changes or self._current is None:
            # Once the history is published, a recovery relies on the versions and content that it names.
            write_state(run.used, {"stamps": [*used_stamps(run), stamp]})
            self._staging.sync()
            tx.publish(run.changes, header)
            replaces = self._replaces or bool(self._moved)
            self._summary.files = tx.carry_out(replaces=replaces, missed=self._uncount)
        else:
            run.changes.unlink()
            self._summary.files = count_entries(self._current)
        remove_tree(run.copies)

    def _all_changes(self) -> Iterator[Change]:
        """Yield the changes in path order."""
        judged = heapq.merge(self._judged(), self._forgotten(), key=attrgetter("path"))
        pace = ReportTimer()
        for number, change in enumerate(judged, 1):
            self._count(change)
            yield change
            if pace.due():
                log.info("%s changes judged so far", number)

    def _with_all_below(self) -> Iterator[Change]:
        """Yield the changes again, and also forget entries that conflict with new paths.

        These are at or below what moves away as a whole, or below or above a new path. Most of them are
        forgotten anyway, except for what is excluded, or hidden below an unreadable directory. Moves come
        before them, because they may fail.
        """
        others = set(ChangeKind) - {ChangeKind.EDITED, ChangeKind.MOVED}
        by_path = attrgetter("path")
        moves = sorted(self._read_changes({ChangeKind.MOVED}), key=by_path)
        forgotten = self._also_forgotten(SortedLookup(self._read_changes(others)))
        yield from heapq.merge(moves, self._read_changes(others), forgotten, key=by_path)

    def _also_forgotten(self, known: SortedLookup[Change]) -> Iterator[Change]:
        coming = (
            change.path
            for change in self._read_changes({ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED})
        )
        covered = PathsBelow(heapq.merge(sorted(self._moved), coming))
        above = self._above_new_paths()
        for path, md5 in self._entries():
            gives_way = covered.covers(path)
            if (gives_way or path in above) and not known.find(path):
                change = Change(path, ChangeKind.FORGOTTEN, old_md5=md5, replaces=md5 if gives_way else None)
                self._count(change)
                yield change

    def _above_new_paths(self) -> set[bytes]:
        """Return entries that are directories of new paths: their files were deleted by hand."""
        coming = self._read_changes({ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED})
        entries = Prefixes()
        found = set()
        for path, mine, comes in merge(self._entries(), (Entry(c.path, c.md5 or b"") for c in coming)):
            entries.advance(path)
            if comes and (above := entries.above(path)):
                found.add(above)
            if mine:
                entries.push(path)
        return found

    def _read_changes(self, kinds: Collection[ChangeKind]) -> Iterator[Change]:
        return (change for change in read_records(self._run.changes, Change) if change.what in kinds)

    def _count(self, change: Change, number: int = 1) -> None:
        summary = self._summary
        if change.what in (ChangeKind.ADDED, ChangeKind.REPLACED):
            summary.size += number * (change.size or 0)
        if change.what in (ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED, ChangeKind.FORGOTTEN):
            setattr(summary, change.what, getattr(summary, change.what) + number)

    def _uncount(self, change: Change, why: str) -> None:
        """Correct the counts for a change that the disk refused."""
        summary = self._summary
        if change.what == ChangeKind.MOVED:
            log.warning("%s could not be moved out of the way: %s", to_text(change.path), why)
            return
        if change.what == ChangeKind.FORGOTTEN:
            self._count(change, -1)
            return
        outcome = Outcome(change.outcome or Outcome.FAILED)
        summary.count(outcome, -1)
        self._count(change, -1)
        summary.count(Outcome.FAILED)
        self._fail(Outcome.FAILED, change.path, why)
        if change.what == ChangeKind.REPLACED and change.version is not None:
            self._archiver.remove_redundant(change.path, change.version, change.old_md5 or b"")

    # --- what changes -------------------------------------------------------------------------------

    def _forgotten(self) -> Iterator[Change]:
        index = SortedLookup(self._entries())
        for item in read_records(self._run.forget, ForgottenEntry):
            entry = index.find(item.path)
            if entry is not None and entry.md5 == item.md5:
                yield Change(item.path, ChangeKind.FORGOTTEN, old_md5=item.md5)

    def _judged(self) -> Iterator[Change]:
        """Yield the changes for the results, each after the move of what is in its way."""
        finished = finished_shards(self._run, self._plan)
        is_complete = not self._plan.partial and len(finished) == len(self._plan.shards)
        with UnstableFiles(self._mirror, self._run, is_complete) as unstable:
            for result in results(self._run, self._plan):
                outcome = Outcome(result.outcome)
                is_unstable = unstable.update(result.path, outcome)
                if outcome.good:
                    yield from self._judge(result)
                    continue
                self._summary.count(outcome)
                if outcome.failure or is_unstable:
                    self._fail(outcome, result.path, result.detail)

    def _fail(self, outcome: Outcome, path: bytes, detail: str | None) -> None:
        self._summary.fail(outcome, f"{to_text(path)} ({detail})")

    def _judge(self, result: Result) -> Iterator[Change]:
        path = result.path
        entry = self._index.find(path)
        record = self._archived.find(path)
        current = entry.md5 if entry is not None else None
        # None: an earlier try took the entry out of the index, and was cut off before replacing the file.
        if current not in (result.replaces, None):
            # Another run has committed it; or this one, before its task was cleared.
            is_own = self._was_committed and current == result.md5
            self._summary.count(Outcome(result.outcome) if is_own else Outcome.SUPERSEDED)
            self._discard(record)
            return
        if result.outcome == Outcome.SUPERSEDED and current != result.md5:
            # The run that was to bring it has been superseded itself; the next run retries.
            self._summary.count(Outcome.SUPERSEDED)
            return
        moved = None
        try:
            if path in self._colliding:
                raise CannotCommit(explain_collision(self._colliding[path]))
            in_the_way, live = self._in_the_way(path)
            if in_the_way is not None and in_the_way not in self._moved:
                moved = Change(in_the_way, ChangeKind.MOVED, version=self._free_version(in_the_way))
            change = self._change(result, record, live)
        except (CannotCommit, OSError) as error:
            if isinstance(error, OSError) and not concerns_one_file(error):
                raise
            self._discard(record)
            self._summary.count(Outcome.FAILED)
            self._fail(Outcome.FAILED, path, reason_of(error))
            return
        self._summary.count(Outcome(result.outcome))
        self._replaces = self._replaces or current is not None
        if moved is not None:
            self._moved.add(moved.path)
            yield moved
        yield change

    def _in_the_way(self, path: bytes) -> tuple[bytes | None, os.stat_result | None]:
        """Return what is in the place of ``path``, or of one of its directories, and must move away.

        :return: its path, or else the live file, if there is one.
        :raises PathBlocked: one of the directories is a symlink, which somebody put there on purpose.
        """
        blocked = self._tree.blocker(path)
        if blocked is not None:
            if blocked.is_symlink:
                raise blocked
            return blocked.at, None
        live = self._tree.lstat(path)
        return (None, live) if live is None or is_file(live) else (path, None)

    def _free_version(self, path: bytes) -> bytes:
        """Return a free version name of ``path``.

        :raises PathBlocked: ``.old`` is not a directory.
        """
        for attempt in count():
            version = version_path(path, self._archiver.stamp, attempt)
            if blocked := self._tree.blocker(version):
                raise blocked
            if self._tree.lstat(version) is None:
                return version
        raise AssertionError

    def _change(self, result: Result, record: Archived | None, live: os.stat_result | None) -> Change:
        """Return the change that brings a result into the mirror.

        :param live: the live file; None if its place is free, or will be.
        :raises CannotCommit: it cannot be brought there.
        :raises OSError: the disk refuses, or (PathBlocked) ``.old`` is not a directory.
        """
        if result.outcome == Outcome.ADOPTED:
            known = result.inode, result.size, result.modified
            if live is None or (live.st_ino, live.st_size, live.st_mtime_ns) != known:
                raise CannotCommit("the live file was changed on this side meanwhile")
            return _change_to(result, ChangeKind.ADOPTED)
        if live is None:
            return _change_to(result, ChangeKind.ADDED, content=self._content.provide(result))
        if record is None or not self._archiver.is_valid(record, live):
            record = self._archiver.archive(result.path, result.md5)
        elif self._is_restamped:
            record = self._archiver.restamp(record, result.md5)
        if record is None:
            raise CannotCommit("the live file was removed on this side just now")
        if record.md5 == result.md5:
            # The staged file is not needed; the live file gets its attributes.
            return _change_to(
                result, ChangeKind.ADOPTED, content=STAGING if self._content.use_staged(result) else None
            )
        try:
            content = self._content.provide(result)
        except (CannotCommit, OSError):
            self._archiver.discard(record)
            raise
        return _change_to(result, ChangeKind.REPLACED, record.md5, record.version, content)

    def _discard(self, record: Archived | None) -> None:
        if record is not None and not self._used:
            self._archiver.discard(record)

    def _count_missing(self) -> None:
        """Count the entries of shards that left no results."""
        finished = finished_shards(self._run, self._plan)
        for shard, number in enumerate(self._plan.shards):
            if shard not in finished and number:
                self._summary.count(Outcome.FAILED, number)
                what = f"shard {shard} ({number} files): pull_changed did not finish; see its log"
                self._summary.fail(Outcome.FAILED, what, number)


def _change_to(
    result: Result,
    what: ChangeKind,
    old_md5: bytes | None = None,
    version: bytes | None = None,
    content: str | None = None,
) -> Change:
    attributes = result.size, result.mtime, result.mode
    return Change(
        *(result.path, what, result.outcome, old_md5, result.md5, *attributes),
        *(version, content, result.replaces),
    )
