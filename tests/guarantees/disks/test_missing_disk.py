"""A disk that is not mounted, is another than it was, or goes away within a step."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.errors import DestinationRefused, RunIncomplete
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.guarantees.disks.filesystems import MB, image_of, mounted, run
from tests.guarantees.disks.scene import pair_at
from tests.torture import Cases

pytestmark = pytest.mark.real_disk
guarantee = pytest.mark.guarantee("4. Disks that fail")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@only_root
@guarantee
@pytest.mark.parametrize("below", ["", "srv1"], ids=["dest is the mount point", "dest lies below it"])
def test_a_dest_whose_disk_is_not_mounted_is_never_taken_for_a_new_one(
    tmp_path: Path, cases: Cases, below: str
) -> None:
    """Airflow knows of a good run, or `mount` says it outright. Nothing is made in the empty mount point."""
    disk = tmp_path / "disk"
    with pair_at(tmp_path) as pair:
        pair.mirror = Mirror(disk / below, "srv1")
        pair.put("alpha", b"one")
        with mounted("ext4", disk, 16 * MB):
            pair.mirror.claim(mount=str(disk))
            pair.backup()
            began = pair.new_run()
            pair.fetch(began)
            pair.diff(began)
        with cases.one():
            with pytest.raises(
                DestinationRefused, match=f"srv1: .*{re.escape(socket.gethostname())} has no backup"
            ):
                pair.mirror.claim(known=True)
            assert list(disk.iterdir()) == []
        with cases.one():
            with pytest.raises(DestinationRefused, match=r"is not a mount point.*Mount the disk"):
                pair.mirror.claim(mount=str(disk))
            assert list(disk.iterdir()) == []
        later: list[Callable[[], Any]] = [
            pair.mirror.check,
            lambda: pair.diff(began),
            lambda: pair.pull(began, pair.plan),
            lambda: pair.archive(began),
            lambda: pair.commit(began),
        ]
        for act in later:
            with cases.one():
                with pytest.raises((DestinationRefused, RunIncomplete)):
                    act()
                assert list(disk.iterdir()) == []
        run("mount", "-o", "loop", str(image_of(disk)), str(disk))
        try:
            with cases.one():
                pair.mirror.claim(known=True, mount=str(disk))
                assert pair.index_b() == pair.index_a()
        finally:
            run("umount", str(disk))


@only_root
@guarantee
def test_a_disk_of_another_kind_in_the_place_of_the_right_one_is_refused(
    tmp_path: Path, cases: Cases
) -> None:
    """It is mounted, and empty; or it lost its marker."""
    with pair_at(tmp_path) as pair, mounted("tmpfs", pair.mirror.dest, MB):
        with cases.one(), pytest.raises(DestinationRefused, match="has no backup, but one succeeded before"):
            pair.mirror.claim(known=True, mount=str(pair.mirror.dest))
        assert list(pair.mirror.dest.iterdir()) == []
        pair.put("alpha", b"one")
        pair.backup()
        (pair.mirror.dest / ".mdbackup" / "provider-id").unlink()
        for known in (True, False):
            with cases.one(), pytest.raises(DestinationRefused):
                pair.mirror.claim(known=known)
        assert pair.index_b() == pair.index_a()


@only_root
def test_a_disk_that_goes_away_within_a_step_is_told_as_such(tmp_path: Path) -> None:
    """What is missing then is the marker."""
    with pair_at(tmp_path) as pair:
        with mounted("tmpfs", pair.mirror.dest, MB):
            pair.mirror.claim()
        missing = pytest.raises(DestinationRefused, match=r"holds no backup .*Is the disk not mounted")
        with missing, pair.mirror.translate_os_errors(), pair.mirror.lock("test"):
            pass
