"""``mdbackup audit PROVIDER``: prove from here that the provider's accounts can do nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from airflow_mdbackup.account.audit import audit
from airflow_mdbackup.account.findings import as_json, show
from airflow_mdbackup.cli import printable
from airflow_mdbackup.cli.providers import find_provider
from airflow_mdbackup.scheme.errors import BackupError

TIGHT, LOOSER, UNREACHED = 0, 1, 3


def run(args: argparse.Namespace) -> int:
    """Print what an audit of ``args.provider`` found, as a table or, for ``args.format`` ``json``, as JSON.

    :returns: 0: all is tight; 1: something is looser than it should be, or could not be judged; 3: an account
        cannot be reached, or is refused.
    :raises UsageError: there is no such provider, or it is not configured validly.
    """
    provider = find_provider(args.provider)
    try:
        with _as_a_command():
            found = audit(
                provider.name,
                sftp_conn_id=provider.sftp_conn_id,
                source=provider.source,
                index=provider.index,
                ssh_conn_id=provider.ssh_conn_id,
            )
    except BackupError as error:
        print(printable(f"{provider.name}: {error}"), file=sys.stderr)
        return UNREACHED
    if args.format == "json":
        print(as_json(provider.name, found))
    else:
        show(provider.name, found)
    return LOOSER if found.loose else TIGHT


@contextmanager
def _as_a_command() -> Iterator[None]:
    """Use Airflow as its own commands do: it looks for connections in its database, too.

    Its log, for which it takes standard output, goes to standard error.
    """
    context = "_AIRFLOW_PROCESS_CONTEXT"
    before = os.environ.get(context)
    os.environ[context] = before or "server"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ[context]
