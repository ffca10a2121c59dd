"""A machine of its own to be set up by the printed script."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import main
from demo.provisioned import COPIED, DEBIAN, EMPTY, ProvisionedServer, connections
from tests.integration.provision.machine import Provision, tree


@pytest.fixture(scope="module", autouse=True)
def machine_itself_is_unchanged() -> Iterator[None]:
    """After all of these tests, accounts, SSH server and the rest of /etc are what they were."""

    def mounts() -> list[str]:
        points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        return [point for point in points if point.startswith((*COPIED, *EMPTY))]

    before = tree(Path("/etc")), os.listdir("/home"), mounts()
    yield
    assert (tree(Path("/etc")), os.listdir("/home"), mounts()) == before
    assert not Path("/usr/local/lib/mdbackup").exists()


@pytest.fixture
def provision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Provision:
    """A function that prints a script on B: for `web`, whose index B asks for, or `self`, which builds it."""
    providers = f"""
    providers:
      web: {{sftp_conn_id: web_backupop, ssh_conn_id: web_index, chroot: /home/backupop, source: /backups,
             dest: {tmp_path}/web}}
      self: {{sftp_conn_id: self_backupop, source: /backups, dest: {tmp_path}/self, exclude: ["it's *.tmp"]}}
    """
    (tmp_path / "providers.yaml").write_text(providers)
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))

    def provision(*words: str, host: str = "127.0.0.1") -> str:
        status = main(["provision", *words, "--host", host])
        told = capsys.readouterr()
        assert status == 0, told.err
        return told.out

    return provision


@pytest.fixture(params=[DEBIAN], ids=["debian"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ProvisionedServer]:
    """A machine with files to back up in /srv/www, and a running sshd."""
    with ProvisionedServer(tmp_path / "server", sshd_config=request.param) as server:
        (server.root / "srv/www").mkdir()
        (server.root / "srv/www/alpha").write_text("content of alpha\n")
        server.start_sshd()
        yield server


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, object]]:
    """A function that pastes the lines which the script printed."""

    def connect(output: str) -> dict[str, object]:
        found = connections(output)
        for connection_id, connection in found.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{connection_id.upper()}", json.dumps(connection))
        return dict(found)

    return connect
