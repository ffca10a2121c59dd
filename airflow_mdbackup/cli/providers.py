"""The provider that a command is about, and its Airflow connections."""

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
    """The fields of an Airflow connection that commands need; empty or None where it has none."""

    host: str
    port: int | None
    login: str
    key_file: str


def find_provider(name: str, file: Path | None = None) -> Provider:
    """Return a provider of the configuration.

    :param file: the configuration; by default what Airflow's options name.
    :raises UsageError: there is no provider of this name, or its configuration is invalid.
    """
    file = providers_file() if file is None else file
    configuration = load(file)
    for provider in configuration.providers:
        if provider.name == name:
            return provider
    problems = [str(p) for p in configuration.problems if p.provider in (name, None)]
    if problems:
        raise UsageError("\n- ".join(["the configuration must be corrected first:", *problems]))
    known = ", ".join(provider.name for provider in configuration.providers) or "none"
    raise UsageError(
        f"there is no provider {name!r} in {file} (known: {known}). Name one of these, or add it to the file:"
        " `sftp_conn_id`, `source` and `dest` are enough."
    )


def find_connection(connection_id: str) -> Connection | None:
    """Return the Airflow connection of this id from any of Airflow's secrets backends, or None.

    Airflow's own look-up returns nothing, without an error, if a backend fails.

    :raises UsageError: a backend fails, or the connection is malformed.
    """
    from airflow.configuration import ensure_secrets_loaded
    from airflow.secrets.metastore import MetastoreBackend

    for backend in ensure_secrets_loaded():
        if isinstance(backend, MetastoreBackend) and not has_connection_table():
            continue
        try:
            found = backend.get_connection(connection_id)
            if found:
                return _read(found)
        except Exception as error:  # a backend may raise anything
            raise UsageError(
                f"the connection {connection_id} cannot be read: {type(backend).__name__}: {error}. Make sure"
                f" that `airflow connections get {connection_id}` works"
            ) from error
    return None


def check_connection(connection_id: str) -> None:
    """Check what can be checked of a connection without contacting the server.

    :raises UsageError: it is missing, malformed, or names a key that is not on this machine.
    """
    connection = find_connection(connection_id)
    if connection is None:
        raise UsageError(
            f"there is no connection {connection_id}: run the `airflow connections add ...` lines that the"
            " script of `mdbackup provision` printed on the server"
        )
    check_key_file(connection_id, connection)
    if connection.key_file and not os.access(os.path.expanduser(connection.key_file), os.R_OK):
        raise UsageError(
            f"the connection {connection_id} names the key {connection.key_file}, which is not on this"
            " machine or not readable for you: run this on an Airflow worker, as the workers' user, or"
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


def has_connection_table() -> bool:
    """Whether Airflow's database has a table of connections; also true if the database does not answer."""
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
        raise ValueError("its extra is not a JSON object")
    return Connection(
        host=found.host or "",
        port=None if found.port is None else int(found.port),
        login=found.login or "",
        key_file=str(extra.get("key_file") or ""),
    )


@contextmanager
def airflow_command() -> Iterator[None]:
    """Use Airflow as its own commands do, so that it also looks for connections in its database.

    Its log, which would go to standard output, goes to standard error.
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
