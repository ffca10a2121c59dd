"""``mdbackup rebuild``: tell lost history anew, by what is left on the disk."""

from __future__ import annotations

import argparse
import json
import sys

from airflow_mdbackup.cli.common import on_disk, quoted
from airflow_mdbackup.cli.mirrors import mirror_of
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.times import format_time
from airflow_mdbackup.scheme.recovery.rebuild_history import rebuild

DONE = 0


def run(args: argparse.Namespace) -> int:
    """Rebuild the history of a backup where it is missing, and print what it tells now.

    :returns: 0.
    :raises UsageError: there is no such backup, or it cannot be changed.
    """
    mirror, words = mirror_of(args)
    if words:
        raise UsageError(f"{words[0]!r} is one word too many: history is rebuilt as a whole")
    rebuilt = rebuild(mirror, dry_run=args.dry_run)
    for stamp, changes in rebuilt.changes.items():
        if args.format == "json":
            print(json.dumps({"stamp": stamp, "changes": changes}))
        else:
            told = ", ".join(f"{number:,} {what}" for what, number in changes.items())
            print(f"{format_time(stamp)}  {told}")
    for place in rebuilt.unclear:
        print(f"not clear whose it is: {quoted(on_disk(mirror, place))}", file=sys.stderr)
    if not rebuilt.gaps and not rebuilt.unclear:
        print("Nothing is missing", file=sys.stderr)
    elif args.dry_run:
        print("Nothing was written: that would be told", file=sys.stderr)
    elif rebuilt.changes:
        print(f"History was rebuilt, as of {len(rebuilt.changes):,} moments", file=sys.stderr)
    return DONE
