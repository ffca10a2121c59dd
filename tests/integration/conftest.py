"""Connections of the shared SSH server, as tasks get them: from the environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def set_connection(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], None]:
    """A function that defines an Airflow connection, such as `provider.sftp_connection()`, for one test."""

    def set_connection(connection_id: str, connection: dict[str, Any]) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{connection_id.upper()}", json.dumps(connection))

    return set_connection
