"""The backup that a command is about: of a configured provider, or in a directory that is named."""

from __future__ import annotations

import argparse
from pathlib import Path

from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.mirror import Mirror, find_mirror


def selection_of(words: list[str]) -> Selection:
    """Return the paths that some words choose.

    :raises UsageError: one is empty, or no pattern.
    """
    try:
        return Selection(words)
    except ValueError as error:
        raise UsageError(f"{error}; write a path, or a gitignore pattern") from error


def mirror_of(args: argparse.Namespace) -> tuple[Mirror, list[str]]:
    """Return the backup that ``args.words`` and ``args.dest`` are about, and the words behind its name.

    With ``args.dest`` nothing is read but that directory: no configuration, and no Airflow.

    :raises UsageError: there is no such provider, or its directory cannot be read.
    :raises DestinationRefused: that holds no backup, or another's.
    """
    try:
        if args.dest:
            return find_mirror(Path(args.dest)), args.words
        if not args.words:
            raise UsageError("name a PROVIDER, or the directory of a backup with --dest DIR")
        # Here, so that what reads a backup alone needs no more than that.
        from airflow_mdbackup.cli.providers import find_provider

        provider = find_provider(args.words[0], Path(args.providers_file) if args.providers_file else None)
        mirror = Mirror(provider.dest, provider.name)
        mirror.check()
        return mirror, args.words[1:]
    except OSError as error:
        raise UsageError(
            f"{error.filename}: {error.strerror}: run this as the user of the workers"
        ) from error
