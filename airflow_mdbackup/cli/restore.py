"""``mdbackup restore``: restore files as of any time, from the disk of the backup alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path

from airflow_mdbackup.cli.common import print_problems, print_stopped, quoted
from airflow_mdbackup.cli.mirrors import open_mirror, parse_selection
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.times import NoSuchTime, RequestedTime, requested_time
from airflow_mdbackup.scheme.common.units import format_count, format_size
from airflow_mdbackup.scheme.recovery.restore import Restored, RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.restore_target import find_other_writer
from airflow_mdbackup.scheme.recovery.state import MirrorState, state_of
from airflow_mdbackup.scheme.store.mirror import Mirror

GOOD, WRONG = 0, 1


def run(args: argparse.Namespace) -> int:
    """Restore ``args.words``, or everything, into ``args.to``.

    :returns: 0: everything is there; 1: something is not, as the output says, or a past state was requested,
        and history is damaged.
    :raises UsageError: there is no such backup, path or time.
    :raises BackupError: nothing can be restored to that target, or with that history.
    """
    mirror, words = open_mirror(args)
    if not args.to:
        raise UsageError("--to is empty: name a directory")
    wanted = parse_selection(words)
    totals = _Totals()
    try:
        when = _when(args.as_of)
        with state_of(mirror, wanted, when, include_deleted=args.include_gone) as state:
            wrong = print_problems(state.timeline)
            print(printable(state.description), file=sys.stderr)
            if owner := find_other_writer(Path(args.to)):
                print(printable(f"WARNING: {owner}"), file=sys.stderr)
            with _progress(state) as advance:
                for restored in _restore(args, mirror, state):
                    totals.add(restored)
                    advance(restored)
                    _print_file(args, restored)
            not_found, taken_out = (
                state.describe_not_found("--include-gone"),
                state.describe_removed("--include-gone"),
            )
    except NoSuchTime as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        print_stopped("restore", error)
        return WRONG
    for why in not_found:
        print(printable(why), file=sys.stderr)
    _print_summary(args, totals)
    for why in taken_out:
        print(why, file=sys.stderr)
    if not state.needs_history:
        wrong = GOOD
    return wrong if all(came.good for came in totals.counts) and not not_found else WRONG


@dataclass(slots=True)
class _Totals:
    """How many files had which outcome; ``size`` is in bytes."""

    counts: Counter[RestoreOutcome] = field(default_factory=Counter)
    size: int = 0
    replaced: int = 0
    differing: int = 0

    def add(self, restored: Restored) -> None:
        self.counts[restored.outcome] += 1
        self.size += restored.size
        self.replaced += restored.replaced
        self.differing += restored.overwritable


def _restore(args: argparse.Namespace, mirror: Mirror, state: MirrorState) -> Iterator[Restored]:
    """Restore what was requested; if that is nothing, do not create the target directory."""
    contents = iter(state.contents())
    first = next(contents, None)
    if first is None:
        return
    yield from restore(
        *(mirror, state.timeline, chain([first], contents), Path(args.to)),
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        threads=args.jobs,
    )


def _when(as_of: str | None) -> RequestedTime | None:
    """Return the requested time, and print which one that is; None for now."""
    if as_of is None:
        return None
    requested = requested_time(as_of, datetime.now().astimezone())
    if requested.understood_as is not None:
        print(requested.understood_as, file=sys.stderr)
    return requested


@contextmanager
def _progress(state: MirrorState) -> Iterator[Callable[[Restored], None]]:
    """Show progress on standard error: a bar on a terminal, else an occasional line."""
    files = size = 0
    if not sys.stderr.isatty():
        timer = ReportTimer()

        def advance(restored: Restored) -> None:
            nonlocal files, size
            files += 1
            size += restored.size
            if timer.due():
                print(f"{format_count(files, 'file')}, {format_size(size)} so far", file=sys.stderr)

        yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
    total = sum(1 for _ in state.contents())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda restored: progress.advance(task)


def _print_file(args: argparse.Namespace, restored: Restored) -> None:
    """Print what happened to a file: to each one in JSON and in a dry run, else to those not restored."""
    content = restored.content
    if args.format == "json":
        facts = {"path": to_text(content.path), "came": restored.outcome, "bytes": restored.size}
        facts |= {"md5": content.md5.decode(), "replaced": restored.replaced, "detail": restored.detail}
        print(json.dumps(facts))
    elif args.dry_run and restored.outcome.good:
        would = "would replace a different file" if restored.replaced else "would be restored"
        what = would if restored.outcome == RestoreOutcome.RESTORED else restored.outcome
        print(f"{what:<17}  {quoted(content.path)}")
    elif not restored.outcome.good:
        print(f"{restored.outcome:<8}  {quoted(content.path)}: {restored.detail}")


def _print_summary(args: argparse.Namespace, totals: _Totals) -> None:
    labels = {RestoreOutcome.RESTORED: "would be restored"} if args.dry_run else {}
    counts = ", ".join(f"{number:,} {labels.get(came, came)}" for came, number in totals.counts.items())
    into = f"{format_size(totals.size)} into {printable(args.to)}"
    print(f"{counts}; {into}" if counts else "nothing restored", file=sys.stderr)
    if totals.replaced:
        verb = "would replace" if args.dry_run else "replaced"
        files = "a different file" if totals.replaced == 1 else "different files"
        print(f"{totals.replaced:,} {verb} {files}", file=sys.stderr)
    if totals.differing:
        print("--overwrite replaces different files", file=sys.stderr)
