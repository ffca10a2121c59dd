"""``mdbackup adopt``: a tree that rsync, rclone or scp made becomes the backup."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pwd
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from airflow_mdbackup.cli.common import quoted, tell_stopped
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
from airflow_mdbackup.cli.suffix import Suffix, suffix_of
from airflow_mdbackup.config import Provider
from airflow_mdbackup.scheme.backup.diff import preview
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.history.consumer_index import index_to_look_at
from airflow_mdbackup.scheme.history.forget import ForgottenEntry
from airflow_mdbackup.scheme.index.canonical import Entry, IndexWriter, check_path, revise
from airflow_mdbackup.scheme.recovery.selection import as_path
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.adopt import (
    adopt,
    check_adoptable,
    conclude,
    go_on,
    is_adopted,
    sources_of,
)
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree, Survey, SurveyReport, is_in

DONE, LEFT_OUT, UNREACHED_STATUS = 0, 1, 3


def run(args: argparse.Namespace) -> int:
    """Make a backup of ``args.provider`` of what lies in its ``dest``, and of ``args.tree``.

    :returns: 0; 1: something could not be adopted, as the output tells; 3: the provider cannot be reached, or
        has no index.
    :raises UsageError: there is no such provider, or what was asked for does not go together.
    :raises DestinationRefused: there is a backup already, or the tree cannot come there.
    """
    if args.offline and args.index is not None:
        raise UsageError("--offline has no index: leave it out, or --index")
    provider = provider_of(args)
    mirror = Mirror(provider.dest, provider.name)
    mirror.check_mount(provider.mount)
    trees = trees_of(args.tree, args.at)
    suffix = suffix_of(args)
    try:
        goes_on = is_adopted(mirror)
        if not goes_on:
            check_adoptable(mirror, trees)
        with provider_index(provider, args.index, offline=args.offline) as aside:
            if goes_on and args.dry_run:
                say("An adoption was cut off; the same command without --dry-run finishes it")
                return DONE
            if goes_on:
                go_on(mirror)
                return _finish(args, provider, mirror, aside)
            return _adopt(args, provider, mirror, aside, trees, suffix)
    except UNREACHED as error:
        why = "Nothing was changed. --index FILE compares with one here, --offline with none"
        print(
            printable(f"mdbackup adopt: {args.provider}: {sentence(provider, error)} {why}"), file=sys.stderr
        )
        return UNREACHED_STATUS
    except (OSError, sqlite3.OperationalError) as error:
        if not isinstance(error, OSError):  # such as that the disk is full
            error = OSError(errno.EIO, str(error), str(mirror.adopting))
        tell_stopped("adopt", error)
        print("The same command again goes on", file=sys.stderr)
        return LEFT_OUT


def trees_of(directories: list[str], paths: list[str]) -> list[SourceTree]:
    """Return trees, each with the path as which backupop sees it.

    :raises UsageError: one is without the other, or a path cannot be.
    """
    if len(directories) != len(paths):
        raise UsageError("each --tree DIR needs an --at PATH behind it: what backupop sees it as")
    found = []
    for directory, at in zip(directories, paths, strict=True):
        path = as_path(at)
        try:
            if path != b"/":
                check_path(path)
        except ValueError as error:
            raise UsageError(f"--at {at}: {error}") from error
        found.append(SourceTree(Path(directory), path.rstrip(b"/")))
    return found


def _adopt(
    args: argparse.Namespace,
    provider: Provider,
    mirror: Mirror,
    aside: Aside,
    trees: list[SourceTree],
    suffix: Suffix | None,
) -> int:
    is_theirs = is_in(aside.run.index) if suffix is not None and aside.index is not None else None

    def is_version(path: bytes) -> bool:
        """Whether a path is an old version by its suffix, and no file of the provider's."""
        return bool(suffix and suffix.cut(path)) and not (is_theirs and is_theirs(path))

    if not args.dry_run:
        mirror.make_directories()
    with Survey(sources_of(mirror, trees), None if args.dry_run else mirror.adopting, is_version) as survey:
        survey.walk()
        if not survey.files:
            raise UsageError(
                f"there is no file to adopt in {mirror.files}: name the tree with --tree DIR --at PATH"
            )
        with progress_of() as progress:
            survey.hash(args.jobs, progress(survey))
        tell_left(args, survey.told, "adopted", _ADVICE)
        if aside.index is not None:
            _compare(args, provider, mirror, aside, survey)
        if args.dry_run:
            say(f"{survey.files:,} files, {format_size(survey.size)}, would be adopted; nothing was changed")
            return LEFT_OUT if harm(survey.told) else DONE
        before = survey.told.left.total()
        adopt(mirror, survey, trees)
        harmed = harm(survey.told)
        if meanwhile := survey.told.left.total() - before:
            say(f"{meanwhile:,} of them changed meanwhile, and are not adopted")
    status = _finish(args, provider, mirror, aside)
    return LEFT_OUT if harmed else status


def _finish(args: argparse.Namespace, provider: Provider, mirror: Mirror, aside: Aside) -> int:
    """Take out of the index again what the provider does not have, and tell what there is now."""
    ours = index_to_look_at(mirror, aside.run.folder / "adopted.md5")
    if aside.index is not None:
        preview(mirror, aside.run, ours, plan_options(provider))
    adopted = conclude(mirror, None if aside.index is None else aside.run)
    if args.format == "json":
        print(json.dumps({"provider": provider.name, "adopted": adopted.files, "gone": adopted.gone}))
    left = f"; {adopted.gone:,} more are kept as gone from the provider" if adopted.gone else ""
    say(
        f"Adopted: {adopted.files:,} files are in the index{left}. The first run makes it a good backup:"
        " start one"
    )
    return DONE


def _compare(
    args: argparse.Namespace, provider: Provider, mirror: Mirror, aside: Aside, survey: Survey
) -> None:
    """Tell how the trees differ from what the provider has, and what the guard would say of a first run.

    :raises UsageError: they have nothing in common.
    """
    index = aside.index
    assert index is not None
    found = aside.run.folder / "found.md5"
    survey.write_index(found)
    plan = preview(mirror, aside.run, found, plan_options(provider))
    if not plan.same and not plan.changed:
        with_names = ", ".join(args.at) or "the mirror"
        raise UsageError(
            f"no path here is in the provider's index, which has {index.files:,}: is {with_names} right, as "
            "backupop sees it? Nothing was changed. --offline adopts all the same"
        )
    kept = aside.run.folder / "kept.md5"
    leaving = read_records(aside.run.forget, ForgottenEntry)
    with IndexWriter(kept) as writer:
        revise(writer, found, (Entry(item.path, b"") for item in leaving))
    first = preview(mirror, aside.run, kept, plan_options(provider))
    if not index.complete:
        say(NO_END)
    only_here = plan.gone + plan.kept
    hidden = survey.files - plan.consumer
    if args.format == "json":
        facts: dict[str, Any] = {"equal": plan.same, "different": plan.changed, "only_here": only_here}
        facts |= {"only_there": plan.new, "excluded": hidden, "guard": first.guard}
        print(json.dumps({"provider": provider.name, "compared": facts}))
    excluded = f", {hidden:,} excluded" if hidden else ""
    say(
        f"{plan.same:,} equal, {plan.changed:,} different, {only_here:,} only here, {plan.new:,} only on the "
        f"provider{excluded}"
    )
    for reason in first.guard:
        say(f"Guard: the first run would be stopped: {reason}")


def harm(told: SurveyReport) -> bool:
    """Whether something was left out that a person should see to."""
    return any(not why.harmless for why in told.left)


def tell_left(
    args: argparse.Namespace, told: SurveyReport, done: str, advice: Mapping[SkipReason, str]
) -> None:
    """Print what is not ``done``, each with an advice, and what else a person should see to."""
    if args.format == "json":
        facts: dict[str, Any] = {why.value: number for why, number in told.left.items()}
        print(json.dumps({"left": facts, "others": told.others, "linked": told.linked}))
    for why, number in told.left.items():
        examples = ", ".join(map(quoted, told.examples[why]))
        more = ", ..." if number > len(told.examples[why]) else ""
        say(f"{number:,} not {done}, {why}: {examples}{more}{advice.get(why, '')}")
    if told.others:
        say(
            f"{told.others:,} files and directories do not belong to {_user()}. All must belong to the user "
            "of the workers: run this as that user, after chown -R"
        )
    if told.linked:
        say(
            f"{told.linked:,} files have more names than one (hard links): whoever writes to such a name in "
            "place changes the backup too"
        )


_ADVICE = {
    SkipReason.BLOCKING: ". Rename them: no file beside them can have versions",
    SkipReason.RESERVED: ". They stay where they are, beside the versions to come",
    SkipReason.UNREADABLE: ". Make them readable for this user, or the next run pulls them",
    SkipReason.MOVING: ". Stop what writes there",
    SkipReason.PASSED_OVER: ". By --suffix they are old versions: `mdbackup import` takes them",
}


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def say(text: str) -> None:
    """Print something for people on standard error."""
    print(printable(text), file=sys.stderr)


@contextmanager
def progress_of() -> Iterator[Callable[[Survey], Callable[[int], None]]]:
    """Hold what shows on standard error how far the hashing of a survey is.

    A bar for people, a line now and then for anybody else.
    """
    if not sys.stderr.isatty():
        yield _lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(survey: Survey) -> Callable[[int], None]:
            task = progress.add_task("", total=survey.size)
            return lambda size: progress.advance(task, size)

        yield bar


def _lines(survey: Survey) -> Callable[[int], None]:
    total, read = survey.size, 0
    pace = ReportTimer()

    def tell(size: int) -> None:
        nonlocal read
        read += size
        if pace.due():
            say(f"{format_size(read)} of {format_size(total)} hashed so far")

    return tell
