"""What ``mdbackup adopt`` and ``mdbackup import`` share: trees, progress, and reports of what was skipped."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from airflow_mdbackup.cli.common import quoted
from airflow_mdbackup.cli.output import UsageError, print_note
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.index.canonical import check_path
from airflow_mdbackup.scheme.recovery.selection import as_path
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree, Survey, SurveyReport

DONE, INCOMPLETE = 0, 1


def parse_trees(directories: list[str], paths: list[str]) -> list[SourceTree]:
    """Return trees, each with its path inside the chroot.

    :raises UsageError: one is without the other, or a path is invalid.
    """
    if len(directories) != len(paths):
        raise UsageError("each --tree DIR needs its --at PATH, the path of DIR inside A's chroot")
    trees = []
    for directory, at in zip(directories, paths, strict=True):
        path = as_path(at)
        try:
            if path != b"/":
                check_path(path)
        except ValueError as error:
            raise UsageError(f"--at {at}: {error}") from error
        trees.append(SourceTree(Path(directory), path.rstrip(b"/")))
    return trees


def needs_attention(report: SurveyReport) -> bool:
    """Whether something was skipped that an operator should look at."""
    return any(not reason.harmless for reason in report.skipped)


def print_skipped(
    args: argparse.Namespace, report: SurveyReport, done: str, advice: Mapping[SkipReason, str]
) -> None:
    """Print what was not ``done``, with advice for each reason, and other things to look at."""
    if args.format == "json":
        facts: dict[str, Any] = {reason.value: number for reason, number in report.skipped.items()}
        print(json.dumps({"left": facts, "others": report.foreign, "linked": report.hard_linked}))
    for reason, number in report.skipped.items():
        examples = ", ".join(map(quoted, report.examples[reason]))
        more = ", ..." if number > len(report.examples[reason]) else ""
        print_note(f"{number:,} not {done}, {reason}: {examples}{more}{advice.get(reason, '')}")
    if report.foreign:
        print_note(
            f"Files and directories that do not belong to {_user()}: {report.foreign:,}. All must belong to"
            " the workers' user: chown -R them, then run this as that user"
        )
    if report.hard_linked:
        print_note(
            f"Files with several names (hard links): {report.hard_linked:,}. Writing to such a name in place"
            " changes the backup too"
        )


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


@contextmanager
def hashing_progress() -> Iterator[Callable[[Survey], Callable[[int], None]]]:
    """Show the progress of hashing on standard error: a bar on a terminal, else an occasional line."""
    if not sys.stderr.isatty():
        yield _progress_lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(survey: Survey) -> Callable[[int], None]:
            task = progress.add_task("", total=survey.size)
            return lambda size: progress.advance(task, size)

        yield bar


def _progress_lines(survey: Survey) -> Callable[[int], None]:
    total, read = survey.size, 0
    timer = ReportTimer()

    def advance(size: int) -> None:
        nonlocal read
        read += size
        if timer.due():
            print_note(f"{format_size(read)} of {format_size(total)} hashed so far")

    return advance
