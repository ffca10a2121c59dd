"""Work that is done in a few threads."""

from __future__ import annotations

import threading
import time

import pytest

from airflow_mdbackup.scheme.common.parallel import parallel_map
from airflow_mdbackup.scheme.index.canonical import Entry

THINGS = [Entry(b"/%d" % number, b"") for number in range(160)]
SIZES = [0, 1 << 20, 1 << 28, None]


@pytest.mark.parametrize(("size", "seconds"), [(0, 0.02), (None, 0.0), (1 << 20, 0.0)])
def test_work_that_waits_for_the_disk_is_done_side_by_side(size: int | None, seconds: float) -> None:
    """Short work too; and the results are in order."""
    at_work, most = set[int](), 0

    def act(thing: Entry) -> bytes:
        nonlocal most
        at_work.add(threading.get_ident())
        time.sleep(seconds or 0.001)
        most = max(most, len(at_work))
        at_work.discard(threading.get_ident())
        return thing.path

    found = list(parallel_map(THINGS, act, 4, lambda thing: size))
    assert found == [thing.path for thing in THINGS] and most > 1


@pytest.mark.parametrize("size", SIZES)
def test_short_work_goes_on_when_some_of_it_fails(size: int | None) -> None:
    """The error comes in its turn, and nobody waits for ever."""

    def act(thing: Entry) -> Entry:
        if thing == THINGS[40]:
            raise OSError
        return thing

    found = []
    with pytest.raises(OSError):
        for thing in parallel_map(THINGS, act, 4, lambda thing: size):
            found.append(thing)
    assert found == THINGS[: 40 if size else 32]


def test_few_large_files_are_shared_out() -> None:
    """Each thread has one, though all would fit into what a thread takes of short ones."""
    together = threading.Barrier(4, timeout=10)
    assert len({*parallel_map(THINGS[:4], lambda thing: together.wait(), 4, lambda thing: 1 << 28)}) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_things_than_wanted_are_worked_on_at_a_time(threads: int) -> None:
    """Whatever sizes they have, and whichever thread has them; all come in their order."""
    at_work, most, lock = 0, 0, threading.Lock()

    def act(thing: Entry) -> Entry:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.002)
        with lock:
            at_work -= 1
        return thing

    sizes = {thing: SIZES[number // 20 % 4] for number, thing in enumerate(THINGS)}
    assert list(parallel_map(THINGS, act, threads, sizes.__getitem__)) == THINGS
    assert most == threads
