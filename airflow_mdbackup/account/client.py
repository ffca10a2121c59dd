"""A paramiko client of an account, for questions that no other library asks.

What an Airflow connection says is found out by :mod:`.hooks.connection`, as for backups.

What this does not give: host certificates, chacha20-poly1305, and whatever else paramiko lacks. An account
that can only be reached by these can be backed up, and not audited.
"""

from __future__ import annotations

from io import StringIO
from typing import Any

import asyncssh
import paramiko
from paramiko.config import SSH_PORT

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.hooks.connection import CONNECT, SshAccount
from airflow_mdbackup.hooks.session import refused, said
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost

_KEYS: dict[str, Any] = {
    "ssh-rsa": paramiko.RSAKey,
    "ssh-ed25519": paramiko.Ed25519Key,
}  # all others are of ECDSA


def client_of(account: SshAccount, transport: type[BoundedTransport]) -> paramiko.SSHClient:
    """Return a connected client.

    :param transport: by which it connects.
    :raises AccessRefused: the host key is not the expected one, or the account is refused.
    :raises ConnectionLost: the server cannot be reached, or paramiko and it have too little in common.
    """
    where = account.where
    client = paramiko.SSHClient()
    _trust(client, account)
    command = account.options.proxy_command
    try:
        client.connect(
            hostname=account.address,
            port=account.port,
            username=account.user,
            password=account.password,
            pkey=None if account.key is None else _key(account.key),
            sock=paramiko.ProxyCommand(" ".join(command)) if command else None,
            look_for_keys=False,
            allow_agent=False,
            timeout=account.patience,
            banner_timeout=CONNECT,
            auth_timeout=CONNECT,
            transport_factory=transport,
        )
    except paramiko.BadHostKeyException as error:
        shown, expected = error.key.fingerprint, error.expected_key.fingerprint
        raise AccessRefused(
            f"{where}: the server's host key is not the expected one (it has {shown}, expected was"
            f" {expected}). Somebody may be in between. If the server really has a new key, pin that in the"
            " connection's extra host_key"
        ) from error
    except paramiko.AuthenticationException as error:
        # paramiko has the same type for a refused key as for a server that went away in the middle.
        if "timeout" in said(error).lower() or "EOF" in said(error):
            raise ConnectionLost(f"{where}: {said(error)}") from error
        raise refused(account, said(error)) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise ConnectionLost(f"{where}: {said(error)}") from error
    return client


def _trust(client: paramiko.SSHClient, account: SshAccount) -> None:
    name = account.address if account.port == SSH_PORT else f"[{account.address}]:{account.port}"
    for key in account.host_keys.trusted:
        kind = key.get_algorithm()
        revoked = key in account.host_keys.revoked
        if not revoked:
            client.get_host_keys().add(name, kind, _KEYS.get(kind, paramiko.ECDSAKey)(data=key.public_data))


def _key(key: asyncssh.SSHKey) -> Any:
    kind = _KEYS.get(key.get_algorithm(), paramiko.ECDSAKey)
    return kind.from_private_key(StringIO(key.export_private_key().decode()))
