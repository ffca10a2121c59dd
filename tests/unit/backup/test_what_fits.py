"""Where not all has room: what fits comes all the same."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections import Counter

import pytest

from airflow_mdbackup.scheme.backup import free_space as space
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.files.disk import Space
from airflow_mdbackup.scheme.files.jsonl import read_header
from tests.guarantees.transport.channels import OPEN, STAT
from tests.pair import Pair
from tests.unit.backup.small_disk import MB, RESERVE, Disk, plan_run, put_all


def test_what_fits_comes_though_one_file_does_not(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Somebody's image of a disk keeps nobody else from being backed up. It comes once there is room."""
    put_all(pair, 3, 100_000)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = plan_run(pair)
    for looked_at in (4, 5):  # the second time is a retry, which only looks at the one that failed
        assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}
        assert asked[STAT] == 4 + looked_at
    assert asked[OPEN] == 3
    summary = pair.finish(run)
    assert summary.added == 3 and summary.failed == 1
    assert re.search(r"/image \(there is no room for its 5\.2 MB: free some, enlarge", summary.failures[0])
    disk.leave(RESERVE + 20 * MB)
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 1}


def test_a_retry_after_room_was_made_brings_what_had_none(pair: Pair, disk: Disk) -> None:
    put_all(pair, 3, 100_000)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}
    disk.leave(RESERVE + 20 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 4}
    assert not pair.finish(run).failed


def test_a_run_without_any_room_comes_but_for_one_file_once_there_is_some(pair: Pair, disk: Disk) -> None:
    put_all(pair, 3, MB)
    pair.put("image", os.urandom(20 * MB))
    disk.leave(RESERVE - MB)
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"failed": 4}
    disk.leave(RESERVE + 8 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 3, "failed": 1}


def test_as_few_and_as_large_files_are_left_as_it_takes(pair: Pair, disk: Disk) -> None:
    """For all shards the same; equal files come together, or not at all."""
    for name, size in (("huge", 6 * MB), ("large", 3 * MB), ("twin 1", 2 * MB), ("twin 2", 2 * MB)):
        pair.put(name, random.Random(size).randbytes(size))
    put_all(pair, 8, MB // 2)
    disk.leave(RESERVE + 10 * MB)
    run = plan_run(pair, shards=3)
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
    run = plan_run(pair)
    assert pair.pull(run, pair.plan)[0].outcomes == {"adopted": 1, "failed": 1}
    summary = pair.finish(run)
    assert summary.forgotten == 3 and summary.outcomes == {"adopted": 1, "failed": 1}
    assert len(pair.index_b()) == 1


def test_what_an_earlier_run_has_staged_comes_though_one_file_does_not(pair: Pair, disk: Disk) -> None:
    """That run was killed before it was committed, and nothing else is to be transferred."""
    put_all(pair, 3, 100_000)
    killed = plan_run(pair)
    pair.pull(killed, pair.plan)
    pair.put("image", os.urandom(5 * MB))
    disk.leave(RESERVE + 2 * MB)
    run = plan_run(pair)
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
    run = plan_run(pair)
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
    run = plan_run(pair, shards=3)
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
    run = plan_run(pair)
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
    run = plan_run(pair)
    summary = pull(pair.mirror, run, 0, pair.connect, max_file_size=size)
    assert summary.outcomes == {"pulled": 1, "failed": 1}
    done = pair.finish(run)
    assert re.search(r"/larger \(it has .*, more than the allowed .* \(max_file_size\)\)", done.failures[0])
    assert not pair.mirror.staging.joinpath("x").exists() and not list(pair.mirror.staging.iterdir())
