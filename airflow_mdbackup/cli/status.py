"""``mdbackup status [PROVIDER...]``: the age of the backups, for operators, cron and monitoring.

Imports no Airflow, and needs none if ``--providers-file`` is given.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.status_formats import Report, as_json, as_prometheus, as_text
from airflow_mdbackup.config import load, providers_file
from airflow_mdbackup.config import schedule as schedule_module
from airflow_mdbackup.config.airflow_options import default_timezone
from airflow_mdbackup.scheme.recovery.health import Health, ProviderHealth, check_health
from airflow_mdbackup.scheme.store.mirror import Mirror

GOOD, NOT_GOOD = 0, 1
_FORMATS: dict[str, Callable[[Report], str]] = {
    "text": as_text,
    "json": as_json,
    "prometheus": as_prometheus,
}


def run(args: argparse.Namespace) -> int:
    """Print the age of the backups of ``args.providers``, or of all providers.

    :returns: 0: all are good; 1: one is not, none is configured, or the configuration has problems.
    :raises UsageError: there is no provider of that name, or ``args.output`` cannot be written.
    """
    file = Path(args.providers_file) if args.providers_file else providers_file()
    report = _report(file, args.providers, datetime.now(UTC))
    text = printable(_FORMATS[args.format](report))
    if args.output:
        _replace(Path(args.output), text)
    else:
        print(text, end="")
    return GOOD if report.good else NOT_GOOD


def _report(file: Path, names: Sequence[str], now: datetime) -> Report:
    configuration = load(file)
    zone = default_timezone()
    statuses = [
        replace(
            check_health(Mirror(provider.dest, provider.name), provider.max_age, now),
            starts=schedule_module.describe_schedule(provider.schedule),
            next_run=schedule_module.next_run(provider.schedule, now, zone),
        )
        for provider in configuration.providers
        if provider.name in names or not names
    ]
    refused = configuration.refused
    statuses += [
        ProviderHealth(name, Health.INVALID, message="; ".join(map(str, problems)))
        for name, problems in refused.items()
        if name in names or not names
    ]
    general = [str(problem) for problem in configuration.problems if problem.provider not in refused]
    unknown = sorted(set(names) - {status.provider for status in statuses})
    # If a file cannot be read, the provider may be in that one.
    if unknown and not general:
        known = ", ".join([*(provider.name for provider in configuration.providers), *refused]) or "none"
        raise UsageError(f"there is no provider {', '.join(map(repr, unknown))} in {file} (known: {known})")
    ordered = sorted(statuses, key=lambda status: status.provider)
    return Report(now, tuple(ordered), tuple(general), detailed=bool(names))


def _replace(file: Path, text: str) -> None:
    """Replace a file that others may read, atomically.

    :raises UsageError: it cannot be written.
    """
    try:
        # Its suffix is not one that a collector reads.
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
            os.fchmod(output.fileno(), 0o644)
        os.replace(temporary, file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
