"""``mdbackup restore``: files come back, as of any moment, from the disk of the backup alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from airflow_mdbackup.cli.common import quoted, tell_problems, tell_stopped
from airflow_mdbackup.cli.mirrors import mirror_of, selection_of
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.times import NoSuchTime, RequestedTime, requested_time
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.recovery.restore import Restored, RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.restore_target import find_other_writer
from airflow_mdbackup.scheme.recovery.state import MirrorState, state_of

GOOD, WRONG = 0, 1


def run(args: argparse.Namespace) -> int:
    """Restore what ``args.words`` name, or everything, into ``args.to``.

    :returns: 0: all of it is there; 1: some of it is not, as the output tells, or a state of the past was
        asked for, and history is damaged.
    :raises UsageError: there is no such backup, path or moment.
    :raises BackupError: nothing can be restored to that target, or by that history.
    """
    mirror, words = mirror_of(args)
    if not args.to:
        raise UsageError("--to is empty: name a directory")
    wanted = selection_of(words)
    counts: Counter[RestoreOutcome] = Counter()
    size = replaced = differing = 0
    try:
        when = _when(args.as_of)
        with state_of(mirror, wanted, when, include_deleted=args.include_gone) as state:
            wrong = tell_problems(state.timeline)
            print(printable(state.description), file=sys.stderr)
            if owner := find_other_writer(Path(args.to)):
                print(printable(f"WARNING: {owner}"), file=sys.stderr)
            with _progress(state) as advance:
                for restored in restore(
                    *(mirror, state.timeline, state.contents(), Path(args.to)),
                    overwrite=args.overwrite,
                    dry_run=args.dry_run,
                    threads=args.jobs,
                ):
                    counts[restored.outcome] += 1
                    size += restored.size
                    replaced += restored.replaced
                    differing += restored.overwritable
                    advance(restored)
                    _tell(args, restored)
            not_found, taken_out = (
                state.describe_not_found("--include-gone"),
                state.describe_removed("--include-gone"),
            )
    except NoSuchTime as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        tell_stopped("restore", error)
        return WRONG
    for why in not_found:
        print(printable(why), file=sys.stderr)
    _sum_up(args, counts, size, replaced)
    if differing:
        print("--overwrite replaces files with other bytes", file=sys.stderr)
    for why in taken_out:
        print(why, file=sys.stderr)
    if not state.needs_history:
        wrong = GOOD
    return wrong if all(came.good for came in counts) and not not_found else WRONG


def _when(as_of: str | None) -> RequestedTime | None:
    """Return the moment that somebody means, and tell which one that is; None for now."""
    if as_of is None:
        return None
    asked = requested_time(as_of, datetime.now().astimezone())
    if asked.understood_as:
        print(asked.understood_as, file=sys.stderr)
    return asked


@contextmanager
def _progress(state: MirrorState) -> Iterator[Callable[[Restored], None]]:
    """Show on standard error how far it is: a bar for people, a line now and then for anybody else."""
    files = size = 0
    if not sys.stderr.isatty():
        pace = ReportTimer()

        def tell(restored: Restored) -> None:
            nonlocal files, size
            files += 1
            size += restored.size
            if pace.due():
                print(f"{files:,} files, {format_size(size)} so far", file=sys.stderr)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
    total = sum(1 for _ in state.contents())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda restored: progress.advance(task)


def _tell(args: argparse.Namespace, restored: Restored) -> None:
    """Print what became of a file: of each one in JSON and in a dry run, else of those that did not come."""
    content = restored.content
    if args.format == "json":
        facts = {"path": to_text(content.path), "came": restored.outcome, "bytes": restored.size}
        facts |= {"md5": content.md5.decode(), "replaced": restored.replaced, "detail": restored.detail}
        print(json.dumps(facts))
    elif args.dry_run and restored.outcome.good:
        would = "would replace what is there" if restored.replaced else "would come"
        what = would if restored.outcome == RestoreOutcome.RESTORED else restored.outcome
        print(f"{what:<10}  {quoted(content.path)}")
    elif not restored.outcome.good:
        print(f"{restored.outcome:<8}  {quoted(content.path)}: {restored.detail}")


def _sum_up(args: argparse.Namespace, counts: Counter[RestoreOutcome], size: int, replaced: int) -> None:
    words = {RestoreOutcome.RESTORED: "would come"} if args.dry_run else {}
    told = ", ".join(f"{number:,} {words.get(came, came)}" for came, number in counts.items()) or "nothing"
    print(f"{told}; {format_size(size)} into {printable(args.to)}", file=sys.stderr)
    if replaced:
        would = "would replace" if args.dry_run else "replaced"
        print(f"{replaced:,} of them {would} a file that differs", file=sys.stderr)
