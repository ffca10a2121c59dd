"""Connections of the shared SSH server, as tasks get them: from the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import airflow_mdbackup.hooks.connection as connection_module
import airflow_mdbackup.hooks.session as session_module
from airflow_mdbackup.hooks import provider as provider_module
from airflow_mdbackup.triggers import build_provider_index as trigger_module
from tests.integration.over_ssh import FakeSsh

LONG_LINE = provider_module.LONG_ROUND_TRIP
SOONEST = trigger_module._EARLIEST_EVENT


@pytest.fixture(autouse=True)
def short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no line for a long one because the machine is busy: `ssh` is not used over those."""
    monkeypatch.setattr(provider_module, "LONG_ROUND_TRIP", 2.0)


@pytest.fixture(autouse=True)
def no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler is here to be late."""
    monkeypatch.setattr(trigger_module, "_EARLIEST_EVENT", 0.0)


@pytest.fixture
def set_connection(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], None]:
    """A function that defines an Airflow connection, such as `provider.sftp_connection()`, for one test."""

    def set_connection(connection_id: str, connection: dict[str, Any]) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{connection_id.upper()}", json.dumps(connection))

    return set_connection


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an empty ~/.ssh, so that nothing depends on who runs the tests."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    """A function that puts a script before the real ssh in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def fake_ssh(script: str) -> None:
        (folder / "ssh").write_text(script)
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return fake_ssh


@pytest.fixture
def no_asyncssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that goes on over asyncssh."""

    def fail(_: object) -> None:
        raise AssertionError("a second attempt, over asyncssh")

    monkeypatch.setattr(provider_module, "Connection", fail)


@pytest.fixture(params=["ssh", "asyncssh"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way after the other: the only one that there is, and must do."""
    if request.param == "ssh":
        request.getfixturevalue("no_asyncssh")
    else:
        monkeypatch.setattr(provider_module, "program_for", lambda account: None)
    return str(request.param)


@pytest.fixture
def connect_within(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets how long a connection may take, in seconds."""

    def connect_within(seconds: int) -> None:
        for module in (connection_module, session_module):
            monkeypatch.setattr(module, "CONNECT", seconds)

    return connect_within
