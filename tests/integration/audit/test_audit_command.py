"""The command that audits a provider: what it prints, and its status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli.audit import run
from airflow_mdbackup.cli.main import main
from demo.processes import CLOSED_PORT
from demo.sshd import _namespaces_allowed
from tests.integration.audit.loose_server import SetConnection, SetUp, serving

pytestmark = pytest.mark.skipif(
    not _namespaces_allowed(),
    reason="needs root and namespaces: accounts and a chroot as the design has them",
)


def test_words_of_a_server_neither_act_on_a_terminal_nor_as_markup(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are shown for what they are."""
    stand_in = "#!/bin/sh\nprintf '\\033]0;owned\\007[red]x[/nonsense]'\n"
    with serving(SetUp(stand_in=stand_in), tmp_path, set_connection, monkeypatch):
        assert run(argparse.Namespace(provider="web", format="text")) == 1
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\x07" not in output
    assert "\\x1b]0;owned\\x07[red]x" in output


def test_table_tells_verdicts_and_what_to_change(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line to change stands below the tables once more, in one piece, so that it can be copied."""
    with serving(SetUp({"PermitTTY": "yes"}), tmp_path, set_connection, monkeypatch):
        assert run(argparse.Namespace(provider="web", format="text")) == 1
    output = capsys.readouterr().out
    assert "web: backup account backupop (in sshd_config: Match User backupop)" in output
    assert "no PTY" in output and "looser" in output
    assert "- backup account: its Match block: PermitTTY no (no PTY)\n" in output


def test_provider_that_indexes_itself_has_one_account(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one connection is made."""
    with serving(SetUp(), tmp_path, set_connection, monkeypatch) as server:
        file = tmp_path / "providers.yaml"
        file.write_text(file.read_text().replace("    ssh_conn_id: index\n", ""))
        connections = server.connections()
        assert run(argparse.Namespace(provider="web", format="json")) == 0
        assert server.connections() - connections == 1
    assert list(json.loads(capsys.readouterr().out)["accounts"]) == ["backup account"]


def test_server_that_known_hosts_has_is_pinned(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As good as the connection's own host_key, on this worker."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pinned = {"host_key": None}
    with serving(SetUp(sftp_extra=pinned, ssh_extra=pinned), tmp_path, set_connection, monkeypatch) as server:
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {server.host_key}\n")
        assert run(argparse.Namespace(provider="web", format="json")) == 0
    assert "in known_hosts of this worker" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "mail",
            "providers: {web: {sftp_conn_id: a, source: /b, dest: /d}}",
            "there is no provider 'mail' in ",
        ),
        ("web", "providers: {web: {sftp_conn_id: a, source: b, dest: /d}}", "source"),
        ("web", "providers: [", "providers.yaml"),
    ],
)
def test_provider_that_is_not_configured_is_a_mistake_of_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    told: str,
) -> None:
    """Exit status 2, and the reason on standard error."""
    file = tmp_path / "providers.yaml"
    file.write_text(content)
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(file))
    assert main(["audit", name]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert told in output.err


@pytest.mark.parametrize(
    ("connection", "told"),
    [
        ({"port": CLOSED_PORT}, f"127.0.0.1:{CLOSED_PORT}"),
        ({"login": "mdbackup-index"}, "refuses the account's key"),
    ],
    ids=["nothing listens", "not its key"],
)
def test_account_that_cannot_be_reached_has_a_status_of_its_own(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connection: dict[str, Any],
    told: str,
) -> None:
    """Nothing was found out, neither good nor bad."""
    with serving(SetUp(), tmp_path, set_connection, monkeypatch) as server:
        set_connection("backupop", server.sftp_connection() | connection)
        assert run(argparse.Namespace(provider="web", format="text")) == 3
    assert told in capsys.readouterr().err


def test_connections_kept_in_the_database_of_airflow_are_found(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most are there, and Airflow looks there for its services and its own commands only."""
    airflow = [sys.executable, "-m", "airflow"]
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    with serving(SetUp(), tmp_path, set_connection, monkeypatch) as server:
        monkeypatch.delenv("AIRFLOW_CONN_BACKUPOP")
        connection = json.dumps(server.sftp_connection())
        for command in (["db", "migrate"], ["connections", "add", "backupop", "--conn-json", connection]):
            subprocess.run([*airflow, *command], check=True, capture_output=True)
        code = (
            "import argparse, sys; from airflow_mdbackup.cli.audit import run;"
            "sys.exit(run(argparse.Namespace(provider='web', format='json')))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tight"] is True
