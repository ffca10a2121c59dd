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

from airflow_mdbackup.cli import UsageError, printable
from airflow_mdbackup.cli.mirrors import mirror_of
from airflow_mdbackup.cli.moments import in_words, moment_of, stamp_of
from airflow_mdbackup.cli.past import quoted, tell_problems
from airflow_mdbackup.scheme.disk import amount
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.past import Content, Moment, Past
from airflow_mdbackup.scheme.progress import Pace
from airflow_mdbackup.scheme.restore import Came, Restored, Selection, restore

GOOD, WRONG = 0, 1


def run(args: argparse.Namespace) -> int:
    """Restore what ``args.words`` name, or everything, into ``args.to``.

    :returns: 0: all of it is there; 1: some of it is not, as the output tells, or history is damaged.
    :raises UsageError: there is no such backup, path, moment or target.
    """
    mirror, words = mirror_of(args)
    wanted = Selection(words)
    target = Path(args.to)
    counts: Counter[Came] = Counter()
    size = 0
    try:
        with Past(mirror, wanted) as past:
            wanted.settle(past)
            moment = _moment(past, args.as_of)
            print(f"As of {in_words(moment.stamp)}, by {printable(moment.run_id)}", file=sys.stderr)
            contents = _chosen(past, moment, wanted, args.include_gone)
            with _progress(past, moment, wanted, args) as advance:
                for restored in restore(
                    *(mirror, past, contents, target),
                    overwrite=args.overwrite,
                    dry_run=args.dry_run,
                    threads=args.jobs,
                ):
                    counts[restored.came] += 1
                    size += restored.size
                    advance(restored)
                    _tell(args, restored)
            status = tell_problems(past)
    except BackupError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(printable(f"mdbackup restore: stopped: {where}{error.strerror}"), file=sys.stderr)
        return WRONG
    if not counts:
        what = f"under {', '.join(map(repr, words))} " if words else ""
        raise UsageError(
            f"there was nothing {what}as of then; --include-gone also takes what had gone by then"
        )
    _sum_up(args, counts, size)
    return status if all(came.good for came in counts) else WRONG


def _moment(past: Past, as_of: str | None) -> Moment:
    """Return the last commit as of then.

    :raises UsageError: there was none yet.
    """
    now = datetime.now().astimezone()
    when = now if as_of is None else moment_of(as_of, now)
    if as_of is not None:
        print(f"{as_of!r} is {when:%Y-%m-%d %H:%M:%S %z}", file=sys.stderr)
    moment = past.moment_at(stamp_of(when))
    if moment is None:
        finished = [moment for moment in past.moments if moment.finished]
        first = f"the first one was at {in_words(finished[0].stamp)}" if finished else "there was none at all"
        raise UsageError(f"there was no backup yet at {when:%Y-%m-%d %H:%M:%S %z}: {first}")
    return moment


def _chosen(past: Past, moment: Moment, wanted: Selection, gone: bool) -> Iterator[Content]:
    return (content for content in past.state(moment, gone=gone) if wanted(content.path))


@contextmanager
def _progress(
    past: Past, moment: Moment, wanted: Selection, args: argparse.Namespace
) -> Iterator[Callable[[Restored], None]]:
    """Show on standard error how far it is: a bar for people, a line now and then for anybody else."""
    files = size = 0
    if not sys.stderr.isatty():
        pace = Pace()

        def tell(restored: Restored) -> None:
            nonlocal files, size
            files += 1
            size += restored.size
            if pace.due():
                print(f"{files:,} files, {amount(size)} so far", file=sys.stderr)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
    total = sum(1 for _ in _chosen(past, moment, wanted, args.include_gone))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda restored: progress.advance(task)


def _tell(args: argparse.Namespace, restored: Restored) -> None:
    """Print what became of a file: of each one in JSON and in a dry run, else of those that did not come."""
    content = restored.content
    if args.format == "json":
        facts = {"path": to_text(content.path), "came": restored.came, "bytes": restored.size}
        print(json.dumps({**facts, "md5": content.md5.decode(), "detail": restored.detail}))
    elif args.dry_run and restored.came.good:
        print(f"{restored.came:<8}  {quoted(content.path)}")
    elif not restored.came.good:
        print(f"{restored.came:<8}  {quoted(content.path)}: {restored.detail}")


def _sum_up(args: argparse.Namespace, counts: Counter[Came], size: int) -> None:
    told = ", ".join(f"{number:,} {came}" for came, number in counts.items())
    would = "Would restore: " if args.dry_run else ""
    print(f"{would}{told}; {amount(size)} into {printable(args.to)}", file=sys.stderr)
    if counts[Came.KEPT] and not args.overwrite:
        print("--overwrite replaces what is there", file=sys.stderr)
