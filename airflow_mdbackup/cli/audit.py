"""``mdbackup audit PROVIDER``: prove from here that the provider's accounts are properly restricted."""

from __future__ import annotations

import argparse
import json
import sys

from airflow_mdbackup.account.audit import audit
from airflow_mdbackup.account.findings import Audit, as_json, show
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import airflow_command, check_connection, find_provider
from airflow_mdbackup.scheme.errors import BackupError

RESTRICTED, LOOSE, UNREACHED = 0, 1, 3


def run(args: argparse.Namespace) -> int:
    """Print the findings of an audit of ``args.provider``, as a table or as JSON (``args.format``).

    :returns: 0: everything is restricted; 1: something is not, or could not be judged; 3: an account cannot
        be reached, or its login is refused.
    :raises UsageError: there is no such provider, its configuration is invalid, or one of its connections is
        missing, malformed, or names a key that is not on this machine.
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
    return LOOSE if found.loose else RESTRICTED


def _audit(name: str) -> Audit:
    provider = find_provider(name)
    with airflow_command():
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
