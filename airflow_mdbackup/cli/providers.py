"""The provider that a command is about, from the configuration, and its connections as far as they exist."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_mdbackup.cli import UsageError
from airflow_mdbackup.config import Provider, load, providers_file


@dataclass(frozen=True, slots=True)
class Connection:
    """What a command may want to know of an Airflow connection; empty or None where that says nothing."""

    host: str
    port: int | None
    login: str
    key_file: str


def find_provider(name: str) -> Provider:
    """Return a provider of the configuration.

    :raises UsageError: there is none of this name, or it is refused for what the configuration says.
    """
    file = providers_file()
    configuration = load(file)
    for provider in configuration.providers:
        if provider.name == name:
            return provider
    problems = [str(p) for p in configuration.problems if p.provider in (name, None)]
    if problems:
        raise UsageError("\n- ".join(["the configuration has to be corrected first:", *problems]))
    known = ", ".join(provider.name for provider in configuration.providers) or "none"
    raise UsageError(
        f"there is no provider {name!r} in {file} (there: {known}). Write it first: `sftp_conn_id`, `source` "
        "and `dest` are enough."
    )


def find_connection(connection_id: str) -> Connection | None:
    """Return the Airflow connection of this id, from wherever Airflow keeps it, or None if there is none."""
    from airflow.exceptions import AirflowNotFoundException
    from airflow.models.connection import Connection as AirflowConnection

    try:
        found = AirflowConnection.get_connection_from_secrets(connection_id)
    except AirflowNotFoundException:
        return None
    return Connection(
        host=found.host or "",
        port=found.port,
        login=found.login or "",
        key_file=str(found.extra_dejson.get("key_file") or ""),
    )
