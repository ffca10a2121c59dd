"""``mdbackup log``, ``history`` and ``versions``: what was backed up when, and where it lies now."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from airflow_mdbackup.cli import UsageError, printable
from airflow_mdbackup.cli.mirrors import mirror_of, selection_of
from airflow_mdbackup.scheme.history import FORGET, REPAIR, Change, What
from airflow_mdbackup.scheme.last_run import LastRun
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.moments import in_words
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.past import UNKNOWN, Content, Past
from airflow_mdbackup.scheme.records import Damaged, read_records
from airflow_mdbackup.scheme.restore import Selection, nothing_under
from airflow_mdbackup.scheme.tree import Tree

GOOD, WRONG = 0, 1
_LEFT = {
    "": "gone from the provider since {}",
    FORGET: "taken out of the index by `mdbackup forget` on {}",
    REPAIR: "taken out of the index by a repair (`verify`) on {}",
    UNKNOWN: "out of the index since {}; history was rebuilt, and does not say why",
}
"""Why an entry left the index."""
_SINCE = {
    None: ", for the next run to copy it again",
    False: "; the provider's index of {} no longer has it",
    True: "; the provider's index of {} has it, but that run did not copy it again",
}
"""What came of an entry that a person took out, by what :class:`.LastRun` says."""


def log(args: argparse.Namespace) -> int:
    """Print a line for each commit that changed anything, the oldest first.

    :returns: 0; 1: history is missing or damaged.
    :raises UsageError: there is no such backup.
    """
    mirror, words = mirror_of(args)
    if words:
        raise UsageError(f"{words[0]!r} is one word too many; `mdbackup history` tells of paths")
    with Past(mirror, lambda path: False) as past:
        for stamp, run_id, changes in _commits(past):
            _print_commit(args.format, stamp, run_id, changes)
        return tell_problems(past)


def _print_commit(form: str, stamp: str, run_id: str, changes: Iterator[Change]) -> None:
    counts: Counter[str] = Counter()
    size = freed = 0
    for change in changes:
        counts[change.what] += 1
        if change.what in (What.ADDED, What.REPLACED):
            size += change.size or 0
        elif change.what == What.PRUNED:
            freed += change.size or 0
    if form == "json":
        _print_json(stamp=stamp, run_id=run_id, bytes=size, freed=freed, changes=counts)
    else:
        told = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        told += f", {freed:,} bytes freed" if counts[What.PRUNED] else f", {size:,} bytes"
        print(printable(f"{in_words(stamp)}  {run_id}  {told}"))


def history(args: argparse.Namespace) -> int:
    """Print a line for each change of some paths, or of all, the oldest first.

    :returns: 0; 1: history is missing or damaged, or a path was never in it.
    :raises UsageError: there is no such backup.
    """
    mirror, words = mirror_of(args)
    wanted = selection_of(words)
    with Past(mirror, wanted) as past:
        wanted.settle(past.knows)
        for stamp, run_id, changes in _commits(past):
            for change in changes:
                if wanted.take(change.path):
                    _print_change(args.format, stamp, run_id, change)
        return max(tell_problems(past), tell_not_found(wanted))


def _commits(past: Past) -> Iterator[tuple[str, str, Iterator[Change]]]:
    """Yield stamp, run id and changes of each commit, as far as they can be read."""
    for moment in past.moments:
        if moment.finished:
            yield moment.time, moment.run_id, _readable(read_records(moment.file, Change))


def _readable(changes: Iterator[Change]) -> Iterator[Change]:
    try:
        yield from changes
    except Damaged:
        return


def _print_change(form: str, stamp: str, run_id: str, change: Change) -> None:
    if form == "json":
        _print_json(
            stamp=stamp,
            run_id=run_id,
            path=to_text(change.path),
            what=change.what,
            old_md5=_text(change.old_md5),
            md5=_text(change.md5),
            size=change.size,
            version=None if change.version is None else to_text(change.version),
        )
    else:
        arrow = "<-" if change.what == What.PRUNED else "->"
        where = f"  {arrow} {quoted(change.version)}" if change.version else ""
        print(f"{in_words(stamp)}  {change.what:<9}  {quoted(change.path)}{where}")


def versions(args: argparse.Namespace) -> int:
    """Print all that some paths ever held, and where it lies.

    :returns: 0; 1: history is missing or damaged, or a path was never in it.
    :raises UsageError: there is no such backup, or no path was named.
    """
    mirror, words = mirror_of(args)
    if not words:
        raise UsageError("name a path, or a pattern such as '*.conf'; '*' for all")
    wanted = selection_of(words)
    with Past(mirror, wanted) as past, _tree(mirror) as tree:
        wanted.settle(past.knows)
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
                    _print_json(**_facts(mirror, content, holder, same))
                else:
                    _print_content(mirror, content, holder, same, _why_left(content, last))
        return max(tell_problems(past), tell_not_found(wanted))


@contextmanager
def _tree(mirror: Mirror) -> Iterator[Tree | None]:
    """Hold the tree of the mirror; None if it is not there, as on a disk that was rescued in part."""
    try:
        tree = mirror.tree()
    except FileNotFoundError:
        yield None
        return
    with tree:
        yield tree


def _holder(tree: Tree | None, content: Content) -> bytes | None:
    """Return the place that has a content, of those where it should be, if anything is there."""
    return next((place for place in content.places if tree is not None and tree.lstat(place)), None)


def _same(content: Content, others: list[Content], holders: list[bytes | None]) -> bytes | None:
    """Return the place that has the same bytes as what another time brought, the live one if it has them."""
    alike = [
        (not other.until, holder)
        for other, holder in zip(others, holders, strict=True)
        if holder is not None and other.md5 == content.md5
    ]
    return max(alike)[1] if alike else None


def _facts(mirror: Mirror, content: Content, holder: bytes | None, same: bytes | None) -> dict[str, Any]:
    return {
        "path": to_text(content.path),
        "md5": _text(content.md5),
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


def _why_left(content: Content, last: LastRun) -> str:
    """Return why an entry left the index, and what became of it; an empty text if it did not."""
    if not content.left:
        return ""
    why = ", " + _LEFT[content.taken_out].format(in_words(content.left))
    if content.taken_out not in (FORGET, REPAIR):
        return why
    return why + _SINCE[last.lists(content)].format(in_words(last.fetched))


def _print_content(
    mirror: Mirror, content: Content, holder: bytes | None, same: bytes | None, left: str
) -> None:
    since = in_words(content.since) or "an unknown moment"
    until = f"until {in_words(content.until)}" if content.until else "live"
    size = "size unknown" if content.size is None else f"{content.size:,} bytes"
    print(f"  from {since} {until}{left}: {size}, md5 {_text(content.md5)}")
    if holder is not None:
        print(f"    {quoted(on_disk(mirror, holder))}")
        return
    if content.pruned:
        print(f"    pruned on {in_words(content.pruned)}")
    elif content.places:
        print(f"    missing: {quoted(on_disk(mirror, content.places[0]))} is not there")
    else:
        print("    lost: when it was to become a version, its file had other bytes, or was not there")
    if same is not None:
        live = "live" if same == content.path else "there as another version"
        print(f"    the same bytes are {live}: {quoted(on_disk(mirror, same))}")


def on_disk(mirror: Mirror, place: bytes) -> bytes:
    """Return where a place of the mirror is on this machine."""
    return os.fsencode(mirror.files) + place


def quoted(path: bytes) -> str:
    """Return a path as it can be given to a command again, in a shell."""
    return shlex.quote(to_text(path))


def tell_problems(past: Past) -> int:
    """Print what is wrong with the history itself, and return the exit status for it."""
    for problem in past.problems:
        print(printable(f"WARNING: {problem}"), file=sys.stderr)
    return WRONG if past.problems else GOOD


def tell_stopped(name: str, error: OSError) -> None:
    """Print why a command could not go on."""
    where = f"{error.filename}: " if error.filename else ""
    print(printable(f"mdbackup {name}: stopped: {where}{error.strerror}"), file=sys.stderr)


def tell_not_found(wanted: Selection) -> int:
    """Complain of words for which there was nothing, and return the exit status for it."""
    for word in wanted.not_found:
        print(printable(nothing_under(word)), file=sys.stderr)
    return WRONG if wanted.not_found else GOOD


def _text(md5: bytes | None) -> str | None:
    return None if md5 is None else md5.decode()


def _print_json(**facts: Any) -> None:
    print(json.dumps(facts))
