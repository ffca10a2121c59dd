"""Sharing a bandwidth: between processes, while the limit changes, whatever is in the file."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup.pull import PullSummary, pull
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer import rate_limit as limit_module
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair, ServerProcess

RATE = 1_000_000
MOST = 4.0  # seconds that nobody ever has to sleep at once


class Clock:
    """Stands in for the module ``time``; :meth:`sleep` takes no time."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.naps: list[float] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limit_module, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bandwidth"


# --- together ---------------------------------------------------------------------------------------

RECEIVE = """
import sys, time
from pathlib import Path
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter, time as clock

path, begin, ahead, size = sys.argv[1], *map(float, sys.argv[2:])

class Ahead:
    sleep = time.sleep
    time = staticmethod(lambda: time.time() + ahead)

import airflow_mdbackup.scheme.transfer.rate_limit
airflow_mdbackup.scheme.transfer.rate_limit.time = Ahead
limiter = RateLimiter(Path(path), lambda: 1_000_000)
time.sleep(begin - time.time())
received = 0
while time.time() < begin + 2:
    received += int(size)
    limiter(int(size))
print(received)
"""


@pytest.mark.parametrize("ahead", [0, 0.4])
def test_two_processes_share_a_rate(path: Path, ahead: float) -> None:
    """Each about half of it; none gets nothing where the clocks of two hosts differ a little."""
    begin = time.time() + 1
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RECEIVE, path, str(begin), str(clock), "10000"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for clock in (0, ahead)
    ]
    received = [int(process.communicate(timeout=30)[0]) for process in processes]
    print(received)
    assert 0.75 * 2 * RATE < sum(received) < 1.25 * 2 * RATE
    if not ahead:
        assert min(received) > 0.25 * 2 * RATE
    assert min(received) > 0


def test_the_file_is_read_and_written_under_a_lock(path: Path) -> None:
    """Two who come at the same moment do not begin at the same moment."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = threading.Thread(target=RateLimiter(path, lambda: RATE), args=(1,))
        second.start()
        second.join(0.3)
        assert second.is_alive() and path.read_bytes() == b""
    second.join(10)
    assert not second.is_alive() and path.read_bytes()


@pytest.mark.parametrize("tasks", [1, 4, 64])
def test_all_tasks_together_keep_to_the_rate(path: Path, clock: Clock, tasks: int) -> None:
    """Whatever each receives at once. The queue of all of them is not mistaken for a damage."""
    sizes = random.Random(1)
    limiter = RateLimiter(path, lambda: RATE)
    begun = clock.now
    wakes = dict.fromkeys(range(tasks), clock.now)
    received = 0
    while clock.now < begun + 20:
        task = min(wakes, key=lambda task: wakes[task])  # who is awake first receives, and sleeps
        clock.now = max(clock.now, wakes[task])
        here = clock.now
        size = sizes.randrange(1, RATE // 32)
        limiter(size)
        received += size
        wakes[task], clock.now = clock.now, here
    assert 0.95 * 20 * RATE < received < 1.05 * 20 * RATE + tasks * RATE / 32
    assert max(clock.naps) <= tasks / 32 + 0.001


def test_what_was_received_at_once_is_paid_in_full(path: Path, clock: Clock) -> None:
    """However much it is; the sleeps are short."""
    limiter = RateLimiter(path, lambda: RATE)
    begun = clock.now
    for _ in range(5):
        assert limiter(2 * RATE) == RATE
    assert 9.9 < clock.now - begun <= 10
    assert max(clock.naps) < 0.1


def test_time_in_which_nothing_came_is_not_made_up_for(path: Path, clock: Clock) -> None:
    """After an hour of silence the rate is what it was."""
    limiter = RateLimiter(path, lambda: RATE)
    limiter(RATE)
    clock.now += 3600
    begun = clock.now
    limiter(RATE)
    assert 0.9 < clock.now - begun <= 1


# --- as time goes on --------------------------------------------------------------------------------


def test_a_limit_holds_from_its_beginning_to_its_end(path: Path, clock: Clock) -> None:
    """It is asked for anew, time and again."""
    begun = clock.now
    limiter = RateLimiter(path, lambda: RATE if 10 <= clock.now - begun < 20 else None)
    received = [0, 0, 0]
    while clock.now < begun + 30:
        received[int(clock.now - begun) // 10] += 50_000
        limiter(50_000)
        clock.now += 0.001
    assert received[0] > 40 * 10 * RATE and received[2] > 40 * 10 * RATE
    assert 0.95 * 10 * RATE < received[1] < 1.05 * 10 * RATE


def test_a_limit_that_ends_lets_those_go_who_wait(path: Path, clock: Clock) -> None:
    """And a greater one holds for what they have not paid yet."""
    end = clock.now + 1
    limiter = RateLimiter(path, lambda: RATE if clock.now < end else None)
    assert limiter(3600 * RATE) is None
    assert clock.now < end + 0.1
    limiter = RateLimiter(path, lambda: RATE if clock.now < end + 10 else 10 * RATE)
    assert limiter(60 * RATE) == 10 * RATE
    assert end + 14 < clock.now < end + 16


def test_without_a_limit_nothing_is_written(path: Path, clock: Clock) -> None:
    """Nobody sleeps either."""
    assert RateLimiter(path, lambda: None)(10**12) is None
    assert not path.exists() and clock.naps == []


# --- whatever is in the file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"x" * 100_000,
        b"\xff\0",
        b"nan",
        b"inf",
        b"-inf",
        b"1e308",
        b"-1",
        b"9" * 64,
        b"1_8",
        b"0x1",
    ]
    + [b"%.6f\nand more" % (1_800_000_000 + seconds) for seconds in (-3600, 1, 3600)],
)
def test_a_damaged_file_makes_nobody_wait_long(path: Path, clock: Clock, content: bytes) -> None:
    """It is mended by the first who comes."""
    path.write_bytes(content)
    limiter = RateLimiter(path, lambda: RATE)
    begun = clock.now
    limiter(RATE)
    assert 0.9 < clock.now - begun < 1 + MOST and max(clock.naps) < MOST
    assert abs(float(path.read_bytes()) - clock.now) < 0.1
    begun = clock.now
    limiter(RATE)
    assert 0.9 < clock.now - begun < 1.1


@pytest.mark.parametrize("jump", [-1e9, -3600, -5, -2, -1, 1, 5, 3600, 1e9])
def test_a_clock_that_jumps_makes_nobody_wait_long(path: Path, clock: Clock, jump: float) -> None:
    """Back or forth; from then on the rate is what it was."""
    limiter = RateLimiter(path, lambda: RATE)
    limiter(RATE)
    clock.now += jump
    for least in (0, 0.9):
        begun = clock.now
        limiter(RATE)
        assert least < clock.now - begun < 1.1 + MOST * (not least)


def test_a_symlink_in_place_of_the_file_is_not_written_through(path: Path, tmp_path: Path) -> None:
    """No more than any other file of ours."""
    path.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        RateLimiter(path, lambda: RATE)(1)
    assert not (tmp_path / "victim").exists()


# --- a whole pull -----------------------------------------------------------------------------------


def planned(pair: Pair) -> Run:
    """Plan to pull 2 MB, half of it in one file."""
    pair.put("large", os.urandom(RATE))
    for number in range(10):
        pair.put(f"{number:02}", os.urandom(RATE // 10))
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    pair.diff(run)
    return run


def seconds_of(pair: Pair, rate: Callable[[], int | None]) -> tuple[float, PullSummary]:
    """Pull and return how long it took."""
    run = planned(pair)

    def connect() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(server.channel, throttle=RateLimiter(pair.mirror.bandwidth, rate))

    begun = time.monotonic()
    summary = pull(pair.mirror, run, 0, connect)
    seconds = time.monotonic() - begun
    assert pair.finish(run).outcomes == {"pulled": 11}
    return seconds, summary


def test_a_pull_keeps_to_the_limit(pair: Pair) -> None:
    """2 MB at 1 MB/s, half of it in small files."""
    seconds, summary = seconds_of(pair, lambda: RATE)
    assert summary.transferred == 2 * RATE
    assert 1.5 < seconds < 10


def test_a_pull_without_limit_takes_no_such_time(pair: Pair) -> None:
    """Also where there is a limit at other hours."""
    seconds, _ = seconds_of(pair, lambda: None)
    assert seconds < 1
    assert not pair.mirror.bandwidth.exists()
