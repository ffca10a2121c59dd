"""``mdbackup import``: turn what ``rsync --backup-dir`` and the like kept into versions."""

from __future__ import annotations

import argparse
import json
from datetime import datetime

from airflow_mdbackup.cli.common import print_stopped
from airflow_mdbackup.cli.output import UsageError, print_note
from airflow_mdbackup.cli.provider_index import resolve_provider
from airflow_mdbackup.cli.suffix import parse_suffix
from airflow_mdbackup.cli.takeover import (
    DONE,
    INCOMPLETE,
    hashing_progress,
    needs_attention,
    parse_trees,
    print_skipped,
)
from airflow_mdbackup.scheme.common.times import NoSuchTime, parse_time, stamp_of
from airflow_mdbackup.scheme.common.units import format_count, format_size
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.import_versions import IdentifyVersion, Imported, import_versions
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree

_ADVICE = {
    SkipReason.BLOCKING: ". Something else is in the place of the versions",
    SkipReason.UNREADABLE: ". Make them readable for this user",
    SkipReason.MOVING: ". Stop whatever writes there",
}


def run(args: argparse.Namespace) -> int:
    """Import the files of ``args.directory``, or those of the mirror that have a suffix, as versions.

    :returns: 0; 1: something could not be imported, or there was nothing to import.
    :raises UsageError: there is no such provider, or the arguments contradict each other.
    :raises DestinationRefused: there is no backup yet, or the tree is on another file system.
    """
    provider = resolve_provider(args)
    mirror = Mirror(provider.dest, provider.name)
    mirror.check_mount(provider.mount)
    source = _source(args, mirror)
    meaning = _meaning(args)
    try:
        with hashing_progress() as progress:
            imported = import_versions(
                *(mirror, source, meaning),
                copy=args.copy,
                dry_run=args.dry_run,
                threads=args.jobs,
                progress=progress,
            )
    except OSError as error:
        print_stopped("import", error)
        return INCOMPLETE
    _print_summary(args, imported)
    nothing = not (imported.versions or imported.already_present or imported.recovered)
    return INCOMPLETE if nothing or needs_attention(imported.report) else DONE


def _source(args: argparse.Namespace, mirror: Mirror) -> SourceTree:
    if args.directory is None:
        if args.suffix is None or args.at:
            raise UsageError("name the DIR that has the versions, or with --suffix import from the mirror")
        mirror.check()
        return SourceTree(mirror.files)
    if not args.at:
        raise UsageError(f"--at PATH is missing: the path of {args.directory} inside A's chroot")
    (source,) = parse_trees([args.directory], [args.at])
    if not source.directory.is_dir():
        raise UsageError(f"{source.directory} is not a directory")
    directory, dest = source.directory.resolve(), mirror.dest.resolve()
    if directory.is_relative_to(dest) or dest.is_relative_to(directory):
        raise UsageError(f"{source.directory} is within the backup, or above it: name a directory elsewhere")
    return source


def _meaning(args: argparse.Namespace) -> IdentifyVersion:
    """Return the function that says which path a file is a version of, and when it was displaced.

    :raises UsageError: the time at which the files were displaced is missing, or given twice.
    """
    suffix = parse_suffix(args)
    if (suffix is not None and suffix.has_time) == (args.displaced is not None):
        raise UsageError(
            "give the time at which the files were displaced once: by --displaced TIME, or by a --suffix that"
            " contains it, such as '.%Y-%m-%d'"
        )
    stamp = ""
    if args.displaced is not None:
        try:
            stamp = stamp_of(parse_time(args.displaced, datetime.now().astimezone()))
        except NoSuchTime as error:
            raise UsageError(str(error)) from error
    if suffix is None:
        return lambda path: (path, stamp)

    def meaning(path: bytes) -> tuple[bytes, str] | None:
        cut = suffix.cut(path)
        return None if cut is None else (cut[0], cut[1] or stamp)

    return meaning


def _print_summary(args: argparse.Namespace, imported: Imported) -> None:
    print_skipped(args, imported.report, "imported", _ADVICE)
    if args.format == "json":
        facts = {"versions": imported.versions, "bytes": imported.size, "there": imported.already_present}
        print(json.dumps({"provider": args.provider, "imported": facts, "dry_run": args.dry_run}))
    if imported.recovered and not args.dry_run:
        print_note("Finished a commit that had been interrupted first")
    there = f"; already in the backup: {imported.already_present:,}" if imported.already_present else ""
    imports = "would be imported" if args.dry_run else "imported"
    print_note(
        f"{format_count(imported.versions, 'version')}, {format_size(imported.size)}, {imports}{there}"
    )
    if imported.versions:
        print_note(
            "`mdbackup versions` lists imported versions. `restore --as-of` does not accept times before the "
            "first backup, since it is not known which files existed then"
        )
    elif not imported.already_present:
        print_note("No old versions were found there")
