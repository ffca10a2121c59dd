"""`mdbackup provision`: from configuration and arguments to the script for server A, and the keys on B."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from airflow_mdbackup.account.provision import Account, Bind, CannotProvision, Setup, script, undo_script
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.providers import (
    Connection,
    check_key_file,
    connections_are_kept,
    find_connection,
    find_provider,
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
        sys.stdout.reconfigure(encoding="utf-8")  # as A reads it, whatever the terminal here takes
    try:
        if arguments.undo:
            print(undo_script(arguments.name or arguments.provider), end="")
            _tell("Review this script, and run it on A as root: sh FILE. It removes no data.")
            _tell(
                "If the provider is given up, remove on B: its entry in providers_file, its DAG (airflow dags"
                " delete), its connections (airflow connections delete) and its key pairs."
            )
            return 0
        provider = find_provider(arguments.provider)
        setup = with_keys(plan(provider, arguments))
        print(script(setup), end="")
    except CannotProvision as error:
        raise UsageError(str(error)) from error
    _tell_what_to_do(provider, setup)
    return 0


def plan(provider: Provider, arguments: argparse.Namespace) -> Setup:
    """Return what is to be on A: as the arguments say, else the connections, else what suits most.

    The accounts have no keys yet.

    :raises CannotProvision: that cannot be written into a script.
    :raises UsageError: arguments contradict each other or the configuration.
    """
    asked_chroot = arguments.chroot and (
        arguments.chroot.rstrip("/") or "/"
    )  # a shell completes with a slash
    backupop_connection = find_connection(provider.sftp_conn_id) or _NO_CONNECTION
    backupop = arguments.backupop or backupop_connection.login or "backupop"
    chroot = provider.chroot or asked_chroot or f"/home/{backupop}"
    if asked_chroot and asked_chroot != chroot:
        raise UsageError(f"the configuration has `chroot: {chroot}`: change it there, and leave out --chroot")
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
    """Return the set-up with the public keys of B's key pairs, which are made if they are missing."""
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
                " this where the Airflow workers run, correct the path, or have another pair made by --keys"
                " DIR"
            )
    return Account(login, connection_id, key_file)


def _with_key(account: Account) -> Account:
    """Return the account with its public key; make the pair if there is none, never touch one that is there.

    :raises UsageError: it cannot be made or read.
    """
    private = Path(account.key_file)
    public = Path(f"{private}.pub")
    try:
        if not private.exists():
            if public.exists():
                raise UsageError(f"{public} is there without its private key {private}: move it away")
            private.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            comment = account.connection_id
            _ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(private))
            _tell(
                f"Made the key pair {private}; it must be readable for the Airflow workers, and nobody else."
            )
        text = public.read_text() if public.exists() else _ssh_keygen("-y", "-P", "", "-f", str(private))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the key pair {private} can be neither read nor made: {error}") from error
    # The comment may be anything, and says nothing on A.
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
    source, _, seen = text.partition(":")
    seen = seen or source
    if not (source.startswith("/") and seen.startswith("/")) or ":" in seen:
        raise UsageError(f"--bind {text!r} must be two absolute paths, as in --bind /srv/www:/backups/www")
    return Bind(source.rstrip("/") or "/", chroot + seen.rstrip("/"))


def _indexer_options(provider: Provider, words: list[str]) -> dict[str, object]:
    """Return what the configuration has under `indexer`, and what ``--indexer`` says in its place."""
    configured = provider.indexer.options()
    chosen = {key: configured[key] for key in sorted(provider.indexer.model_fields_set)}
    for text in words:
        chosen |= _setting(text)
    return {key: value for key, value in chosen.items() if value is not None}


def _setting(text: str) -> dict[str, Any]:
    """Return what ``--indexer KEY=VALUE`` says; both are as under `indexer` in the configuration.

    :raises UsageError: there is no such key, or it has no such value.
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


def _tell_what_to_do(provider: Provider, setup: Setup) -> None:
    accounts = [setup.backupop, *([setup.indexer] if setup.indexer else [])]
    steps = [
        "Review the script, copy it to A, and run it there as root: sh FILE",
        "Paste here the `airflow connections add` lines that it prints at its end, with A's host key.",
        f"Prove that it is tight: airflow mdbackup audit {provider.name}",
    ]
    if setup.indexer and not provider.ssh_conn_id:
        keys = f"`ssh_conn_id: {setup.indexer.connection_id}` and `chroot: {setup.chroot}`"
        steps.insert(2, f"Add to `{provider.name}` in {providers_file()}: {keys}")
    for number, step in enumerate(steps, 1):
        _tell(f"{number}. {step}")
    if not connections_are_kept():
        _tell(
            "Note: Airflow's database is not set up here (`airflow db migrate`), so it was not asked for"
            " connections."
        )
    for account in accounts:
        if find_connection(account.connection_id):
            _tell(
                f"Note: the connection {account.connection_id} exists. Before you paste its line:"
                f" airflow connections delete {account.connection_id}"
            )
    seen = [bind.target.removeprefix(setup.chroot) for bind in setup.binds]
    for path in seen:
        if not any(_below(path, source) or _below(source, path) for source in setup.source):
            _tell(f"Note: {path} is mounted, but not backed up: it is not in `source` of {provider.name}.")
    for source in setup.source:
        if not any(_below(path, source) or _below(source, path) for path in seen):
            _tell(f"Note: nothing is mounted for {source}: put files into {setup.chroot}{source}, or --bind.")
    if provider.ssh_conn_id and (setup.timer or setup.cron):
        _tell(
            f"Note: each run has A build the index anew, since `{provider.name}` has `ssh_conn_id`; what A"
            " builds by itself comes on top of that."
        )
    if not setup.indexer:
        when = f"cron ({setup.cron})" if setup.cron else f"a systemd timer ({setup.timer})"
        _tell(f"Note: A builds its index itself, by {when}; `max_index_age` must be longer than that.")


def _below(path: str, directory: str) -> bool:
    return f"{path}/".startswith(directory.rstrip("/") + "/")


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr)
