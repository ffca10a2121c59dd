"""``mdbackup rebuild``: rebuild lost history from what is on the disk."""

from __future__ import annotations

import argparse
import json
import sys

from airflow_mdbackup.cli.common import on_disk, quoted
from airflow_mdbackup.cli.mirrors import open_mirror
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.times import format_time
from airflow_mdbackup.scheme.common.units import format_count
from airflow_mdbackup.scheme.recovery.rebuild_history import rebuild

DONE = 0


def run(args: argparse.Namespace) -> int:
    """Rebuild the history of a backup where it is missing, and print the rebuilt changes.

    :returns: 0.
    :raises UsageError: there is no such backup, or it cannot be changed.
    """
    mirror, words = open_mirror(args)
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}: history is rebuilt as a whole")
    rebuilt = rebuild(mirror, dry_run=args.dry_run)
    for stamp, changes in rebuilt.changes.items():
        if args.format == "json":
            print(json.dumps({"stamp": stamp, "changes": changes}))
        else:
            changed = ", ".join(f"{number:,} {what}" for what, number in changes.items())
            print(f"{format_time(stamp)}  {changed}")
    for place in rebuilt.unclear:
        print(f"unclear which path this is a version of: {quoted(on_disk(mirror, place))}", file=sys.stderr)
    if not rebuilt.gaps and not rebuilt.unclear:
        print("Nothing is missing", file=sys.stderr)
    elif args.dry_run:
        print("Dry run: the above would be written; nothing was", file=sys.stderr)
    elif rebuilt.changes:
        print(f"History was rebuilt: {format_count(len(rebuilt.changes), 'commit')}", file=sys.stderr)
    return DONE
