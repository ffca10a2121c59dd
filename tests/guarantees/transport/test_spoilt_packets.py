"""Packets that are spoilt, break the protocol, or bring less than was asked for."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from airflow_mdbackup.scheme.backup.fetch import IndexLimits, fetch_index
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import (
    ATTRS,
    DATA,
    EOF,
    FAILURE,
    HANDLE,
    PERMISSION_DENIED,
    FlippedChannel,
    PacketChannel,
    ScriptedServer,
    ShuffledChannel,
    packet,
    status,
    string,
)
from tests.guarantees.transport.line import FILES, FIRST, PORTION, Line, id_of, replies
from tests.pair import Pair
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("2. Faulty transport")


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
