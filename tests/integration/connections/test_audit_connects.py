"""The connections of an audit, which are by paramiko."""

from __future__ import annotations

import threading
from pathlib import Path

import asyncssh
import pytest

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.hooks.provider import account
from tests.integration.connections.ways import Place, set_up, tried
from tests.integration.connections_table import REFUSED, Case
from tests.integration.ssh_servers import Sshd
from tests.waiting import until


def audit() -> str:
    """Connect as an audit does."""
    client_of(account("backup"), BoundedTransport).close()
    return BY_PARAMIKO


BY_PARAMIKO = "paramiko"
_KEYS_OF_HOST = "[127.0.0.1]:{port} {host ed25519}\n"
_OTHER_KINDS = {
    kind: asyncssh.generate_private_key(kind).export_public_key().decode().strip()
    for kind in ("ssh-dss", "ssh-ed448")
}


def _private(kind: str) -> str:
    return asyncssh.generate_private_key(kind).export_private_key().decode()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("", config="Host *\n  ProxyCommand {proxy} %h %p\n"), ""),
        (Case("", known_hosts=f"{_KEYS_OF_HOST}[127.0.0.1]:{{port}} {_OTHER_KINDS['ssh-dss']}\n"), ""),
        (Case("", known_hosts=f"{_KEYS_OF_HOST}[127.0.0.1]:{{port}} {_OTHER_KINDS['ssh-ed448']}\n"), ""),
        (Case("", known_hosts=_KEYS_OF_HOST + "[127.0.0.1]:{port} {host other}\n"), ""),
        (Case("", known_hosts="[127.0.0.1]:{port} {host other}\n" + _KEYS_OF_HOST), ""),
        (Case("", extra={"host_key": "{host rsa}"}), ""),
        (Case("", extra={"host_key": "{host ecdsa}"}), ""),
        (Case("", extra={"key_file": "{keys}/ecdsa"}), ""),
        (Case("", extra={"key_file": "{keys}/rsa"}), ""),
        (Case("", extra={"key_file": "{keys}/certified"}), ""),
        (Case("", known_hosts="@cert-authority * {host ca}\n"), "does not support host certificates"),
        (Case("", extra={"host_key": "{host other}"}), "host key is not the expected one"),
        (Case("", extra={"key_file": None, "private_key": _private("ssh-ed448")}), "of type ssh-ed448"),
        (Case("", extra={"key_file": "{keys}/wrong"}), "refuses the account's key"),
        (Case("", server="of sntrup761"), "have no algorithm in common"),
    ],
)  # fmt: skip
def test_audit_connects_or_is_refused_with_the_reason(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, says: str
) -> None:
    """And leaves no connection or thread of its own behind."""
    set_up(case, place, place.server(case.server), tmp_path / "home", monkeypatch)
    came, words = tried(audit)
    assert came == (REFUSED if says else BY_PARAMIKO), words
    assert says in words
    until(lambda: not [one for one in threading.enumerate() if isinstance(one, BoundedTransport)])


def failed_logins(server: Sshd) -> int:
    return server.log_text().count("Failed publickey")
