"""`init` with connections that a task could not use, and with some that it could."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli.main import main
from demo.sshd import ProviderServer

SetConnection = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], tuple[int, str]]:
    """A function that runs the command for one provider, and returns its exit status and what it prints."""
    keys = {"sftp_conn_id": "backupop", "ssh_conn_id": "index", "chroot": "/", "source": "/backups"}
    file = tmp_path / "providers.yaml"
    file.write_text(json.dumps({"providers": {"srv1": keys | {"dest": str(tmp_path / "dest")}}}))
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(file))

    def init() -> tuple[int, str]:
        status = main(["init"])
        return status, capsys.readouterr().out

    return init


def test_init_is_content_with_connections_that_a_task_could_use(
    provider: ProviderServer, set_connection: SetConnection, init: Callable[[], tuple[int, str]]
) -> None:
    """It says which command asks the servers, since it does not."""
    set_connection("backupop", provider.sftp_connection())
    set_connection("index", provider.ssh_connection())
    status, printed = init()
    assert status == 0 and "1 provider: all its connections and pools exist" in printed
    assert "airflow mdbackup audit" in printed


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ({"login": ""}, "the connection backupop has no login"),
        ({"extra": {"key_file": "/nowhere/key"}}, "/nowhere/key"),
        ({"extra": {"private_key": "AAAA"}}, "the connection backupop has"),
        ({"extra": {"no_host_key_check": True}}, "trusts any server"),
        ({"port": "ssh"}, "backupop"),
        ({"extra": "[1]"}, "the connection backupop cannot be read"),
    ],
)
def test_init_reports_a_connection_that_no_task_could_use_as_a_task_does(
    provider: ProviderServer,
    set_connection: SetConnection,
    init: Callable[[], tuple[int, str]],
    spoilt: dict[str, Any],
    why: str,
) -> None:
    """That it exists is not enough; and the other one, which is missing, is reported, too."""
    set_connection("backupop", provider.sftp_connection() | spoilt)
    status, printed = init()
    assert status == 1 and "connections and pools exist" not in printed
    assert "connection backupop of srv1: does NOT work on this machine: " in printed and why in printed
    assert "connection index of srv1: MISSING" in printed
