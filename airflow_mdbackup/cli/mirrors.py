"""The backup that a command is about: a configured provider's, or the one in ``--dest DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.mirror import Mirror, find_mirror


def parse_selection(words: list[str]) -> Selection:
    """Return the selection that some paths and patterns make.

    :raises UsageError: one is empty, or not a pattern.
    """
    try:
        return Selection(words)
    except ValueError as error:
        raise UsageError(f"{error}; write a path, or a gitignore pattern") from error


def open_mirror(args: argparse.Namespace) -> tuple[Mirror, list[str]]:
    """Return the backup that ``args.words`` or ``args.dest`` names, and the remaining words.

    With ``args.dest``, only that directory is read: no configuration, and no Airflow.

    :raises UsageError: there is no such provider, or its directory cannot be read.
    :raises DestinationRefused: the directory has no backup, or another provider's.
    """
    try:
        if args.dest:
            return find_mirror(Path(args.dest)), args.words
        if not args.words:
            raise UsageError("name a PROVIDER, or the directory of a backup with --dest DIR")
        # Here, so that --dest needs none of it.
        from airflow_mdbackup.cli.providers import find_provider

        provider = find_provider(args.words[0], Path(args.providers_file) if args.providers_file else None)
        mirror = Mirror(provider.dest, provider.name)
        mirror.check()
        return mirror, args.words[1:]
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}: run this as the workers' user") from error
