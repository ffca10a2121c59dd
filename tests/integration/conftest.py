"""Connections of the shared SSH server, as tasks get them: from the environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from airflow_mdbackup.hooks import provider as provider_module
from airflow_mdbackup.triggers import build_provider_index as trigger_module

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
