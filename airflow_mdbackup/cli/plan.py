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
    Aside,
    plan_options,
    provider_index,
    provider_of,
    sentence,
)
from airflow_mdbackup.config import Provider
from airflow_mdbackup.scheme.backup.diff import list_changes, preview
from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import describe_duration, format_size
from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged, IndexRefused
from airflow_mdbackup.scheme.history.changes import pending
from airflow_mdbackup.scheme.history.consumer_index import index_to_look_at
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.index.canonical import Entry
from airflow_mdbackup.scheme.recovery.selection import as_path
from airflow_mdbackup.scheme.store.mirror import Mirror

GOES, STOPS, UNREACHED_STATUS = 0, 1, 3
_WHAT = {"+": "new", "*": "changed", "-": "gone", "=": "same"}


@dataclass(slots=True)
class _Sizes:
    """Bytes of what is on this side already, and so is not transferred."""

    adopt: int = 0
    copy: int = 0


def run(args: argparse.Namespace) -> int:
    """Print what the next run of ``args.provider`` would do, as far as ``args.words`` choose it.

    :returns: 0: it would be done; 1: the run would stop, by its guard, for an index that it refuses, or
        because the consumer index is damaged; 3: the provider cannot be reached, or has no index.
    :raises UsageError: there is no such provider, or its directory or the index cannot be read.
    :raises DestinationRefused: the directory holds something else, or another provider's backup.
    """
    provider = provider_of(args)
    mirror = Mirror(provider.dest, provider.name)
    only = [as_path(word) for word in args.words]
    try:
        with provider_index(provider, args.index) as aside:
            ours = _consumer_index(mirror, provider, aside)
            plan = preview(mirror, aside.run, ours, plan_options(provider, only))
            sizes = _print_listing(args, provider, mirror, aside, only)
            _sum_up(args, provider, aside, plan, sizes, pending=_is_pending(mirror))
    except UNREACHED as error:
        return _stop(
            args, f"{sentence(provider, error)} --index FILE compares with one here", UNREACHED_STATUS
        )
    except (IndexRefused, ConsumerIndexDamaged) as error:
        which = "a run of these paths" if only else "the next run"
        return _stop(args, f"{which} would stop: {error}", STOPS)
    except OSError as error:
        raise UsageError(
            f"{error.filename}: {error.strerror}: run this as the user of the workers"
        ) from error
    return STOPS if plan.guard else GOES


def _consumer_index(mirror: Mirror, provider: Provider, aside: Aside) -> Path | None:
    """Return the consumer index as the next run would find it; None if it would begin anew."""
    mirror.check_mount(provider.mount)
    if not mirror.is_marked():
        mirror.check_new()
        return None
    mirror.check()
    return index_to_look_at(mirror, aside.run.consumer_index)


def _is_pending(mirror: Mirror) -> bool:
    return mirror.is_marked() and any(pending(mirror))


def _stop(args: argparse.Namespace, why: str, status: int) -> int:
    if args.format == "json":
        print(json.dumps({"provider": args.provider, "error": why}))
    print(printable(f"mdbackup plan: {args.provider}: {why}"), file=sys.stderr)
    return status


def _print_listing(
    args: argparse.Namespace, provider: Provider, mirror: Mirror, aside: Aside, only: list[bytes]
) -> _Sizes:
    sizes = _Sizes()
    with ExitStack() as stack:
        tree = stack.enter_context(mirror.tree()) if mirror.files.exists() else None
        for mark, told in list_changes(aside.run, plan_options(provider, only), same=args.all):
            if isinstance(told, PlanItem) and tree and (place := told.path if told.adopt else told.source):
                there = tree.lstat(place)
                size = there.st_size if there else 0
                sizes.adopt += size if told.adopt else 0
                sizes.copy += 0 if told.adopt else size
            if args.format == "json":
                print(json.dumps(dict(_facts(mark, told))))
            else:
                print(f"{mark} {quoted(told.path)}")
    return sizes


def _facts(mark: str, told: PlanItem | ForgottenEntry | Entry) -> Iterator[tuple[str, Any]]:
    yield from (("path", to_text(told.path)), ("mark", mark), ("what", _WHAT[mark]))
    gone = mark == "-"
    yield "md5", None if gone else told.md5.decode()
    if isinstance(told, PlanItem):
        yield "old_md5", told.replaces.decode() if told.replaces else None
        yield "here", told.adopt
        yield "copied_from", to_text(told.source) if told.source else None
    elif gone:
        yield "old_md5", told.md5.decode()


def _sum_up(
    args: argparse.Namespace, provider: Provider, aside: Aside, plan: Plan, sizes: _Sizes, *, pending: bool
) -> None:
    """Print the counts, and what else a person should know before the run."""
    index = aside.index
    assert index is not None
    names = ("same", "new", "changed", "gone", "kept", "adopt", "copy", "unreadable", "rotten")
    if args.format == "json":
        facts: dict[str, Any] = {name: getattr(plan, name) for name in names}
        facts |= {"adopt_bytes": sizes.adopt, "copy_bytes": sizes.copy, "index_bytes": index.size}
        facts |= {"index_files": index.files, "index_age": index.age, "guard": plan.guard, "pending": pending}
        print(json.dumps({"provider": provider.name, "summary": facts}))
        return
    total = "" if index.size is None else f", {format_size(index.size)}"
    age = describe_duration(timedelta(seconds=index.age))
    lines = [f"The provider's index is {age} old: {index.files:,} files{total}"]
    if not index.complete:
        lines.append(NO_END)
    if provider.ssh_conn_id and args.index is None:
        lines.append("The next run builds it anew first")
    lines.append(
        f"{plan.same:,} same, {plan.new:,} new, {plan.changed:,} changed, {plan.gone:,} gone from there"
    )
    if plan.adopt:
        lines.append(
            f"{plan.adopt:,} of the new ones are here already ({format_size(sizes.adopt)}): each is hashed, "
            "transferred only if it differs"
        )
    if plan.copy:
        lines.append(
            f"{plan.copy:,} of them would be copied from what is here, not transferred"
            f" ({format_size(sizes.copy)})"
        )
    if plan.kept:
        lines.append(f"{plan.kept:,} gone, but below what the provider could not read: they stay")
    for number, what, paths in (
        (plan.unreadable, "unreadable", plan.unreadable_paths),
        (plan.rotten, "rotten", plan.rotten_paths),
    ):
        if number:
            lines.append(f"{number:,} {what} on the provider, for which the run fails: {', '.join(paths)}")
    if pending:
        lines.append(
            "A commit is not finished: a run is at it now, or the next one finishes it first. This is "
            "compared with what was there before it"
        )
    if plan.telltale:
        lines.append(f"WARNING: {plan.telltale}, as ransomware does. Look at the provider")
    asks = "a person would be asked" if provider.on_guard == "approve" else "the run would stop"
    lines += [f"Guard: {asks}: {reason}" for reason in plan.guard]
    for line in lines:
        print(printable(line), file=sys.stderr)
