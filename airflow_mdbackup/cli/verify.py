"""``mdbackup verify``: read what lies in a backup again, and tell what is not as it should be."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

from airflow_mdbackup.cli.common import on_disk, quoted, tell_not_found, tell_problems, tell_stopped
from airflow_mdbackup.cli.mirrors import mirror_of, selection_of
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import parse_size
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.verify import Verification, VerifiedFile, VerifyOutcome, describe_repair
from airflow_mdbackup.scheme.store.mirror import Mirror

SOUND, DAMAGED = 0, 1

T = TypeVar("T")


def run(args: argparse.Namespace) -> int:
    """Verify what ``args.words`` name, or all, or the next part of all; repair it, if asked.

    :returns: 0: all that was read is sound; 1: there is damage, or was before the repair, or history is
        missing or damaged, so that what it told of could not be read.
    :raises UsageError: there is no such backup, or what was asked for does not go together.
    """
    mirror, words = mirror_of(args)
    if args.missing and not args.repair:
        raise UsageError("--missing is for --repair: write both")
    try:
        return _run(args, mirror, words)
    except OSError as error:
        tell_stopped("verify", error)
        return DAMAGED


def _run(args: argparse.Namespace, mirror: Mirror, words: list[str]) -> int:
    wanted = selection_of(words)
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
                acknowledge=args.let_go,
                report_progress=lambda text: print(text, file=sys.stderr),
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        for verified in walk:
            _tell(args, mirror, verified)
        tell_problems(past)
    tell_not_found(wanted)
    print(walk.summary(), file=sys.stderr)
    try:
        gone = walk.finish()
        let_go = walk.acknowledge_missing()
    except BackupError as error:
        print(printable(f"mdbackup verify: nothing was repaired, or let go: {error}"), file=sys.stderr)
        return DAMAGED
    for path in gone:
        fact = json.dumps({"path": to_text(path), "repair": "forgotten"})
        print(fact if args.format == "json" else f"{'forgotten':<10}  {quoted(path)}")
    for place in let_go:
        file = on_disk(mirror, place)
        fact = json.dumps({"file": to_text(file), "repair": "let go"})
        print(fact if args.format == "json" else f"{'let go':<10}  {quoted(file)}")
    if gone:
        print(describe_repair(mirror.provider, gone), file=sys.stderr)
    if let_go:
        print(f"{len(let_go):,} missing files are let go: nothing looks for them any more", file=sys.stderr)
    if walk.is_last:
        print("That was the last part; the next one begins anew", file=sys.stderr)
    return SOUND if walk.is_sound else DAMAGED


def _part(args: argparse.Namespace) -> int | Fraction | None:
    """Return the part that was asked for, in bytes or as a fraction; None for all.

    :raises UsageError: it is none.
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
        raise ValueError("it is no part of all: write 1/30, or 0.1")
    return fraction


def _tell(args: argparse.Namespace, mirror: Mirror, verified: VerifiedFile) -> None:
    """Print what is not as it should be; in JSON, everything."""
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
