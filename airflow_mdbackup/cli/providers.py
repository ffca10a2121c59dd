"""The provider that a command is about, from the configuration, and its connections as far as they exist."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.config import Provider, load, providers_file


@dataclass(frozen=True, slots=True)
class Connection:
    """What a command may want to know of an Airflow connection; empty or None where that says nothing."""

    host: str
    port: int | None
    login: str
    key_file: str


def find_provider(name: str, file: Path | None = None) -> Provider:
    """Return a provider of the configuration.

    :param file: the configuration; by default what Airflow's options name.
    :raises UsageError: there is none of this name, or it is refused for what the configuration says.
    """
    file = providers_file() if file is None else file
    configuration = load(file)
    for provider in configuration.providers:
        if provider.name == name:
            return provider
    problems = [str(p) for p in configuration.problems if p.provider in (name, None)]
    if problems:
        raise UsageError("\n- ".join(["the configuration has to be corrected first:", *problems]))
    known = ", ".join(provider.name for provider in configuration.providers) or "none"
    raise UsageError(
        f"there is no provider {name!r} in {file} (there: {known}). Name one of these first, or write it "
        "there: `sftp_conn_id`, `source` and `dest` are enough."
    )


def find_connection(connection_id: str) -> Connection | None:
    """Return the Airflow connection of this id, from wherever Airflow keeps it, or None if there is none.

    Airflow's own look-up says that there is none also where it could not look.

    :raises UsageError: it cannot be looked for, or is malformed.
    """
    from airflow.configuration import ensure_secrets_loaded
    from airflow.secrets.metastore import MetastoreBackend

    for place in ensure_secrets_loaded():
        if isinstance(place, MetastoreBackend) and not connections_are_kept():
            continue
        try:
            found = place.get_connection(connection_id)
            if found:
                return _read(found)
        except Exception as error:  # of whatever keeps the connections
            raise UsageError(
                f"whether there is a connection {connection_id}, and what it says, cannot be told:"
                f" {type(place).__name__}: {error}. See that `airflow connections get {connection_id}` works"
            ) from error
    return None


def check_connection(connection_id: str) -> None:
    """Tell what can be told of a connection before the server is asked.

    :raises UsageError: it is missing, malformed, or names a key that is not here.
    """
    connection = find_connection(connection_id)
    if connection is None:
        raise UsageError(
            f"there is no connection {connection_id}: paste the lines `airflow connections add ...` that the"
            " script of `mdbackup provision` printed on the server"
        )
    check_key_file(connection_id, connection)
    if connection.key_file and not os.access(os.path.expanduser(connection.key_file), os.R_OK):
        raise UsageError(
            f"the connection {connection_id} names the key {connection.key_file}, which is not on this"
            " machine, or not readable for you: run this where the Airflow workers run, as their user, or"
            " correct the path"
        )


def check_key_file(connection_id: str, connection: Connection) -> None:
    """Refuse what cannot be the name of a key's file.

    :raises UsageError: it is the key itself, which is not quoted; or no file can have this name.
    """
    from airflow_mdbackup.hooks.fields import check_file
    from airflow_mdbackup.hooks.invalid_connection import InvalidConnection

    try:
        check_file({"key_file": connection.key_file}, "key_file")
    except InvalidConnection as error:
        raise UsageError(f"the connection {connection_id} {error}") from error


def connections_are_kept() -> bool:
    """Tell whether Airflow's database has a table of connections; true also if it does not answer."""
    from airflow import settings
    from sqlalchemy import inspect
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return inspect(settings.get_engine()).has_table("connection")
    except SQLAlchemyError:
        return True


def _read(found: Any) -> Connection:
    extra = found.extra_dejson
    if not isinstance(extra, dict):
        raise ValueError("its extra is no JSON object")
    return Connection(
        host=found.host or "",
        port=None if found.port is None else int(found.port),
        login=found.login or "",
        key_file=str(extra.get("key_file") or ""),
    )


@contextmanager
def as_a_command() -> Iterator[None]:
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
