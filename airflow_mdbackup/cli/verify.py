"""``mdbackup verify``: read what lies in a backup again, and tell what is not as it should be."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from typing import Any

from airflow_mdbackup.cli import UsageError
from airflow_mdbackup.cli.mirrors import mirror_of, selection_of
from airflow_mdbackup.cli.past import on_disk, quoted, tell_not_found, tell_problems, tell_stopped
from airflow_mdbackup.scheme.disk import amount
from airflow_mdbackup.scheme.limit import Limiter
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.past import Content, Past
from airflow_mdbackup.scheme.progress import Pace
from airflow_mdbackup.scheme.restore import Selection
from airflow_mdbackup.scheme.verify import Found, Part, Verified, unknown, verify

SOUND, DAMAGED = 0, 1


def run(args: argparse.Namespace) -> int:
    """Verify what ``args.words`` name, or all, or the next part of all.

    :returns: 0: all that was read is sound; 1: there is damage. History that is missing is only told of: it
        does not come back.
    :raises UsageError: there is no such backup, or what was asked for does not go together.
    """
    mirror, words = mirror_of(args)
    in_parts = args.bytes is not None or args.fraction is not None
    if words and in_parts:
        raise UsageError("parts are of the whole backup: leave the paths out, or --bytes and --fraction")
    try:
        return _run(args, mirror, words, in_parts)
    except OSError as error:
        tell_stopped("verify", error)
        return DAMAGED


def _run(args: argparse.Namespace, mirror: Mirror, words: list[str], in_parts: bool) -> int:
    wanted = selection_of(words)
    with Past(mirror, wanted) as past:
        wanted.settle(past.knows)
        part = Part(mirror, past, _size(args, past)) if in_parts else None
        counts: Counter[Found] = Counter()
        read = 0
        found = _verified(args, mirror, past, part or past.noting(past.contents()), wanted)
        for verified in chain(found, () if words or in_parts else unknown(mirror, past)):
            counts[verified.found] += 1
            read += verified.size
            _tell(args, mirror, verified)
        tell_problems(past)
    if tell_not_found(wanted):
        counts[Found.MISSING] += len(wanted.not_found)
    told = ", ".join(f"{number:,} {found}" for found, number in counts.items()) or "nothing to verify"
    print(f"{told}; {amount(read)} read", file=sys.stderr)
    if part is not None:
        part.keep()
        if part.is_last:
            print("That was the last part; the next one begins anew", file=sys.stderr)
    return SOUND if all(found.good for found in counts) else DAMAGED


def _verified(
    args: argparse.Namespace,
    mirror: Mirror,
    past: Past,
    contents: Iterable[Content],
    wanted: Selection,
) -> Iterator[Verified]:
    """Yield what is found, with a word on standard error now and then."""
    limit = _rate(args.limit)
    limiter = Limiter(mirror.verifying, lambda: limit)
    chosen = (content for content in contents if wanted.take(content.path))
    pace = Pace()
    read = 0
    for files, verified in enumerate(verify(mirror, past, chosen, threads=args.jobs, wait=limiter), 1):
        read += verified.size
        if pace.due():
            print(f"{files:,} files, {amount(read)} read so far", file=sys.stderr)
        yield verified


def _size(args: argparse.Namespace, past: Past) -> int:
    """Return how many bytes a part has.

    :raises UsageError: that is no size, or no fraction.
    """
    if args.bytes is not None:
        return _bytes("--bytes", args.bytes)
    try:
        fraction = Fraction(args.fraction)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        raise UsageError(f"--fraction {args.fraction} is no part of all: write 1/30, or 0.1")
    return max(1, int(fraction * sum(content.size or 0 for content in past.contents())))


def _rate(text: str | None) -> int | None:
    return None if text is None else _bytes("--limit", text)


def _bytes(name: str, text: str) -> int:
    from airflow_mdbackup.config.values import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{name} {text}: {error}") from error


def _tell(args: argparse.Namespace, mirror: Mirror, verified: Verified) -> None:
    """Print what is not as it should be; in JSON, everything."""
    if args.format == "json":
        content = verified.content
        facts: dict[str, Any] = {"file": to_text(on_disk(mirror, verified.place)), "found": verified.found}
        if content is not None:
            known = {
                "path": to_text(content.path),
                "md5": content.md5.decode(),
                "since": content.since or None,
            }
            facts |= known | {"until": content.until or None}
        print(json.dumps(facts))
    elif verified.found != Found.SOUND:
        print(f"{verified.found:<10}  {quoted(on_disk(mirror, verified.place))}")
