"""`plan` and `adopt` with a provider's Airflow connection, over a real, strictly locked SSH server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli.main import main
from demo.sshd import ProviderServer
from tests.integration.test_operators import Backup

SetConnection = Callable[[str, dict[str, Any]], None]


def test_an_rsync_tree_becomes_a_backup_whose_first_run_transfers_what_differs(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands find the connection as `airflow` does; the operators go on with what they left."""
    set_connection("backupop", provider.sftp_connection())
    set_connection("index", provider.ssh_connection())
    backup = Backup(provider, tmp_path / "dest")
    (source,) = backup.source
    keys = {"sftp_conn_id": "backupop", "source": source, "index": backup.index, "dest": str(backup.dest)}
    (tmp_path / "providers.yaml").write_text(json.dumps({"providers": {"srv1": keys}}))
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))
    for name in ("same", "changed"):
        (provider.tree / "backups" / name).write_text(name)
    copy = tmp_path / "copy"
    subprocess.run(["rsync", "-a", f"{provider.tree}/backups/", f"{copy}/"], check=True)
    (provider.tree / "backups/changed").write_text("since then")
    for command in (["plan", "srv1"], ["adopt", "srv1", "--tree", str(copy), "--at", source]):
        assert main(command) == 3
        told = capsys.readouterr().err
        assert "does not exist" in told and "--index FILE" in told
        assert "srv1: srv1:" not in told and ".." not in told
    assert copy.exists()

    def plan(*words: str) -> str:
        capsys.readouterr()
        assert main(["plan", "srv1", *words]) == 0
        return capsys.readouterr().out

    backup.build()
    assert plan() == f"+ {source}/changed\n+ {source}/same\n"
    assert not backup.dest.exists()
    assert main(["adopt", "srv1", "--tree", str(copy), "--at", source]) == 0
    assert "1 equal, 1 different, 0 only here, 0 only on the provider" in capsys.readouterr().err
    assert plan("--all") == f"* {source}/changed\n= {source}/same\n"
    assert backup.run("scheduled__1")["outcomes"] == {"pulled": 1}
    assert plan() == ""

    set_connection("backupop", {**provider.sftp_connection(), "port": 1})
    assert main(["plan", "srv1", "--format", "json"]) == 3
    assert json.loads(capsys.readouterr().out)["provider"] == "srv1"


def test_plan_before_the_first_run_says_that_a_run_builds_the_index(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without an index account nothing does, and nothing of the kind is said."""
    set_connection("backupop", provider.sftp_connection())
    keys = {"sftp_conn_id": "backupop", "source": "/backups", "chroot": provider.prefix or "/home/backupop"}
    keys |= {"dest": str(tmp_path / "dest"), "index": f"{provider.prefix}/.mdbackup/index.md5"}
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))

    def told(**more: str) -> str:
        (tmp_path / "providers.yaml").write_text(json.dumps({"providers": {"srv1": keys | more}}))
        assert main(["plan", "srv1"]) == 3
        return capsys.readouterr().err

    assert "Each run of this provider builds the index first" in told(ssh_conn_id="index")
    assert (
        "does not exist. Has it been built yet?" in (alone := told())
        and "builds the index first" not in alone
    )
