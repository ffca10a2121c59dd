"""The provider's index for a command that only reads it: from the provider, or from a file."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.cli.providers import airflow_command, check_connection, find_provider
from airflow_mdbackup.config import Provider
from airflow_mdbackup.scheme.backup.diff import preview
from airflow_mdbackup.scheme.backup.fetch import (
    FetchedIndex,
    IndexLimits,
    check_local_index,
    fetch_for_preview,
)
from airflow_mdbackup.scheme.backup.plan import Limits, Plan, PlanOptions
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run

UNREACHED = (ConnectionLost, AccessRefused, NotOnProvider)
"""What is raised if the provider cannot be reached, or does not provide its index."""
UNREACHED_STATUS = 3

NO_END = "The provider's index may be truncated: it has no end line"


def resolve_provider(args: argparse.Namespace) -> Provider:
    """Return the provider that a command is about.

    :raises UsageError: see :func:`.providers.find_provider`.
    """
    with airflow_command():  # keeps what Airflow logs while loading out of the results
        return find_provider(args.provider, Path(args.providers_file) if args.providers_file else None)


def describe_unreached(provider: Provider, error: Exception) -> str:
    """Return an error's message with a full stop, without the provider's name that most begin with."""
    message = str(error).removeprefix(f"{provider.name}: ").rstrip(".") + "."
    if isinstance(error, NotOnProvider) and provider.ssh_conn_id:
        message += " Each run of this provider builds the index first; so will the first one."
    return message


@dataclass(frozen=True, slots=True)
class IndexWorkspace:
    """A temporary directory, laid out like a run's, with the provider index in it.

    :ivar index: facts about the index; None if none was requested.
    """

    provider: Provider
    run: Run
    index: FetchedIndex | None

    def preview(self, mirror: Mirror, ours: Path | None, only: Sequence[bytes] = ()) -> Plan:
        """Compare the index with ``ours`` as a run of the provider would: see :func:`.diff.preview`."""
        return preview(mirror, self.run, ours, plan_options(self.provider, only))


@contextmanager
def provider_index(
    provider: Provider, file: str | None, *, offline: bool = False
) -> Iterator[IndexWorkspace]:
    """Make a temporary directory with the provider's index in it.

    :param file: where the index is; ``-`` is standard input. None: fetch it from the provider, over its
        Airflow connection.
    :param offline: use no index at all.
    :raises UsageError: the file cannot be read, or the connection is invalid.
    :raises BackupError: see :func:`.backup.fetch.fetch_for_preview`.
    """
    with TemporaryDirectory(prefix="mdbackup-") as folder:
        run = Run(Path(folder), "a look")
        yield IndexWorkspace(provider, run, None if offline else _get_index(provider, run, file))


def _get_index(provider: Provider, run: Run, file: str | None) -> FetchedIndex:
    if file is not None:
        return _read_file(provider, run, file)
    # Imported here, so that an index in a file needs no Airflow.
    from airflow_mdbackup.hooks.provider import ProviderHook

    age, stall = provider.max_index_age, provider.stall_timeout.total_seconds()
    with airflow_command():
        check_connection(provider.sftp_conn_id)
        with ProviderHook(provider.sftp_conn_id, stall_timeout=stall) as hook:
            return fetch_for_preview(
                *(provider.name, run, hook.reader, provider.index.encode()),
                IndexLimits(None if age is None else age.total_seconds(), provider.max_index_size),
            )


def _read_file(provider: Provider, run: Run, file: str) -> FetchedIndex:
    try:
        if file != "-":
            return check_local_index(provider.name, run, Path(file))
        with run.received.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        return check_local_index(provider.name, run, run.received)
    except OSError as error:
        raise UsageError(f"--index {file}: {error.strerror}") from error


def plan_options(provider: Provider, only: Sequence[bytes] = ()) -> PlanOptions:
    """Return the options by which the provider's runs are planned."""
    return PlanOptions(
        source=[path.encode() for path in provider.source],
        exclude=provider.exclude,
        only=only,
        limits=Limits(provider.guard.share, provider.guard.number, provider.guard.above),
        allow_empty=provider.allow_empty,
    )
