"""Indexers to run, and a tree for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.unit.provider_side import indexing
from tests.unit.provider_side.indexing import Indexer


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Directories to be used as PATH: one with this Python, one with busybox alone, one where sh is dash."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("python", "busybox", "dash"):
        (folder / name).mkdir()
    (folder / "python" / "python3").symlink_to(sys.executable)
    (folder / "dash" / "sh").symlink_to(shutil.which("dash"))
    busybox = shutil.which("busybox")
    for applet in subprocess.check_output([busybox, "--list"], text=True).split():
        (folder / "busybox" / applet).symlink_to(busybox)
    return {
        "python": f"{folder}/python:/usr/bin:/bin",
        "dash": f"{folder}/dash:/usr/bin:/bin",
        "busybox": f"{folder}/busybox",
    }


@pytest.fixture(params=["python", "dash", "busybox"])
def indexer_program(request, programs, monkeypatch):
    if request.param != "python":
        # The command names /bin/sh, which is whatever the machine has.
        shell = shutil.which("sh", path=programs[request.param])
        monkeypatch.setattr(indexing, "shell_command", lambda: f"exec {shell} -s")
    return Indexer(request.param, programs[request.param])


@pytest.fixture
def python_program(programs):
    return Indexer("python", programs["python"])


@pytest.fixture
def chroot(tmp_path):
    (tmp_path / "chroot" / "backups").mkdir(parents=True)
    return os.fsencode(tmp_path / "chroot")
