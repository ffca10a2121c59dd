"""A paramiko client for an account, to try what the other libraries do not offer.

:mod:`.hooks.connection` parses the Airflow connection, as for backups.

Limitations: host certificates, chacha20-poly1305, and whatever else paramiko lacks. An account that needs
them can be backed up, but not audited, and the audit says so.
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
from airflow_mdbackup.hooks.failures import message_of, mismatch, refused, wrong_host_key
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost

_KEYS: dict[str, Any] = {
    "ssh-rsa": paramiko.RSAKey,
    "ssh-ed25519": paramiko.Ed25519Key,
    "ecdsa-sha2-nistp256": paramiko.ECDSAKey,
    "ecdsa-sha2-nistp384": paramiko.ECDSAKey,
    "ecdsa-sha2-nistp521": paramiko.ECDSAKey,
}
_PARAMIKO_LACKS = "An audit connects by paramiko, which does not support"


def client_of(account: SshAccount, transport: type[BoundedTransport]) -> paramiko.SSHClient:
    """Return a connected client.

    :param transport: the class of its transport.
    :raises AccessRefused: the host key is not the expected one, the login is refused, or paramiko does not
        support what the connection needs.
    :raises ConnectionLost: the server cannot be reached.
    """
    trusted = _Trusted(account)
    key = _key(account) if account.keys else None
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(trusted)  # decides alone, since the client has no host keys
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
            timeout=account.connect_timeout,
            banner_timeout=CONNECT,
            auth_timeout=CONNECT,
            transport_factory=lambda *args, **options: trusted.preferred_by(transport(*args, **options)),
        )
    except BaseException as error:
        client.close()
        if proxy is not None:
            with suppress(OSError):  # it has already ended
                proxy.close()
        raise _translated(account, error) from error
    return client


def _translated(account: SshAccount, error: BaseException) -> BaseException:
    """Return our error for one of paramiko's."""
    where = account.where
    if isinstance(error, IncompatiblePeer) and "no acceptable" in message_of(error):
        return AccessRefused(
            f"{where}: the server and paramiko, which an audit uses, have no algorithm in common"
            f" ({message_of(error)}). A backup may still have one. Allow another one in the server's"
            " sshd_config, or see the connection's extras ciphers and disabled_algorithms"
        )
    if isinstance(error, paramiko.AuthenticationException):
        # paramiko raises the same error for a refused key and for a server that hangs up during the login.
        if "timeout" in message_of(error).lower() or "EOF" in message_of(error):
            return ConnectionLost(f"{where}: {message_of(error)}")
        return refused(account, message_of(error))
    if isinstance(error, paramiko.SSHException | OSError | EOFError):
        return ConnectionLost(f"{where}: {message_of(error)}")
    return error


class _Trusted(paramiko.MissingHostKeyPolicy):
    """The host keys that a server may have. paramiko itself supports only one of each type."""

    def __init__(self, account: SshAccount) -> None:
        keys = account.host_keys
        self._account = account
        self._keys = [key for key in keys.trusted if key not in keys.revoked]
        if keys.authorities and not keys.trusted:
            raise AccessRefused(
                f"{account.where}: known_hosts has only an authority for its host key."
                f" {_PARAMIKO_LACKS} host certificates: pin the key itself in the extra host_key,"
                " or add it to known_hosts"
            )

    def preferred_by(self, transport: BoundedTransport) -> BoundedTransport:
        """Return the transport, with the trusted types of keys first in its preferences."""
        options = transport.get_security_options()
        trusted = [name.decode() for key in self._keys for name in key.sig_algorithms]
        known = list(options.key_types)
        options.key_types = sorted(known, key=lambda name: name not in trusted)
        return transport

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        if key.asbytes() in [trusted.public_data for trusted in self._keys]:
            return
        raise wrong_host_key(self._account, mismatch(self._account, key.fingerprint))


def _key(account: SshAccount) -> paramiko.PKey:
    """Return the first of the account's keys, with its certificate, if it has one."""
    first, _, certificate = account.keys[0]
    kind = first.get_algorithm()
    if kind not in _KEYS:
        raise AccessRefused(
            f"{account.where}: the account's key is of type {kind}. {_PARAMIKO_LACKS} such keys: for an"
            " audit, authorize another one for the account, such as ssh-ed25519"
        )
    # The only form of ECDSA keys that asyncssh writes and paramiko reads.
    form = "pkcs1-pem" if kind.startswith("ecdsa-") else "openssh"
    key: paramiko.PKey = _KEYS[kind].from_private_key(StringIO(first.export_private_key(form).decode()))
    if certificate is not None:
        key.load_certificate(certificate.export_certificate().decode())
    return key
