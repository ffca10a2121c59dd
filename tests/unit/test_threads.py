"""Work that is shared out to threads."""

from __future__ import annotations

import threading
import time

import pytest

from airflow_mdbackup.scheme.index import Entry
from airflow_mdbackup.scheme.threads import spread

THINGS = [Entry(b"/%d" % number, b"") for number in range(160)]


@pytest.mark.parametrize(("size", "seconds"), [(None, 0.02), (1 << 20, 0.0)])
def test_work_that_waits_for_the_disk_is_done_side_by_side(size: int | None, seconds: float) -> None:
    """Short work too, once it is seen to wait; and all of it comes in its order."""
    at_work, most = set[int](), 0

    def act(thing: Entry) -> bytes:
        nonlocal most
        at_work.add(threading.get_ident())
        time.sleep(seconds or 0.001)
        most = max(most, len(at_work))
        at_work.discard(threading.get_ident())
        return thing.path

    found = list(spread(THINGS, act, 4, lambda thing: size))
    assert found == [thing.path for thing in THINGS] and most > 1


def test_short_work_goes_on_when_some_of_it_fails() -> None:
    """The error comes in its turn, and nobody waits for ever."""

    def act(thing: Entry) -> Entry:
        if thing == THINGS[40]:
            raise OSError
        return thing

    found = []
    with pytest.raises(OSError):
        for thing in spread(THINGS, act, 4, lambda thing: None):
            found.append(thing)
    assert found == THINGS[:32]


def test_few_large_files_are_shared_out() -> None:
    """Each thread has one, though all would fit into what a thread takes of short ones."""
    together = threading.Barrier(4, timeout=10)
    assert len({*spread(THINGS[:4], lambda thing: together.wait(), 4, lambda thing: 1 << 28)}) == 4
