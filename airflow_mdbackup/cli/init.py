"""``mdbackup init``: make in Airflow what the configuration names, and report what only a person can make.

Connections are read as a task reads them, keys and known_hosts included. No server is asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import as_a_command, find_connection
from airflow_mdbackup.config import Configuration, load, providers_file
from airflow_mdbackup.scheme.errors import AccessRefused

_DESCRIPTION = "Made by `airflow mdbackup init`: tasks of airflow-mdbackup that run at the same time"


def run(args: argparse.Namespace) -> int:
    """Make the pools that are missing, with ``args.slots`` slots each, and report what else is wrong.

    :returns: 0: all is there now; 1: connections are missing, or cannot be used on this machine, or the
        configuration has problems.
    :raises UsageError: Airflow's database cannot be used, or the number of slots is none.
    """
    if args.slots < 1:
        raise UsageError("a pool without slots lets no task run: --slots must be 1 or more")
    file = providers_file()
    configuration = load(file)
    with as_a_command():
        lines = [*_pools(configuration, args.slots)]
        wrong = [*_wrong(configuration)]
    if not wrong:
        lines.append(
            f"{file}: {len(configuration.providers)} providers, and all that they name is there. No server"
            " was asked; `airflow mdbackup audit PROVIDER` does that"
        )
    for line in [*lines, *wrong]:
        print(printable(line))
    return 1 if wrong else 0


def _pools(configuration: Configuration, slots: int) -> Iterator[str]:
    """Make each pool that is missing, and yield what became of each."""
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
                f"Airflow's database cannot be used for the pool {name}: {why}. If it is new: `airflow db"
                " migrate`"
            ) from error
        yield (
            f"pool {name}: made, with {slots} slots; `airflow pools set {name} SLOTS TEXT` changes that"
            if found is None
            else f"pool {name}: there, with {found.slots} slots"
        )


def _wrong(configuration: Configuration) -> Iterator[str]:
    for provider in configuration.providers:
        for connection_id in (provider.sftp_conn_id, provider.ssh_conn_id):
            if connection_id:
                yield from _wrong_account(provider.name, connection_id)
    for provider in configuration.providers:
        for rule in provider.alerts:
            if rule.email and rule.smtp_conn_id and find_connection(rule.smtp_conn_id) is None:
                yield f"connection {rule.smtp_conn_id} of {provider.name}: MISSING, for its alerts"
    for problem in configuration.problems:
        yield f"NOT configured validly: {problem}"


def _wrong_account(provider: str, connection_id: str) -> Iterator[str]:
    from airflow_mdbackup.hooks.provider import account

    try:
        if find_connection(connection_id) is None:
            yield (
                f"connection {connection_id} of {provider}: MISSING; `airflow mdbackup provision {provider}` "
                "prints the script that sets the account up and tells how to add it"
            )
        else:
            account(connection_id)
    except (UsageError, AccessRefused) as error:
        yield f"connection {connection_id} of {provider}: NOT usable on this machine: {error}"
