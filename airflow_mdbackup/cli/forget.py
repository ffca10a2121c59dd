"""``mdbackup forget``: drop files from the index so that the next run fetches them again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from airflow_mdbackup.cli.common import quoted
from airflow_mdbackup.cli.mirrors import open_mirror, parse_selection
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import format_count
from airflow_mdbackup.scheme.history.consumer_index import present_index
from airflow_mdbackup.scheme.history.forget import forget
from airflow_mdbackup.scheme.index.canonical import has_path

DONE, NOTHING = 0, 1


def run(args: argparse.Namespace) -> int:
    """Remove the entries of ``args.words`` from the consumer index, and print their paths.

    :returns: 0; 1: one of them matches no entry.
    :raises UsageError: there is no such backup, no path was given, or the index cannot be changed.
    """
    mirror, words = open_mirror(args)
    if not words:
        raise UsageError("name a path or a pattern, such as '*.conf' or '*'")
    wanted = parse_selection(words)
    with TemporaryDirectory(prefix="mdbackup-") as folder:
        index = present_index(mirror, Path(folder) / "index.md5")
        wanted.resolve(lambda path: index is not None and has_path(index, path))
    gone = forget(mirror, wanted.take)
    for path in gone:
        print(json.dumps({"path": to_text(path)}) if args.format == "json" else quoted(path))
    print(
        f"{format_count(len(gone), 'entry', 'entries')} removed from the index; the files stay",
        file=sys.stderr,
    )
    for word in wanted.not_found:
        print(printable(f"Nothing in the index matches {word!r}"), file=sys.stderr)
    return NOTHING if wanted.not_found else DONE
