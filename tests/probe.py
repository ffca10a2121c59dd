"""Tests that `unit/project/test_isolation.py` runs in a pytest of their own; nobody else collects them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from demo.sshd import ProviderServer
from tests.guarantees.disks.filesystems import MB, mounted


def test_that_goes_on_until_it_is_killed(provider_server: ProviderServer, tmp_path: Path) -> None:
    """It has mounted a disk, and a server is running."""
    with mounted("exfat", tmp_path / "disk", 16 * MB):
        Path(os.environ["PROBE"]).write_text(str(tmp_path))
        time.sleep(60)


@pytest.mark.parametrize("name", ["it's"])
def test_that_fails(name: str) -> None:
    assert name == "its"
