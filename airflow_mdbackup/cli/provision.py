"""``mdbackup provision``: print the script for server A, and create the keys on B."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from airflow_mdbackup.account.provision import Account, Bind, CannotProvision, Setup, script, undo_script
from airflow_mdbackup.cli.output import UsageError, print_note
from airflow_mdbackup.cli.providers import (
    Connection,
    check_key_file,
    find_connection,
    find_provider,
    has_connection_table,
)
from airflow_mdbackup.config import Provider, providers_file
from airflow_mdbackup.config.problem import explain
from airflow_mdbackup.config.provider import Indexer

_NO_CONNECTION = Connection(host="", port=None, login="", key_file="")


def run(arguments: argparse.Namespace) -> int:
    """Print the script on standard output, and what to do with it on standard error.

    :raises UsageError: see its message.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as A reads it, whatever this terminal uses
    try:
        if arguments.undo:
            print(undo_script(arguments.name or arguments.provider), end="")
            print_note("Review this script, and run it on A as root: sh FILE. It removes no data.")
            print_note(
                "To give up the provider, also remove on B: its entry in providers_file, its DAG (airflow"
                " dags delete), its connections (airflow connections delete) and its key pairs."
            )
            return 0
        provider = find_provider(arguments.provider)
        setup = with_keys(plan(provider, arguments))
        print(script(setup), end="")
    except CannotProvision as error:
        raise UsageError(str(error)) from error
    for number, step in enumerate(_next_steps(provider, setup), 1):
        print_note(f"{number}. {step}")
    for note in (*_connection_notes(setup), *_mount_notes(provider, setup), *_index_notes(provider, setup)):
        print_note(f"Note: {note}")
    return 0


def plan(provider: Provider, arguments: argparse.Namespace) -> Setup:
    """Return the set-up of A: from the arguments, else the connections, else the defaults.

    Its accounts have no keys yet.

    :raises CannotProvision: a value cannot be written into a script.
    :raises UsageError: arguments contradict each other or the configuration.
    """
    asked_chroot = arguments.chroot and (
        arguments.chroot.rstrip("/") or "/"
    )  # a shell completes with a slash
    backupop_connection = find_connection(provider.sftp_conn_id) or _NO_CONNECTION
    backupop = arguments.backupop or backupop_connection.login or "backupop"
    chroot = provider.chroot or asked_chroot or f"/home/{backupop}"
    if asked_chroot and asked_chroot != chroot:
        raise UsageError(f"the configuration has `chroot: {chroot}`: change that, and remove --chroot")
    timer = arguments.timer or ("hourly" if arguments.path_unit else None)
    asked_by_b = bool(provider.ssh_conn_id or arguments.index_account)
    if not (timer or arguments.cron or asked_by_b):
        timer = "daily"
    return Setup(
        provider=provider.name,
        name=arguments.name or provider.name,
        backupop=_account(provider, arguments, provider.sftp_conn_id, backupop_connection, backupop),
        indexer=_index_account(provider, arguments) if asked_by_b else None,
        chroot=chroot,
        source=provider.source,
        index=provider.index,
        exclude=provider.exclude,
        binds=tuple(_bind(text, chroot) for text in arguments.bind),
        subsystem="sftpi" if arguments.sftpi else "sftp",
        addresses=tuple(arguments.addresses),
        timer=timer,
        path_unit=arguments.path_unit,
        cron=arguments.cron,
        indexer_options=_indexer_options(provider, arguments.indexer),
        host=arguments.host or backupop_connection.host or None,
        port=backupop_connection.port if arguments.port is None else arguments.port,
    )


def with_keys(setup: Setup) -> Setup:
    """Return the set-up with the public keys of B's key pairs, which are created if they are missing."""
    backupop = _with_key(setup.backupop)
    indexer = setup.indexer and _with_key(setup.indexer)
    return replace(setup, backupop=backupop, indexer=indexer)


def _index_account(provider: Provider, arguments: argparse.Namespace) -> Account:
    connection_id = provider.ssh_conn_id or f"{provider.name}_index"
    connection = find_connection(connection_id) or _NO_CONNECTION
    login = arguments.index_account or connection.login or "mdbackup-index"
    return _account(provider, arguments, connection_id, connection, login)


def _account(
    provider: Provider, arguments: argparse.Namespace, connection_id: str, connection: Connection, login: str
) -> Account:
    if arguments.keys or not connection.key_file:
        folder = Path(arguments.keys) if arguments.keys else providers_file().parent / "keys"
        key_file = str(folder.absolute() / connection_id)
    else:
        check_key_file(connection_id, connection)
        key_file = connection.key_file
        if not os.path.exists(key_file):
            raise UsageError(
                f"the connection {connection_id} names the key {key_file}, which is not on this machine: run"
                " this on an Airflow worker, correct the path, or create another pair with --keys DIR"
            )
    return Account(login, connection_id, key_file)


def _with_key(account: Account) -> Account:
    """Return the account with its public key; create the key pair if it is missing.

    :raises UsageError: it cannot be created or read.
    """
    private = Path(account.key_file)
    public = Path(f"{private}.pub")
    try:
        if not private.exists():
            if public.exists():
                raise UsageError(f"{public} exists without its private key {private}: move it away")
            private.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            comment = account.connection_id
            _ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(private))
            print_note(f"Created the key pair {private}; only the Airflow workers must be able to read it.")
        text = public.read_text() if public.exists() else _ssh_keygen("-y", "-P", "", "-f", str(private))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the key pair {private} can be neither read nor created: {error}") from error
    # Without the comment, which may be anything and is of no use on A.
    return replace(account, public_key=" ".join(text.split()[:2]))


def _ssh_keygen(*arguments: str) -> str:
    try:
        done = subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, umask=0o077)
    except FileNotFoundError:
        raise UsageError("the program ssh-keygen is missing: install the OpenSSH client") from None
    if done.returncode:
        raise UsageError(f"ssh-keygen failed: {done.stderr.strip()}")
    return done.stdout


def _bind(text: str, chroot: str) -> Bind:
    source, _, path = text.partition(":")
    path = path or source
    if not (source.startswith("/") and path.startswith("/")) or ":" in path:
        raise UsageError(f"--bind {text!r} must be two absolute paths, as in --bind /srv/www:/backups/www")
    return Bind(source.rstrip("/") or "/", chroot + path.rstrip("/"))


def _indexer_options(provider: Provider, words: list[str]) -> dict[str, object]:
    """Return the keys of `indexer` in the configuration, overridden by ``--indexer``."""
    configured = provider.indexer.options()
    chosen = {key: configured[key] for key in sorted(provider.indexer.model_fields_set)}
    for text in words:
        chosen |= _parse_option(text)
    return {key: value for key, value in chosen.items() if value is not None}


def _parse_option(text: str) -> dict[str, Any]:
    """Parse ``--indexer KEY=VALUE``; both are written as under `indexer` in the configuration.

    :raises UsageError: there is no such key, or the value is invalid.
    """
    key, _, value = text.partition("=")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = value
    try:
        return {key: Indexer.model_validate({key: read}).options()[key]}
    except ValidationError as error:
        why = explain(error.errors()[0], key, Indexer.model_fields)
        raise UsageError(f"--indexer {text}: `{key}` {why}") from error


def _next_steps(provider: Provider, setup: Setup) -> list[str]:
    steps = [
        "Review the script, copy it to A, and run it there as root: sh FILE",
        "Run here the `airflow connections add` lines that it prints at its end, with A's host key.",
        f"Prove that the accounts are restricted: airflow mdbackup audit {provider.name}",
    ]
    if setup.indexer and not provider.ssh_conn_id:
        keys = f"`ssh_conn_id: {setup.indexer.connection_id}` and `chroot: {setup.chroot}`"
        steps.insert(2, f"Add to `{provider.name}` in {providers_file()}: {keys}")
    return steps


def _connection_notes(setup: Setup) -> Iterator[str]:
    if not has_connection_table():
        yield (
            "Airflow's database is not set up here (`airflow db migrate`), so it was not searched for"
            " connections."
        )
    for account in (setup.backupop, setup.indexer):
        if account and find_connection(account.connection_id):
            yield (
                f"the connection {account.connection_id} exists. Before you run its line:"
                f" airflow connections delete {account.connection_id}"
            )


def _mount_notes(provider: Provider, setup: Setup) -> Iterator[str]:
    mounted = [bind.target.removeprefix(setup.chroot) for bind in setup.binds]
    for path in mounted:
        if not any(_overlap(path, source) for source in setup.source):
            yield f"{path} is mounted, but not backed up: it is not in `source` of {provider.name}."
    for source in setup.source:
        if not any(_overlap(path, source) for path in mounted):
            yield f"nothing is mounted at {source}: put files into {setup.chroot}{source}, or use --bind."


def _index_notes(provider: Provider, setup: Setup) -> Iterator[str]:
    if provider.ssh_conn_id and (setup.timer or setup.cron):
        yield (
            f"each run rebuilds the index on A, since `{provider.name}` has `ssh_conn_id`; A's own builds"
            " come on top of that."
        )
    if not setup.indexer:
        when = f"cron ({setup.cron})" if setup.cron else f"a systemd timer ({setup.timer})"
        yield f"A builds its index by itself, by {when}; `max_index_age` must be longer than that interval."


def _overlap(one: str, other: str) -> bool:
    return _below(one, other) or _below(other, one)


def _below(path: str, directory: str) -> bool:
    return f"{path}/".startswith(directory.rstrip("/") + "/")
