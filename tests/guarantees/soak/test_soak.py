"""Hundreds of runs in one process: what they hold, and what they leave, does not grow."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import tracemalloc
from collections.abc import Iterator, Set
from itertools import count
from typing import NamedTuple

import pytest

import airflow_mdbackup.scheme.backup.cleanup as clean_module
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import ConnectionLost, IndexRefused
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import CutChannel
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair, ServerProcess
from tests.torture import Cases, scaled

_SETTLED = 40  # runs after which nothing may grow any more
_NOISE = 8_000  # bytes; a leak of 200 bytes in each run would be more
_OURS = tracemalloc.Filter(True, "*/airflow_mdbackup/*")
_KINDS = ("airflow_mdbackup.", "_io", "socket", "subprocess")  # modules whose objects count


class Held(NamedTuple):
    """What this process has: open files, threads, objects of ours or of files, and bytes, by line of ours."""

    files: int
    threads: int
    objects: int
    size: int
    lines: dict[str, int]

    @classmethod
    def now(cls, others: Set[threading.Thread]) -> Held:
        """Look; threads that other tests have left are not counted, for they may end meanwhile."""
        gc.collect()
        # There Python keeps some thousand names of attributes that were looked up, ours among them.
        sys._clear_type_cache()
        lines = tracemalloc.take_snapshot().filter_traces([_OURS]).statistics("lineno")
        sizes = {str(line.traceback[0]): line.size for line in lines}
        files = len(os.listdir("/proc/self/fd"))
        objects = sum(str(type(thing).__module__).startswith(_KINDS) for thing in gc.get_objects())
        return cls(files, len(set(threading.enumerate()) - others), objects, sum(sizes.values()), sizes)


@pytest.fixture
def traced(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL)  # pytest would keep what is logged
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.guarantee("10. Leak and soak")
def test_hundreds_of_runs_leave_nothing_behind(pair: Pair, cases: Cases, traced: None) -> None:
    """Most of them good; some with a cut connection, a refused index, or a file that changes meanwhile."""
    held: list[Held] = []
    others = set(threading.enumerate())
    for number in range(scaled(120, 1000)):
        pair.put("changes", b"%d" % number)
        pair.put(f"some/{number % 7}", b"x" * number)
        pair.put("large", b"%d" % (number // 5) * 200_000)
        with cases.one():
            do_run(pair, number)
        while pair.servers:
            pair.servers.pop().stop()
        if number >= _SETTLED and number % 10 == 0:
            held.append(Held.now(others))
    check_sound(pair)
    check_disk(pair)
    assert len({(h.files, h.threads) for h in held}) == 1, held
    before, after = (min(part, key=lambda h: h.size) for part in halves(held))
    grown = {line: size - before.lines.get(line, 0) for line, size in after.lines.items()}
    assert after.size < before.size + _NOISE, sorted(grown.items(), key=lambda item: -item[1])[:5]
    before, after = (min(part, key=lambda h: h.objects) for part in halves(held))
    assert after.objects < before.objects + 10, [h.objects for h in held]


def halves(held: list[Held]) -> tuple[list[Held], list[Held]]:
    return held[: len(held) // 2], held[len(held) // 2 :]


def do_run(pair: Pair, number: int) -> None:
    """Do a run of one kind or another, as a DAG would, with retries."""
    match number % 10:
        case 3:
            cut_off(pair, 100_000 * (number % 3 + 1))
        case 5:
            with open(pair.index, "wb") as index:
                index.write(b"no index\n")
            with pytest.raises(IndexRefused):
                pair.fetch(pair.new_run(), still=0.0)
        case 7:
            pair.build_index()
            pair.put("changes", b"changed since")
            assert pair.finish(pair.prepare()).outcomes["changed"] == 1
        case _:
            assert pair.backup().failed == 0


def cut_off(pair: Pair, limit: int) -> None:
    """Lose the connection each time that so many bytes have come, and try again."""
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    pair.diff(run)

    def connect() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(CutChannel(server.channel, limit))

    for _ in count():
        try:
            pull(pair.mirror, run, 0, connect)
        except ConnectionLost:
            continue
        break
    assert pair.finish(run).failed == 0


def check_disk(pair: Pair) -> None:
    """What is there beside files, versions and history is bounded, however many runs there were."""
    mirror = pair.mirror
    state = mirror.dest / ".mdbackup"
    assert {path.name for path in mirror.dest.iterdir()} == {".mdbackup", "files", "index.md5"}
    assert {path.name for path in state.iterdir()} == {
        *("staging", "runs", "history", "lock", "order", "provider-id", "status.json"),
        *("committed.md5", "changing.jsonl"),
    }
    runs = list((state / "runs").iterdir())
    assert sum((run / "done.json").exists() for run in runs) <= clean_module._MAX_RUNS
    assert all(path.suffix == ".jsonl" for path in mirror.history.iterdir())
    assert list(mirror.staging.iterdir()) == []
