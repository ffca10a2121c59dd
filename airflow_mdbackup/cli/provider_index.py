"""The provider's index for a command that only looks: from the provider, or from a file."""

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
from airflow_mdbackup.cli.providers import as_a_command, check_connection, find_provider
from airflow_mdbackup.config import Provider
from airflow_mdbackup.scheme.backup.fetch import (
    FetchedIndex,
    IndexLimits,
    check_local_index,
    fetch_for_preview,
)
from airflow_mdbackup.scheme.backup.plan import Limits, PlanOptions
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.store.run import Run

UNREACHED = (ConnectionLost, AccessRefused, NotOnProvider)
"""What is raised where the provider cannot be reached, or does not hand out its index: exit status 3."""

NO_END = "That index has no end line, so that nobody can tell whether it is whole"


def provider_of(args: argparse.Namespace) -> Provider:
    """Return the provider that a command is about.

    :raises UsageError: see :func:`.providers.find_provider`.
    """
    with as_a_command():  # what Airflow logs when it is loaded, if it is, is no result
        return find_provider(args.provider, Path(args.providers_file) if args.providers_file else None)


def sentence(provider: Provider, error: Exception) -> str:
    """Return what an error says, ended by a full stop, and without the name with which most of them begin."""
    said = str(error).removeprefix(f"{provider.name}: ").rstrip(".") + "."
    if isinstance(error, NotOnProvider) and provider.ssh_conn_id:
        said += " Each run of this provider has the index built first, and so has the first one."
    return said


@dataclass(frozen=True, slots=True)
class Aside:
    """A directory that goes with the command, and the provider index in it.

    :ivar index: what is known of the index; None where none was asked for.
    """

    run: Run
    index: FetchedIndex | None


@contextmanager
def provider_index(provider: Provider, file: str | None, *, offline: bool = False) -> Iterator[Aside]:
    """Hold a directory for the work of a command, with the provider's index in it.

    :param file: where the index is; ``-`` is standard input. None: on the provider, which is asked over its
        Airflow connection.
    :param offline: have no index at all.
    :raises UsageError: the file cannot be read, or the connection is of no use.
    :raises BackupError: see :func:`.backup.fetch.fetch_for_preview`.
    """
    with TemporaryDirectory(prefix="mdbackup-") as folder:
        run = Run(Path(folder), "a look")
        yield Aside(run, None if offline else _index(provider, run, file))


def _index(provider: Provider, run: Run, file: str | None) -> FetchedIndex:
    if file is not None:
        return _from_file(provider, run, file)
    # Here, so that an index in a file needs no Airflow.
    from airflow_mdbackup.hooks.provider import ProviderHook

    age, stall = provider.max_index_age, provider.stall_timeout.total_seconds()
    with as_a_command():
        check_connection(provider.sftp_conn_id)
        with ProviderHook(provider.sftp_conn_id, stall_timeout=stall) as hook:
            return fetch_for_preview(
                *(provider.name, run, hook.reader, provider.index.encode()),
                IndexLimits(None if age is None else age.total_seconds(), provider.max_index_size),
            )


def _from_file(provider: Provider, run: Run, file: str) -> FetchedIndex:
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
