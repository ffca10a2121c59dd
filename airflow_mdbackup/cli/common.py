"""What several commands print: paths, problems with history, paths that were not found."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

from airflow_mdbackup.cli.output import printable
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import describe_never_backed_up
from airflow_mdbackup.scheme.store.mirror import Mirror

GOOD, WRONG = 0, 1


def on_disk(mirror: Mirror, place: bytes) -> bytes:
    """Return the path on this machine of a place in the mirror."""
    return os.fsencode(mirror.files) + place


def quoted(path: bytes) -> str:
    """Return a path as a shell command line takes it."""
    return shlex.quote(to_text(path))


def print_problems(past: Timeline) -> int:
    """Print what is wrong with the history itself, and return the exit status for it."""
    for problem in past.problems:
        print(printable(f"WARNING: {problem}"), file=sys.stderr)
    return WRONG if past.problems else GOOD


def print_stopped(name: str, error: OSError) -> None:
    """Print why a command could not continue."""
    where = f"{error.filename}: " if error.filename else ""
    print(printable(f"mdbackup {name}: stopped: {where}{error.strerror}"), file=sys.stderr)


def print_not_found(wanted: Selection) -> int:
    """Print the paths and patterns that matched nothing, and return the exit status for them."""
    for word in wanted.not_found:
        print(printable(describe_never_backed_up(word)), file=sys.stderr)
    return WRONG if wanted.not_found else GOOD


def md5_text(md5: bytes | None) -> str | None:
    return None if md5 is None else md5.decode()


def print_json(**facts: Any) -> None:
    print(json.dumps(facts))
