"""A person at a terminal on server B, who takes over what another tool has made."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.recovery.health import check_health
from tests.guarantees.crash.crash import crash_at

if TYPE_CHECKING:
    from tests.pair import Pair

GOOD, WRONG, REFUSED, UNREACHED = range(4)


class Terminal:
    """Somebody who works on server B, which has a configuration of one provider."""

    def __init__(self, pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pair = pair
        self.file = folder / "providers.yaml"
        self.capsys = capsys
        self.configure()

    def configure(self, **keys: Any) -> None:
        keys = {"sftp_conn_id": "nowhere", "source": str(self.pair.a), **keys}
        keys["dest"] = str(self.pair.mirror.dest)
        self.file.write_text(json.dumps({"providers": {"srv1": keys}}))

    def run(self, command: str, *words: str | Path, status: int = GOOD, index: bool = True) -> str:
        """Give a command, which must end so, and return what it prints on standard output."""
        more = ["--index", os.fsdecode(self.pair.index)] if index else []
        where = ["--providers-file", str(self.file)]
        self.capsys.readouterr()
        found = main([command, "srv1", *map(str, words), *more, *where])
        told = self.capsys.readouterr()
        self.told = told.err
        assert found == status, told.err
        return told.out

    def cut_off(
        self, there: Callable[[], bool], *words: str | Path, first: int = 1, index: bool = True
    ) -> None:
        """Give a command until a kill leaves what is wanted, each time a few steps later."""
        for number in count(first, 3):
            if there():
                return
            assert crash_at(number, partial(self.run, *words, index=index))

    def plan(self, *words: str, status: int = GOOD) -> list[str]:
        """Return the plan, with names relative to A's tree."""
        lines = self.run("plan", *words, status=status).splitlines()
        return [line.replace(f"{self.pair.a}/", "").replace("'", "") for line in lines]


def on_disk(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return all that lies below a directory: inode, time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = status.st_ino, status.st_mtime_ns, content
    return found


def rsynced(pair: Pair, folder: Path) -> Path:
    """Let rsync copy A's tree, as a script did for years, and return the copy."""
    copy = folder / "rsynced"
    folder.mkdir(exist_ok=True)
    subprocess.run(["rsync", "-a", f"{pair.a}/", f"{copy}/"], check=True)
    return copy


def disk_of(pair: Pair) -> tuple[int, ...]:
    """Return what the status tells: live files and their bytes, versions and theirs."""
    disk = check_health(pair.mirror, None, datetime.now(UTC)).disk
    assert disk is not None
    return disk[:4]
