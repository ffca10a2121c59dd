"""``mdbackup import``: what ``rsync --backup-dir`` and the like kept becomes versions."""

from __future__ import annotations

import argparse
import json
from datetime import datetime

from airflow_mdbackup.cli.adopt import harm, progress_of, say, tell_left, trees_of
from airflow_mdbackup.cli.common import tell_stopped
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.cli.provider_index import provider_of
from airflow_mdbackup.cli.suffix import suffix_of
from airflow_mdbackup.scheme.common.times import NoSuchTime, parse_time, stamp_of
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.import_versions import IdentifyVersion, Imported, import_versions
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree

DONE, LEFT_OUT = 0, 1

_ADVICE = {
    SkipReason.BLOCKING: ". Something else stands where versions belong",
    SkipReason.UNREADABLE: ". Make them readable for this user",
    SkipReason.MOVING: ". Stop what writes there",
}


def run(args: argparse.Namespace) -> int:
    """Bring the files of ``args.directory`` as versions, or those of the mirror that have a suffix.

    :returns: 0; 1: something could not be imported, or there was nothing.
    :raises UsageError: there is no such provider, or what was asked for does not go together.
    :raises DestinationRefused: there is no backup yet, or the tree is on another file system.
    """
    provider = provider_of(args)
    mirror = Mirror(provider.dest, provider.name)
    mirror.check_mount(provider.mount)
    source = _source(args, mirror)
    meaning = _meaning(args)
    try:
        with progress_of() as progress:
            imported = import_versions(
                *(mirror, source, meaning),
                copy=args.copy,
                dry_run=args.dry_run,
                threads=args.jobs,
                progress=progress,
            )
    except OSError as error:
        tell_stopped("import", error)
        return LEFT_OUT
    _sum_up(args, imported)
    nothing = not (imported.versions or imported.already_present or imported.recovered)
    return LEFT_OUT if nothing or harm(imported.report) else DONE


def _source(args: argparse.Namespace, mirror: Mirror) -> SourceTree:
    if args.directory is None:
        if args.suffix is None or args.at:
            raise UsageError("name the DIR that has the versions; by --suffix they may be in the mirror")
        mirror.check()
        return SourceTree(mirror.files)
    if not args.at:
        raise UsageError(f"--at PATH is missing: what backupop sees {args.directory} as")
    (source,) = trees_of([args.directory], [args.at])
    if not source.directory.is_dir():
        raise UsageError(f"{source.directory} is no directory")
    there, dest = source.directory.resolve(), mirror.dest.resolve()
    if there.is_relative_to(dest) or dest.is_relative_to(there):
        raise UsageError(f"{source.directory} is within the backup, or above it: name a directory elsewhere")
    return source


def _meaning(args: argparse.Namespace) -> IdentifyVersion:
    """Return what tells of a file what it is a version of.

    :raises UsageError: it is not told when the files were displaced, or twice.
    """
    suffix = suffix_of(args)
    if (suffix is not None and suffix.has_time) == (args.displaced is not None):
        raise UsageError(
            "say once when the files were displaced: by --displaced TIME, or by a --suffix that tells it, "
            "such as '.%Y-%m-%d'"
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


def _sum_up(args: argparse.Namespace, imported: Imported) -> None:
    tell_left(args, imported.report, "imported", _ADVICE)
    if args.format == "json":
        facts = {"versions": imported.versions, "bytes": imported.size, "there": imported.already_present}
        print(json.dumps({"provider": args.provider, "imported": facts, "dry_run": args.dry_run}))
    if imported.recovered and not args.dry_run:
        say("A commit that was cut off has been finished first")
    there = f", {imported.already_present:,} were there already" if imported.already_present else ""
    would = "would be imported" if args.dry_run else "imported"
    say(f"{imported.versions:,} versions, {format_size(imported.size)}, {would}{there}")
    if imported.versions:
        say(
            "Which files there were at a moment before the first backup is not known: `mdbackup versions` "
            "lists these, but `restore --as-of` has no such moment"
        )
    elif not imported.already_present:
        say("Nothing there was taken for an old version")
