"""What is to be done: two indexes become a plan.

::

    settled   what a crashed run left is finished (see commit)
    excluded  entries are passed over on both sides, and those that lie outside of what is asked for
    merged    provider index with consumer index, both in path order:
                only on A                     pull; if a live file is there all the same: adopt
                on both, md5 differs          pull, replacing
                on both, md5 equal            nothing
                only on B                     forget, unless it lies at or below an unreadable path of A
    guarded   too much gone or changed at once: the plan is not accepted
    told      what ransomware would look like, as a warning
    matched   wanted md5s against the consumer index: what moved on A is copied on B
    cut       into shards by md5, in path order within each

The plan lies in the run directory, as ``plan.json``, one file of items per shard, and what to forget. Nothing
else on the disk is changed, and no step holds a whole index in memory.

Source: the seed's sections "Index Files" (policy) and "Delete Policy".
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import pathspec

from airflow_mdbackup.scheme.backup.plan import USUAL_LIMITS, Limits, Plan, PlanItem
from airflow_mdbackup.scheme.backup.ransomware import SuspectNames
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

_CHUNK = 100_000  # planned entries whose md5s are looked up in the consumer index at a time
_SHOWN = 20  # paths that a summary names
_EXAMPLES = 3  # paths that the guard names


def make_plan(
    mirror: Mirror,
    run: Run,
    *,
    source: Sequence[bytes] = (),
    exclude: Sequence[str] = (),
    shards: int = 1,
    limits: Limits = USUAL_LIMITS,
    allow_empty: bool = False,
    may_trip: bool = False,
    override: bool = False,
    only: Sequence[bytes] = (),
    attempt: int = 0,
) -> Plan:
    """Compare the run's provider index with the consumer index and write the plan.

    :param source: the paths that the provider is configured to index.
    :param exclude: gitignore patterns, against paths without their leading slash.
    :param may_trip: write the plan although the guard trips, because a person decides.
    :param override: a person has decided already. That is for the first index that the run judges so, and for
        no other that comes when its tasks are cleared; :attr:`Plan.overridden` tells whether it is this one.
    :param only: files, and directories with all below, to which the run is limited; nothing for no limit.
    :param attempt: counts the tries of this run's plan. One that was thought dead, and goes on once a later
        one has made it, would take it away from the steps that go on from it.
    :raises IndexRefused: the provider index is not what FetchIndex left, or has a reserved name; or neither
        index has anything of ``only``.
    :raises GuardTripped: see ``limits``; nothing was changed.
    :raises ConsumerIndexDamaged: the consumer index cannot be read.
    :raises DestinationBusy: an earlier try, or another run, does not end; or a later try has ended.
    :raises RunIncomplete: the run has no provider index.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors(), run.lock("diff_indexes", mirror.provider):
        if (later := run.made_by(run.plan)) > attempt:
            raise run.comes_late(mirror.provider, "made the plan", attempt, later)
        run.begin_again()
        state = run.require(run.state, "fetch_index")
        if not run.index.exists():
            raise RunIncomplete(
                f"run {run.run_id!r} has no accepted index: clear its task fetch_index and those after it"
            )
        if digest(run.index) != state["index"]["digest"]:
            raise IndexRefused(
                f"{mirror.provider}: {run.index} is not the file that fetch_index wrote; clear it"
            )
        with transaction(mirror, f"diff_indexes of {run.run_id}", scratch=run.consumer_index) as tx:
            ours = tx.index
            plan = Plan(attempt=attempt, committed=mirror.last_commit())
            plan.provider_time = state["index"]["time"]
        asked = _Asked(source, exclude, only, limits, allow_empty)
        comparison = _compare(mirror, run, plan, ours, asked)
        plan.overridden = override and _is_meant(mirror, run, state["index"]["digest"])
        if plan.guard and not (may_trip or plan.overridden):
            run.items.unlink()
            run.forget.unlink()
            raise GuardTripped(
                f"{mirror.provider}: the guard stopped this run, nothing was changed: "
                f"{'; '.join(plan.guard)}. If that is meant: trigger a run by hand with override_guard, "
                f"{comparison.way_out()}, or have a person asked (on_guard: approve)."
            )
        _cut(mirror, run, plan, ours, max(1, min(shards, plan.pull)))
        plan.digest = _digest(run, len(plan.shards))
        write_state(run.plan, asdict(plan))
        return plan


def preview(
    mirror: Mirror,
    run: Run,
    ours: Path | None,
    *,
    source: Sequence[bytes] = (),
    exclude: Sequence[str] = (),
    limits: Limits = USUAL_LIMITS,
    allow_empty: bool = False,
    only: Sequence[bytes] = (),
) -> Plan:
    """Compare as :func:`make_plan` does, for whoever only looks. Nothing in ``dest`` is changed or locked.

    The guard stops nothing; :attr:`Plan.guard` says why it would. The plan has one shard, and lies in the
    directory of ``run``.

    :param run: with an index that :func:`.fetch_to_look` or :func:`.take_index` left there.
    :param ours: the consumer index in canonical form, or None if there is none.
    :raises IndexRefused: the provider index has a reserved name, or neither index has anything of ``only``.
    :raises OSError: ``dest`` cannot be read, or the run's directory not be written.
    """
    plan = Plan(provider_time=read_header(run.state)["index"]["time"])
    _compare(mirror, run, plan, ours, _Asked(source, exclude, only, limits, allow_empty))
    _cut(mirror, run, plan, ours, 1)
    return plan


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a plan is made by; see :func:`make_plan`."""

    source: Sequence[bytes]
    exclude: Sequence[str]
    only: Sequence[bytes]
    limits: Limits
    allow_empty: bool


def _compare(mirror: Mirror, run: Run, plan: Plan, ours: Path | None, asked: _Asked) -> _Comparison:
    """Fill ``plan``, and write what is to be pulled, not cut into shards yet, and what to forget."""
    exclude, only = asked.exclude, asked.only
    excluded = _Excluded(exclude, only)
    plan.partial = bool(only)
    plan.hides = bool(exclude or only)
    plan.unreadable, plan.unreadable_paths = _remarks(run, Remark.UNREADABLE, excluded)
    plan.rotten, plan.rotten_paths = _remarks(run, Remark.ROTTEN, excluded)
    with ExitStack() as stack:
        to_pull = stack.enter_context(RecordWriter[PlanItem](run.items))
        to_forget = stack.enter_context(RecordWriter[ForgottenEntry](run.forget))
        tree = stack.enter_context(mirror.tree()) if ours and mirror.files.exists() else None
        hidden = PathsBelow(read_remarks(run.index, Remark.UNREADABLE) if plan.unreadable else iter(()))
        comparison = _Comparison(mirror.provider, plan, asked.source, hidden)
        for item in comparison.run(_differences(run.index, ours, excluded if exclude or only else None)):
            if isinstance(item, ForgottenEntry):
                to_forget.add(item)
            elif tree and item.replaces is None and tree.has_file(item.path):
                to_pull.add(PlanItem(item.path, item.md5, adopt=True))
                plan.adopt += 1
            else:
                to_pull.add(item)
        if only and not comparison.files and not plan.consumer:
            raise IndexRefused(
                f"{mirror.provider}: neither index has anything at {', '.join(map(to_text, only))}. "
                "Write the paths as backupop sees them"
            )
        plan.hides = plan.hides or bool(plan.kept)
        plan.guard = comparison.guard(asked.limits, asked.allow_empty or bool(only))
    return comparison


def _is_meant(mirror: Mirror, run: Run, index: str) -> bool:
    """Whether a person's override of the guard, given for a run, is for this index. Notes that it is."""
    try:
        return bool(read_header(run.override).get("index") == index)
    except FileNotFoundError:
        if mirror.has_committed(run):  # and its directory has been taken away since
            return False
    write_state(run.override, {"index": index})
    return True


def in_lines(run: Run, plan: Plan, most: int = 100) -> Iterator[str]:
    """Yield what a plan would do, a line for each path as rclone has them, at most ``most`` of each kind.

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


def listed(
    run: Run, *, exclude: Sequence[str] = (), only: Sequence[bytes] = (), same: bool = False
) -> Iterator[tuple[str, PlanItem | ForgottenEntry | Entry]]:
    """Yield what a plan of one shard would do, in path order, each with its mark; see :func:`in_lines`.

    :param exclude: as the plan was made with; ``only`` likewise.
    :param same: also what both sides have alike, marked ``=``.
    """
    items = read_records(run.pulls(0), PlanItem)
    pulled = (("+" if item.replaces is None else "*", item) for item in items)
    gone = (("-", item) for item in read_records(run.forget, ForgottenEntry))
    streams: list[Iterator[tuple[str, PlanItem | ForgottenEntry | Entry]]] = [pulled, gone]
    if same:
        streams.append(_alike(run, _Excluded(exclude, only)))
    return heapq.merge(*streams, key=lambda told: told[1].path)


def _alike(run: Run, excluded: _Excluded) -> Iterator[tuple[str, Entry]]:
    """Yield the entries of the provider with which nothing is to be done."""
    pulled = SortedLookup(read_records(run.pulls(0), PlanItem))
    for entry in read_entries(run.index):
        if not excluded(entry.path) and pulled.find(entry.path) is None:
            yield "=", entry


class _Excluded:
    """The paths that patterns exclude, and those that lie elsewhere than what is asked for."""

    def __init__(self, patterns: Sequence[str], only: Sequence[bytes] = ()) -> None:
        self._spec = pathspec.GitIgnoreSpec.from_lines(patterns) if patterns else None
        self._only = [path.rstrip(b"/") for path in only]

    def __call__(self, path: bytes) -> bool:
        if self._only and not any(_is_in(path, wanted) for wanted in self._only):
            return True
        return self._spec is not None and self._spec.match_file(os.fsdecode(path[1:]))

    def whole(self, path: bytes) -> bool:
        """Tell whether a path is excluded, and with it all that is below should it be a directory."""
        if self._only and not any(_is_in(path, wanted) or _is_in(wanted, path) for wanted in self._only):
            return True
        if self._spec is None or any(pattern.include is False for pattern in self._spec.patterns):
            return False  # one that takes back in may mean something below
        return self(path) or self(path + b"/")


class _Comparison:
    """The merge of both indexes, and the counts that the guard judges."""

    def __init__(self, provider: str, plan: Plan, source: Sequence[bytes], hidden: PathsBelow) -> None:
        self._provider = provider
        self._plan = plan
        self._hidden = hidden  # what the provider could not look at
        self.files = 0  # of the provider
        self._lost: list[bytes] = []  # the first entries that are gone or changed
        self._names = SuspectNames()
        # By source, which is a directory or a file: how many entries each side has of it.
        self._sources = {path.rstrip(b"/"): [0, 0] for path in source}

    def run(
        self, differences: Iterable[IdenticalEntries | Difference]
    ) -> Iterator[PlanItem | ForgottenEntry]:
        """Yield the items to pull and the entries to forget, in path order."""
        plan = self._plan
        pace = ReportTimer()
        for difference in differences:
            if pace.due():
                log.info("%s entries of the provider compared so far", self.files)
            if isinstance(difference, IdenticalEntries):
                self._count_same(difference)
                continue
            path, left, right = difference
            kept = left is None and self._hidden.covers(path)
            self._count(path, left, right, kept)
            if left is None:
                assert right is not None
                if kept:
                    plan.kept += 1
                else:
                    plan.gone += 1
                    self._lose(path)
                    self._names.gone(path)
                    yield ForgottenEntry(path, right)
            elif OLD in path.split(b"/"):
                raise IndexRefused(
                    f"{self._provider}: {to_text(path)} is in the provider's index, but the name "
                    f"{OLD.decode()} is reserved for versions. Rename it there, or exclude it on purpose."
                )
            else:
                if right is None:
                    plan.new += 1
                    self._names.new(path)
                else:
                    plan.changed += 1
                    self._lose(path)
                yield PlanItem(path, left, right)
        plan.telltale = self._names.told()

    def _count_same(self, same: IdenticalEntries) -> None:
        self.files += same.count
        self._plan.consumer += same.count
        self._plan.same += same.count
        for source, counts in self._sources.items():
            if all(path.startswith(source + b"/") for path in same.span):
                below = same.count  # what begins alike follows one another
            else:
                below = sum(_is_in(path, source) for path in same.paths())
            counts[0] += below
            counts[1] += below

    def _count(self, path: bytes, left: bytes | None, right: bytes | None, kept: bool) -> None:
        self.files += left is not None
        self._plan.consumer += right is not None
        for source, counts in self._sources.items():
            if _is_in(path, source):
                counts[0] += left is not None
                counts[1] += right is not None and not kept

    def _lose(self, path: bytes) -> None:
        if len(self._lost) < _EXAMPLES:
            self._lost.append(path)

    def way_out(self) -> str:
        """Return what lets a plan pass for which :meth:`guard` has reasons."""
        emptied = not self.files or any(ours and not theirs for theirs, ours in self._sources.values())
        return "set allow_empty" if emptied else "widen the guard"

    def guard(self, limits: Limits, allow_empty: bool) -> list[str]:
        """Return why a person should look before this plan is carried out; nothing if it is harmless."""
        plan = self._plan
        reasons = []
        if not allow_empty:
            if not self.files:
                unreadable = ", ".join(plan.unreadable_paths)
                why = f", because it could not read {unreadable}" if unreadable else ""
                reasons.append(f"the provider's index is empty{why}")
            for source, (theirs, ours) in self._sources.items():
                if ours and not theirs:
                    reasons.append(f"nothing is left of {ours} entries in {to_text(source) or '/'}")
        lost = plan.gone + plan.changed
        examples = ", ".join(map(to_text, self._lost))
        told = f"{plan.gone} gone and {plan.changed} changed of {plan.consumer} entries"
        if plan.consumer > limits.above:
            if lost > limits.share * plan.consumer:
                reasons.append(f"{told}, over {limits.share:.0%} (such as {examples})")
            elif limits.number is not None and lost > limits.number:
                reasons.append(f"{told}, over {limits.number} (such as {examples})")
        if reasons and plan.telltale:
            reasons.append(f"{plan.telltale}, as ransomware does")
        return reasons


def _is_in(path: bytes, source: bytes) -> bool:
    return path.startswith(source) and path[len(source) : len(source) + 1] in (b"", b"/")


def _differences(
    theirs: Path, ours: Path | None, excluded: _Excluded | None
) -> Iterator[IdenticalEntries | Difference]:
    """Yield how the indexes differ, once what is excluded is out of both."""
    if excluded is None:
        yield from compare(theirs, ours)
        return
    for difference in merge(read_entries(theirs), read_entries(ours) if ours else ()):
        path, left, right = difference
        if not excluded(path):
            yield IdenticalEntries.one(path) if left == right else difference


def _remarks(run: Run, remark: Remark, excluded: _Excluded) -> tuple[int, list[str]]:
    """Return of how many paths the provider index has a remark, and the first few of them."""
    number = 0
    paths: list[str] = []
    # A run that an older version fetched knows of no rotten ones.
    if read_header(run.state)["index"].get(remark):
        for path in read_remarks(run.index, remark):
            if not excluded.whole(path):
                number += 1
                if number <= _SHOWN:
                    paths.append(to_text(path))
    return number, paths


def _cut(mirror: Mirror, run: Run, plan: Plan, ours: Path | None, shards: int) -> None:
    """Write the items to their shards, each with the live path that it can be copied from, if any."""
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
    """Return which of the shards brings what has this md5, in hexadecimal digits."""
    return int(md5[:8], 16) % shards


def _sources(tree: Tree, ours: Path, wanted: set[bytes]) -> dict[bytes, bytes]:
    """Return by md5 a live file that the consumer index says to have it. Its bytes are still to be proven."""
    found: dict[bytes, bytes] = {}
    for path, md5 in entries_with_md5(ours, wanted):
        if md5 not in found and tree.has_file(path):
            found[md5] = path
    return found


def _digest(run: Run, shards: int) -> str:
    """Return what results of this plan know it by."""
    parts = [digest(run.forget), *(digest(run.pulls(n)) for n in range(shards))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
