"""What tests of names and file systems run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guarantees.disks.filesystems import MB, mounted


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs begin on disks of a few megabytes."""
    monkeypatch.setattr("airflow_mdbackup.scheme.backup.free_space._RESERVE", 0)


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A directory for what syncs often: in memory, if that can be mounted."""
    if os.geteuid() != 0:
        yield tmp_path
    else:
        with mounted("tmpfs", tmp_path / "fast", 64 * MB) as folder:
            yield folder
