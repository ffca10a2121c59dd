"""What tests of disks run on."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs begin on disks of a few megabytes."""
    monkeypatch.setattr("airflow_mdbackup.scheme.backup.free_space._RESERVE", 0)
