"""Lines that are cut, stall or trickle while they are pulled over, from a real SFTP server where one can."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from airflow_mdbackup.scheme.backup.fetch import IndexLimits, fetch_index
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.transfer import sftp_packets as sftp_packets_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Stream, Wanted
from tests.guarantees.transport.channels import (
    CutChannel,
    CutRequestsChannel,
    PacketChannel,
    ScriptedServer,
    status,
)
from tests.guarantees.transport.line import Line, places, replies
from tests.pair import ServerProcess
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("2. Faulty transport")


# --- cut --------------------------------------------------------------------------------------------


def test_an_answer_cut_after_any_byte_costs_a_retry(line: Line, cases: Cases) -> None:
    """Also between each two packets."""
    packets = replies(line)
    # What ends after all files are here, as the answer to a CLOSE, nobody waits for.
    needed = sum(map(len, packets)) - 5 * len(status(0, 0, b"Success"))
    for place in places(packets):
        with cases.one():
            said = line.lost(lambda channel, place=place: CutChannel(channel, place))
            assert "closed the connection" in said or "broke" in said or place > needed
    line.finish()


def packets_of(stream: bytes) -> Iterator[bytes]:
    """Yield the packets of a stream, each with its length before it."""
    while stream:
        size = 4 + int.from_bytes(stream[:4], "big")
        yield stream[:size]
        stream = stream[size:]


def test_a_request_cut_after_any_byte_costs_a_retry(line: Line, cases: Cases) -> None:
    """The server may have got a part of it."""
    sent = []

    class Noting(CutRequestsChannel):
        def sendall(self, data: bytes) -> None:
            sent.append(data)
            super().sendall(data)

    line.begin()
    line.pull(lambda channel: Noting(channel, 1 << 30))
    requests = [*packets_of(b"".join(sent))]
    total = sum(map(len, requests))
    # Nobody waits for what is closed at the end, and how much that is, is a matter of time.
    needed = total - sum(len(request) for request in requests if request[4] == sftp_packets_module.Type.CLOSE)
    for place in range(0, total, scaled(3, 1)):
        with cases.one():
            said = line.lost(lambda channel, place=place: CutRequestsChannel(channel, place))
            assert "broke" in said or place >= needed
    line.finish()


def test_an_index_cut_after_any_byte_costs_a_retry(line: Line, cases: Cases) -> None:
    """What has come of it is believed by nobody."""
    pair, run = line.pair, line.pair.new_run()
    total = 0

    def fetch(place: int) -> None:
        server = ServerProcess()
        try:
            wire = CutChannel(server.channel, place)
            fetch_index(pair.mirror, run, lambda: Reader(wire), pair.index, IndexLimits(still=0))
        finally:
            server.stop()

    for place in range(0, 5000, scaled(11, 1)):
        with cases.one():
            try:
                fetch(place)
                break
            except ConnectionLost:
                assert not run.index.exists() and not run.state.exists()
                total = place
    assert total > os.path.getsize(pair.index)
    assert list(read_entries(run.index)) == list(read_entries(line.run.index))


def test_a_server_that_is_killed_costs_a_retry(line: Line, cases: Cases) -> None:
    """A real end, not one that the channel plays."""

    def kill_at(number: int) -> None:
        def kill(n: int, kind: int, whole: bytes) -> Iterator[bytes]:
            if n == number:
                os.kill(server.process.pid, signal.SIGKILL)
                server.process.wait()
            yield whole

        server = ServerProcess()
        try:
            wire = PacketChannel(server.channel, kill)
            with pytest.raises(ConnectionLost):
                pull(line.pair.mirror, line.run, 0, lambda: Reader(wire, window=1))
        finally:
            server.stop()

    for number in range(2, 2 + scaled(10, 20)):
        with cases.one():
            line.begin()
            kill_at(number)
            line.retry()
    line.finish()


# --- stalled ----------------------------------------------------------------------------------------


def test_a_stall_at_any_packet_is_ended_and_a_retry_brings_the_rest(line: Line, cases: Cases) -> None:
    """What has come of a large file is not transferred again."""
    total = len(replies(line))
    for number in range(total):

        def stall(n: int, kind: int, whole: bytes, number: int = number) -> Iterator[bytes]:
            if n >= number:
                raise TimeoutError("timed out")
            yield whole

        with cases.one():
            said = line.lost(lambda channel, stall=stall: PacketChannel(channel, stall))
            assert "stalled" in said or number > total - 5
    line.finish()


def test_a_server_that_stops_is_given_up_when_the_time_is_over(line: Line, cases: Cases) -> None:
    """The process is really stopped, and the channel's own timer ends the wait."""
    with cases.one():
        line.begin()
        server = ServerProcess()
        server.channel.settimeout(0.3)

        def stop(n: int, kind: int, whole: bytes) -> Iterator[bytes]:
            if n == 12:
                os.kill(server.process.pid, signal.SIGSTOP)
            yield whole

        with pytest.raises(ConnectionLost, match="stalled: no reply"):
            pull(line.pair.mirror, line.run, 0, lambda: Reader(PacketChannel(server.channel, stop), window=1))
        os.kill(server.process.pid, signal.SIGCONT)
        server.stop()
        line.retry()
    line.finish()


class Clock:
    """A clock that a channel moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Trickle(ScriptedServer):
    """Sends ``most`` bytes whenever ``seconds`` are over."""

    def __init__(self, files: dict[bytes, bytes], most: int, clock: Clock, seconds: float) -> None:
        super().__init__(files, most)
        self.clock = clock
        self.seconds = seconds

    def recv(self, size: int) -> bytes:
        self.clock.now += self.seconds
        return super().recv(size)


@pytest.mark.parametrize(("most", "seconds"), [(1, 59), (5, 59), (1, 1), (3, 1)])
def test_a_trickle_is_given_up(most: int, seconds: float, cases: Cases) -> None:
    """It is never silent for as long as the channel allows, and would keep a task for ever."""
    clock = Clock()
    server = Trickle({b"/f": bytes(5000)}, most, clock, seconds)
    with cases.one(), pytest.raises(ConnectionLost, match=r"stalled: only \d+ bytes came while we waited"):
        reader = Reader(server, clock=clock)
        reader.submit(Wanted(b"/f", None, lambda _: Stream(len)))
        reader.wait()
    assert 300 <= clock.now < 700


@pytest.mark.parametrize(("most", "seconds", "patience"), [(30, 5, 300), (1000, 20, 300), (500, 100, 1500)])
def test_a_slow_line_is_not_given_up(most: int, seconds: float, patience: float, cases: Cases) -> None:
    """A modem, a disk that has to spin up: all that it takes is time."""
    clock = Clock()
    server = Trickle({b"/f": bytes(10_000)}, most, clock, seconds)
    with cases.one():
        reader = Reader(server, patience=patience, clock=clock)
        reader.submit(Wanted(b"/f", None, lambda _: Stream(len)))
        (fetched,) = reader.wait()
        assert fetched.refusal is None and fetched.size == 10_000  # type: ignore[union-attr]
    assert clock.now > patience


def test_the_wait_for_a_limit_or_the_disk_is_none_for_the_server(cases: Cases) -> None:
    """However long it is."""
    clock = Clock()

    def throttle(size: int) -> None:
        clock.now += 100

    class Slow(Stream):
        def write(self, data: bytes | memoryview) -> None:
            clock.now += 100
            super().write(data)

    server = ScriptedServer({b"/f": bytes(5000)}, 10)
    with cases.one():
        reader = Reader(server, throttle=throttle, clock=clock)
        reader.submit(Wanted(b"/f", None, lambda _: Slow(len)))
        assert reader.wait()
    assert clock.now > 10_000
