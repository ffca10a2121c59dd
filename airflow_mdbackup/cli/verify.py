"""``mdbackup verify``: read a backup again, and report what is not as it should be."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

from airflow_mdbackup.cli.common import on_disk, print_not_found, print_problems, print_stopped, quoted
from airflow_mdbackup.cli.mirrors import open_mirror, parse_selection
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import format_count, parse_size
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.verify import Verification, VerifiedFile, VerifyOutcome, describe_repair
from airflow_mdbackup.scheme.store.mirror import Mirror

SOUND, DAMAGED = 0, 1

T = TypeVar("T")


def run(args: argparse.Namespace) -> int:
    """Verify ``args.words``, or everything, or the next part; repair it if asked to.

    :returns: 0: everything that was read is sound; 1: there is damage, or was before the repair, or history
        is missing or damaged, so that not everything could be checked.
    :raises UsageError: there is no such backup, or the arguments contradict each other.
    """
    mirror, words = open_mirror(args)
    if args.missing and not args.repair:
        raise UsageError("--missing only works with --repair: write both")
    try:
        return _run(args, mirror, words)
    except OSError as error:
        print_stopped("verify", error)
        return DAMAGED


def _run(args: argparse.Namespace, mirror: Mirror, words: list[str]) -> int:
    wanted = parse_selection(words)
    with Timeline(mirror, wanted) as past:
        wanted.resolve(past.knows)
        try:
            walk = Verification(
                *(mirror, past, wanted),
                part=_part(args),
                limit=_parsed("--limit", args.limit, parse_size),
                threads=args.jobs,
                repair=args.repair,
                missing=args.missing,
                acknowledge=args.acknowledge_missing,
                report_progress=lambda text: print(text, file=sys.stderr),
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        for verified in walk:
            _print_file(args, mirror, verified)
        print_problems(past)
    print_not_found(wanted)
    print(walk.summary(), file=sys.stderr)
    try:
        forgotten = walk.finish()
        acknowledged = walk.acknowledge_missing()
    except BackupError as error:
        print(printable(f"mdbackup verify: nothing was repaired or acknowledged: {error}"), file=sys.stderr)
        return DAMAGED
    _print_repair(args, mirror, forgotten, acknowledged)
    if walk.is_last:
        print("That was the last part; the next run starts over", file=sys.stderr)
    return SOUND if walk.is_sound else DAMAGED


def _print_repair(
    args: argparse.Namespace, mirror: Mirror, forgotten: list[bytes], acknowledged: list[bytes]
) -> None:
    """Print what was forgotten, so that the next run fetches it again, and what was acknowledged."""
    for path in forgotten:
        fact = json.dumps({"path": to_text(path), "repair": "forgotten"})
        print(fact if args.format == "json" else f"{'forgotten':<10}  {quoted(path)}")
    for place in acknowledged:
        file = on_disk(mirror, place)
        fact = json.dumps({"file": to_text(file), "repair": "let go"})
        print(fact if args.format == "json" else f"acknowledged  {quoted(file)}")
    if forgotten:
        print(describe_repair(mirror.provider, forgotten), file=sys.stderr)
    if acknowledged:
        missing = format_count(len(acknowledged), "missing file")
        print(f"{missing} acknowledged: no longer reported", file=sys.stderr)


def _part(args: argparse.Namespace) -> int | Fraction | None:
    """Return the part that was asked for, in bytes or as a fraction; None for everything.

    :raises UsageError: it is invalid.
    """
    if args.bytes is not None:
        return _parsed("--bytes", args.bytes, parse_size)
    return _parsed("--fraction", args.fraction, _fraction)


def _parsed(name: str, text: str | None, parse: Callable[[str], T]) -> T | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(f"{name} {text}: {error}") from error


def _fraction(text: str) -> Fraction:
    try:
        fraction = Fraction(text)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        raise ValueError("it must be more than 0 and at most 1: write 1/30, or 0.1")
    return fraction


def _print_file(args: argparse.Namespace, mirror: Mirror, verified: VerifiedFile) -> None:
    """Print a file that is not as it should be; in JSON, every file."""
    if args.format == "json":
        content = verified.content
        facts: dict[str, Any] = {"file": to_text(on_disk(mirror, verified.place)), "found": verified.outcome}
        if content is not None:
            known = {
                "path": to_text(content.path),
                "md5": content.md5.decode(),
                "since": content.since or None,
            }
            facts |= known | {"until": content.until or None}
        print(json.dumps(facts))
    elif verified.outcome != VerifyOutcome.SOUND:
        print(f"{verified.outcome:<10}  {quoted(on_disk(mirror, verified.place))}")
