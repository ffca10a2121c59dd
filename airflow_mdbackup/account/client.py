"""A paramiko client of an account, for questions that no other library asks.

What an Airflow connection says is found out by :mod:`.hooks.connection`, as for backups.

What this does not give: host certificates, chacha20-poly1305, and whatever else paramiko lacks. An account
that can only be reached by these can be backed up, and not audited, which is told as that.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from io import StringIO
from typing import Any

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.hooks.connection import CONNECT, SshAccount
from airflow_mdbackup.hooks.session import refused, said, wrong_host_key
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost

_KEYS: dict[str, Any] = {
    "ssh-rsa": paramiko.RSAKey,
    "ssh-ed25519": paramiko.Ed25519Key,
    "ecdsa-sha2-nistp256": paramiko.ECDSAKey,
    "ecdsa-sha2-nistp384": paramiko.ECDSAKey,
    "ecdsa-sha2-nistp521": paramiko.ECDSAKey,
}
_BY_PARAMIKO = "An audit connects by paramiko, which knows no"


def client_of(account: SshAccount, transport: type[BoundedTransport]) -> paramiko.SSHClient:
    """Return a connected client.

    :param transport: by which it connects.
    :raises AccessRefused: the host key is not the expected one, the account is refused, or paramiko cannot
        do what the connection takes.
    :raises ConnectionLost: the server cannot be reached.
    """
    trusted = _Trusted(account)
    key = _key(account) if account.keys else None
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(trusted)  # which is asked, since it has no host keys else
    proxy: paramiko.ProxyCommand | None = None
    try:
        if account.proxy is not None:
            proxy = paramiko.ProxyCommand(shlex.join(account.proxy_command))
        client.connect(
            hostname=account.address,
            port=account.port,
            username=account.user,
            password=account.password,
            pkey=key,
            sock=proxy,
            look_for_keys=False,
            allow_agent=False,
            timeout=account.patience,
            banner_timeout=CONNECT,
            auth_timeout=CONNECT,
            transport_factory=lambda *args, **options: trusted.asked_for(transport(*args, **options)),
        )
    except BaseException as error:
        client.close()
        if proxy is not None:
            with suppress(OSError):  # it has ended already
                proxy.close()
        raise _told(account, error) from error
    return client


def _told(account: SshAccount, error: BaseException) -> BaseException:
    """Return what an error of paramiko's is told as."""
    where = account.where
    if isinstance(error, IncompatiblePeer) and "no acceptable" in said(error):
        return AccessRefused(
            f"{where}: the server and paramiko, by which an audit connects, have no algorithm in common"
            f" ({said(error)}). A backup may find one all the same. Have sshd_config of the server allow"
            " another one, or see the connection's extras ciphers and disabled_algorithms"
        )
    if isinstance(error, paramiko.AuthenticationException):
        # paramiko has the same type for a refused key as for a server that went away in the middle.
        if "timeout" in said(error).lower() or "EOF" in said(error):
            return ConnectionLost(f"{where}: {said(error)}")
        return refused(account, said(error))
    if isinstance(error, paramiko.SSHException | OSError | EOFError):
        return ConnectionLost(f"{where}: {said(error)}")
    return error


class _Trusted(paramiko.MissingHostKeyPolicy):
    """The host keys that a server may have. paramiko itself knows only one of each kind."""

    def __init__(self, account: SshAccount) -> None:
        keys = account.host_keys
        self._account = account
        self._keys = [key for key in keys.trusted if key not in keys.revoked]
        if keys.authorities and not keys.trusted:
            raise AccessRefused(
                f"{account.where}: only an authority for the server's host key is in known_hosts."
                f" {_BY_PARAMIKO} host certificates: pin the key itself in the connection's extra host_key,"
                " or add it to known_hosts"
            )

    def asked_for(self, transport: BoundedTransport) -> BoundedTransport:
        """Have a transport ask for the kinds of keys that are trusted first."""
        options = transport.get_security_options()
        trusted = [name.decode() for key in self._keys for name in key.sig_algorithms]
        known = list(options.key_types)
        options.key_types = sorted(known, key=lambda name: name not in trusted)
        return transport

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        if key.asbytes() in [trusted.public_data for trusted in self._keys]:
            return
        expected = " or ".join(each.get_fingerprint() for each in self._keys[:3]) or "one that is not revoked"
        raise wrong_host_key(self._account, f"it has {key.fingerprint}, expected was {expected}")


def _key(account: SshAccount) -> paramiko.PKey:
    """Return the first of the account's keys, with its certificate, if there is one."""
    first, _, certificate = account.keys[0]
    kind = first.get_algorithm()
    if kind not in _KEYS:
        raise AccessRefused(
            f"{account.where}: the account's key is one of {kind}. {_BY_PARAMIKO} such keys: for an audit,"
            " have the account take another one, such as ssh-ed25519"
        )
    # Of ECDSA, paramiko reads no other form that asyncssh writes.
    form = "pkcs1-pem" if kind.startswith("ecdsa-") else "openssh"
    key: paramiko.PKey = _KEYS[kind].from_private_key(StringIO(first.export_private_key(form).decode()))
    if certificate is not None:
        key.load_certificate(certificate.export_certificate().decode())
    return key
