"""A disk that becomes full all the same, and how amounts are told."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup import commit_content
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.common import units as units_module
from airflow_mdbackup.scheme.errors import DestinationBroken, DestinationFull
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair
from tests.unit.backup.small_disk import MB, RESERVE, Disk, plan_run, put_all


@pytest.mark.parametrize("size", [MB, 100_000], ids=["large files", "small files"])
def test_a_disk_that_becomes_full_is_told_and_a_retry_goes_on(pair: Pair, disk: Disk, size: int) -> None:
    """Something else took the room; what was staged is not transferred again."""
    put_all(pair, 6 * MB // size, size)
    run = plan_run(pair)
    disk.leave(RESERVE + 20 * MB)

    def connect() -> Reader:
        disk.fill(3 * MB)
        return pair.connect()

    where = f"srv1: the disk of {pair.mirror.dest} on {socket.gethostname()} is full"
    with pytest.raises(DestinationFull, match=f"{where}: .*No space left on device.*Free some space") as told:
        pull(pair.mirror, run, 0, connect)
    assert isinstance(told.value.__cause__, OSError) and told.value.__cause__.errno == errno.ENOSPC
    here = [file for file in pair.mirror.staging.iterdir() if file.suffix != ".part"]
    assert here
    disk.empty()
    summary = pair.pull(run, pair.plan)[0]
    assert summary.outcomes == {"pulled": 6 * MB // size}
    assert summary.transferred <= (6 * MB // size - len(here)) * size
    assert pair.finish(run).failed == 0
    assert pair.index_b() == pair.index_a()
    for path, digest in pair.index_a().items():
        live = Path(os.fsdecode(os.fsencode(pair.mirror.files) + path))
        assert hashlib.md5(live.read_bytes()).hexdigest().encode() == digest


def test_a_disk_that_is_full_when_copies_are_made_is_told_too(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit makes copies of equal files; a retry goes on from there."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"the same")
    run = plan_run(pair)
    pair.pull(run, pair.plan)

    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(DestinationFull, match="Free some space"):
        patched.setattr(commit_content, "copy_of", full)
        pair.finish(run)
    assert not pair.finish(run).failed and len(pair.index_b()) == 2


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EDQUOT, DestinationFull), (errno.EIO, DestinationBroken)]
)
def test_a_quota_that_ends_is_told_like_a_full_disk_and_a_broken_disk_is_not(
    pair: Pair, number: int, kind: type[Exception]
) -> None:
    """There, freeing room would not help."""
    pair.mirror.claim()
    with pytest.raises(kind, match=re.escape(os.strerror(number))), pair.mirror.translate_os_errors():
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (24, "24 B"), (999, "999 B"), (1500, "1.5 kB"), (64 * MB, "67.1 MB"), (10**12, "1.0 TB")],
)
def test_amounts_are_told_in_units_for_people(size: int, told: str) -> None:
    """Powers of ten, as in the configuration."""
    assert units_module.format_size(size) == told
    assert units_module.format_rate(size) == f"{told}/s"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "no versions"), (1, "1 version"), (2, "2 versions"), (1200, "1,200 versions")]
)
def test_counts_have_a_plural_where_there_is_more_than_one(number: int, text: str) -> None:
    assert units_module.format_count(number, "version") == text
    assert units_module.format_count(number, "entry", "entries") == text.replace("version", "entry").replace(
        "entrys", "entries"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (2.24, "2.2 s"), (59.9, "59.9 s"), (90, "1 min")]
)
def test_times_that_work_took_are_exact_below_a_minute(seconds: float, text: str) -> None:
    assert units_module.format_elapsed(seconds) == text
