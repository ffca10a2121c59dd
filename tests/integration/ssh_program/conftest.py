"""A home without keys, and programs called ssh, for the way over ssh."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import airflow_mdbackup.hooks.connection as connection_module
import airflow_mdbackup.hooks.session as session_module
from airflow_mdbackup.hooks import provider as provider_module
from tests.integration.ssh_program.over_ssh import FakeSsh


@pytest.fixture(autouse=True)
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
