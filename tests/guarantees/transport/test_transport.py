"""Pulling over lines that break, spoil what they carry, or never end, from a real SFTP server where one can.

Whatever happens on the line: nothing is staged but what has its md5, no other file suffers, a retry transfers
just the rest, and then everything is here.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup.fetch import IndexLimits, fetch_index
from airflow_mdbackup.scheme.backup.pull import PullSummary, pull
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer import sftp as sftp_module
from airflow_mdbackup.scheme.transfer import sftp_handshake
from airflow_mdbackup.scheme.transfer import sftp_packets as sftp_packets_module
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Stream, Wanted
from tests.guarantees.transport.channels import (
    ATTRS,
    DATA,
    EOF,
    FAILURE,
    HANDLE,
    PERMISSION_DENIED,
    CutChannel,
    CutRequestsChannel,
    FlippedChannel,
    PacketChannel,
    ScriptedServer,
    ShuffledChannel,
    packet,
    status,
    string,
)
from tests.pair import Pair, ServerProcess
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("2. Faulty transport")

# What is read as a large file, and in what portions: little, so that each byte of a run can be tried.
SMALL, FIRST, PORTION = 600, 200, 400
FILES = {"a": 10, "b": 150, "c": 500, "empty": 0, "large": 1500, "larger": 1900, "more/d": 230}


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small portions; and nothing waits for the disk, since no power fails here."""
    monkeypatch.setattr(sftp_module, "SMALL", SMALL)
    monkeypatch.setattr(sftp_module, "FIRST_READ", FIRST)
    monkeypatch.setattr(sftp_handshake, "_MAX_READ", PORTION)
    monkeypatch.setattr(sftp_handshake, "DEFAULT_READ", PORTION)
    monkeypatch.setattr("airflow_mdbackup.scheme.transfer.packet_stream._PAUSE", 0)
    monkeypatch.setattr(syscalls_module, "syncfs", lambda descriptor: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


Wire = Callable[[Any], Any]


class Line:
    """A run that is planned, and pulled over one line after the other."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        for name, size in FILES.items():
            pair.put(name, random.Random(name).randbytes(size))
        pair.put("same", random.Random("a").randbytes(FILES["a"]))
        pair.build_index()
        self.run: Run = pair.new_run()
        pair.fetch(self.run)
        pair.plan = pair.diff(self.run)
        self.number = len(FILES) + 1

    def begin(self) -> None:
        """Forget all that was pulled."""
        for path in [*self.pair.mirror.staging.iterdir()]:
            path.unlink()
        self.run.results(0).unlink(missing_ok=True)

    def pull(self, wire: Wire, timeout: float = 20) -> PullSummary:
        server = ServerProcess(self.pair.user)
        server.channel.settimeout(timeout)
        try:
            return pull(self.pair.mirror, self.run, 0, lambda: Reader(wire(server.channel), window=1))
        finally:
            server.stop()

    def results(self) -> list[Result]:
        return list(read_records(self.run.results(0), Result))

    def check_staged(self) -> set[bytes]:
        """Make sure that what counts as staged has its md5, and that results tell of nothing else."""
        staged = {
            os.fsencode(path.name): path.read_bytes()
            for path in self.pair.mirror.staging.iterdir()
            if path.suffix != ".part"
        }
        for md5, content in staged.items():
            assert hashlib.md5(content).hexdigest().encode() == md5
        if self.run.results(0).exists():
            for result in self.results():
                if result.outcome in ("pulled", "copied"):
                    assert len(staged[result.md5]) == result.size
        return staged.keys() & set(self.pair.index_a().values())

    def missing(self) -> int:
        """Return how many bytes a retry may transfer."""
        here = self.check_staged()
        wanted = {md5: os.path.getsize(path) for path, md5 in self.pair.index_a().items()}
        begun = [path.stat().st_size for path in self.pair.mirror.staging.glob("*.part")]
        lacking = sum(size for md5, size in wanted.items() if md5 not in here)
        # The first portion of a file is asked for before it is known that its beginning is here.
        return lacking - sum(begun) + FIRST * len(begun)

    def retry(self, *, spoilt: bool = False) -> None:
        """Pull over a good line, which brings the rest.

        :param spoilt: beginnings may have wrong bytes, and then come a second time.
        """
        missing = self.missing() + (sum(FILES.values()) if spoilt else 0)
        summary = self.pull(lambda channel: channel)
        assert summary.outcomes.get("pulled", 0) + summary.outcomes.get("copied", 0) == self.number
        assert summary.transferred <= missing
        assert len(self.check_staged()) == len(set(self.pair.index_a().values()))

    def lost(self, wire: Wire, timeout: float = 20, *, spoilt: bool = False) -> str:
        """Pull over a line that breaks, from nothing, and again; return how it broke, or nothing if not."""
        self.begin()
        said = ""
        try:
            self.pull(wire, timeout)
        except ConnectionLost as error:
            said = str(error)
        self.retry(spoilt=spoilt)
        return said

    def not_brought(self, wire: Wire) -> list[Result]:
        """Pull over a line that spoils things, from nothing; return what did not come. A retry brings it."""
        self.begin()
        self.pull(wire)
        found = [result for result in self.results() if result.outcome not in ("pulled", "copied")]
        self.retry()
        return found

    def finish(self) -> None:
        """Commit, and make sure that B has what A has."""
        assert self.pair.finish(self.run).failed == 0
        assert self.pair.index_b() == self.pair.index_a()
        for name in [*FILES, "same"]:
            with open(self.pair.path(name), "rb") as file:
                assert self.pair.live(name).read_bytes() == file.read()


@pytest.fixture
def line(pair: Pair) -> Line:
    return Line(pair)


def replies(line: Line) -> list[bytes]:
    """Return each packet that the server sends in a pull over a good line."""
    found = []

    def noted(number: int, kind: int, whole: bytes) -> Iterator[bytes]:
        found.append(whole)
        yield whole

    line.begin()
    line.pull(lambda channel: PacketChannel(channel, noted))
    return found


def places(packets: list[bytes]) -> list[int]:
    """Return after which bytes to cut: each one, or those of the beginning and of each packet's ends."""
    total = sum(map(len, packets))
    ends = [0]
    for each in packets:
        ends.append(ends[-1] + len(each))
    near = {end + step for end in ends for step in (-1, 0, 1, 4)} | set(range(0, 300, 3))
    return scaled(sorted(near & set(range(total))), list(range(total)))


def id_of(whole: bytes) -> int:
    number: int = struct.unpack_from(">I", whole, 5)[0]
    return number


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


# --- spoilt -----------------------------------------------------------------------------------------


def test_a_flipped_bit_is_never_staged(line: Line, cases: Cases) -> None:
    """SSH's own checks let none through; without them, md5 finds what the protocol does not."""
    total = sum(map(len, replies(line)))
    chance = random.Random(5)
    ends = set()
    for place in range(0, total, scaled(11, 1)):
        bit = chance.randrange(8)
        with cases.one():
            # A length that was flipped makes us wait for what never comes.
            wire = partial(FlippedChannel, place=place, bit=bit)
            ends.add(line.lost(wire, timeout=0.2, spoilt=True))
    assert "" in ends and len(ends) > 3
    line.finish()


@pytest.mark.parametrize(
    "words", [b"Welcome to srv1!\n", b"\n", b"\r\n", b"hi\n", b"\x1b[2J", b"Last login: yesterday\r\n\r\n"]
)
def test_a_login_shell_that_prints_is_told_of(line: Line, words: bytes, cases: Cases) -> None:
    """What it prints comes before the server's first packet."""

    def greet(number: int, kind: int, whole: bytes) -> Iterator[bytes]:
        yield (words if number == 0 else b"") + whole

    with cases.one():
        assert "Does a login shell print" in line.lost(lambda channel: PacketChannel(channel, greet))


# --- packets that are not as they should be ---------------------------------------------------------


def twice(whole: bytes) -> bytes:
    return whole + whole


def of_unknown_id(whole: bytes) -> bytes:
    return whole[:5] + struct.pack(">I", 1_000_000) + whole[9:]


def oversized(whole: bytes) -> bytes:
    return struct.pack(">I", 300_000) + whole[4:]


def huge(whole: bytes) -> bytes:
    return b"\xff\xff\xff\xff" + whole[4:]


def truncated(whole: bytes) -> bytes:
    return string(whole[4 : 4 + (len(whole) - 4) // 2])


@pytest.mark.parametrize("spoil", [twice, of_unknown_id, oversized, huge, truncated])
def test_a_packet_that_breaks_the_protocol_costs_a_retry(
    line: Line, spoil: Callable[[bytes], bytes], cases: Cases
) -> None:
    """Each packet of the pull in turn; the words tell what the server did."""
    total = len(replies(line))
    words = ("never sent", "does not speak SFTP", "malformed", "more than was requested", "does not fit")
    said = []
    for number in range(2, total, scaled(2, 1)):

        def change(n: int, kind: int, whole: bytes, number: int = number) -> Iterator[bytes]:
            yield spoil(whole) if n == number else whole

        with cases.one():
            said.append(line.lost(lambda channel, change=change: PacketChannel(channel, change)))
    # Some answers end a CLOSE, of which only the id matters.
    assert all(any(word in each for word in words) for each in said if each)
    assert sum(map(bool, said)) > len(said) // 2
    line.finish()


def test_answers_in_any_order_bring_everything(line: Line, cases: Cases) -> None:
    """At once, without a retry."""
    for seed in range(scaled(20, 300)):
        with cases.one():
            assert line.not_brought(lambda channel, seed=seed: ShuffledChannel(channel, seed)) == []
    line.finish()


@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_reads_bring_everything(line: Line, most: int, cases: Cases) -> None:
    """A server may send less than it was asked for."""

    def shorten(number: int, kind: int, whole: bytes) -> Iterator[bytes]:
        yield packet(DATA, id_of(whole), string(whole[13 : 13 + most])) if kind == DATA else whole

    with cases.one():
        assert line.not_brought(lambda channel: PacketChannel(channel, shorten)) == []
    line.finish()


def test_an_early_end_of_a_file_has_it_read_once_more(line: Line, cases: Cases) -> None:
    """In the place of each block in turn."""
    total = len(replies(line))
    ended = 0
    for number in range(2, total):

        def end(n: int, kind: int, whole: bytes, number: int = number) -> Iterator[bytes]:
            nonlocal ended
            is_cut = kind == DATA and n == number
            ended += is_cut
            yield status(id_of(whole), EOF) if is_cut else whole

        with cases.one():
            assert line.not_brought(lambda channel, end=end: PacketChannel(channel, end)) == []
    assert ended > len(FILES)
    line.finish()


def test_a_file_that_always_ends_early_is_corrupt_and_no_other(line: Line, cases: Cases) -> None:
    """The large ones, behind their first block. What the next try gets right is taken then."""

    def end(number: int, kind: int, whole: bytes) -> Iterator[bytes]:
        is_later = kind == DATA and len(whole) == 13 + PORTION
        yield status(id_of(whole), EOF) if is_later else whole

    with cases.one():
        os.utime(line.pair.path("large"), (1e9, 1e9))
        os.utime(line.pair.path("larger"), (1e9, 1e9))
        found = line.not_brought(lambda channel: PacketChannel(channel, end))
        assert [(os.path.basename(each.path), each.outcome) for each in found] == [
            (b"large", "corrupt"),
            (b"larger", "corrupt"),
        ]
    line.finish()


@pytest.mark.parametrize(("code", "outcome"), [(FAILURE, "failed"), (PERMISSION_DENIED, "denied")])
def test_a_request_that_is_refused_fails_its_file_and_no_other(
    line: Line, code: int, outcome: str, cases: Cases
) -> None:
    """Each answer in turn: an OPEN, a handle that dies under FSTAT or a READ, a STAT."""
    kinds = set()
    for number in range(2, len(replies(line))):

        def refuse(n: int, kind: int, whole: bytes, number: int = number) -> Iterator[bytes]:
            if n == number:
                kinds.add(kind)
                whole = status(id_of(whole), code, b"not today")
            yield whole

        with cases.one():
            found = line.not_brought(lambda channel, refuse=refuse: PacketChannel(channel, refuse))
            assert len(found) <= 1
            assert all((each.outcome, each.detail) == (outcome, "not today") for each in found)
    assert {HANDLE, ATTRS, DATA} <= kinds
    line.finish()


def test_a_handle_that_dies_behind_some_blocks_keeps_them(line: Line, cases: Cases) -> None:
    """Each later read of the largest file fails; a retry resumes where it failed."""

    def die(number: int, kind: int, whole: bytes) -> Iterator[bytes]:
        content = line.pair.path("larger")
        with open(content, "rb") as file:
            is_late = kind == DATA and whole[13:] in file.read()[1000:]
        yield status(id_of(whole), FAILURE, b"Input/output error") if is_late else whole

    with cases.one():
        line.begin()
        line.pull(lambda channel: PacketChannel(channel, die))
        assert [r.outcome for r in line.results()].count("failed") == 1
        (part,) = line.pair.mirror.staging.glob("*.part")
        assert part.stat().st_size == 1000
        line.retry()
    line.finish()


def test_a_file_that_is_denied_fails_alone(limited_pair: Pair, cases: Cases) -> None:
    """By the server's own system, each file in turn."""
    line = Line(limited_pair)
    for name in FILES:
        with cases.one():
            os.chmod(line.pair.path(name), 0)
            line.begin()
            line.pull(lambda channel: channel)
            found = {r.path: r.outcome for r in line.results() if r.outcome not in ("pulled", "copied")}
            assert found == {line.pair.path(name): "denied"}
            os.chmod(line.pair.path(name), 0o644)
            line.retry()
    line.finish()


def test_an_index_that_ends_early_at_the_end_of_a_line_is_not_taken_for_a_whole_one(
    line: Line, cases: Cases
) -> None:
    """Nothing but its size tells it from one that somebody's own md5sum job made."""
    with open(line.pair.index, "rb") as file:
        index = file.read()
    cut = index.index(b"\n", FIRST + 1) + 1

    class Short(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return super().read(number, content[:cut], offset, length)

        def on_stat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, len(index), 0o100644, 5, 5))

    server = Short({line.pair.index: index})
    with cases.one(), pytest.raises(ConnectionLost, match="changed each time"):
        fetch_index(
            line.pair.mirror,
            line.pair.new_run(),
            lambda: Reader(server),
            line.pair.index,
            IndexLimits(still=0),
        )


# --- whoever opens it waits -------------------------------------------------------------------------


@contextmanager
def a_pipe_instead(pair: Pair, name: str) -> Iterator[None]:
    """Hold while a named pipe is in the place of a file."""
    path = pair.path(name)
    os.rename(path, path + b".aside")
    os.mkfifo(path)
    try:
        yield
    finally:
        # A server that waits for the other end is let go.
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        os.rename(path + b".aside", path)


@pytest.mark.parametrize("name", ["a", "c", "larger", "same"])
def test_a_named_pipe_in_the_place_of_a_file_keeps_no_other_from_coming(
    line: Line, name: str, cases: Cases
) -> None:
    """The try that meets it stalls, as the whole server does; the next one does not open it."""
    with cases.one():
        server = ServerProcess()
        with a_pipe_instead(line.pair, name):
            server.channel.settimeout(0.3)
            # "same" is a copy of "a", and only asked about.
            with pytest.raises(ConnectionLost, match="stalled") if name != "same" else nullcontext():
                pull(line.pair.mirror, line.run, 0, lambda: Reader(server.channel, window=1))
            server.channel.close()
            line.pull(lambda channel: channel)
            (found,) = [r for r in line.results() if r.outcome not in ("pulled", "copied")]
            assert (found.path, found.outcome) == (line.pair.path(name), "failed")
            assert found.detail == "not a regular file but a named pipe"
        server.stop()
        line.retry()
    line.finish()


def test_equal_files_come_although_a_pipe_is_in_the_place_of_the_first(line: Line, cases: Cases) -> None:
    """Whoever waits for its content fetches it."""
    with cases.one():
        server = ServerProcess()
        with a_pipe_instead(line.pair, "a"):
            server.channel.settimeout(0.3)
            with pytest.raises(ConnectionLost, match="stalled"):
                pull(line.pair.mirror, line.run, 0, lambda: Reader(server.channel, window=1))
            server.channel.close()
            line.pull(lambda channel: channel)
            told = {os.path.basename(result.path): result.outcome for result in line.results()}
            assert told[b"a"] == "failed" and told[b"same"] == "pulled"
        server.stop()
        line.retry()
    line.finish()


# --- without end ------------------------------------------------------------------------------------


class Endless(ScriptedServer):
    """Answers a READ with something that has no end."""

    flood = b""
    sent = 0

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        self.flood = self.endless(number)
        return b""

    def endless(self, number: int) -> bytes:
        raise NotImplementedError

    def silent(self) -> bytes:
        self.sent += len(self.flood)
        assert self.sent < 1 << 20, "it is listened to for ever"
        return self.flood


class Unasked(Endless):
    def endless(self, number: int) -> bytes:
        return packet(DATA, number + 1000, string(bytes(1000)))


class Shapeless(Endless):
    def endless(self, number: int) -> bytes:
        return b"x" * 1000


class NeverWhole(Endless):
    def endless(self, number: int) -> bytes:
        return bytes(999) + b"\1"


@pytest.mark.parametrize("kind", [Unasked, Shapeless, NeverWhole])
def test_a_server_that_streams_for_ever_is_given_up(kind: type[Endless], cases: Cases) -> None:
    """Before it has sent more than a packet may hold."""
    server = kind({b"/f": bytes(100_000)})
    with cases.one(), pytest.raises(ConnectionLost):
        reader = Reader(server)
        reader.submit(Wanted(b"/f", None, lambda _: Stream(len)))
        reader.wait()


def test_a_file_without_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    """Its size is what the provider says; where it goes, the disk sets the limit."""
    monkeypatch.undo()
    most = scaled(200, 2000) << 20
    block = bytes(255 << 10)

    class Boundless(ScriptedServer):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 13, (1 << 63) - 1, 0o100644, 5, 5))

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return packet(DATA, number, string(block[:length]))

    written = 0

    def write(data: bytes | memoryview) -> None:
        nonlocal written
        written += len(data)
        if written > most:
            raise OSError(28, "No space left on device")

    tracemalloc.start()
    try:
        with cases.one(), pytest.raises(OSError, match="No space"):
            reader = Reader(Boundless({b"/f": b""}), window=2 << 20)
            reader.submit(Wanted(b"/f", None, lambda _: Stream(write)))
            reader.wait()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
