"""The connections of the tests: an Airflow that several of them share has all of these in its environment.

All lead to one SSH server, by different keys, or to where nobody answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_ssh_private_key,
)

from demo.processes import CLOSED_PORT
from demo.sshd import ProviderServer

OTHER_HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJHv6ZrIrX0XxfVb0tD7bIsVWmI8o4yvfVZqfT4mFtKk"
PASSPHRASE = "correct-horse-battery-staple"
PASSWORD = "tr0ub4dor-and-3"
GARBAGE = "c2VjcmV0LWtleS10aGF0LWlzLXNwb2lsdA"


def environment(server: ProviderServer, keys: Path, mail_port: int) -> dict[str, str]:
    """Return the environment variables that define all connections.

    :param keys: directory, made here, with the keys that connections hold themselves.
    """
    keys.mkdir()
    shutil.copy(server.backupop_key, keys / "plain")
    _lock(server.backupop_key, keys / "locked")
    _lock(server.index_key, keys / "index")
    backupop, index = server.sftp_connection(), server.ssh_connection()
    spoilt = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{GARBAGE}\n-----END OPENSSH PRIVATE KEY-----\n"
    smtp = {"disable_ssl": True, "disable_tls": True, "timeout": 10, "retry_limit": 1}
    connections = {
        "backupop": backupop,
        "index": index,
        "imposter": server.ssh_connection(host_key=OTHER_HOST_KEY),
        "nowhere": index | {"port": CLOSED_PORT},
        # Airflow itself ends a task's programs, such as `ssh`; what goes over asyncssh, only the task does.
        # `ssh` does not know the second of these ciphers.
        "asyncssh": server.sftp_connection(ciphers=["aes128-gcm@openssh.com", "seed-cbc@ssh.com"]),
        "plain": _with_key(backupop, (keys / "plain").read_text()),
        "locked": _with_key(backupop, (keys / "locked").read_text(), PASSPHRASE) | {"password": PASSWORD},
        "index_locked": _with_key(index, (keys / "index").read_text(), PASSPHRASE),
        "spoilt": _with_key(backupop, spoilt),
        "password": {**_with_key(backupop, None), "password": PASSWORD},
        "mail": {"conn_type": "smtp", "host": "127.0.0.1", "port": mail_port, "extra": smtp},
    }
    return {f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in connections.items()}


def _lock(key: Path, copy: Path) -> None:
    """Write a copy of a private key that needs PASSPHRASE; ssh-keygen wants that on its command line."""
    private = load_ssh_private_key(key.read_bytes(), None)
    passphrase = BestAvailableEncryption(PASSPHRASE.encode())
    copy.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, passphrase))


def _with_key(connection: dict[str, Any], key: str | None, passphrase: str | None = None) -> dict[str, Any]:
    """Return a connection that has its key within, instead of a file's name."""
    extra = {name: value for name, value in connection["extra"].items() if name != "key_file"}
    if key is not None:
        extra["private_key"] = key
    if passphrase is not None:
        extra["private_key_passphrase"] = passphrase
    return {**connection, "extra": extra}
