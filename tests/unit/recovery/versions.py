"""Many versions, the command that prunes them, and what the disk and the status say of them."""

from __future__ import annotations

import os
import shutil

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.health import check_health
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PrunableVersion, pruning
from airflow_mdbackup.scheme.recovery.selection import Selection
from tests.guarantees.whatever_happens.soundness import files_of
from tests.pair import Pair
from tests.unit.common.present import NOW


def prune(
    pair: Pair, rules: KeepRules, words: tuple[str, ...] = (), *, carry_out: bool = True
) -> list[PrunableVersion]:
    with pruning(pair.mirror, Selection(words), rules, carry_out=carry_out) as (_, versions):
        return list(versions)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command, and return its exit status and output."""
    try:
        status = main(words)
    except SystemExit as end:
        status = int(str(end.code))
    told = capsys.readouterr()
    return status, told.out, told.err


def contents(pair: Pair) -> list[FileVersion]:
    with Timeline(pair.mirror) as past:
        return list(past.contents())


def walked(pair: Pair) -> tuple[int, int, int, int]:
    """Return what a walk of the disk counts: live files and their bytes, versions and theirs."""
    files = files_of(pair)
    versions = [len(file.content) for path, file in files.items() if b"/.old/" in path]
    live = [len(file.content) for path, file in files.items() if b"/.old/" not in path]
    return len(live), sum(live), len(versions), sum(versions)


def told(pair: Pair) -> tuple[int, ...]:
    """Return what the status says of the same."""
    disk = check_health(pair.mirror, None, NOW).disk
    assert disk is not None
    return disk[:4]


def many_versions(pair: Pair) -> None:
    """Make versions of files, of deleted ones too, and some in a directory that was moved out of the way."""
    for number in range(4):
        for name in ("changes", "deep/changes", "gone", "flips/below", "flips/beside"):
            pair.put(name, f"{name}, {number}".encode() * (number + 1))
        pair.put("same", b"same")
        pair.backup()
    os.unlink(pair.path("gone"))
    shutil.rmtree(pair.path("flips"))
    pair.put("flips", b"a file")
    pair.backup()
