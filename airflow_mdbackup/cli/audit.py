"""``mdbackup audit PROVIDER``: prove from here that the provider's accounts can do nothing else."""

from __future__ import annotations

import argparse
import json
import sys

from airflow_mdbackup.account.audit import audit
from airflow_mdbackup.account.findings import Audit, as_json, show
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import as_a_command, check_connection, find_provider
from airflow_mdbackup.scheme.errors import BackupError

TIGHT, LOOSER, UNREACHED = 0, 1, 3


def run(args: argparse.Namespace) -> int:
    """Print what an audit of ``args.provider`` found, as a table or, for ``args.format`` ``json``, as JSON.

    :returns: 0: all is tight; 1: something is looser than it should be, or could not be judged; 3: an account
        cannot be reached, or is refused.
    :raises UsageError: there is no such provider, it is not configured validly, or one of its connections is
        missing, malformed, or names a key that is not here.
    """
    try:
        found = _audit(args.provider)
    except (BackupError, UsageError) as error:
        if args.format == "json":
            print(json.dumps({"provider": args.provider, "error": str(error)}, indent=2))
        if isinstance(error, UsageError):
            raise
        print(printable(f"mdbackup audit: {args.provider}: {error}"), file=sys.stderr)
        return UNREACHED
    if args.format == "json":
        print(as_json(args.provider, found))
    else:
        show(args.provider, found)
    return LOOSER if found.loose else TIGHT


def _audit(name: str) -> Audit:
    provider = find_provider(name)
    with as_a_command():
        for connection_id in (provider.sftp_conn_id, provider.ssh_conn_id):
            if connection_id:
                check_connection(connection_id)
        return audit(
            provider.name,
            sftp_conn_id=provider.sftp_conn_id,
            source=provider.source,
            index=provider.index,
            ssh_conn_id=provider.ssh_conn_id,
        )
