"""``mdbackup test-alert PROVIDER``: try each way of a provider's ``alerts``, before one is needed."""

from __future__ import annotations

import argparse
import socket
import sys
from datetime import UTC, datetime

from airflow_mdbackup.alerts.message import Alert
from airflow_mdbackup.alerts.senders import deliver, describe_rule
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import as_a_command, find_provider
from airflow_mdbackup.config.settings import dags_folder

TAKEN, NOT_TAKEN = 0, 1


def run(args: argparse.Namespace) -> int:
    """Send a message that is marked as a test in each way, and print which of them took it.

    :param args: ``provider``, and ``fail``: whether pings say that a run failed.
    :returns: 0: all took it; 1: one did not.
    :raises UsageError: there is no such provider, it is not configured validly, or it has no alerts.
    """
    provider = find_provider(args.provider)
    if not provider.alerts:
        raise UsageError(
            f"the provider {provider.name} has no `alerts`, so that nobody is told when it fails: write for"
            " example `alerts: [{email: ops@example.org}]`"
        )
    _find_notifiers_beside_dags()
    facts = (
        ("Sent by", f"mdbackup test-alert on {socket.gethostname()}"),
        ("Sent at", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"),
    )
    alert = Alert(provider.name, "test", "TEST of the alerts; nothing is wrong", facts)
    status = TAKEN
    for rule in provider.alerts:
        with as_a_command():
            why = deliver(rule, "failure" if args.fail else "test", alert, {})
        print(printable(f"{describe_rule(rule)}: {f'NOT taken: {why}' if why else 'taken'}"), flush=True)
        status = NOT_TAKEN if why else status
    return status


def _find_notifiers_beside_dags() -> None:
    """Have modules found in Airflow's dags folder, as where DAGs are read; commands do not look there."""
    folder = dags_folder()
    if folder not in sys.path:
        sys.path.append(folder)
