"""``mdbackup adopt``: turn a tree that rsync, rclone or scp made into the backup."""

from __future__ import annotations

import argparse
import errno
import json
import sqlite3
import sys
from typing import Any

from airflow_mdbackup.cli.common import print_stopped
from airflow_mdbackup.cli.output import UsageError, print_note, printable
from airflow_mdbackup.cli.provider_index import (
    NO_END,
    UNREACHED,
    UNREACHED_STATUS,
    IndexWorkspace,
    describe_unreached,
    provider_index,
    resolve_provider,
)
from airflow_mdbackup.cli.suffix import Suffix, parse_suffix
from airflow_mdbackup.cli.takeover import (
    DONE,
    INCOMPLETE,
    hashing_progress,
    needs_attention,
    parse_trees,
    print_skipped,
)
from airflow_mdbackup.scheme.common.units import format_count, format_size
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.history.consumer_index import index_to_look_at
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.index.canonical import Entry, IndexWriter, revise
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.adopt import (
    adopt,
    check_adoptable,
    conclude,
    is_committing,
    resume,
    survey_sources,
)
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree, Survey, index_lookup


def run(args: argparse.Namespace) -> int:
    """Turn the files in the ``dest`` of ``args.provider``, and those of ``args.tree``, into its backup.

    :returns: 0; 1: something could not be adopted, as the output says; 3: the provider cannot be reached, or
        has no index.
    :raises UsageError: there is no such provider, or the arguments contradict each other.
    :raises DestinationRefused: there is a backup already, or the tree cannot be moved there.
    """
    if args.offline and args.index is not None:
        raise UsageError("--offline uses no index: remove either --offline or --index")
    provider = resolve_provider(args)
    mirror = Mirror(provider.dest, provider.name)
    mirror.check_mount(provider.mount)
    trees = parse_trees(args.tree, args.at)
    suffix = parse_suffix(args)
    try:
        interrupted = is_committing(mirror)
        if not interrupted:
            check_adoptable(mirror, trees)
        with provider_index(provider, args.index, offline=args.offline) as workspace:
            if interrupted and args.dry_run:
                print_note("An adoption was interrupted; this command without --dry-run finishes it")
                return DONE
            if interrupted:
                resume(mirror)
                return _finish(args, mirror, workspace)
            return _adopt(args, mirror, workspace, trees, suffix)
    except UNREACHED as error:
        why = (
            f"{describe_unreached(provider, error)} Nothing was changed. --index FILE uses an index here,"
            " --offline uses none"
        )
        print(printable(f"mdbackup adopt: {args.provider}: {why}"), file=sys.stderr)
        return UNREACHED_STATUS
    except (OSError, sqlite3.OperationalError) as error:
        if not isinstance(error, OSError):  # such as that the disk is full
            error = OSError(errno.EIO, str(error), str(mirror.adopting))
        print_stopped("adopt", error)
        print("Run the same command again to continue", file=sys.stderr)
        return INCOMPLETE


def _adopt(
    args: argparse.Namespace,
    mirror: Mirror,
    workspace: IndexWorkspace,
    trees: list[SourceTree],
    suffix: Suffix | None,
) -> int:
    on_provider = (
        index_lookup(workspace.run.index) if suffix is not None and workspace.index is not None else None
    )

    def is_version(path: bytes) -> bool:
        """Whether a path is an old version by its suffix, and not a file of the provider."""
        return bool(suffix and suffix.cut(path)) and not (on_provider and on_provider(path))

    if not args.dry_run:
        mirror.make_directories()
    with Survey(
        survey_sources(mirror, trees), None if args.dry_run else mirror.adopting, is_version
    ) as survey:
        survey.walk()
        if not survey.files:
            raise UsageError(
                f"there are no files to adopt in {mirror.files}: name the tree with --tree DIR --at PATH"
            )
        with hashing_progress() as progress:
            survey.hash(args.jobs, progress(survey))
        print_skipped(args, survey.report, "adopted", _ADVICE)
        if workspace.index is not None:
            _compare(args, mirror, workspace, survey)
        if args.dry_run:
            print_note(
                f"{format_count(survey.files, 'file')}, {format_size(survey.size)}, would be adopted; nothing"
                " was changed"
            )
            return INCOMPLETE if needs_attention(survey.report) else DONE
        before = survey.report.skipped.total()
        adopt(mirror, survey, trees)
        incomplete = needs_attention(survey.report)
        if changed := survey.report.skipped.total() - before:
            print_note(f"{format_count(changed, 'file')} changed meanwhile, not adopted")
    status = _finish(args, mirror, workspace)
    return INCOMPLETE if incomplete else status


def _finish(args: argparse.Namespace, mirror: Mirror, workspace: IndexWorkspace) -> int:
    """Drop from the index what the provider does not have, and print the result."""
    ours = index_to_look_at(mirror, workspace.run.folder / "adopted.md5")
    if workspace.index is not None:
        workspace.preview(mirror, ours)
    adopted = conclude(mirror, None if workspace.index is None else workspace.run)
    if args.format == "json":
        print(json.dumps({"provider": mirror.provider, "adopted": adopted.files, "gone": adopted.gone}))
    gone = f"; {adopted.gone:,} more kept as gone from the provider" if adopted.gone else ""
    print_note(
        f"Adopted: {format_count(adopted.files, 'file')} in the index{gone}. Start a run now: the first one"
        " makes it a good backup"
    )
    return DONE


def _compare(args: argparse.Namespace, mirror: Mirror, workspace: IndexWorkspace, survey: Survey) -> None:
    """Print how the trees differ from the provider's index, and whether the guard would stop a first run.

    :raises UsageError: they have nothing in common.
    """
    index = workspace.index
    assert index is not None
    found = workspace.run.folder / "found.md5"
    survey.write_index(found)
    plan = workspace.preview(mirror, found)
    if not plan.same and not plan.changed:
        at = ", ".join(args.at) or "the mirror"
        raise UsageError(
            f"none of these paths is in the provider's index, which has {format_count(index.files, 'path')}:"
            f" is {at} the right path inside the chroot? Nothing was changed. --offline needs no index"
        )
    kept = workspace.run.folder / "kept.md5"
    leaving = read_records(workspace.run.forget, ForgottenEntry)
    with IndexWriter(kept) as writer:
        revise(writer, found, (Entry(item.path, b"") for item in leaving))
    first = workspace.preview(mirror, kept)
    if not index.complete:
        print_note(NO_END)
    only_here = plan.gone + plan.kept
    excluded = survey.files - plan.consumer
    if args.format == "json":
        facts: dict[str, Any] = {"equal": plan.same, "different": plan.changed, "only_here": only_here}
        facts |= {"only_there": plan.new, "excluded": excluded, "guard": first.guard}
        print(json.dumps({"provider": mirror.provider, "compared": facts}))
    hidden = f", {excluded:,} excluded" if excluded else ""
    print_note(
        f"{plan.same:,} equal, {plan.changed:,} different, {only_here:,} only here, {plan.new:,} only on the "
        f"provider{hidden}"
    )
    for reason in first.guard:
        print_note(f"Guard: the first run would be stopped: {reason}")


_ADVICE = {
    SkipReason.BLOCKING: ". Rename them: files beside them could not have versions",
    SkipReason.RESERVED: ". They stay where they are, beside future versions",
    SkipReason.UNREADABLE: ". Make them readable for this user, or the next run pulls them",
    SkipReason.MOVING: ". Stop whatever writes there",
    SkipReason.PASSED_OVER: ". Old versions, by --suffix: `mdbackup import` imports them",
}
