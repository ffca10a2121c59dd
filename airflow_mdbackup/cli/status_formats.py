"""How the command `status` writes what it found: for people, for programs, for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow_mdbackup.cli.output import printable
from airflow_mdbackup.scheme.common.times import format_time, stamp_of
from airflow_mdbackup.scheme.common.units import format_duration, format_size
from airflow_mdbackup.scheme.history.usage import DiskUsage
from airflow_mdbackup.scheme.recovery.health import Health, LastCommit, ProviderHealth, Unfinished

_FORMAT = 1
_NAMED = 5  # backups that the first line names of each kind


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say of several backups.

    :ivar problems: what is wrong in the configuration beside the providers that are told of.
    :ivar detailed: whether people asked for these backups by name.
    """

    now: datetime
    statuses: tuple[ProviderHealth, ...]
    problems: tuple[str, ...]
    detailed: bool = False

    @property
    def good(self) -> bool:
        """Whether there is a backup, all of them are good, and nothing is wrong in the configuration."""
        return bool(self.statuses) and not self.problems and not self.bad

    @property
    def bad(self) -> list[ProviderHealth]:
        """The backups that are not good."""
        return [status for status in self.statuses if status.state != Health.GOOD]


def as_text(report: Report) -> str:
    """Return a line that says all, and one for each provider, the bad ones first; more if asked by name."""
    lines = [_summary(report), *(f"configuration: {_one_line(problem)}" for problem in report.problems)]
    width = max((len(status.provider) for status in report.statuses), default=0)
    for status in sorted(report.statuses, key=lambda status: status.state == Health.GOOD):
        state = status.state if status.state == Health.GOOD else status.state.upper()
        told = "; ".join(map(_one_line, _told(status, report.now)))
        lines.append(f"{status.provider:{width}}  {state:10}  {told}")
        if report.detailed:
            lines += [f"{'':{width}}  {_one_line(more)}" for more in _details(status)]
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> str:
    """Return one line, of bounded length: monitoring agents show the first one only."""
    total, problems = len(report.statuses), len(report.problems)
    if not total:
        first = "no provider is configured" if not problems else "no provider can be told of"
    elif report.bad:
        told = _some([f"{status.provider} {status.state.upper()}" for status in report.bad])
        first = f"{len(report.bad)} of {total} backups not good: {told}"
    else:
        first = f"{total} of {total} backups good"
    told = _some([word for status in report.statuses if (word := _last_word(status))])
    first += f"; {told}" if told else ""
    if problems:
        first += f"; {problems} problem{'s' * (problems > 1)} in the configuration"
    return first


def _last_word(status: ProviderHealth) -> str:
    """Return what is wrong with the last run, other than its age; nothing if that is not known yet."""
    run, last = status.unfinished, status.last_commit
    if run is not None and not run.at_work:
        return _one_line(f"{status.provider}: the run {run.run_id}, {_begun(run)}, has not come to its end")
    if last is None or not last.failures:
        return ""
    return f"{status.provider} had {last.failures:,} failure{'s' * (last.failures > 1)} in its last run"


def _begun(run: Unfinished) -> str:
    return f"begun on {_local(run.since)}"


def _some(told: list[str]) -> str:
    more = [f"and {len(told) - _NAMED:,} more"] if len(told) > _NAMED else []
    return ", ".join(told[:_NAMED] + more)


def _told(status: ProviderHealth, now: datetime) -> Iterable[str]:
    if status.message:
        yield status.message
    if status.last_good is not None:
        at = status.last_good.at
        limit = f", of at most {format_duration(status.max_age)}" if status.max_age is not None else ""
        ago = "" if status.message else f" ({format_duration(now - at)} ago{limit})"
        yield f"last good {_local(at)}{ago}"
    if status.files is not None:
        yield f"{status.files} files"
    last = status.last_commit
    if last is not None and last != status.last_good:
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in last.outcomes.items())
        how = "was limited to some paths" if last.partial else "was not good"
        yield f"last run {_local(last.at)} {how}: {outcomes} ({last.run_id})"
    if (run := status.unfinished) is not None and run.at_work:
        yield f"a run has been going on since {_local(run.since)} ({run.run_id})"
    elif run is not None:
        yield f"the run {run.run_id}, {_begun(run)}, has not come to its end"


def _details(status: ProviderHealth) -> Iterable[str]:
    disk, came = status.disk, status.received
    if disk is not None and came is not None:
        yield (
            f"on the disk: {disk.live:,} files with {format_size(disk.live_bytes)},"
            f" {disk.versions:,} versions"
            f" with {format_size(disk.version_bytes)}; {format_size(came)} came in the last 30 days"
        )
    if status.next_run is not None:
        yield f"next run {_local(status.next_run)} ({status.starts})"
    elif status.starts:
        yield f"next run: {status.starts}"


def _local(moment: datetime) -> str:
    """Return a moment as `mdbackup log` prints it, and `--as-of` takes it."""
    return format_time(stamp_of(moment))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def as_json(report: Report) -> str:
    """Return one JSON object; moments are ISO 8601 in UTC, durations seconds."""
    found: dict[str, Any] = {
        "format": _FORMAT,
        "at": _iso(report.now),
        "good": report.good,
        "problems": list(report.problems),
        "providers": [_object(status, report.now) for status in report.statuses],
    }
    return json.dumps(found, indent=2) + "\n"


def _object(status: ProviderHealth, now: datetime) -> dict[str, Any]:
    last_good = status.last_good
    return {
        "provider": status.provider,
        "state": status.state.value,
        "message": status.message,
        "age": round((now - last_good.at).total_seconds()) if last_good is not None else None,
        "max_age": round(status.max_age.total_seconds()) if status.max_age is not None else None,
        "files": status.files,
        "disk": None if status.disk is None else _disk(status.disk, status.received),
        "starts": status.starts or None,
        "next_run": None if status.next_run is None else _iso(status.next_run),
        "last_good": _commit(last_good),
        "last_commit": _commit(status.last_commit),
        "unfinished": _unfinished(status.unfinished),
    }


def _disk(disk: DiskUsage, came: int | None) -> dict[str, int | None]:
    sizes = {"live": disk.live, "live_bytes": disk.live_bytes}
    sizes |= {"versions": disk.versions, "version_bytes": disk.version_bytes}
    return {**sizes, "came_30_days": came}


def _commit(commit: LastCommit | None) -> dict[str, Any] | None:
    if commit is None:
        return None
    return {"run_id": commit.run_id, "at": _iso(commit.at), "outcomes": commit.outcomes}


def _unfinished(run: Unfinished | None) -> dict[str, Any] | None:
    return None if run is None else {"run_id": run.run_id, "since": _iso(run.since), "at_work": run.at_work}


def _iso(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def as_prometheus(report: Report) -> str:
    """Return the text exposition format, as the textfile collector of node_exporter reads it.

    Source: "Text-based format" of the Prometheus documentation on exposition formats.
    """
    statuses = report.statuses
    metrics: list[tuple[str, str, list[tuple[dict[str, str], float]]]] = [
        (
            "configuration_problems",
            "What is wrong in the configuration beside the providers that are told of.",
            [({}, len(report.problems))],
        ),
        (
            "provider_state",
            "1 for the state in which the provider's backup is, 0 for the others.",
            [
                ({"provider": status.provider, "state": state.value}, int(status.state == state))
                for status in statuses
                for state in Health
            ],
        ),
        (
            "last_good_timestamp_seconds",
            "When the last run was that backed up everything.",
            [(_of(s), s.last_good.at.timestamp()) for s in statuses if s.last_good is not None],
        ),
        (
            "last_commit_timestamp_seconds",
            "When the last run was that committed anything, good or not.",
            [(_of(s), s.last_commit.at.timestamp()) for s in statuses if s.last_commit is not None],
        ),
        (
            "last_commit_outcomes",
            "How many entries had which outcome in the last run that committed.",
            [
                (_of(s) | {"outcome": outcome}, number)
                for s in statuses
                if s.last_commit is not None
                for outcome, number in sorted(s.last_commit.outcomes.items())
            ],
        ),
        (
            "max_age_seconds",
            "How long ago the last good run may be.",
            [(_of(s), s.max_age.total_seconds()) for s in statuses if s.max_age is not None],
        ),
        (
            "files",
            "Files in the backup's index.",
            [(_of(s), s.files) for s in statuses if s.files is not None],
        ),
        (
            "disk_files",
            "Files on the disk of the backup: live ones, also such as have left the index, and versions.",
            [sample for s in statuses for sample in _by_kind(s, lambda disk: (disk.live, disk.versions))],
        ),
        (
            "disk_bytes",
            "Their sizes.",
            [
                sample
                for s in statuses
                for sample in _by_kind(s, lambda disk: (disk.live_bytes, disk.version_bytes))
            ],
        ),
        (
            "came_bytes",
            "Bytes that came to the disk in the last 30 days.",
            [(_of(s), s.received) for s in statuses if s.received is not None],
        ),
        (
            "next_run_timestamp_seconds",
            "When the next run begins, by the schedule.",
            [(_of(s), s.next_run.timestamp()) for s in statuses if s.next_run is not None],
        ),
    ]
    lines = []
    for name, told, samples in metrics:
        if samples:
            lines += [f"# HELP mdbackup_{name} {told}", f"# TYPE mdbackup_{name} gauge"]
        for labels, value in samples:
            marks = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            lines.append(f"mdbackup_{name}{f'{{{marks}}}' if marks else ''} {value:.15g}")
    return "\n".join(lines) + "\n"


def _by_kind(
    status: ProviderHealth, counts: Callable[[DiskUsage], tuple[int, int]]
) -> Iterable[tuple[dict[str, str], float]]:
    if status.disk is not None:
        for kind, number in zip(("live", "version"), counts(status.disk), strict=True):
            yield _of(status) | {"kind": kind}, number


def _of(status: ProviderHealth) -> dict[str, str]:
    return {"provider": status.provider}


def _escaped(text: str) -> str:
    return printable(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
