"""``mdbackup prune``: take old versions away, by rules, because a person wants their room."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby

from airflow_mdbackup.cli.common import on_disk, quoted, tell_not_found, tell_problems
from airflow_mdbackup.cli.mirrors import mirror_of, selection_of
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.times import stamp_of
from airflow_mdbackup.scheme.common.units import format_size, parse_duration
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PrunableVersion, PruneOutcome, pruning
from airflow_mdbackup.scheme.recovery.verify import unknown_files
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import OLD

DONE, WRONG = 0, 1
_DAY = timedelta(days=1)
_LEFT = {
    PruneOutcome.CHANGED: "left, for they are not what history says (see `mdbackup verify`)",
    PruneOutcome.LINKED: "left, for they have another name (a hard link), so that nothing would be freed",
    PruneOutcome.FAILED: "left, for the disk refused",
}


def run(args: argparse.Namespace) -> int:
    """Show which versions of ``args.words``, or of all, no rule keeps; with ``args.yes`` take them away.

    :returns: 0; 1: history is missing or damaged, a path was never in it, or the disk refused.
    :raises UsageError: there is no such backup, or no rule.
    """
    mirror, words = mirror_of(args)
    rules = _rules(args)
    wanted = selection_of(words)
    fates: Counter[PruneOutcome] = Counter()
    size = room = paths = others = 0
    with pruning(mirror, wanted, rules, carry_out=args.yes) as (past, versions):
        wrong = tell_problems(past)
        for _, of_path in groupby(_with_progress(versions), key=lambda version: version.content.path):
            gone = _tell(args, mirror, of_path, fates)
            size += sum(version.size for version in gone)
            room += sum(version.disk_size for version in gone)
            paths += bool(gone)
        if not words and not args.yes:
            others = sum(b"/" + OLD + b"/" in each.place for each in unknown_files(mirror, past))
    number = fates[PruneOutcome.PRUNED] + fates[PruneOutcome.GOES]
    what = "pruned" if args.yes else "would go"
    print(
        f"{number:,} versions of {paths:,} paths {what}: {format_size(size)}, {format_size(room)} on the"
        f" disk; {fates[PruneOutcome.KEPT]:,} are kept",
        file=sys.stderr,
    )
    for fate, why in _LEFT.items():
        if fates[fate]:
            print(f"{fates[fate]:,} are {why}", file=sys.stderr)
    if others:
        print(f"{others:,} files in .old are left, for no history tells of them", file=sys.stderr)
    if number and not args.yes:
        print(
            "Nothing was changed. --yes takes them away, for good; verify what stays first", file=sys.stderr
        )
    return max(wrong, tell_not_found(wanted), WRONG if fates[PruneOutcome.FAILED] else DONE)


def _rules(args: argparse.Namespace) -> KeepRules:
    """Return the rules that are asked for.

    :raises UsageError: there is none, or a duration is none, or too short to be meant.
    """
    since = "" if args.keep_within is None else stamp_of(datetime.now(UTC) - _duration(args.keep_within))
    rules = KeepRules(args.keep_last or 0, args.keep_daily or 0, args.keep_monthly or 0, since)
    if rules == KeepRules():
        raise UsageError(
            "say what is to be kept: --keep-last N, --keep-within 1y, --keep-daily N or --keep-monthly N;"
            " what any of them keeps stays"
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
    """Yield the versions, with a word on standard error now and then."""
    pace = ReportTimer()
    for number, version in enumerate(versions, 1):
        if pace.due():
            print(f"{number:,} versions so far", file=sys.stderr)
        yield version


def _tell(
    args: argparse.Namespace,
    mirror: Mirror,
    versions: Iterator[PrunableVersion],
    fates: Counter[PruneOutcome],
) -> list[PrunableVersion]:
    """Print what becomes of the versions of one path, count their fates, and return those that go."""
    gone = []
    for version in versions:
        fates[version.outcome] += 1
        if version.outcome in (PruneOutcome.GOES, PruneOutcome.PRUNED):
            gone.append(version)
        if args.format == "json":
            _print_json(mirror, version)
        elif version.outcome in _LEFT:
            why = f": {version.detail}" if version.detail else ""
            print(f"{version.outcome:<13}  {quoted(on_disk(mirror, version.place))}{why}")
    if gone and args.format != "json":
        size = format_size(sum(version.size for version in gone))
        print(f"{len(gone):>6,} versions  {size:>9}  {quoted(gone[0].content.path)}")
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
