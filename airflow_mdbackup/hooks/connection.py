"""The SSH account that an Airflow connection describes: parsed and checked once, for every way to connect.

::

    the connection    host, port, login, password, and the extras of Airflow's SSH package    .fields
    ~/.ssh/config     of $HOME, for what the connection does not set: HostName, Port,         .ssh_config
                      ProxyCommand, ProxyJump, IdentityFile, algorithms
    private keys      read here, with their passphrase                                        .private_keys
    host keys         the pinned one, or those in known_hosts: keys, authorities, revoked     .host_keys
    algorithms        of the extras, or of ~/.ssh/config                                      .algorithms

Nothing is sent to a server until all of that is known to be usable. Errors name the connection, and the extra
to correct.

Limitations: keys of an ssh-agent are not used; workers have none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import asyncssh

from airflow_mdbackup.hooks import host_keys
from airflow_mdbackup.hooks.algorithms import Algorithms, for_asyncssh, requested
from airflow_mdbackup.hooks.fields import (
    check_host,
    check_text,
    extras_of,
    is_on,
    port_of,
    seconds_of,
    unknown_extras,
)
from airflow_mdbackup.hooks.files import path_of
from airflow_mdbackup.hooks.host_keys import HostKeys
from airflow_mdbackup.hooks.invalid_connection import InvalidConnection
from airflow_mdbackup.hooks.private_keys import Key, key_from_file, key_from_text
from airflow_mdbackup.hooks.ssh_config import Reached, reached
from airflow_mdbackup.scheme.errors import AccessRefused

log = logging.getLogger(__name__)

CONNECT = 30  # seconds for each of: TCP connection, and login
KEEPALIVE = 30  # seconds


@dataclass(frozen=True, slots=True)
class SshAccount:
    """An account on a server, and how to reach it.

    :ivar host: as the connection names it; ``address`` is what ~/.ssh/config resolves it to.
    :ivar keys: private keys, decrypted, best first; empty if there is only a password.
    :ivar algorithms: those that the connection or ~/.ssh/config asks for.
    :ivar pinned: whether the host key comes from the connection itself.
    :ivar connect_timeout: seconds for the TCP connection.
    :ivar proxy: a shell command that makes the connection; ``jumps``: it stands for a ``ProxyJump``.
    :ivar options: all of this but the proxy, for asyncssh.
    """

    conn_id: str
    host: str
    address: str
    port: int
    host_key_alias: str | None
    user: str
    password: str | None = field(repr=False)
    keys: tuple[Key, ...] = field(repr=False)
    algorithms: Algorithms
    host_keys: HostKeys
    pinned: bool
    connect_timeout: int
    compress: bool
    subsystem: str
    proxy: str | None
    jumps: bool
    options: asyncssh.SSHClientConnectionOptions

    @property
    def proxy_command(self) -> list[str]:
        """The arguments to run ``proxy`` with."""
        return ["/bin/sh", "-c", f"exec {self.proxy}"]

    @property
    def known_by(self) -> str:
        """Where its host key was found, for messages."""
        return "the host key is the pinned one" if self.pinned else "the host key is in known_hosts"

    @property
    def where(self) -> str:
        """What is connected to, for messages."""
        by = "ProxyJump" if self.jumps else "ProxyCommand"
        through = f", through the {by} of ~/.ssh/config" if self.proxy else ""
        return f"{self.user}@{self.host}:{self.port} (connection {self.conn_id}{through})"

    def without_authorities(self) -> SshAccount:
        """Return the same account, whose server is known by its key alone and not by a certificate."""
        account = replace(self, host_keys=replace(self.host_keys, authorities=()))
        return replace(account, options=_options(account))


def account_of(conn_id: str, connection: Any) -> SshAccount:
    """Return the account that an Airflow connection describes.

    :raises AccessRefused: the connection cannot be used as it is; the message names it, and what to correct.
    """
    try:
        account = _account_of(conn_id, connection)
    except InvalidConnection as error:
        hint = f" ({unknown})" if (unknown := unknown_extras(connection)) else ""
        raise AccessRefused(f"the connection {conn_id} {error}{hint}") from error.__cause__
    if unknown := unknown_extras(connection):
        log.warning("the connection %s: %s", conn_id, unknown)
    return account


def _account_of(conn_id: str, connection: Any) -> SshAccount:
    extra = extras_of(connection)
    host, user = connection.host or "", connection.login or ""
    if not user.strip():
        raise InvalidConnection("has no login: enter the name of the account on the server")
    check_host(host)
    check_text("a login", user, printable=True)
    check_text("a password", connection.password or "", printable=False)
    reached = _reached(host, port_of(connection.port), user)
    check_host(reached.host, ", the HostName of ~/.ssh/config")
    keys, password = _secrets(extra, connection, reached)
    trusted = _host_keys(extra, reached)
    account = SshAccount(
        conn_id=conn_id,
        host=host,
        address=reached.host.lower(),  # as ssh does, for known_hosts and certificates
        port=reached.port,
        host_key_alias=reached.host_key_alias,
        user=user,
        password=password,
        keys=keys,
        algorithms=requested(extra, reached, trusted),
        host_keys=trusted,
        pinned="host_key" in extra,
        connect_timeout=seconds_of(extra, "conn_timeout", CONNECT),
        compress=is_on(extra, "compress"),
        subsystem=extra.get("subsystem", "sftp"),
        proxy=reached.proxy,
        jumps=reached.jumps,
        options=asyncssh.SSHClientConnectionOptions(config=None, agent_path=None, known_hosts=None),
    )
    return replace(account, options=_options(account))


def _reached(host: str, port: int | None, user: str) -> Reached:
    try:
        return reached(host, port, user)
    except (ValueError, OSError) as error:
        raise InvalidConnection(f"cannot be used on this machine: {error}") from error


def _secrets(
    extra: Mapping[str, Any], connection: Any, reached: Reached
) -> tuple[tuple[Key, ...], str | None]:
    """Return the keys, best first, and the password to log in with, as far as there are any."""
    password = connection.password or None
    passphrases = [None, extra.get("private_key_passphrase"), extra.get("passphrase"), password]
    if "private_key" in extra and "key_file" in extra:
        raise InvalidConnection("has a private_key and a key_file: remove one of them")
    if "private_key" in extra:
        keys = [key_from_text(extra["private_key"].encode(), passphrases, "an extra private_key")]
    elif "key_file" in extra:
        path = path_of(extra["key_file"])
        keys = [key_from_file(path, passphrases, f"a key_file {path}")]
    else:
        keys = list(_default_keys(extra, reached, passphrases, has_password=password is not None))
    if any(key.passphrase == password for key in keys):
        password = None  # it was the passphrase
    if not keys and password is None:
        raise InvalidConnection(f"has no key: {_missing(reached)}")
    return tuple(keys), password


def _missing(reached: Reached) -> str:
    """Return what to do where there is no key."""
    if named := reached.options.get("IdentityFile"):
        return (
            f"the IdentityFile of ~/.ssh/config ({', '.join(named)}) is not there, or cannot be used. Copy it"
            " here, or name another one in the connection's extra key_file"
        )
    return "name one in its extra key_file, or write it into private_key"


def _default_keys(
    extra: Mapping[str, Any], reached: Reached, passphrases: Sequence[str | None], *, has_password: bool
) -> Iterator[Key]:
    """Yield the keys that OpenSSH tries by default. Unusable ones are skipped with a warning."""
    named = reached.options.get("IdentityFile", [])
    if not named and (has_password or str(extra.get("look_for_keys", "true")).lower() == "false"):
        return
    for name in named or [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]:
        try:
            path = path_of(name)
            if path.is_file():
                yield key_from_file(path, passphrases, f"a key, {path},")
            elif named:
                log.warning("~/.ssh/config names the IdentityFile %s, which is not there", path)
        except InvalidConnection as error:
            log.warning("Skipping a key: the connection %s", error)
        except ValueError as error:
            log.warning("Skipping a key: %s", error)


def _host_keys(extra: Mapping[str, Any], reached: Reached) -> HostKeys:
    """Return the pinned key; without one, what known_hosts has."""
    options = reached.options
    revoked = host_keys.revoked_keys(options.get("RevokedHostKeys", []))
    if "host_key" in extra:
        return replace(host_keys.pinned_key(extra["host_key"]), revoked=revoked)
    files = (
        [extra["known_hosts"]]
        if "known_hosts" in extra
        else [
            *options.get("UserKnownHostsFile", host_keys.USER_FILES),
            *options.get("GlobalKnownHostsFile", host_keys.GLOBAL_FILES),
        ]
    )
    found = host_keys.keys_in_known_hosts(files, reached.host.lower(), reached.port, reached.host_key_alias)
    return replace(found, revoked=(*found.revoked, *revoked))


def _options(account: SshAccount) -> asyncssh.SSHClientConnectionOptions:
    has_password = account.password is not None
    keys: list[Any] = [
        (each.key, each.certificate) if each.certificate else each.key for each in account.keys
    ]
    try:
        return asyncssh.SSHClientConnectionOptions(
            config=None,
            agent_path=None,
            host=account.address,
            port=account.port,
            username=account.user,
            known_hosts=account.host_keys.for_asyncssh(),
            client_keys=keys or None,
            password=account.password,
            preferred_auth=["publickey", *["password", "keyboard-interactive"] * has_password],
            public_key_auth=bool(keys),
            password_auth=has_password,
            kbdint_auth=has_password,
            host_based_auth=False,
            gss_auth=False,
            gss_kex=False,
            compression_algs=["none"],  # asyncssh does not limit what it decompresses; see `ssh_program`
            connect_timeout=account.connect_timeout + CONNECT,  # asyncssh counts the login in
            login_timeout=CONNECT,
            keepalive_interval=KEEPALIVE,
            host_key_alias=account.host_key_alias,
            **for_asyncssh(account.algorithms, account.host_keys),
        )
    except ValueError as error:
        raise InvalidConnection(
            f"asks for an unknown algorithm: {error}. See its extras ciphers and disabled_algorithms"
        ) from error
