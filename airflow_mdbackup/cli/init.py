"""``mdbackup init``: create the configured pools, and report what only an operator can add.

Connections are read as a task reads them, with their keys and known_hosts. No server is contacted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import airflow_command, find_connection
from airflow_mdbackup.config import Configuration, load, providers_file
from airflow_mdbackup.scheme.common.units import format_count
from airflow_mdbackup.scheme.errors import AccessRefused

_DESCRIPTION = "Created by `airflow mdbackup init`: limits how many tasks of airflow-mdbackup run at a time"


def run(args: argparse.Namespace) -> int:
    """Create the missing pools, with ``args.slots`` slots each, and report what else is wrong.

    :returns: 0: everything exists now; 1: connections are missing or do not work on this machine, or the
        configuration has problems.
    :raises UsageError: Airflow's database cannot be used, or the number of slots is less than one.
    """
    if args.slots < 1:
        raise UsageError("--slots must be at least 1: a pool without slots lets no task run")
    file = providers_file()
    configuration = load(file)
    with airflow_command():
        lines = [*_create_pools(configuration, args.slots)]
        wrong = [*_find_problems(configuration)]
    if not wrong:
        number = len(configuration.providers)
        lines.append(
            f"{file}: {format_count(number, 'provider')}: all {'its' if number == 1 else 'their'} connections"
            " and pools exist. No server was contacted; `airflow mdbackup audit PROVIDER` does that"
        )
    for line in [*lines, *wrong]:
        print(printable(line))
    return 1 if wrong else 0


def _create_pools(configuration: Configuration, slots: int) -> Iterator[str]:
    """Create each missing pool, and yield a line for every pool."""
    from airflow.models.pool import Pool
    from sqlalchemy.exc import SQLAlchemyError

    for name in sorted({provider.pool for provider in configuration.providers if provider.pool}):
        try:
            found = Pool.get_pool(name)
            if found is None:
                Pool.create_or_update_pool(name, slots, _DESCRIPTION, include_deferred=False)
        except SQLAlchemyError as error:
            why = str(error).splitlines()[0]
            raise UsageError(
                f"Airflow's database cannot be used for the pool {name}: {why}. If it is new, run"
                " `airflow db migrate`"
            ) from error
        yield (
            f"pool {name}: created with {format_count(slots, 'slot')}; to change that, `airflow pools set"
            f" {name} SLOTS TEXT`"
            if found is None
            else f"pool {name}: exists, with {format_count(found.slots, 'slot')}"
        )


def _find_problems(configuration: Configuration) -> Iterator[str]:
    for provider in configuration.providers:
        for connection_id in (provider.sftp_conn_id, provider.ssh_conn_id):
            if connection_id:
                yield from _check_account(provider.name, connection_id)
    for provider in configuration.providers:
        for rule in provider.alerts:
            if rule.email and rule.smtp_conn_id and find_connection(rule.smtp_conn_id) is None:
                yield f"connection {rule.smtp_conn_id} of {provider.name}: MISSING, needed for its alerts"
    for problem in configuration.problems:
        yield f"INVALID configuration: {problem}"


def _check_account(provider: str, connection_id: str) -> Iterator[str]:
    from airflow_mdbackup.hooks.provider import account

    try:
        if find_connection(connection_id) is None:
            yield (
                f"connection {connection_id} of {provider}: MISSING; `airflow mdbackup provision {provider}` "
                "prints the script that sets up the account and prints how to add it"
            )
        else:
            account(connection_id)
    except (UsageError, AccessRefused) as error:
        yield f"connection {connection_id} of {provider}: does NOT work on this machine: {error}"
