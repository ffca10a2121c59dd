"""How the command ``status`` writes its report: as text, as JSON, and for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow_mdbackup.cli.output import printable
from airflow_mdbackup.scheme.common.times import format_time, stamp_of
from airflow_mdbackup.scheme.common.units import format_count, format_duration, format_size
from airflow_mdbackup.scheme.history.usage import DiskUsage
from airflow_mdbackup.scheme.recovery.health import Health, LastCommit, ProviderHealth, Unfinished

_FORMAT = 1
_MOST_NAMED = 5  # backups of each kind that the first line names


@dataclass(frozen=True, slots=True)
class Report:
    """The health of several backups.

    :ivar problems: what is wrong in the configuration, except for the providers in ``statuses``.
    :ivar detailed: whether these backups were asked for by name.
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
    """Return a summary line, and a line for each provider, bad ones first; more if asked for by name."""
    lines = [_summary(report), *(f"configuration: {_one_line(problem)}" for problem in report.problems)]
    width = max((len(status.provider) for status in report.statuses), default=0)
    for status in sorted(report.statuses, key=lambda status: status.state == Health.GOOD):
        state = status.state if status.state == Health.GOOD else status.state.upper()
        facts = "; ".join(map(_one_line, _facts(status, report.now)))
        lines.append(f"{status.provider:{width}}  {state:10}  {facts}")
        if report.detailed:
            lines += [f"{'':{width}}  {_one_line(detail)}" for detail in _details(status)]
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> str:
    """Return one line of limited length: monitoring agents show only the first one."""
    total, problems = len(report.statuses), len(report.problems)
    if not total:
        line = "no provider is configured" if not problems else "no provider can be read"
    elif report.bad:
        bad = _shortened([f"{status.provider} {status.state.upper()}" for status in report.bad])
        line = f"{len(report.bad)} of {total} backups not good: {bad}"
    else:
        line = f"{total} of {total} backups good"
    failed = _shortened([failure for status in report.statuses if (failure := _describe_failure(status))])
    line += f"; {failed}" if failed else ""
    if problems:
        line += f"; {format_count(problems, 'problem')} in the configuration"
    return line


def _describe_failure(status: ProviderHealth) -> str:
    """Return what is wrong with the last run, apart from its age; an empty text if nothing is."""
    run, last = status.unfinished, status.last_commit
    if run is not None and not run.at_work:
        return _one_line(f"{status.provider}: {_describe_unfinished(run)}")
    if last is None or not last.failures:
        return ""
    return f"{status.provider} had {format_count(last.failures, 'failure')} in its last run"


def _describe_unfinished(run: Unfinished) -> str:
    return f"the run {run.run_id}, started {_local(run.since)}, did not finish"


def _shortened(names: list[str]) -> str:
    more = [f"and {len(names) - _MOST_NAMED:,} more"] if len(names) > _MOST_NAMED else []
    return ", ".join(names[:_MOST_NAMED] + more)


def _facts(status: ProviderHealth, now: datetime) -> Iterable[str]:
    if status.message:
        yield status.message
    if status.last_good is not None:
        at = status.last_good.at
        limit = f", at most {format_duration(status.max_age)}" if status.max_age is not None else ""
        ago = "" if status.message else f" ({format_duration(now - at)} ago{limit})"
        yield f"last good {_local(at)}{ago}"
    if status.files is not None:
        yield format_count(status.files, "file")
    last = status.last_commit
    if last is not None and last != status.last_good:
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in last.outcomes.items())
        how = "was limited to some paths" if last.partial else "was not good"
        yield f"last run {_local(last.at)} {how}: {outcomes} ({last.run_id})"
    if (run := status.unfinished) is not None and run.at_work:
        yield f"running since {_local(run.since)} ({run.run_id})"
    elif run is not None:
        yield _describe_unfinished(run)


def _details(status: ProviderHealth) -> Iterable[str]:
    disk, came = status.disk, status.received
    if disk is not None and came is not None:
        yield (
            f"on the disk: {format_count(disk.live, 'file')} ({format_size(disk.live_bytes)}),"
            f" {format_count(disk.versions, 'version')} ({format_size(disk.version_bytes)});"
            f" {format_size(came)} added in the last 30 days"
        )
    if status.next_run is not None:
        yield f"next run {_local(status.next_run)} ({status.starts})"
    elif status.starts:
        yield f"next run: {status.starts}"


def _local(moment: datetime) -> str:
    """Return a time as `mdbackup log` prints it and `--as-of` accepts it."""
    return format_time(stamp_of(moment))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def as_json(report: Report) -> str:
    """Return one JSON object; times are ISO 8601 in UTC, durations in seconds."""
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


_Samples = Iterator[tuple[dict[str, str], float]]


def as_prometheus(report: Report) -> str:
    """Return the text exposition format, as the textfile collector of node_exporter reads it.

    Source: "Text-based format" of the Prometheus documentation on exposition formats.
    """
    lines = _metric("configuration_problems", _PROBLEMS_HELP, [({}, len(report.problems))])
    for name, help_text, get in _METRICS:
        samples = [
            ({"provider": status.provider} | labels, value)
            for status in report.statuses
            for labels, value in get(status)
        ]
        lines += _metric(name, help_text, samples)
    return "\n".join(lines) + "\n"


def _metric(name: str, help_text: str, samples: Sequence[tuple[dict[str, str], float]]) -> list[str]:
    lines = []
    if samples:
        lines += [f"# HELP mdbackup_{name} {help_text}", f"# TYPE mdbackup_{name} gauge"]
    for labels, value in samples:
        pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"mdbackup_{name}{f'{{{pairs}}}' if pairs else ''} {value:.15g}")
    return lines


def _state(status: ProviderHealth) -> _Samples:
    for state in Health:
        yield {"state": state.value}, int(status.state == state)


def _outcomes(status: ProviderHealth) -> _Samples:
    if status.last_commit is not None:
        for outcome, number in sorted(status.last_commit.outcomes.items()):
            yield {"outcome": outcome}, number


def _by_kind(counts: Callable[[DiskUsage], tuple[int, int]]) -> Callable[[ProviderHealth], _Samples]:
    def get(status: ProviderHealth) -> _Samples:
        if status.disk is not None:
            for kind, number in zip(("live", "version"), counts(status.disk), strict=True):
                yield {"kind": kind}, number

    return get


def _single(value: Callable[[ProviderHealth], float | None]) -> Callable[[ProviderHealth], _Samples]:
    """Return a getter of one sample, or of none where the value is None."""

    def get(status: ProviderHealth) -> _Samples:
        found = value(status)
        if found is not None:
            yield {}, found

    return get


_PROBLEMS_HELP = "What is wrong in the configuration beside the providers that are told of."
_METRICS: tuple[tuple[str, str, Callable[[ProviderHealth], _Samples]], ...] = (
    ("provider_state", "1 for the state in which the provider's backup is, 0 for the others.", _state),
    (
        "last_good_timestamp_seconds",
        "When the last run was that backed up everything.",
        _single(lambda status: status.last_good.at.timestamp() if status.last_good else None),
    ),
    (
        "last_commit_timestamp_seconds",
        "When the last run was that committed anything, good or not.",
        _single(lambda status: status.last_commit.at.timestamp() if status.last_commit else None),
    ),
    ("last_commit_outcomes", "How many entries had which outcome in the last run that committed.", _outcomes),
    (
        "max_age_seconds",
        "How long ago the last good run may be.",
        _single(lambda status: None if status.max_age is None else status.max_age.total_seconds()),
    ),
    ("files", "Files in the backup's index.", _single(lambda status: status.files)),
    (
        "disk_files",
        "Files on the disk of the backup: live ones, also such as have left the index, and versions.",
        _by_kind(lambda disk: (disk.live, disk.versions)),
    ),
    ("disk_bytes", "Their sizes.", _by_kind(lambda disk: (disk.live_bytes, disk.version_bytes))),
    (
        "came_bytes",
        "Bytes that came to the disk in the last 30 days.",
        _single(lambda status: status.received),
    ),
    (
        "next_run_timestamp_seconds",
        "When the next run begins, by the schedule.",
        _single(lambda status: status.next_run.timestamp() if status.next_run else None),
    ),
)
"""Name, help and getter of each metric. The texts are part of the output: they stay as they are."""


def _escaped(text: str) -> str:
    return printable(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
