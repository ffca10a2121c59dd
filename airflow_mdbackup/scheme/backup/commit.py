"""Staged files become live files, and the consumer index is written anew.

In this order, under the lock, so that a crash anywhere leaves each live file whole, every version, and an
index that never claims what the disk lacks::

    settle   a commit that a crash cut off is finished first, entry by entry, by what the disk shows
    judge    each result once more: the index must still say what the plan replaces, the live file must still
             be the one that was archived (else it is archived now), the content must be there
    ahead    write the history of all that is to happen; syncfs; then it gets its name, .pending
    finish   index without what is about to be replaced, files, final index, final history (see settle)
    tell     write the status; take away old run directories

A run whose provider index is older than the last committed one changes nothing: it is superseded.

What this does not give: between a file's replacement and the end, the index lacks the entry. A crash there
costs the next run a hash of that file, never a transfer.

Source: the seed's sections "Copy Process" and "Index Files" ("Server B Index").
"""

from __future__ import annotations

import heapq
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from operator import attrgetter
from typing import Any

from airflow_mdbackup.scheme.backup import name_collisions as clash
from airflow_mdbackup.scheme.backup.archive import (
    Archived,
    Archiver,
    clashing_paths,
    is_used,
    read_archived,
    stamp_of,
    used_stamps,
    withdraw_unused,
)
from airflow_mdbackup.scheme.backup.cleanup import clean
from airflow_mdbackup.scheme.backup.plan import Plan, read_plan
from airflow_mdbackup.scheme.backup.results import Result, finished_shards, results
from airflow_mdbackup.scheme.backup.unstable_files import UnstableFiles
from airflow_mdbackup.scheme.common.bloom import BloomFilter
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.sorted_paths import PathsBelow, Prefixes, SortedLookup
from airflow_mdbackup.scheme.errors import EntriesFailed
from airflow_mdbackup.scheme.files.content import copy_of
from airflow_mdbackup.scheme.files.jsonl import read_header, read_records, write_state
from airflow_mdbackup.scheme.files.syscalls import (
    concerns_one_file,
    is_file,
    make_directory,
    open_for_owner,
)
from airflow_mdbackup.scheme.files.tree import Tree, remove_tree
from airflow_mdbackup.scheme.history.apply import STAGING, reason_of
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, last
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.history.journal import Transaction, transaction
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.history.status_file import status_or_lost
from airflow_mdbackup.scheme.history.usage import totals_state
from airflow_mdbackup.scheme.index.canonical import Entry, count_entries, merge, read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.staging import Staging
from airflow_mdbackup.scheme.store.version_names import version_path

log = logging.getLogger(__name__)

_SHOWN = 20  # paths that a message names
_UNREADABLE = "on the provider; build_provider_index says why"
_ROTTEN = (
    "damaged on the provider: its content changed, its times did not. The good copy here is kept; copy it "
    "back, or `touch` it there to accept what it has now"
)
_TRIED = 3  # live files that are tried as a source of missing content


@dataclass(slots=True)
class CommitSummary:
    """What became of a run.

    :ivar outcomes: how many entries had each outcome.
    :ivar added: of entries: new in the mirror; ``replaced``, ``adopted``, ``forgotten`` likewise.
    :ivar size: bytes that were put in place.
    :ivar files: entries in the consumer index afterwards.
    :ivar superseded: a run with a newer provider index was committed before, and nothing was changed.
    :ivar doubtful: and the last run that committed was not good, or limited to some paths.
    :ivar partial: the run was limited to some paths, so that it is no good run of all.
    :ivar failures: the first of the entries for which the run fails, as text.
    :ivar failed: how many there are.
    :ivar clock: for people: why the clock of this machine may be wrong, if anything speaks for that.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    added: int = 0
    replaced: int = 0
    adopted: int = 0
    forgotten: int = 0
    size: int = 0
    files: int = 0
    superseded: bool = False
    doubtful: bool = False
    partial: bool = False
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    clock: str | None = None

    def count(self, outcome: Outcome, number: int = 1) -> None:
        """Note that ``number`` entries had an outcome."""
        total = self.outcomes.get(outcome.value, 0) + number
        if total:
            self.outcomes[outcome.value] = total
        else:
            self.outcomes.pop(outcome.value, None)

    def fail(self, outcome: Outcome, what: str, number: int = 1) -> None:
        """Note that ``number`` entries failed, and name them if there is still room."""
        self.failed += number
        if number and len(self.failures) < _SHOWN:
            self.failures.append(f"{outcome} {what}")

    def raise_for_failures(self, provider: str) -> None:
        """Raise :class:`EntriesFailed` if any entry failed, naming the first."""
        if self.failed:
            files = "file" if self.failed == 1 else "files"
            others = self.failed - len(self.failures)
            more = f", and {others} more" if others > 0 else ""
            raise EntriesFailed(
                f"{provider}: {self.failed} {files} could not be backed up, all others are committed: "
                f"{'; '.join(self.failures)}{more}"
            )


def commit(mirror: Mirror, run: Run) -> CommitSummary:
    """Commit what a run has pulled. May be called again, after a crash or for a cleared task.

    :return: what became of it; the caller fails by :meth:`CommitSummary.raise_for_failures`.
    :raises RunIncomplete: the run has no accepted plan.
    :raises ConsumerIndexDamaged: somebody damaged the consumer index.
    :raises DestinationBusy: another run holds the lock for too long.
    :raises DestinationFull: there is no room for copies, or for the index; a retry goes on from there.
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
        # A kill may have come between the history and the status.
        told, newest = str(status.get("order", "")), str(last(mirror).get("order", ""))
        if max(told, newest) > order:
            log.info("A run with a newer provider index has been committed: this one is superseded")
            summary.superseded = True
            summary.doubtful = newest > told or status.get("last_good") != status.get("last_commit")
            summary.count(Outcome.SUPERSEDED, plan.pull)
            summary.files = int(status.get("files", 0))
            withdraw_unused(mirror, run, tree)
        else:
            if plan.partial:
                # It is newer than others only where it has been; each of their entries is judged by itself.
                order = max(told, newest)
            _Commit(tx, mirror, run, plan, tree, staging, summary).carry_out(order)
            _count_remarks(summary, Outcome.UNREADABLE, plan.unreadable, plan.unreadable_paths, _UNREADABLE)
            _count_remarks(summary, Outcome.ROTTEN, plan.rotten, plan.rotten_paths, _ROTTEN)
            summary.seconds = round(time.monotonic() - started, 3)
            _write_status(mirror, run, summary, status, order)
        write_state(run.done, {"outcomes": summary.outcomes})
        clean(mirror, tree)
    return summary


class _Commit:
    """One commit: judges each result, and has :func:`.history.journal.finish` carry out what stands."""

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
        self._clashing = clashing_paths(run, plan, lambda: tx.index)
        self._again = mirror.has_committed(run)
        archived_at, archived = read_archived(run)
        stamp = stamp_of(mirror, run)
        self._stale = stamp != archived_at
        self._used = is_used(mirror, run, archived_at)
        self._archiver = Archiver(run, tree, stamp)
        self._archived = SortedLookup(archived)
        self._index = SortedLookup(self._entries())
        self._moved: set[bytes] = set()  # what goes out of the way as a whole
        self._replaces = False  # whether entries of the index are untrue for a while
        self._copies = 0
        self._taken = BloomFilter(
            plan.pull
        )  # md5s whose staged file goes to one entry; the others get copies
        self._elsewhere: dict[bytes, list[bytes]] | None = None

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
            # Whoever settles a history that has its name relies on the versions and content it tells of.
            write_state(run.used, {"stamps": [*used_stamps(run), stamp]})
            self._staging.sync()
            tx.publish(run.changes, header)
            replaces = self._replaces or bool(self._moved)
            self._summary.files = tx.carry_out(replaces=replaces, missed=self._missed)
        else:
            run.changes.unlink()
            self._summary.files = count_entries(self._current)
        remove_tree(run.copies)

    def _all_changes(self) -> Iterator[Change]:
        """Yield what changes, in path order."""
        judged = heapq.merge(self._judged(), self._forgotten(), key=attrgetter("path"))
        pace = ReportTimer()
        for number, change in enumerate(judged, 1):
            self._tally(change)
            yield change
            if pace.due():
                log.info("%s changes judged so far", number)

    def _with_all_below(self) -> Iterator[Change]:
        """Yield the changes again, and that entries leave the index which cannot stay beside what comes.

        These are below what goes as a whole, or below or above of a path that comes. Most of them are
        forgotten anyway, but for what is excluded, or hidden below an unreadable directory. What goes comes
        before them, for it may refuse to.
        """
        others = set(ChangeKind) - {ChangeKind.EDITED, ChangeKind.MOVED}
        by_path = attrgetter("path")
        moves = sorted(self._changes({ChangeKind.MOVED}), key=by_path)
        forgotten = self._also_forgotten(SortedLookup(self._changes(others)))
        yield from heapq.merge(moves, self._changes(others), forgotten, key=by_path)

    def _also_forgotten(self, told: SortedLookup[Change]) -> Iterator[Change]:
        coming = (
            change.path
            for change in self._changes({ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED})
        )
        covered = PathsBelow(heapq.merge(sorted(self._moved), coming))
        above = self._above_what_comes()
        for path, md5 in self._entries():
            gives_way = covered.covers(path)
            if (gives_way or path in above) and not told.find(path):
                change = Change(path, ChangeKind.FORGOTTEN, old_md5=md5, replaces=md5 if gives_way else None)
                self._tally(change)
                yield change

    def _above_what_comes(self) -> set[bytes]:
        """Return entries that are directories of what comes: files that hands have taken away."""
        coming = self._changes({ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED})
        entries = Prefixes()
        found = set()
        for path, mine, comes in merge(self._entries(), (Entry(c.path, c.md5 or b"") for c in coming)):
            entries.advance(path)
            if comes and (above := entries.above(path)):
                found.add(above)
            if mine:
                entries.push(path)
        return found

    def _changes(self, whats: Collection[ChangeKind]) -> Iterator[Change]:
        return (change for change in read_records(self._run.changes, Change) if change.what in whats)

    def _tally(self, change: Change, number: int = 1) -> None:
        summary = self._summary
        if change.what in (ChangeKind.ADDED, ChangeKind.REPLACED):
            summary.size += number * (change.size or 0)
        if change.what in (ChangeKind.ADDED, ChangeKind.REPLACED, ChangeKind.ADOPTED, ChangeKind.FORGOTTEN):
            setattr(summary, change.what, getattr(summary, change.what) + number)

    def _missed(self, change: Change, why: str) -> None:
        """Take back what was counted for a change that the disk refused."""
        summary = self._summary
        if change.what == ChangeKind.MOVED:
            log.warning("%s could not be moved out of the way: %s", to_text(change.path), why)
            return
        if change.what == ChangeKind.FORGOTTEN:
            self._tally(change, -1)
            return
        outcome = Outcome(change.outcome or Outcome.FAILED)
        summary.count(outcome, -1)
        self._tally(change, -1)
        summary.count(Outcome.FAILED)
        self._fail(Outcome.FAILED, change.path, why)
        if change.what == ChangeKind.REPLACED and change.version is not None:
            self._archiver.take_back(change.path, change.version, change.old_md5 or b"")

    # --- what changes -------------------------------------------------------------------------------

    def _forgotten(self) -> Iterator[Change]:
        index = SortedLookup(self._entries())
        for item in read_records(self._run.forget, ForgottenEntry):
            entry = index.find(item.path)
            if entry is not None and entry.md5 == item.md5:
                yield Change(item.path, ChangeKind.FORGOTTEN, old_md5=item.md5)

    def _judged(self) -> Iterator[Change]:
        """Yield what becomes of the results, each with what must go out of its way first."""
        finished = finished_shards(self._run, self._plan)
        judged_all = not self._plan.partial and len(finished) == len(self._plan.shards)
        with UnstableFiles(self._mirror, self._run, judged_all) as patience:
            for result in results(self._run, self._plan):
                outcome = Outcome(result.outcome)
                worn_out = patience.gives_up_on(result.path, outcome)
                if outcome.good:
                    yield from self._judge(result)
                    continue
                self._summary.count(outcome)
                if outcome.failure or worn_out:
                    self._fail(outcome, result.path, result.detail)

    def _fail(self, outcome: Outcome, path: bytes, detail: str | None) -> None:
        self._summary.fail(outcome, f"{to_text(path)} ({detail})")

    def _judge(self, result: Result) -> Iterator[Change]:
        path = result.path
        entry = self._index.find(path)
        record = self._archived.find(path)
        current = entry.md5 if entry is not None else None
        # An entry that an earlier try took out of the index, and did not get to replace, is judged again.
        if current not in (result.replaces, None):
            # Another run has been here; or this one, before its task was cleared.
            mine = self._again and current == result.md5
            self._summary.count(Outcome(result.outcome) if mine else Outcome.SUPERSEDED)
            self._withdraw(record)
            return
        if result.outcome == Outcome.SUPERSEDED and current != result.md5:
            # What had brought it has been superseded itself; the next run sees to it.
            self._summary.count(Outcome.SUPERSEDED)
            return
        moved = None
        try:
            if path in self._clashing:
                raise _Impossible(clash.reason(self._clashing[path]))
            in_the_way, live = self._in_the_way(path)
            if in_the_way is not None and in_the_way not in self._moved:
                moved = Change(in_the_way, ChangeKind.MOVED, version=self._free_version(in_the_way))
            change = self._change(result, record, live)
        except (_Impossible, OSError) as error:
            if isinstance(error, OSError) and not concerns_one_file(error):
                raise
            self._withdraw(record)
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
        """Return what stands where ``path``, or a directory of it, belongs and must go as a whole.

        :return: its path, or else the live file, if there is one.
        :raises Blocked: a directory of it is a symlink, which somebody put there on purpose.
        """
        blocked = self._tree.blocker(path)
        if blocked is not None:
            if blocked.is_symlink:
                raise blocked
            return blocked.at, None
        live = self._tree.lstat(path)
        return (None, live) if live is None or is_file(live) else (path, None)

    def _free_version(self, path: bytes) -> bytes:
        """Return a version name of ``path`` that is free.

        :raises Blocked: something else stands in the place of ``.old``.
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

        :param live: the live file; None if the place is free, or will be.
        :raises _Impossible: it cannot be brought there.
        :raises OSError: the disk refuses, or (Blocked) something stands in the place of ``.old``.
        """
        if result.outcome == Outcome.ADOPTED:
            known = result.inode, result.size, result.modified
            if live is None or (live.st_ino, live.st_size, live.st_mtime_ns) != known:
                raise _Impossible("the live file was changed on this side meanwhile")
            return _brought(result, ChangeKind.ADOPTED)
        if live is None:
            return _brought(result, ChangeKind.ADDED, content=self._content(result))
        if record is None or not self._archiver.stands(record, live):
            record = self._archiver.archive(result.path, result.md5)
        elif self._stale:
            record = self._archiver.restamp(record, result.md5)
        if record is None:
            raise _Impossible("the live file was removed on this side just now")
        if record.md5 == result.md5:
            # The staged file is not needed, and its attributes go to the live one.
            return _brought(
                result, ChangeKind.ADOPTED, content=STAGING if self._takes_staged(result) else None
            )
        try:
            content = self._content(result)
        except (_Impossible, OSError):
            self._archiver.withdraw(record)
            raise
        return _brought(result, ChangeKind.REPLACED, record.md5, record.version, content)

    def _content(self, result: Result) -> str:
        """Return where the new bytes wait, making a copy of them for all but one of equal files.

        :raises _Impossible: they are nowhere.
        """
        if self._takes_staged(result):
            return STAGING
        make_directory(self._run.copies)
        name = str(self._copies)
        self._copies += 1
        target = open_for_owner(self._run.copies / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for source in self._sources(result.md5):
                try:
                    if copy_of(source, target) == result.md5:
                        return name
                finally:
                    os.close(source)
        finally:
            os.close(target)
        raise _Impossible("its content is no longer in staging; the next run pulls it again")

    def _takes_staged(self, result: Result) -> bool:
        """Whether the staged file itself goes to this entry, the first one with its md5.

        One for which the result does not vouch is hashed first.
        """
        if self._taken.seen_before(result.md5):
            return False
        return self._staging.holds(result.md5, result.inode, result.changed) or self._is_staged(result.md5)

    def _is_staged(self, md5: bytes) -> bool:
        """Whether what is staged has this content, by hashing it."""
        try:
            return self._staging.is_whole(md5, md5)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return False

    def _sources(self, md5: bytes) -> Iterator[int]:
        """Yield descriptors of files that should have these bytes: the staged one, then live ones."""
        yield from _if_readable(self._staging.open, md5)
        if self._elsewhere is None:
            self._elsewhere = self._look_elsewhere()
        for path in self._elsewhere.get(md5, ()):
            yield from _if_readable(self._tree.open, path)

    def _look_elsewhere(self) -> dict[bytes, list[bytes]]:
        """Return where live files should have what is missing in staging, looked up for all at once."""
        missing: dict[bytes, list[bytes]] = {}
        for result in results(self._run, self._plan):
            if result.md5 not in missing and not self._staging.has(result.md5):
                missing[result.md5] = []
        for entry in self._entries():
            paths = missing.get(entry.md5)
            if paths is not None and len(paths) < _TRIED:
                paths.append(entry.path)
        return missing

    def _withdraw(self, record: Archived | None) -> None:
        if record is not None and not self._used:
            self._archiver.withdraw(record)

    def _count_missing(self) -> None:
        """Count the entries of shards that left no results."""
        finished = finished_shards(self._run, self._plan)
        for shard, number in enumerate(self._plan.shards):
            if shard not in finished and number:
                self._summary.count(Outcome.FAILED, number)
                what = f"shard {shard} ({number} files): pull_changed did not finish; see its log"
                self._summary.fail(Outcome.FAILED, what, number)


def _if_readable(opener: Callable[[bytes], int], name: bytes) -> Iterator[int]:
    """Yield a descriptor of a file, if it can be opened."""
    try:
        descriptor = opener(name)
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return
    yield descriptor


class _Impossible(Exception):
    """An entry cannot be brought into the mirror. The message says why and what to do."""


def _brought(
    result: Result,
    what: ChangeKind,
    old_md5: bytes | None = None,
    version: bytes | None = None,
    content: str | None = None,
) -> Change:
    attributes = result.size, result.mtime, result.mode
    content_known = version, content, result.replaces
    return Change(result.path, what, result.outcome, old_md5, result.md5, *attributes, *content_known)


def _count_remarks(
    summary: CommitSummary, outcome: Outcome, number: int, paths: Sequence[str], detail: str
) -> None:
    """Fail for what the provider's index says of ``number`` paths, the first of which are ``paths``."""
    summary.count(outcome, number)
    for path in paths:
        summary.fail(outcome, f"{path} ({detail})")
    summary.fail(outcome, "(others)", number - len(paths))


def _write_status(
    mirror: Mirror, run: Run, summary: CommitSummary, status: dict[str, Any], order: str
) -> None:
    """Write what monitoring reads, and from which the next run knows what is newer than what."""
    now = {
        "run_id": run.run_id,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": summary.seconds,
        "outcomes": summary.outcomes,
        "partial": summary.partial,
    }
    new = {"provider": mirror.provider, "order": order, "files": summary.files, "last_commit": now}
    good = status.get("last_good") if summary.failed or summary.partial else now
    if good:
        new["last_good"] = good
    if summary.clock:
        new["clock"] = summary.clock
    write_state(mirror.status, {**new, **totals_state(mirror, status, summary.files)})
