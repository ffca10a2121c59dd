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

from airflow_mdbackup.scheme import commit as commit_module
from airflow_mdbackup.scheme import disk as disk_module
from airflow_mdbackup.scheme import mirror as mirror_module
from airflow_mdbackup.scheme import part as part_module
from airflow_mdbackup.scheme import pull as pull_module
from airflow_mdbackup.scheme import space
from airflow_mdbackup.scheme.errors import ConnectionLost, DestinationBroken, DestinationFull
from airflow_mdbackup.scheme.mirror import Run
from airflow_mdbackup.scheme.pull import pull
from airflow_mdbackup.scheme.records import read_header
from airflow_mdbackup.scheme.sftp import Reader
from airflow_mdbackup.scheme.tree import shares_blocks

from .channels import ATTRS, OPEN, STAT, CutChannel, ScriptedServer, packet
from .conftest import Pair, ServerProcess

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


@pytest.fixture
def all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have so much be new that the largest contents are but a little of it."""
    monkeypatch.setattr(space, "_MOST_LEFT", 0)


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
    return judged["size"] - RESERVE - 2 * run.index.stat().st_size - files * space._BESIDE


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
    with pytest.raises(DestinationFull):
        pair.pull(run, pair.plan)
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
    with pytest.raises(DestinationFull):
        pair.pull(run, pair.plan)
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
    with pytest.raises(DestinationFull):
        pair.pull(run, pair.plan)
    assert content_needed(run) == 2 * MB


@pytest.mark.usefixtures("all_or_nothing")
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
        with pytest.raises(DestinationFull):
            pair.pull(run, pair.plan)
    assert content_needed(run) == 8192 + (0 if shared else 6 * MB)
    assert read_header(run.space)["files"] == 4 + space._RESERVED_FILES
    assert asked[STAT] == 4  # of three for their attributes if shared, of all for their sizes if not


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


def test_sizes_beyond_all_disks_are_refused_like_others(pair: Pair, disk: Disk) -> None:
    """A provider may tell anything."""
    put_all(pair, 3, 10)
    run = planned(pair, with_end=False)

    class Boastful(ScriptedServer):
        def on_stat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQ", 1, 2**64 - 1))

    for _ in range(2):
        with pytest.raises(DestinationFull, match=r"needs 9,223,372\.0 TB where"):
            pull(pair.mirror, run, 0, lambda: Reader(Boastful({})))


# --- when there is none -----------------------------------------------------------------------------


@pytest.mark.usefixtures("all_or_nothing")
def test_too_little_room_changes_nothing(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """No byte is transferred, and the message says where, how much, and what to do."""
    put_all(pair, 3, MB)
    pair.backup()
    pair.put("01", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    asked.clear()
    run = planned(pair)
    files, index = tree_of(pair.mirror.files), pair.mirror.index.read_bytes()
    where = f"srv1: {pair.mirror.dest} on {socket.gethostname()} has too little room"
    lack = r"needs 72\.\d MB where 6[89]\.\d MB are free"
    with pytest.raises(
        DestinationFull, match=f"^{where}.*{lack}. Nothing was changed. .*pull_changed.*exclude"
    ):
        pair.pull(run, pair.plan)
    assert asked[OPEN] == 0
    assert list(pair.mirror.staging.iterdir()) == []
    assert not run.results(0).exists()
    assert (tree_of(pair.mirror.files), pair.mirror.index.read_bytes()) == (files, index)
    outcome = pair.finish(run)
    assert outcome.failed == 1 and "see its log" in outcome.failures[0]
    assert (tree_of(pair.mirror.files), pair.mirror.index.read_bytes()) == (files, index)


def test_too_few_inodes_are_told_as_such(pair: Pair, disk: Disk) -> None:
    """A disk may have bytes free and still take no more files."""
    put_all(pair, 50, 10)
    run = planned(pair)
    disk.leave(RESERVE + 10 * MB, files=120)
    lack = r"which needs 150 inodes where 1[12]\d are free\. Nothing was changed"
    with pytest.raises(DestinationFull, match=lack):
        pair.pull(run, pair.plan)
    disk.leave(RESERVE + 10 * MB, files=180)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 50}


def test_a_retry_after_room_was_made_asks_nothing_again(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """As long as there is none, it is refused again; then it goes through."""
    put_all(pair, 3, 2 * MB)
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    for _ in range(2):
        with pytest.raises(DestinationFull):
            pair.pull(run, pair.plan)
        assert asked[STAT] == 3
    disk.leave(RESERVE + 8 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3}
    assert asked[STAT] == 3
    assert pair.finish(run).outcomes == {"pulled": 3}


@pytest.mark.usefixtures("all_or_nothing")
def test_a_new_plan_of_the_same_run_is_judged_anew(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Be it one with less, after a no, or one with more, after a yes."""
    put_all(pair, 2, 2 * MB)
    pair.put("large", os.urandom(4 * MB))
    disk.leave(RESERVE + 5 * MB)
    run = planned(pair)
    with pytest.raises(DestinationFull):
        pair.pull(run, pair.plan)
    assert asked[STAT] == 3
    less = pair.diff(run, exclude=["large"])
    assert pair.pull(run, less)[0].outcomes == {"pulled": 2}
    assert asked[STAT] == 5
    disk.leave(RESERVE + MB)
    with pytest.raises(DestinationFull):
        pair.pull(run, pair.diff(run))
    assert content_needed(run) == 4 * MB


# --- what fits all the same -------------------------------------------------------------------------


def test_what_fits_comes_though_one_file_does_not(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Somebody's image of a disk keeps nobody else from being backed up. It comes once there is room."""
    put_all(pair, 3, 100_000)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = planned(pair)
    for _ in range(2):  # the second time is a retry, which asks for sizes no more
        assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}
        assert asked[STAT] == 4
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


def test_a_run_that_was_refused_comes_but_for_one_file_once_there_is_some_room(
    pair: Pair, disk: Disk
) -> None:
    put_all(pair, 3, MB)
    pair.put("image", os.urandom(20 * MB))
    disk.leave(RESERVE - MB)
    run = planned(pair)
    with pytest.raises(DestinationFull):
        pair.pull(run, pair.plan)
    disk.leave(RESERVE + 8 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}


def test_as_few_and_as_large_contents_are_left_as_it_takes(pair: Pair, disk: Disk) -> None:
    """For all shards the same; equal files are one content."""
    for name, size in (("huge", 6 * MB), ("large", 3 * MB), ("twin 1", 2 * MB), ("twin 2", 2 * MB)):
        pair.put(name, random.Random(size).randbytes(size))
    put_all(pair, 8, MB // 2)
    disk.leave(RESERVE + 10 * MB)
    run = planned(pair, shards=3)
    outcomes = sum((Counter(summary.outcomes) for summary in pair.pull(run, pair.plan)), Counter[str]())
    # Without `huge`, 11 MB are new; without the twins, which need 4 MB, 7 MB.
    assert outcomes == {"failed": 3, "pulled": 9}
    assert not pair.live("huge").exists() and pair.finish(run).added == 9
    assert pair.live("large").exists()


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


@pytest.mark.usefixtures("all_or_nothing")
def test_what_does_not_fit_for_all_shards_is_refused_to_each(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """One alone would fit."""
    put_all(pair, 8, MB)
    run = planned(pair, shards=2)
    assert min(pair.plan.shards) > 0
    disk.leave(RESERVE + 7 * MB)
    for shard in range(2):
        with pytest.raises(DestinationFull):
            pull(pair.mirror, run, shard, pair.connect)
    assert asked[STAT] == 8 and asked[OPEN] == 0


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
    with pytest.raises(DestinationFull, match=f"{where}: .*No space left on device.*Free some room") as told:
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

    with monkeypatch.context() as patched, pytest.raises(DestinationFull, match="Free some room"):
        patched.setattr(commit_module, "copy_of", full)
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
    with pytest.raises(kind, match=re.escape(os.strerror(number))), pair.mirror.told_plainly():
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0.0 B"), (999, "999.0 B"), (1500, "1.5 kB"), (64 * MB, "67.1 MB"), (10**12, "1.0 TB")],
)
def test_amounts_are_told_in_units_for_people(size: int, told: str) -> None:
    """Powers of ten, as in the configuration."""
    assert disk_module.amount(size) == told


# --- runs side by side ------------------------------------------------------------------------------


@pytest.mark.parametrize("judged", [False, True])
def test_what_another_run_has_brought_needs_no_room(pair: Pair, disk: Disk, judged: bool) -> None:
    """In a backfill all runs may be planned before the first is committed; some are refused meanwhile."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = planned(pair), planned(pair)
    if judged:
        disk.leave(RESERVE + MB)
        with pytest.raises(DestinationFull):
            pair.pull(second, pair.plan)
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
    """Or else every retry would refuse what another run has brought long since."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = planned(pair), planned(pair)
    pair.pull(first, pair.plan)
    judge = space.make_sure_of_room

    def commit_and_judge(*args: Any) -> None:
        pair.finish(first)
        disk.leave(RESERVE + MB)
        judge(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "make_sure_of_room", commit_and_judge)
        with pytest.raises(DestinationFull):
            pair.pull(second, pair.plan)
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
    judge = space.make_sure_of_room

    def delete_and_judge(*args: Any) -> None:
        pair.mirror.index.unlink()
        disk.leave(RESERVE + MB)
        judge(*args)

    monkeypatch.setattr(pull_module, "make_sure_of_room", delete_and_judge)
    pair.pull(second, pair.plan)
    assert pair.transferred == 0
