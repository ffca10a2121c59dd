"""``mdbackup plan``: what the next run would do, from a terminal. Nothing is changed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow_mdbackup.cli.common import quoted
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.provider_index import (
    NO_END,
    UNREACHED,
    UNREACHED_STATUS,
    IndexWorkspace,
    describe_unreached,
    plan_options,
    provider_index,
    resolve_provider,
)
from airflow_mdbackup.config import Provider
from airflow_mdbackup.scheme.backup.diff import list_changes
from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import format_count, format_duration, format_size
from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged, IndexRefused
from airflow_mdbackup.scheme.history.changes import pending
from airflow_mdbackup.scheme.history.consumer_index import index_to_look_at
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.index.canonical import Entry
from airflow_mdbackup.scheme.recovery.selection import as_path
from airflow_mdbackup.scheme.store.mirror import Mirror

RUNS, STOPS = 0, 1
_CHANGES = {"+": "new", "*": "changed", "-": "gone", "=": "same"}


@dataclass(slots=True)
class _Sizes:
    """Bytes of files that are already here, and so need no transfer."""

    adopt: int = 0
    copy: int = 0


def run(args: argparse.Namespace) -> int:
    """Print what the next run of ``args.provider`` would do, or what it would do to ``args.words``.

    :returns: 0: the run would do it; 1: the run would stop, because of its guard, an index that it refuses,
        or a damaged consumer index; 3: the provider cannot be reached, or has no index.
    :raises UsageError: there is no such provider, or its directory or the index cannot be read.
    :raises DestinationRefused: the directory holds something else, or another provider's backup.
    """
    provider = resolve_provider(args)
    mirror = Mirror(provider.dest, provider.name)
    only = [as_path(word) for word in args.words]
    try:
        with provider_index(provider, args.index) as workspace:
            ours = _consumer_index(mirror, provider, workspace)
            plan = workspace.preview(mirror, ours, only)
            sizes = _print_listing(args, mirror, workspace, only)
            _print_summary(args, workspace, plan, sizes, pending=_is_pending(mirror))
    except UNREACHED as error:
        why = f"{describe_unreached(provider, error)} --index FILE uses an index here"
        return _report_stop(args, why, UNREACHED_STATUS)
    except (IndexRefused, ConsumerIndexDamaged) as error:
        which = "a run of these paths" if only else "the next run"
        return _report_stop(args, f"{which} would stop: {error}", STOPS)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}: run this as the workers' user") from error
    return STOPS if plan.guard else RUNS


def _consumer_index(mirror: Mirror, provider: Provider, workspace: IndexWorkspace) -> Path | None:
    """Return the consumer index as the next run would find it; None if it would start without one."""
    mirror.check_mount(provider.mount)
    if not mirror.is_marked():
        mirror.check_new()
        return None
    mirror.check()
    return index_to_look_at(mirror, workspace.run.consumer_index)


def _is_pending(mirror: Mirror) -> bool:
    return mirror.is_marked() and any(pending(mirror))


def _report_stop(args: argparse.Namespace, why: str, status: int) -> int:
    if args.format == "json":
        print(json.dumps({"provider": args.provider, "error": why}))
    print(printable(f"mdbackup plan: {args.provider}: {why}"), file=sys.stderr)
    return status


def _print_listing(
    args: argparse.Namespace, mirror: Mirror, workspace: IndexWorkspace, only: list[bytes]
) -> _Sizes:
    sizes = _Sizes()
    with ExitStack() as stack:
        tree = stack.enter_context(mirror.tree()) if mirror.files.exists() else None
        options = plan_options(workspace.provider, only)
        for mark, item in list_changes(workspace.run, options, same=args.all):
            if isinstance(item, PlanItem) and tree and (place := item.path if item.adopt else item.source):
                there = tree.lstat(place)
                size = there.st_size if there else 0
                sizes.adopt += size if item.adopt else 0
                sizes.copy += 0 if item.adopt else size
            if args.format == "json":
                print(json.dumps(dict(_facts(mark, item))))
            else:
                print(f"{mark} {quoted(item.path)}")
    return sizes


def _facts(mark: str, item: PlanItem | ForgottenEntry | Entry) -> Iterator[tuple[str, Any]]:
    yield from (("path", to_text(item.path)), ("mark", mark), ("what", _CHANGES[mark]))
    gone = mark == "-"
    yield "md5", None if gone else item.md5.decode()
    if isinstance(item, PlanItem):
        yield "old_md5", item.replaces.decode() if item.replaces else None
        yield "here", item.adopt
        yield "copied_from", to_text(item.source) if item.source else None
    elif gone:
        yield "old_md5", item.md5.decode()


def _print_summary(
    args: argparse.Namespace, workspace: IndexWorkspace, plan: Plan, sizes: _Sizes, *, pending: bool
) -> None:
    """Print the counts, and what else the operator should know before the run."""
    if args.format == "json":
        _print_json_summary(workspace, plan, sizes, pending=pending)
        return
    for line in _summary(args, workspace, plan, sizes, pending=pending):
        print(printable(line), file=sys.stderr)


def _print_json_summary(workspace: IndexWorkspace, plan: Plan, sizes: _Sizes, *, pending: bool) -> None:
    index = workspace.index
    assert index is not None
    names = ("same", "new", "changed", "gone", "kept", "adopt", "copy", "unreadable", "rotten")
    facts: dict[str, Any] = {name: getattr(plan, name) for name in names}
    facts |= {"adopt_bytes": sizes.adopt, "copy_bytes": sizes.copy, "index_bytes": index.size}
    facts |= {"index_files": index.files, "index_age": index.age, "guard": plan.guard, "pending": pending}
    print(json.dumps({"provider": workspace.provider.name, "summary": facts}))


def _summary(
    args: argparse.Namespace, workspace: IndexWorkspace, plan: Plan, sizes: _Sizes, *, pending: bool
) -> Iterator[str]:
    provider, index = workspace.provider, workspace.index
    assert index is not None
    total = "" if index.size is None else f", {format_size(index.size)}"
    age = format_duration(timedelta(seconds=index.age))
    yield f"The provider's index is {age} old: {format_count(index.files, 'file')}{total}"
    if not index.complete:
        yield NO_END
    if provider.ssh_conn_id and args.index is None:
        yield "The next run rebuilds it first"
    counts = {
        "same": plan.same,
        "new": plan.new,
        "changed": plan.changed,
        "gone from the provider": plan.gone,
    }
    yield ", ".join(f"{number:,} {what}" for what, number in counts.items())
    if plan.adopt:
        yield (
            f"Of the new ones, already here: {plan.adopt:,} ({format_size(sizes.adopt)}). They are hashed,"
            " and transferred only if they differ"
        )
    if plan.copy:
        yield f"Duplicates that would be copied locally: {plan.copy:,} ({format_size(sizes.copy)})"
    if plan.kept:
        yield f"{plan.kept:,} gone, but below a path that the provider could not read: kept"
    for number, what, paths in (
        (plan.unreadable, "unreadable", plan.unreadable_paths),
        (plan.rotten, "rotten", plan.rotten_paths),
    ):
        if number:
            yield f"{number:,} {what} on the provider, so the run will fail: {', '.join(paths)}"
    yield from _warnings(provider, plan, pending=pending)


def _warnings(provider: Provider, plan: Plan, *, pending: bool) -> Iterator[str]:
    if pending:
        yield (
            "A commit is not finished: a run is working on it, or the next one will finish it. This is a"
            " comparison with the state before it"
        )
    if plan.telltale:
        yield f"WARNING: {plan.telltale}, as ransomware does. Check the provider"
    effect = "the run would wait for approval" if provider.on_guard == "approve" else "the run would stop"
    yield from (f"Guard: {effect}: {reason}" for reason in plan.guard)
