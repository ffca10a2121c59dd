"""``mdbackup test-alert PROVIDER``: try each of a provider's ``alerts`` before one is needed."""

from __future__ import annotations

import argparse
import socket
import sys
from datetime import UTC, datetime

from airflow_mdbackup.alerts.message import Alert
from airflow_mdbackup.alerts.senders import deliver, describe_rule
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import airflow_command, find_provider
from airflow_mdbackup.config.airflow_options import dags_folder

ACCEPTED, REJECTED = 0, 1


def run(args: argparse.Namespace) -> int:
    """Send a message marked as a test by each alert, and print which services accepted it.

    :param args: ``provider``, and ``fail``: whether pings report a failed run.
    :returns: 0: all accepted it; 1: one rejected it.
    :raises UsageError: there is no such provider, its configuration is invalid, or it has no alerts.
    """
    provider = find_provider(args.provider)
    if not provider.alerts:
        raise UsageError(
            f"the provider {provider.name} has no `alerts`, so its failures are not reported to anybody:"
            " write for example `alerts: [{email: ops@example.org}]`"
        )
    _add_dags_folder_to_path()
    facts = (
        ("Sent by", f"mdbackup test-alert on {socket.gethostname()}"),
        ("Sent at", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"),
    )
    alert = Alert(provider.name, "test", "TEST of the alerts; nothing is wrong", facts)
    status = ACCEPTED
    for rule in provider.alerts:
        with airflow_command():
            why = deliver(rule, "failure" if args.fail else "test", alert, {})
        print(printable(f"{describe_rule(rule)}: {f'REJECTED: {why}' if why else 'accepted'}"), flush=True)
        status = REJECTED if why else status
    return status


def _add_dags_folder_to_path() -> None:
    """Let notifiers in Airflow's dags folder be imported, as the DAG processor does."""
    folder = dags_folder()
    if folder not in sys.path:
        sys.path.append(folder)
