"""Room for a run on a disk of a few megabytes: judged before the first byte."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import struct
from collections import Counter
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup import free_space as space
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import DestinationFull
from airflow_mdbackup.scheme.files.content import shares_blocks
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import ATTRS, OPEN, STAT, ScriptedServer, packet
from tests.pair import Pair
from tests.unit.backup.small_disk import MB, RESERVE, Disk, content_needed, plan_run, put_all, tree_of

# --- when there is room -----------------------------------------------------------------------------


def test_room_for_all_that_the_index_tells_of_asks_nothing(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """The usual case costs no request."""
    put_all(pair, 20, 1000)
    disk.leave(RESERVE + MB)
    run = plan_run(pair)
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
    run = plan_run(pair)
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
    run = plan_run(pair, with_end=False)
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
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {}
    pair.put("alpha", b"1" * 100)
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"adopted": 1}
    assert not asked


def test_a_filesystem_that_counts_neither_bytes_nor_files_is_taken_to_have_room(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """As some network filesystems are, which tell zeros."""
    put_all(pair, 3, MB)
    disk.tell(f_blocks=0, f_bavail=0, f_files=0, f_favail=0)
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3}
    assert asked[STAT] == 0


# --- what is counted --------------------------------------------------------------------------------


def test_what_is_staged_and_what_parts_have_is_not_needed_again(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """An earlier run that was killed has brought it."""
    put_all(pair, 3, 2 * MB)
    run = plan_run(pair)
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
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"adopted": 1, "pulled": 1}
    assert content_needed(run) == 4096 and asked[STAT] == 1


def test_a_part_longer_than_its_file_is_no_beginning_of_it(pair: Pair, disk: Disk) -> None:
    """Its room is had again when it is cut, but is none for other files."""
    put_all(pair, 2, 2 * MB)
    run = plan_run(pair)
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
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 3}
    assert content_needed(run) == 6 * MB


@pytest.mark.parametrize("there", [2 * MB, MB], ids=["staged", "begun"])
def test_what_is_there_counts_for_one_of_equal_files_only(pair: Pair, disk: Disk, there: int) -> None:
    """The others are copies of it, and need room each."""
    content = os.urandom(2 * MB)
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, content)
    disk.leave(RESERVE + 6 * MB)
    run = plan_run(pair)
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
    run = plan_run(pair)
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
    run = plan_run(pair)
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
    run = plan_run(pair, with_end=False)
    os.unlink(pair.path("01"))
    disk.leave(RESERVE + 5 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 2, "vanished": 1}
    assert content_needed(run) == 2 * MB


def test_sizes_beyond_all_disks_fail_like_others(pair: Pair, disk: Disk) -> None:
    """A provider may tell anything."""
    put_all(pair, 3, 10)
    run = plan_run(pair, with_end=False)

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
    run = plan_run(pair)
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
    run = plan_run(pair, shards=2)
    disk.leave(RESERVE + 10 * MB, files=125)
    outcomes = sum((Counter(summary.outcomes) for summary in pair.pull(run, pair.plan)), Counter[str]())
    # Some are used by what the run writes.
    assert outcomes.total() == 50 and 15 <= outcomes["pulled"] <= 25
    summary = pair.finish(run)
    assert summary.added == outcomes["pulled"] and summary.failed == outcomes["failed"]
    assert "(no inodes are free for it: free some, enlarge" in summary.failures[0]
    disk.leave(RESERVE + 10 * MB, files=180)
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": outcomes["failed"]}


def test_a_retry_after_room_was_made_does_not_judge_again(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """As long as there is none, the same fail; then they come. Each is looked at before it is opened."""
    put_all(pair, 3, 2 * MB)
    disk.leave(RESERVE + 2 * MB)
    run = plan_run(pair)
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
    run = plan_run(pair)
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
    run = plan_run(pair)
    if not disk.mounted:
        pytest.skip("only a disk that is really full refuses a file of its own")
    disk.leave(0, files=0)
    with pytest.raises(DestinationFull, match=r"the disk of .* is full: .*Free some space"):
        pair.pull(run, pair.plan)
