"""``mdbackup prune``: delete old versions, by rules, when an operator needs their space."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby

from airflow_mdbackup.cli.common import on_disk, print_not_found, print_problems, quoted
from airflow_mdbackup.cli.mirrors import open_mirror, parse_selection
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.times import stamp_of
from airflow_mdbackup.scheme.common.units import format_count, format_size, parse_duration
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PrunableVersion, PruneOutcome, pruning
from airflow_mdbackup.scheme.recovery.verify import unknown_files
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import OLD

DONE, WRONG = 0, 1
_DAY = timedelta(days=1)
_WHY_LEFT = {
    PruneOutcome.CHANGED: "they are not what history says (see `mdbackup verify`)",
    PruneOutcome.LINKED: "they have another name (a hard link), so nothing would be freed",
    PruneOutcome.FAILED: "the disk refused",
}


def run(args: argparse.Namespace) -> int:
    """Show which versions of ``args.words``, or of all paths, no rule keeps; delete them if ``args.yes``.

    :returns: 0; 1: history is missing or damaged, a path was never in it, or the disk refused.
    :raises UsageError: there is no such backup, there are no rules, or the arguments contradict each other.
    """
    if args.yes and args.dry_run:
        raise UsageError("--yes and --dry-run contradict each other: use only one")
    mirror, words = open_mirror(args)
    rules = _rules(args)
    wanted = parse_selection(words)
    counts: Counter[PruneOutcome] = Counter()
    size = room = paths = others = 0
    with pruning(mirror, wanted, rules, carry_out=args.yes) as (past, versions):
        wrong = print_problems(past)
        for _, of_path in groupby(_with_progress(versions), key=lambda version: version.content.path):
            gone = _print_path(args, mirror, of_path, counts)
            size += sum(version.size for version in gone)
            room += sum(version.disk_size for version in gone)
            paths += bool(gone)
        if not words and not args.yes:
            others = sum(b"/" + OLD + b"/" in each.place for each in unknown_files(mirror, past))
    number = counts[PruneOutcome.PRUNED] + counts[PruneOutcome.GOES]
    what = "pruned" if args.yes else "would be pruned"
    removed = (
        f"{format_count(number, 'version')} of {format_count(paths, 'path')}" if number else "no versions"
    )
    print(
        f"{removed} {what}: {format_size(size)}, {format_size(room)} on the disk;"
        f" {counts[PruneOutcome.KEPT]:,} kept",
        file=sys.stderr,
    )
    for outcome, why in _WHY_LEFT.items():
        if counts[outcome]:
            print(f"{format_count(counts[outcome], 'version')} left: {why}", file=sys.stderr)
    if others:
        print(f"{format_count(others, 'file')} in .old left: history does not know them", file=sys.stderr)
    if number and not args.yes:
        print(
            "Nothing was changed. --yes deletes them for good: first verify what will stay", file=sys.stderr
        )
    return max(wrong, print_not_found(wanted), WRONG if counts[PruneOutcome.FAILED] else DONE)


def _rules(args: argparse.Namespace) -> KeepRules:
    """Return the rules that the arguments give.

    :raises UsageError: there are none, or a duration is invalid, or too short to be intended.
    """
    since = "" if args.keep_within is None else stamp_of(datetime.now(UTC) - _duration(args.keep_within))
    rules = KeepRules(args.keep_last or 0, args.keep_daily or 0, args.keep_monthly or 0, since)
    if rules == KeepRules():
        raise UsageError(
            "say what to keep: --keep-last N, --keep-within 1y, --keep-daily N or --keep-monthly N; a version"
            " stays if any of them keeps it"
        )
    return rules


def _duration(text: str) -> timedelta:
    try:
        duration = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--keep-within {text}: {error}") from error
    if duration < _DAY:
        raise UsageError(
            f"--keep-within {text} is less than a day (m are minutes): write 180d for half a year"
        )
    return duration


def _with_progress(versions: Iterator[PrunableVersion]) -> Iterator[PrunableVersion]:
    """Yield the versions, and print their number on standard error now and then."""
    timer = ReportTimer()
    for number, version in enumerate(versions, 1):
        if timer.due():
            print(f"{format_count(number, 'version')} so far", file=sys.stderr)
        yield version


def _print_path(
    args: argparse.Namespace,
    mirror: Mirror,
    versions: Iterator[PrunableVersion],
    counts: Counter[PruneOutcome],
) -> list[PrunableVersion]:
    """Print what happens to the versions of one path, count the outcomes, and return the pruned ones."""
    gone = []
    for version in versions:
        counts[version.outcome] += 1
        if version.outcome in (PruneOutcome.GOES, PruneOutcome.PRUNED):
            gone.append(version)
        if args.format == "json":
            _print_json(mirror, version)
        elif version.outcome in _WHY_LEFT:
            why = f": {version.detail}" if version.detail else ""
            print(f"{version.outcome:<13}  {quoted(on_disk(mirror, version.place))}{why}")
    if gone and args.format != "json":
        size = format_size(sum(version.size for version in gone))
        noun = "version " if len(gone) == 1 else "versions"
        print(f"{len(gone):>6,} {noun}  {size:>9}  {quoted(gone[0].content.path)}")
    return gone


def _print_json(mirror: Mirror, version: PrunableVersion) -> None:
    content = version.content
    facts = {
        "path": to_text(content.path),
        "file": to_text(on_disk(mirror, version.place)),
        "fate": version.outcome,
        "md5": content.md5.decode(),
        "bytes": version.size,
        "room": version.disk_size,
        "since": content.since or None,
        "until": content.until,
    }
    print(json.dumps(facts))
