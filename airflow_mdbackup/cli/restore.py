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
from tempfile import TemporaryDirectory

from airflow_mdbackup.cli import UsageError, printable
from airflow_mdbackup.cli.mirrors import mirror_of, selection_of
from airflow_mdbackup.cli.moments import in_words, moment_of, stamp_of
from airflow_mdbackup.cli.past import quoted, tell_problems, tell_stopped
from airflow_mdbackup.scheme.disk import amount
from airflow_mdbackup.scheme.index import has_path
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.past import Content, Moment, Past
from airflow_mdbackup.scheme.progress import Pace
from airflow_mdbackup.scheme.restore import Came, Restored, Selection, as_path, restore
from airflow_mdbackup.scheme.settle import present_index

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
    target = Path(args.to)
    counts: Counter[Came] = Counter()
    size = 0
    try:
        with Past(mirror, wanted) as past, TemporaryDirectory(prefix="mdbackup-") as folder:
            index = present_index(mirror, Path(folder) / "index.md5")
            wanted.settle(lambda path: past.knows(path) or (index is not None and has_path(index, path)))
            wrong = tell_problems(past)
            state = _state(args, past, index)
            contents = (content for content in state() if wanted.take(content.path))
            with _progress(state, wanted) as advance:
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
            known = [word for word in wanted.not_found if past.knows(as_path(word))]
    except OSError as error:
        tell_stopped("restore", error)
        return WRONG
    for word in wanted.not_found:
        why = "not then; --include-gone takes what had gone by then, too" if word in known else "never"
        print(printable(f"There was nothing under {word!r}: {why}"), file=sys.stderr)
    _sum_up(args, counts, size)
    if args.as_of is None:
        wrong = GOOD  # the index tells what is there now, and no history is needed for that
    return wrong if all(came.good for came in counts) and not wanted.not_found else WRONG


def _state(args: argparse.Namespace, past: Past, index: Path | None) -> Callable[[], Iterator[Content]]:
    """Return what gives the contents as of then, and say on standard error as of when that is.

    :param index: the consumer index as it is now; None if there is none.
    :raises UsageError: there was no backup yet.
    """
    if args.as_of is None and index is not None and not args.include_gone:
        last = f"; the last commit was at {in_words(past.moments[-1].stamp)}" if past.moments else ""
        print(f"As of now, by the index{last}", file=sys.stderr)
        return lambda: past.present(index)
    moment = _moment(past, args.as_of)
    print(f"As of {in_words(moment.stamp)}, by {printable(moment.run_id)}", file=sys.stderr)
    if moment.rebuilt:
        print("The history of then was lost, and told anew: there may be too much", file=sys.stderr)
    return lambda: past.state(moment, gone=args.include_gone)


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
        first = f"the first one was at {in_words(finished[0].stamp)}" if finished else "history knows of none"
        raise UsageError(f"there was no backup yet at {when:%Y-%m-%d %H:%M:%S %z}: {first}")
    return moment


@contextmanager
def _progress(
    state: Callable[[], Iterator[Content]], wanted: Selection
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
    total = sum(1 for content in state() if wanted(content.path))
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
        said = "would come" if restored.came == Came.RESTORED else restored.came
        print(f"{said:<10}  {quoted(content.path)}")
    elif not restored.came.good:
        print(f"{restored.came:<8}  {quoted(content.path)}: {restored.detail}")


def _sum_up(args: argparse.Namespace, counts: Counter[Came], size: int) -> None:
    words = {Came.RESTORED: "would come"} if args.dry_run else {}
    told = ", ".join(f"{number:,} {words.get(came, came)}" for came, number in counts.items()) or "nothing"
    print(f"{told}; {amount(size)} into {printable(args.to)}", file=sys.stderr)
    if counts[Came.KEPT] and not args.overwrite:
        print("--overwrite replaces what is there", file=sys.stderr)
