"""A disk of a few megabytes, and what a run needs of it."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup import free_space as space
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.store import mirror as mirror_module
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer import partial_file as part_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair

MB = 1 << 20
RESERVE = space._RESERVE


class Disk:
    """The disk of ``dest``: a tmpfs of its own; where none can be mounted, one that only says it is full.

    :ivar mounted: which of both.
    """

    def __init__(self, mount_point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._at = mount_point
        self._patch = monkeypatch
        mount_point.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1g,mode=700", "tmpfs", str(mount_point)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self._at)], check=True)

    def leave(self, size: int, files: int = 100_000) -> None:
        """Have ``size`` bytes free, and so many inodes."""
        if self.mounted:
            disk = os.statvfs(self._at)
            total = (disk.f_blocks - disk.f_bfree) * disk.f_frsize + size
            inodes = disk.f_files - disk.f_ffree + files
            resized = f"remount,size={total},nr_inodes={inodes}"
            subprocess.run(["mount", "-o", resized, str(self._at)], check=True)
        else:
            self.tell(f_bavail=size // 4096, f_frsize=4096, f_favail=files, f_files=files)

    def tell(self, **values: int) -> None:
        """Have ``os.statvfs`` tell something else."""
        told = os.statvfs(self._at)
        fields = [name for name in dir(told) if name.startswith("f_") and name != "f_fsid"]
        all_values = {name: getattr(told, name) for name in fields} | values
        answer = type("Told", (), all_values)()
        self._patch.setattr(os, "statvfs", lambda path: answer)

    def fill(self, left: int) -> None:
        """Have the disk become full after ``left`` bytes more."""
        if self.mounted:
            self.leave(left)
            return

        def write(descriptor: int, data: bytes) -> None:
            nonlocal left
            left -= len(data)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            os.write(descriptor, data)

        for module in (part_module, mirror_module):
            self._patch.setattr(module, "write_all", write)

    def empty(self) -> None:
        """Have room again after :meth:`fill`."""
        self._patch.undo()
        self.leave(RESERVE + 100 * MB)


class Watched:
    """Passes on to another channel, counting requests by kind."""

    def __init__(self, channel: Any, asked: Counter[int]) -> None:
        self._channel = channel
        self._asked = asked
        self.recv = channel.recv

    def sendall(self, data: bytes) -> None:
        self._channel.sendall(data)
        while data:
            (length,) = struct.unpack(">I", data[:4])
            self._asked[data[4]] += 1
            data = data[4 + length :]


class Patient(Reader):
    """Makes sure that nothing is asked for beyond what may be on its way at a time."""

    def submit_stat(self, path: bytes, key: Any) -> None:
        assert self.room
        super().submit_stat(path, key)


def plan_run(pair: Pair, *, shards: int = 1, with_end: bool = True) -> Run:
    """Plan a run with A as it is now."""
    pair.build_index()
    if not with_end:
        lines = Path(os.fsdecode(pair.index)).read_bytes().splitlines(keepends=True)
        Path(os.fsdecode(pair.index)).write_bytes(b"".join(lines[:-1]))
    run = pair.new_run()
    pair.fetch(run, still=0.0)
    pair.plan = pair.diff(run, shards=shards)
    return run


def put_all(pair: Pair, files: int, size: int, folder: str = "") -> None:
    for number in range(files):
        name = f"{folder}{number:02}"
        pair.put(name, random.Random(name).randbytes(size))


def content_needed(run: Run) -> int:
    """Return the bytes of content that the run was judged by."""
    judged = read_header(run.space)
    files = judged["files"] - space._RESERVED_FILES
    return judged["size"] - RESERVE - 2 * run.index.stat().st_size - files * space._OVERHEAD


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
