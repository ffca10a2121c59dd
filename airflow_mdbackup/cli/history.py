"""``mdbackup log``, ``history`` and ``versions``: what was backed up when, and where it is now."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from airflow_mdbackup.cli.common import (
    md5_text,
    on_disk,
    print_json,
    print_not_found,
    print_problems,
    quoted,
)
from airflow_mdbackup.cli.mirrors import open_mirror, parse_selection
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.times import format_time
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_records
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import FORGET, REPAIR, Change, ChangeKind
from airflow_mdbackup.scheme.history.replay import UNKNOWN, FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.last_run import LastRun
from airflow_mdbackup.scheme.store.mirror import Mirror

_WHY_REMOVED = {
    "": "gone from the provider since {}",
    FORGET: "removed from the index by `mdbackup forget` on {}",
    REPAIR: "removed from the index by a repair (`verify`) on {}",
    UNKNOWN: "not in the index since {}; history was rebuilt, and does not say why",
}
"""Why an entry left the index."""
_SINCE_REMOVAL = {
    None: ", so that the next run fetches it again",
    False: "; the provider's index of {} no longer has it",
    True: "; the provider's index of {} has it, but that run did not fetch it again",
}
"""What happened to an entry that an operator removed, by the result of :meth:`.LastRun.lists`."""


def log(args: argparse.Namespace) -> int:
    """Print a line for each commit that changed anything, oldest first.

    :returns: 0; 1: history is missing or damaged.
    :raises UsageError: there is no such backup.
    """
    mirror, words = open_mirror(args)
    if words:
        raise UsageError(
            f"unexpected argument {words[0]!r}: for the changes of paths, use `mdbackup history`"
        )
    with Timeline(mirror, lambda path: False) as past:
        for stamp, run_id, changes in _commits(past):
            _print_commit(args.format, stamp, run_id, changes)
        return print_problems(past)


def _print_commit(form: str, stamp: str, run_id: str, changes: Iterator[Change]) -> None:
    counts: Counter[str] = Counter()
    size = freed = 0
    for change in changes:
        counts[change.what] += 1
        if change.what in (ChangeKind.ADDED, ChangeKind.REPLACED):
            size += change.size or 0
        elif change.what == ChangeKind.PRUNED:
            freed += change.size or 0
    if form == "json":
        print_json(stamp=stamp, run_id=run_id, bytes=size, freed=freed, changes=counts)
    else:
        changed = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        changed += f", {freed:,} bytes freed" if counts[ChangeKind.PRUNED] else f", {size:,} bytes"
        print(printable(f"{format_time(stamp)}  {run_id}  {changed}"))


def history(args: argparse.Namespace) -> int:
    """Print a line for each change of some paths, or of all, oldest first.

    :returns: 0; 1: history is missing or damaged, or a path was never in it.
    :raises UsageError: there is no such backup.
    """
    mirror, words = open_mirror(args)
    wanted = parse_selection(words)
    with Timeline(mirror, wanted) as past:
        wanted.resolve(past.knows)
        for stamp, run_id, changes in _commits(past):
            for change in changes:
                if wanted.take(change.path):
                    _print_change(args.format, stamp, run_id, change)
        return max(print_problems(past), print_not_found(wanted))


def _commits(past: Timeline) -> Iterator[tuple[str, str, Iterator[Change]]]:
    """Yield the time, run id and readable changes of each commit."""
    for moment in past.moments:
        if moment.finished:
            yield moment.time, moment.run_id, _readable(read_records(moment.file, Change))


def _readable(changes: Iterator[Change]) -> Iterator[Change]:
    try:
        yield from changes
    except CorruptFile:
        return


def _print_change(form: str, stamp: str, run_id: str, change: Change) -> None:
    if form == "json":
        print_json(
            stamp=stamp,
            run_id=run_id,
            path=to_text(change.path),
            what=change.what,
            old_md5=md5_text(change.old_md5),
            md5=md5_text(change.md5),
            size=change.size,
            version=None if change.version is None else to_text(change.version),
        )
    else:
        arrow = "<-" if change.what == ChangeKind.PRUNED else "->"
        where = f"  {arrow} {quoted(change.version)}" if change.version else ""
        print(f"{format_time(stamp)}  {change.what:<9}  {quoted(change.path)}{where}")


def versions(args: argparse.Namespace) -> int:
    """Print every version of some paths, and where it is.

    :returns: 0; 1: history is missing or damaged, or a path was never in it.
    :raises UsageError: there is no such backup, or no path was given.
    """
    mirror, words = open_mirror(args)
    if not words:
        raise UsageError("name a path or a pattern, such as '*.conf' or '*'")
    wanted = parse_selection(words)
    with Timeline(mirror, wanted) as past, _tree(mirror) as tree:
        wanted.resolve(past.knows)
        last = LastRun(mirror)
        for path, contents in groupby(past.contents(), key=lambda content: content.path):
            if not wanted.take(path):
                continue
            if args.format != "json":
                print(quoted(path))
            known = list(contents)
            holders = [_holder(tree, content) for content in known]
            for content, holder in zip(known, holders, strict=True):
                same = holder or _same(content, known, holders)
                if args.format == "json":
                    print_json(**_facts(mirror, content, holder, same))
                else:
                    _print_content(mirror, content, holder, same, _describe_removal(content, last))
        return max(print_problems(past), print_not_found(wanted))


@contextmanager
def _tree(mirror: Mirror) -> Iterator[Tree | None]:
    """Open the tree of the mirror; None if it is missing, as on a partly rescued disk."""
    try:
        tree = mirror.tree()
    except FileNotFoundError:
        yield None
        return
    with tree:
        yield tree


def _holder(tree: Tree | None, content: FileVersion) -> bytes | None:
    """Return the place that has a version, out of those where it should be; None if nothing is there."""
    return next((place for place in content.places if tree is not None and tree.lstat(place)), None)


def _same(content: FileVersion, others: list[FileVersion], holders: list[bytes | None]) -> bytes | None:
    """Return the place of another version with the same content, if possible the live file."""
    alike = [
        (not other.until, holder)
        for other, holder in zip(others, holders, strict=True)
        if holder is not None and other.md5 == content.md5
    ]
    return max(alike)[1] if alike else None


def _facts(mirror: Mirror, content: FileVersion, holder: bytes | None, same: bytes | None) -> dict[str, Any]:
    return {
        "path": to_text(content.path),
        "md5": md5_text(content.md5),
        "size": content.size,
        "mtime": content.mtime,
        "since": content.since or None,
        "left": content.left or None,
        "taken_out": content.taken_out or None,
        "until": content.until or None,
        "pruned": content.pruned or None,
        "file": None if holder is None else to_text(on_disk(mirror, holder)),
        "same": None if same is None else to_text(on_disk(mirror, same)),
    }


def _describe_removal(content: FileVersion, last: LastRun) -> str:
    """Return why an entry left the index, and what happened then; an empty text if it did not leave."""
    if not content.left:
        return ""
    why = ", " + _WHY_REMOVED[content.taken_out].format(format_time(content.left))
    if content.taken_out not in (FORGET, REPAIR):
        return why
    return why + _SINCE_REMOVAL[last.lists(content)].format(format_time(last.fetched))


def _print_content(
    mirror: Mirror, content: FileVersion, holder: bytes | None, same: bytes | None, left: str
) -> None:
    since = format_time(content.since) or "an unknown time"
    until = f"until {format_time(content.until)}" if content.until else "live"
    size = "size unknown" if content.size is None else f"{content.size:,} bytes"
    print(f"  from {since} {until}{left}: {size}, md5 {md5_text(content.md5)}")
    if holder is not None:
        print(f"    {quoted(on_disk(mirror, holder))}")
        return
    if content.pruned:
        print(f"    pruned on {format_time(content.pruned)}")
    elif content.places:
        print(f"    missing: {quoted(on_disk(mirror, content.places[0]))} does not exist")
    else:
        print("    lost: its file had other content, or was not there, when it should have become a version")
    if same is not None:
        where = "in the live file" if same == content.path else "in another version"
        print(f"    the same content is {where}: {quoted(on_disk(mirror, same))}")
