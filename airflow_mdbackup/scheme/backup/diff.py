"""Two indexes become a plan: what the run has to do.

::

    recover   finish what a crashed commit left (see history.journal)
    exclude   skip excluded entries on both sides, and those outside of the requested paths
    merge     provider index with consumer index, both in path order:
                only on A                     pull; if there is a live file anyway: adopt
                on both, md5 differs          pull, replacing
                on both, md5 equal            nothing
                only on B                     forget, unless it is at or below an unreadable path of A
    guard     refuse the plan if too much is gone or changed at once
    warn      of names that look like ransomware
    match     wanted md5s with the consumer index: what was moved on A is copied on B
    divide    into shards by md5, each in path order

The plan is in the run directory: ``plan.json``, one file of items for each shard, and the entries to forget.
Nothing else on the disk is changed, and no step holds a whole index in memory.

Source: the seed's sections "Index Files" (policy) and "Delete Policy".
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pathspec

from airflow_mdbackup.scheme.backup.guard import Guard, is_at_or_below
from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem, PlanOptions
from airflow_mdbackup.scheme.backup.ransomware import SuspectNames
from airflow_mdbackup.scheme.backup.results import MAX_NAMED
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.sorted_paths import PathsBelow, SortedLookup, batches
from airflow_mdbackup.scheme.errors import GuardTripped, IndexRefused, RunIncomplete
from airflow_mdbackup.scheme.files.jsonl import RecordWriter, read_header, read_records, write_state
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.history.journal import transaction
from airflow_mdbackup.scheme.index.canonical import (
    Difference,
    Entry,
    IdenticalEntries,
    Remark,
    compare,
    digest,
    entries_with_md5,
    merge,
    read_entries,
    read_remarks,
)
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.version_names import OLD

log = logging.getLogger(__name__)

DEFAULT_OPTIONS = PlanOptions()
_CHUNK = 100_000  # planned entries whose md5s are looked up in the consumer index at a time


def make_plan(
    mirror: Mirror,
    run: Run,
    options: PlanOptions = DEFAULT_OPTIONS,
    *,
    shards: int = 1,
    may_trip: bool = False,
    override: bool = False,
    attempt: int = 0,
) -> Plan:
    """Compare the run's provider index with the consumer index and write the plan.

    :param may_trip: write the plan even if the guard has reasons, because an operator decides later.
    :param override: an operator has already decided to override the guard. This holds for the first index of
        the run that the guard objects to, and not for another one that arrives when its tasks are cleared;
        :attr:`Plan.overridden` says whether it applied.
    :param attempt: numbers the tries of this task. A try that was believed dead, and resumes after a later
        one has made the plan, must not take that plan away from the steps that rely on it.
    :raises IndexRefused: the provider index is not the file that FetchIndex left, or has a reserved name; or
        neither index has anything of ``only``.
    :raises GuardTripped: too much is gone or changed; nothing was changed.
    :raises ConsumerIndexDamaged: the consumer index cannot be read.
    :raises DestinationBusy: an earlier try, or another run, does not end; or a later try has ended.
    :raises RunIncomplete: the run has no provider index.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors(), run.lock("diff_indexes", mirror.provider):
        index = _begin(mirror, run, attempt)
        with transaction(mirror, f"diff_indexes of {run.run_id}", scratch=run.consumer_index) as tx:
            ours = tx.index
            plan = Plan(attempt=attempt, committed=mirror.last_commit(), provider_time=index["time"])
        guard = _compare(mirror, run, plan, ours, options)
        plan.overridden = override and _is_override_for(mirror, run, index["digest"])
        if plan.guard and not (may_trip or plan.overridden):
            run.items.unlink()
            run.forget.unlink()
            raise GuardTripped(
                f"{mirror.provider}: the guard stopped this run, and nothing was changed: "
                f"{'; '.join(plan.guard)}. If this is intended: trigger a run by hand with override_guard, "
                f"{guard.remedy()}, or let an operator approve such runs (on_guard: approve)."
            )
        _write_shards(mirror, run, plan, ours, max(1, min(shards, plan.pull)))
        plan.digest = _digest(run, len(plan.shards))
        write_state(run.plan, asdict(plan))
        return plan


def _begin(mirror: Mirror, run: Run, attempt: int) -> dict[str, Any]:
    """Discard an earlier plan, and return what FetchIndex noted about the run's index."""
    if (later := run.made_by(run.plan)) > attempt:
        raise run.comes_late(mirror.provider, "made the plan", attempt, later)
    run.begin_again()
    index: dict[str, Any] = run.require(run.state, "fetch_index")["index"]
    if not run.index.exists():
        raise RunIncomplete(
            f"run {run.run_id!r} has no accepted index: clear its task fetch_index and those after it"
        )
    if digest(run.index) != index["digest"]:
        raise IndexRefused(
            f"{mirror.provider}: {run.index} is not the file that fetch_index wrote; clear fetch_index"
        )
    return index


def preview(mirror: Mirror, run: Run, ours: Path | None, options: PlanOptions = DEFAULT_OPTIONS) -> Plan:
    """Compare as :func:`make_plan` does, but neither change nor lock anything in ``dest``.

    The guard stops nothing; :attr:`Plan.guard` says why it would. The plan has one shard, and is in the
    directory of ``run``.

    :param run: with an index from :func:`.fetch_for_preview` or :func:`.check_local_index`.
    :param ours: the consumer index in canonical form, or None if there is none.
    :raises IndexRefused: the provider index has a reserved name, or neither index has anything of ``only``.
    :raises OSError: ``dest`` cannot be read, or the run's directory cannot be written.
    """
    plan = Plan(provider_time=read_header(run.state)["index"]["time"])
    _compare(mirror, run, plan, ours, options)
    _write_shards(mirror, run, plan, ours, 1)
    return plan


def _compare(mirror: Mirror, run: Run, plan: Plan, ours: Path | None, options: PlanOptions) -> Guard:
    """Fill ``plan``, and write the items to pull, not divided into shards yet, and the entries to forget."""
    excluded = _Excluded(options.exclude, options.only)
    is_filtered = bool(options.exclude or options.only)
    plan.partial = bool(options.only)
    plan.unreadable, plan.unreadable_paths = _remarks(run, Remark.UNREADABLE, excluded)
    plan.rotten, plan.rotten_paths = _remarks(run, Remark.ROTTEN, excluded)
    hidden = PathsBelow(read_remarks(run.index, Remark.UNREADABLE) if plan.unreadable else iter(()))
    guard = Guard(options.source)
    with ExitStack() as stack:
        to_pull = stack.enter_context(RecordWriter[PlanItem](run.items))
        to_forget = stack.enter_context(RecordWriter[ForgottenEntry](run.forget))
        tree = stack.enter_context(mirror.tree()) if ours and mirror.files.exists() else None
        differences = _differences(run.index, ours, excluded if is_filtered else None)
        for item in _classify(mirror.provider, plan, guard, hidden, differences):
            if isinstance(item, ForgottenEntry):
                to_forget.add(item)
            elif tree and item.replaces is None and tree.has_file(item.path):
                to_pull.add(PlanItem(item.path, item.md5, adopt=True))
                plan.adopt += 1
            else:
                to_pull.add(item)
        if options.only and not guard.files and not plan.consumer:
            raise IndexRefused(
                f"{mirror.provider}: neither index has anything at {', '.join(map(to_text, options.only))}. "
                "Write the paths as backupop sees them"
            )
    plan.hides = is_filtered or bool(plan.kept)
    plan.guard = guard.reasons(plan, options)
    return guard


def _classify(
    provider: str,
    plan: Plan,
    guard: Guard,
    hidden: PathsBelow,
    differences: Iterable[IdenticalEntries | Difference],
) -> Iterator[PlanItem | ForgottenEntry]:
    """Yield the items to pull and the entries to forget, in path order, and count all entries.

    :param hidden: the paths that the provider could not read.
    """
    names = SuspectNames()
    timer = ReportTimer()
    for difference in differences:
        if timer.due():
            log.info("%s entries of the provider compared so far", f"{guard.files:,}")
        if isinstance(difference, IdenticalEntries):
            guard.count_identical(difference)
            plan.consumer += difference.count
            plan.same += difference.count
            continue
        path, theirs, ours = difference
        kept = theirs is None and hidden.covers(path)
        plan.consumer += ours is not None
        guard.count(path, theirs is not None, ours is not None and not kept)
        if theirs is None:
            assert ours is not None
            if kept:
                plan.kept += 1
                continue
            plan.gone += 1
            guard.add_lost(path)
            names.add_gone(path)
            yield ForgottenEntry(path, ours)
            continue
        if OLD in path.split(b"/"):
            raise IndexRefused(
                f"{provider}: {to_text(path)} is in the provider's index, but the name {OLD.decode()} is "
                "reserved for versions. Rename it there, or exclude it on purpose."
            )
        if ours is None:
            plan.new += 1
            names.add_new(path)
        else:
            plan.changed += 1
            guard.add_lost(path)
        yield PlanItem(path, theirs, ours)
    plan.telltale = names.warning()


def _is_override_for(mirror: Mirror, run: Run, index: str) -> bool:
    """Whether an operator's override of the guard for a run applies to this index. Records that it does."""
    try:
        return bool(read_header(run.override).get("index") == index)
    except FileNotFoundError:
        if mirror.has_committed(run):  # its directory has been removed since
            return False
    write_state(run.override, {"index": index})
    return True


def format_changes(run: Run, plan: Plan, most: int = 100) -> Iterator[str]:
    """Yield a line for each path of a plan, with the marks of rclone, at most ``most`` of each kind.

    ``+`` is new, ``*`` is changed, ``-`` leaves the consumer index, while its file stays.
    """
    items = (item for shard in range(len(plan.shards)) for item in read_records(run.pulls(shard), PlanItem))
    marked = (("+" if item.replaces is None else "*", item.path) for item in items)
    gone = (("-", item.path) for item in read_records(run.forget, ForgottenEntry))
    shown: dict[str, int] = {}
    for mark, path in chain(marked, gone):
        shown[mark] = shown.get(mark, 0) + 1
        if shown[mark] <= most:
            yield f"{mark} {to_text(path)}"
    for mark, number in shown.items():
        if number > most:
            yield f"{mark} and {number - most} more"


def list_changes(
    run: Run, options: PlanOptions = DEFAULT_OPTIONS, *, same: bool = False
) -> Iterator[tuple[str, PlanItem | ForgottenEntry | Entry]]:
    """Yield the items of a plan of one shard, in path order, each with its mark; see :func:`format_changes`.

    :param options: those that the plan was made with.
    :param same: also yield what is equal on both sides, marked ``=``.
    """
    items = read_records(run.pulls(0), PlanItem)
    pulled = (("+" if item.replaces is None else "*", item) for item in items)
    gone = (("-", item) for item in read_records(run.forget, ForgottenEntry))
    streams: list[Iterator[tuple[str, PlanItem | ForgottenEntry | Entry]]] = [pulled, gone]
    if same:
        streams.append(_unchanged(run, _Excluded(options.exclude, options.only)))
    return heapq.merge(*streams, key=lambda marked: marked[1].path)


def _unchanged(run: Run, excluded: _Excluded) -> Iterator[tuple[str, Entry]]:
    """Yield the entries of the provider that need nothing done."""
    pulled = SortedLookup(read_records(run.pulls(0), PlanItem))
    for entry in read_entries(run.index):
        if not excluded(entry.path) and pulled.find(entry.path) is None:
            yield "=", entry


class _Excluded:
    """Whether a path is excluded by a pattern, or outside of the requested paths."""

    def __init__(self, patterns: Sequence[str], only: Sequence[bytes] = ()) -> None:
        self._spec = pathspec.GitIgnoreSpec.from_lines(patterns) if patterns else None
        self._only = [path.rstrip(b"/") for path in only]

    def __call__(self, path: bytes) -> bool:
        if self._only and not any(is_at_or_below(path, wanted) for wanted in self._only):
            return True
        return self._spec is not None and self._spec.match_file(os.fsdecode(path[1:]))

    def covers_all_below(self, path: bytes) -> bool:
        """Whether a path is excluded, together with everything below it if it is a directory."""
        if self._only and not any(
            is_at_or_below(path, wanted) or is_at_or_below(wanted, path) for wanted in self._only
        ):
            return True
        if self._spec is None or any(pattern.include is False for pattern in self._spec.patterns):
            return False  # a negated pattern may include something below
        return self(path) or self(path + b"/")


def _differences(
    theirs: Path, ours: Path | None, excluded: _Excluded | None
) -> Iterator[IdenticalEntries | Difference]:
    """Yield the differences of two indexes, without excluded paths."""
    if excluded is None:
        yield from compare(theirs, ours)
        return
    for difference in merge(read_entries(theirs), read_entries(ours) if ours else ()):
        path, left, right = difference
        if not excluded(path):
            yield IdenticalEntries.one(path) if left == right else difference


def _remarks(run: Run, remark: Remark, excluded: _Excluded) -> tuple[int, list[str]]:
    """Return the number of paths with a remark in the provider index, and the first few of them."""
    number = 0
    paths: list[str] = []
    # The state that an older version wrote may lack the count of rotten files.
    if read_header(run.state)["index"].get(remark):
        for path in read_remarks(run.index, remark):
            if not excluded.covers_all_below(path):
                number += 1
                if number <= MAX_NAMED:
                    paths.append(to_text(path))
    return number, paths


def _write_shards(mirror: Mirror, run: Run, plan: Plan, ours: Path | None, shards: int) -> None:
    """Write the items to their shards, each with the live path it can be copied from, if any."""
    for stale in run.folder.glob("pull-*.jsonl"):
        stale.unlink()
    plan.shards = [0] * shards
    remaining = read_records(run.items, PlanItem)
    with ExitStack() as stack:
        tree = stack.enter_context(mirror.tree()) if ours and mirror.files.exists() else None
        writers = [stack.enter_context(RecordWriter[PlanItem](run.pulls(n))) for n in range(shards)]
        for chunk in batches(remaining, _CHUNK):
            sources = _sources(tree, ours, {item.md5 for item in chunk}) if ours and tree else {}
            for item in chunk:
                if not item.adopt and (source := sources.get(item.md5)):
                    item = PlanItem(item.path, item.md5, item.replaces, source)
                    plan.copy += 1
                shard = _shard_of(item.md5, shards)
                writers[shard].add(item)
                plan.shards[shard] += 1
    run.items.unlink()


def _shard_of(md5: bytes, shards: int) -> int:
    """Return the shard of an md5, given in hexadecimal digits: equal contents go to one shard."""
    return int(md5[:8], 16) % shards


def _sources(tree: Tree, ours: Path, wanted: set[bytes]) -> dict[bytes, bytes]:
    """Return by md5 a live file that has it by the consumer index. Its bytes are not verified yet."""
    found: dict[bytes, bytes] = {}
    for path, md5 in entries_with_md5(ours, wanted):
        if md5 not in found and tree.has_file(path):
            found[md5] = path
    return found


def _digest(run: Run, shards: int) -> str:
    """Return the digest by which the results of this plan refer to it."""
    parts = [digest(run.forget), *(digest(run.pulls(n)) for n in range(shards))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
