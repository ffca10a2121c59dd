"""Room for a run on a disk of a few megabytes: judged before the first byte, and used up all the same."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup import commit_content
from airflow_mdbackup.scheme.backup import free_space as space
from airflow_mdbackup.scheme.backup import pull as pull_module
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.common import units as units_module
from airflow_mdbackup.scheme.errors import ConnectionLost, DestinationBroken, DestinationFull
from airflow_mdbackup.scheme.files.content import shares_blocks
from airflow_mdbackup.scheme.files.disk import Space
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.store import mirror as mirror_module
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer import partial_file as part_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import ATTRS, OPEN, STAT, CutChannel, ScriptedServer, packet
from tests.pair import Pair, ServerProcess

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


@pytest.fixture
def disk(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(pair.mirror.dest, monkeypatch)
    yield disk
    disk.unmount()


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


@pytest.fixture
def asked(pair: Pair) -> Counter[int]:
    """The requests that the provider got from the shards since the plan was made."""
    counts: Counter[int] = Counter()
    fetch, connect = pair.fetch, pair.connect

    def watched() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Patient(Watched(server.channel, counts))

    def plain_fetch(run: Run, **options: object) -> object:
        pair.connect = connect  # type: ignore[method-assign]
        try:
            return fetch(run, **options)
        finally:
            pair.connect = watched  # type: ignore[method-assign]

    pair.fetch = plain_fetch  # type: ignore[method-assign, assignment]
    return counts


def planned(pair: Pair, *, shards: int = 1, with_end: bool = True) -> Run:
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


# --- when there is room -----------------------------------------------------------------------------


def test_room_for_all_that_the_index_tells_of_asks_nothing(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """The usual case costs no request."""
    put_all(pair, 20, 1000)
    disk.leave(RESERVE + MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 20}
    assert asked[STAT] == 0 and asked[OPEN] == 20


def test_doubt_asks_for_the_sizes_of_what_is_planned_only(
    pair: Pair, disk: Disk, asked: Counter[int], caplog: pytest.LogCaptureFixture
) -> None:
    """All files would not fit, but the few that are new do."""
    caplog.set_level("INFO")
    put_all(pair, 5, 2 * MB)
    pair.backup()
    put_all(pair, 3, 100_000, "new/")
    disk.leave(RESERVE + 2 * MB)
    asked.clear()
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3}
    assert asked[STAT] == 3 and asked[OPEN] == 3
    assert content_needed(run) == 3 * 25 * 4096  # whole blocks
    told = r"srv1: this run needs 67\.\d MB and 103 inodes, and 69\.\d MB and [\d,]+ inodes are free"
    assert [m for m in caplog.messages if re.fullmatch(told, m)]
    assert pair.finish(run).outcomes == {"pulled": 3}


def test_an_index_without_end_line_has_the_sizes_asked_for(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """More of them than can be on their way at a time."""
    put_all(pair, 1200, 10)
    disk.leave(RESERVE + 20 * MB)
    run = planned(pair, with_end=False)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 1200}
    assert asked[STAT] == 1200
    assert content_needed(run) == 1200 * 4096


def test_a_plan_that_brings_nothing_needs_no_room(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Nothing new, or files to adopt: nobody is asked, however full the disk is."""
    path = pair.put("alpha", b"1" * 100)
    pair.put("bravo", b"2")
    pair.backup()
    os.unlink(path)
    pair.backup()
    disk.leave(MB)
    asked.clear()
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {}
    pair.put("alpha", b"1" * 100)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"adopted": 1}
    assert not asked


def test_a_filesystem_that_counts_neither_bytes_nor_files_is_taken_to_have_room(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """As some network filesystems are, which tell zeros."""
    put_all(pair, 3, MB)
    disk.tell(f_blocks=0, f_bavail=0, f_files=0, f_favail=0)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3}
    assert asked[STAT] == 0


# --- what is counted --------------------------------------------------------------------------------


def test_what_is_staged_and_what_parts_have_is_not_needed_again(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """An earlier run that was killed has brought it."""
    put_all(pair, 3, 2 * MB)
    run = planned(pair)
    first, second, _ = pair.index_a().items()
    shutil.copy(os.fsdecode(first[0]), pair.staged(first[1]))
    pair.part(second[1]).write_bytes(Path(os.fsdecode(second[0])).read_bytes()[:MB])
    disk.leave(RESERVE + 4 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3}
    assert content_needed(run) == 3 * MB
    # The third STAT is for the attributes of what is staged.
    assert asked[STAT] == 3 and asked[OPEN] == 2


def test_what_is_to_be_adopted_is_not_counted(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """It is here already."""
    path = pair.put("alpha", b"1" * 2 * MB)
    pair.put("bravo", b"2")
    pair.backup()
    os.unlink(path)
    pair.backup()
    pair.put("alpha", b"1" * 2 * MB)
    pair.put("charlie", b"3")
    disk.leave(RESERVE + MB)
    asked.clear()
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"adopted": 1, "pulled": 1}
    assert content_needed(run) == 4096 and asked[STAT] == 1


def test_a_part_longer_than_its_file_is_no_beginning_of_it(pair: Pair, disk: Disk) -> None:
    """Its room is had again when it is cut, but is none for other files."""
    put_all(pair, 2, 2 * MB)
    run = planned(pair)
    pair.part(next(iter(pair.index_a().values()))).write_bytes(bytes(3 * MB))
    disk.leave(RESERVE + 3 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 2}
    assert content_needed(run) == 2 * MB


def test_equal_files_need_room_each(pair: Pair, disk: Disk) -> None:
    """They are transferred once, and then copied."""
    content = os.urandom(2 * MB)
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, content)
    disk.leave(RESERVE + 5 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 3}
    assert content_needed(run) == 6 * MB


@pytest.mark.parametrize("there", [2 * MB, MB], ids=["staged", "begun"])
def test_what_is_there_counts_for_one_of_equal_files_only(pair: Pair, disk: Disk, there: int) -> None:
    """The others are copies of it, and need room each."""
    content = os.urandom(2 * MB)
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, content)
    disk.leave(RESERVE + 6 * MB)
    run = planned(pair)
    md5 = hashlib.md5(content).hexdigest().encode()
    (pair.staged(md5) if there == 2 * MB else pair.part(md5)).write_bytes(content[:there])
    disk.leave(RESERVE + 3 * MB)
    comes = {"pulled": 1, "failed": 2} if there == 2 * MB else {"failed": 3}
    for _ in range(2):
        assert pair.pull(run, pair.plan)[0].outcomes == comes
    assert content_needed(run) == 6 * MB - there


def test_equal_files_need_room_once_where_copies_share_blocks(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "shares_blocks", lambda directory: True)
    content = os.urandom(2 * MB)
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, content)
    disk.leave(RESERVE + MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 3}
    assert content_needed(run) == 2 * MB


@pytest.mark.parametrize("shared", [True, False])
def test_what_moved_on_the_provider_needs_room_unless_copies_share_blocks(
    pair: Pair, disk: Disk, asked: Counter[int], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A large directory can be renamed there even when this disk is nearly full, if it has reflinks."""
    put_all(pair, 3, 2 * MB, "old/")
    pair.backup()
    os.rename(pair.path("old"), pair.path("new"))
    pair.put("other", b"1" * 8192)
    monkeypatch.setattr(space, "shares_blocks", lambda directory: shared)
    disk.leave(RESERVE + 2 * MB)
    asked.clear()
    run = planned(pair)
    assert pair.plan.copy == 3
    if shared:
        disk.leave(RESERVE + 8 * MB)  # since tmpfs does not really share
        disk.tell(f_bavail=(RESERVE + 2 * MB) // 4096, f_frsize=4096)
        assert pair.pull(run, pair.plan)[0].outcomes == {"copied": 3, "pulled": 1}
    else:
        assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 3, "pulled": 1}
    assert content_needed(run) == 8192 + (0 if shared else 6 * MB)
    assert read_header(run.space)["files"] == 4 + space._RESERVED_FILES
    # Of three for their attributes if shared; of all for their sizes if not, and of what is to be opened.
    assert asked[STAT] == (4 if shared else 5)


def test_whether_blocks_are_shared_is_found_out_without_a_trace(pair: Pair, disk: Disk) -> None:
    """A tmpfs cannot."""
    pair.mirror.claim()
    before = list(pair.mirror.staging.iterdir())
    if disk.mounted:
        assert not shares_blocks(pair.mirror.staging)
    assert list(pair.mirror.staging.iterdir()) == before == []


def test_a_size_that_the_provider_does_not_tell_counts_as_nothing(pair: Pair, disk: Disk) -> None:
    """What is gone there takes no room here; the pull tells of it."""
    put_all(pair, 3, MB)
    run = planned(pair, with_end=False)
    os.unlink(pair.path("01"))
    disk.leave(RESERVE + 5 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 2, "vanished": 1}
    assert content_needed(run) == 2 * MB


def test_sizes_beyond_all_disks_fail_like_others(pair: Pair, disk: Disk) -> None:
    """A provider may tell anything."""
    put_all(pair, 3, 10)
    run = planned(pair, with_end=False)

    class Boastful(ScriptedServer):
        def on_stat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQ", 1, 2**64 - 1))

    for _ in range(2):
        assert pull(pair.mirror, run, 0, lambda: Reader(Boastful({}))).outcomes == {"failed": 3}
    assert "there is no room for its 18,446,744.1 TB" in pair.finish(run).failures[0]


# --- when there is none -----------------------------------------------------------------------------


def test_too_little_room_for_all_that_is_new_changes_nothing(
    pair: Pair, disk: Disk, asked: Counter[int], caplog: pytest.LogCaptureFixture
) -> None:
    """No byte is transferred, and the message says where, how much, and what to do."""
    put_all(pair, 3, MB)
    pair.backup()
    path = os.fsdecode(pair.put("01", os.urandom(5 * MB)))
    disk.leave(RESERVE + 2 * MB)
    asked.clear()
    run = planned(pair)
    files, index = tree_of(pair.mirror.files), pair.mirror.index.read_bytes()
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 1}
    where = f"srv1: {pair.mirror.dest} on {socket.gethostname()} lacks room, or inodes, for 5.2 MB"
    assert [m for m in caplog.messages if m.startswith(f"{where} of what is new (files: 1). ")]
    assert asked[OPEN] == 0
    assert list(pair.mirror.staging.iterdir()) == []
    outcome = pair.finish(run)
    assert outcome.outcomes == {"failed": 1}
    do = "free some, enlarge the disk, or exclude it; what fits is backed up"
    assert outcome.failures == [f"failed {path} (there is no room for its 5.2 MB: {do})"]
    assert (tree_of(pair.mirror.files), pair.mirror.index.read_bytes()) == (files, index)


def test_where_inodes_lack_as_many_files_come_as_there_are(pair: Pair, disk: Disk) -> None:
    """A disk may have bytes free and still take no more files."""
    put_all(pair, 50, 10)
    run = planned(pair, shards=2)
    disk.leave(RESERVE + 10 * MB, files=125)
    outcomes = sum((Counter(summary.outcomes) for summary in pair.pull(run, pair.plan)), Counter[str]())
    # Some are used by what the run writes.
    assert outcomes.total() == 50 and 15 <= outcomes["pulled"] <= 25
    summary = pair.finish(run)
    assert summary.added == outcomes["pulled"] and summary.failed == outcomes["failed"]
    assert "(no inodes are free for it: free some, enlarge" in summary.failures[0]
    disk.leave(RESERVE + 10 * MB, files=180)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": outcomes["failed"]}


def test_a_retry_after_room_was_made_does_not_judge_again(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """As long as there is none, the same fail; then they come. Each is looked at before it is opened."""
    put_all(pair, 3, 2 * MB)
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    for looked_at in (3, 6):
        assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 3}
        assert asked[STAT] == 3 + looked_at
    disk.leave(RESERVE + 8 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3}
    assert asked[STAT] == 3 + 9
    assert pair.finish(run).outcomes == {"pulled": 3}


def test_a_new_plan_of_the_same_run_is_judged_anew(pair: Pair, disk: Disk) -> None:
    """Be it one with less, after a no, or one with more, after a yes."""
    put_all(pair, 2, 2 * MB)
    pair.put("large", os.urandom(4 * MB))
    disk.leave(RESERVE + 5 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 2, "failed": 1}
    assert content_needed(run) == 8 * MB
    less = pair.diff(run, exclude=["large"])
    assert pair.pull(run, less)[0].outcomes == {"pulled": 2}
    assert read_header(run.space)["cells"] == []
    disk.leave(RESERVE + MB)
    assert pair.pull(run, pair.diff(run))[0].outcomes == {"pulled": 2, "failed": 1}
    assert content_needed(run) == 4 * MB


def test_a_disk_on_which_not_even_records_can_be_written_is_told_as_full(pair: Pair, disk: Disk) -> None:
    put_all(pair, 3, MB)
    run = planned(pair)
    if not disk.mounted:
        pytest.skip("only a disk that is really full refuses a file of its own")
    disk.leave(0, files=0)
    with pytest.raises(DestinationFull, match=r"the disk of .* is full: .*Free some space"):
        pair.pull(run, pair.plan)


# --- what fits all the same -------------------------------------------------------------------------


def test_what_fits_comes_though_one_file_does_not(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Somebody's image of a disk keeps nobody else from being backed up. It comes once there is room."""
    put_all(pair, 3, 100_000)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    for looked_at in (4, 5):  # the second time is a retry, which only looks at the one that failed
        assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}
        assert asked[STAT] == 4 + looked_at
    assert asked[OPEN] == 3
    summary = pair.finish(run)
    assert summary.added == 3 and summary.failed == 1
    assert re.search(r"/image \(there is no room for its 5\.2 MB: free some, enlarge", summary.failures[0])
    disk.leave(RESERVE + 20 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 1}


def test_a_retry_after_room_was_made_brings_what_had_none(pair: Pair, disk: Disk) -> None:
    put_all(pair, 3, 100_000)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}
    disk.leave(RESERVE + 20 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 4}
    assert not pair.finish(run).failed


def test_a_run_without_any_room_comes_but_for_one_file_once_there_is_some(pair: Pair, disk: Disk) -> None:
    put_all(pair, 3, MB)
    pair.put("image", os.urandom(20 * MB))
    disk.leave(RESERVE - MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 4}
    disk.leave(RESERVE + 8 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}


def test_as_few_and_as_large_files_are_left_as_it_takes(pair: Pair, disk: Disk) -> None:
    """For all shards the same; equal files come together, or not at all."""
    for name, size in (("huge", 6 * MB), ("large", 3 * MB), ("twin 1", 2 * MB), ("twin 2", 2 * MB)):
        pair.put(name, random.Random(size).randbytes(size))
    put_all(pair, 8, MB // 2)
    disk.leave(RESERVE + 10 * MB)
    run = planned(pair, shards=3)
    outcomes = sum((Counter(summary.outcomes) for summary in pair.pull(run, pair.plan)), Counter[str]())
    # Without `huge`, 11 MB are new; without `large`, 8 MB.
    assert outcomes == {"failed": 2, "pulled": 9, "copied": 1}
    assert pair.finish(run).added == 10
    assert not pair.live("huge").exists() and not pair.live("large").exists()


def test_a_run_that_brings_nothing_for_lack_of_room_forgets_all_the_same(pair: Pair, disk: Disk) -> None:
    """Others have only deleted and moved files, or have them here already."""
    put_all(pair, 3, 1000, "gone/")
    pair.put("back", b"b" * 1000)
    pair.backup()
    os.unlink(pair.path("back"))
    pair.backup()
    shutil.rmtree(pair.path("gone"))
    pair.put("back", b"b" * 1000)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"adopted": 1, "failed": 1}
    summary = pair.finish(run)
    assert summary.forgotten == 3 and summary.outcomes == {"adopted": 1, "failed": 1}
    assert len(pair.index_b()) == 1


def test_what_an_earlier_run_has_staged_comes_though_one_file_does_not(pair: Pair, disk: Disk) -> None:
    """That run was killed before it was committed, and nothing else is to be transferred."""
    put_all(pair, 3, 100_000)
    killed = planned(pair)
    pair.pull(killed, pair.plan)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}
    assert pair.finish(run).added == 3


def test_copies_that_share_blocks_come_though_one_file_does_not(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need an inode each, and are no smaller than what has no room."""
    put_all(pair, 2, 6 * MB, "old/")
    pair.backup()
    os.rename(pair.path("old"), pair.path("new"))
    pair.put("image", os.urandom(5 * MB))
    monkeypatch.setattr(space, "shares_blocks", lambda directory: True)
    disk.leave(RESERVE + 20 * MB)  # since tmpfs does not really share
    disk.tell(f_bavail=(RESERVE + 2 * MB) // 4096, f_frsize=4096)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"copied": 2, "failed": 1}
    assert pair.finish(run).added == 2


def test_any_number_of_files_that_do_not_fit_leave_room_for_the_others(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are added up in few cells, and as many of them come as fit, to within what a cell holds."""
    monkeypatch.setattr(space, "_MAX_CELLS", 256)
    for number in range(1300):
        path = pair.put(f"theirs/{number:04}", b"%d" % number)
        os.truncate(path, 64 << 10)
    pair.put("yours/letter", b"dear")
    disk.leave(RESERVE + 500 * (66 << 10))
    run = planned(pair, shards=3)
    for _ in range(2):
        outcomes = sum((Counter(summary.outcomes) for summary in pair.pull(run, pair.plan)), Counter[str]())
        assert outcomes.total() == 1301 and 450 <= outcomes["pulled"] <= 501
    assert len(read_header(run.space)["cells"]) <= 256
    summary = pair.finish(run)
    assert (summary.added, summary.failed) == (outcomes["pulled"], outcomes["failed"])
    assert pair.live("yours/letter").exists()


def test_copies_of_one_small_file_by_the_thousand_leave_room_for_the_others(pair: Pair, disk: Disk) -> None:
    """They are no larger than what others have, and more than fits."""
    for number in range(1000):
        pair.put(f"theirs/{number:04}", b"t" * 4096)
    put_all(pair, 20, 4096, "yours/")
    disk.leave(RESERVE + 3 * MB)
    run = planned(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 1000, "pulled": 20}
    assert pair.finish(run).added == 20


def test_sizes_of_all_kinds_are_told_apart_as_far_as_cells_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewer there are, the more finely; the smallest come, and the sum of all is exact in any case."""
    monkeypatch.setattr(space, "_MAX_CELLS", 256)
    needed = space._Needed("salt")
    sizes = [random.Random(number).randrange(1 << number % 64) for number in range(10_000)]
    for size in sizes:
        needed.add(hashlib.md5(str(size).encode()).hexdigest().encode(), size, size)
    assert len(needed.cells) <= 256
    taken = sum(-(-size // 4096) * 4096 for size in sizes)
    assert sum(need.size for need in needed.cells.values()) == taken + 10_000 * (
        1024 - space._FAILED_OVERHEAD
    )
    has = Space(10 << 30, 100_000)
    judged = needed.decide(has)
    left_out = {(blocks, lot) for blocks, lot, _ in judged["cells"]}
    come = [need for cell, need in needed.cells.items() if cell not in left_out]
    assert has.size // 2 < sum(need.size for need in come) <= has.size


@pytest.mark.parametrize("size", [100_000, 3 * MB], ids=["small", "large"])
def test_a_file_that_is_larger_than_allowed_fails_alone_and_needs_no_room(
    pair: Pair, disk: Disk, size: int
) -> None:
    pair.put("larger", os.urandom(size + 1))
    pair.put("as large", os.urandom(size))
    disk.leave(RESERVE + size + MB // 2)
    run = planned(pair)
    summary = pull(pair.mirror, run, 0, pair.connect, max_file_size=size)
    assert summary.outcomes == {"pulled": 1, "failed": 1}
    done = pair.finish(run)
    assert re.search(r"/larger \(it has .*, more than the allowed .* \(max_file_size\)\)", done.failures[0])
    assert not pair.mirror.staging.joinpath("x").exists() and not list(pair.mirror.staging.iterdir())


# --- the shards of a run ----------------------------------------------------------------------------


def test_the_first_shard_judges_for_all(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """The second takes up the room that was found for both, though the first has filled a part of it."""
    put_all(pair, 8, MB)
    run = planned(pair, shards=2, with_end=False)
    disk.leave(RESERVE + 9 * MB)
    pull(pair.mirror, run, 0, pair.connect)
    assert asked[STAT] == 8 and content_needed(run) == 8 * MB
    disk.leave(RESERVE)
    pull(pair.mirror, run, 1, pair.connect)
    assert asked[STAT] == 8
    assert pair.finish(run).outcomes == {"pulled": 8}


def test_what_does_not_fit_is_the_same_for_all_shards(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Of the second one all would fit, if it were alone."""
    put_all(pair, 8, MB)
    run = planned(pair, shards=2)
    assert min(pair.plan.shards) > 0
    disk.leave(RESERVE + 7 * MB)
    outcomes = Counter[str]()
    for shard in range(2):
        outcomes.update(pull(pair.mirror, run, shard, pair.connect).outcomes)
    assert outcomes == {"pulled": 6, "failed": 2}
    assert asked[STAT] == 8 + 8 and asked[OPEN] == 6


def test_shards_that_begin_at_once_wait_for_one_judgement(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """It is made under a lock."""
    put_all(pair, 200, 100)
    run = planned(pair, shards=4, with_end=False)
    disk.leave(RESERVE + 5 * MB)
    begin = threading.Barrier(4)

    def connect() -> Reader:
        with suppress(threading.BrokenBarrierError):
            begin.wait(0.5)  # all come here, unless there is a lock
        return pair.connect()

    threads = [threading.Thread(target=pull, args=(pair.mirror, run, n, connect)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert asked[STAT] == 200
    assert pair.finish(run).outcomes == {"pulled": 200}


def test_a_retry_does_not_count_against_itself_what_it_has_staged(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """Half of it is there, and the room that is left is for the other half."""
    put_all(pair, 10, MB)
    run = planned(pair, with_end=False)
    disk.leave(RESERVE + 11 * MB)

    def cut() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(Watched(CutChannel(server.channel, 6 * MB), asked))

    with pytest.raises(ConnectionLost):
        pull(pair.mirror, run, 0, cut)
    assert sum(file.stat().st_size for file in pair.mirror.staging.iterdir()) > 4 * MB
    missing = 10 - sum(file.suffix != ".part" for file in pair.mirror.staging.iterdir())
    disk.leave(7 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 10}
    assert asked[STAT] == 10 + missing  # once for the sizes, then whether those are regular files still


def test_a_connection_that_breaks_while_sizes_are_asked_for_leaves_no_judgement(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """The retry asks again."""
    put_all(pair, 50, 10)
    run = planned(pair, with_end=False)

    def cut() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(CutChannel(server.channel, 1000))

    with pytest.raises(ConnectionLost):
        pull(pair.mirror, run, 0, cut)
    assert not run.space.exists()
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 50}
    assert asked[STAT] == 50 + 50  # for the sizes, then whether those are regular files still


# --- a disk that becomes full all the same ----------------------------------------------------------


@pytest.mark.parametrize("size", [MB, 100_000], ids=["large files", "small files"])
def test_a_disk_that_becomes_full_is_told_and_a_retry_goes_on(pair: Pair, disk: Disk, size: int) -> None:
    """Something else took the room; what was staged is not transferred again."""
    put_all(pair, 6 * MB // size, size)
    run = planned(pair)
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
    run = planned(pair)
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


# --- runs side by side ------------------------------------------------------------------------------


@pytest.mark.parametrize("judged", [False, True])
def test_what_another_run_has_brought_needs_no_room(pair: Pair, disk: Disk, judged: bool) -> None:
    """In a backfill all runs may be planned before the first is committed; some have no room meanwhile."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = planned(pair), planned(pair)
    if judged:
        disk.leave(RESERVE + MB)
        assert pair.pull(second, pair.plan)[0].outcomes == {"failed": 4}
        disk.leave(RESERVE + 50 * MB)
    pair.pull(first, pair.plan)
    pair.finish(first)
    disk.leave(RESERVE + MB)
    pair.pull(second, pair.plan)
    assert pair.transferred == 0
    assert pair.finish(second).outcomes == {"superseded": 4}


def test_a_commit_while_room_is_judged_is_known_to_the_next_try(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else every retry would fail what another run has brought long since."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = planned(pair), planned(pair)
    pair.pull(first, pair.plan)
    judge = space.check_free_space

    def commit_and_judge(*args: Any) -> space.SkippedForSpace:
        pair.finish(first)
        disk.leave(RESERVE + MB)
        return judge(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "check_free_space", commit_and_judge)
        assert pair.pull(second, pair.plan)[0].outcomes == {"failed": 4}
    pair.pull(second, pair.plan)
    assert pair.finish(second).outcomes == {"superseded": 4}


def test_an_index_that_is_deleted_while_room_is_judged_stops_nothing(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As errors.md advises for a damaged one; what this run knew of it, it goes on to know."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = planned(pair), planned(pair)
    pair.pull(first, pair.plan)
    pair.finish(first)
    judge = space.check_free_space

    def delete_and_judge(*args: Any) -> space.SkippedForSpace:
        pair.mirror.index.unlink()
        disk.leave(RESERVE + MB)
        return judge(*args)

    monkeypatch.setattr(pull_module, "check_free_space", delete_and_judge)
    pair.pull(second, pair.plan)
    assert pair.transferred == 0
