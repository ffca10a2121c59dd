"""The pipelined reader against servers that do less than OpenSSH's: fewer files at a time, no attributes,
wrong sizes, failures that pass."""

from __future__ import annotations

import random
import struct
from collections import Counter
from typing import Any

import pytest

from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import SMALL, Fetched, Stated, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Code
from tests.guarantees.transport.channels import (
    ATTRS,
    DATA,
    EOF,
    FAILURE,
    READ,
    ScriptedServer,
    packet,
    status,
    string,
)
from tests.pair import md5
from tests.unit.transfer.test_sftp import LIMITS, fetch_all

PATTERN = random.Random(2).randbytes(1_000_003)
SIZES = (0, 1, 100, (32 << 10) - 1, 32 << 10, (32 << 10) + 1, SMALL, SMALL + 1, 1_000_003)
FILES = {b"/%d" % size: PATTERN[:size] for size in SIZES}
MANY = {b"/%d" % number: b"%d" % number * 50 for number in range(401)}
UNSUPPORTED = 8


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """These servers send one packet at a time, and more of them do not come while we wait."""
    monkeypatch.setattr("airflow_mdbackup.scheme.transfer.packet_stream._PAUSE", 0)


class Odd(ScriptedServer):
    """A server of whose habits each can be given.

    :param at_once: files that may be open; one more is refused with `code`.
    :param fstat: what FSTAT tells: "size", "no size", "zero", "small", "large", or a code to refuse it with.
    :param stat: likewise, of STAT.
    :param empty_end: the end of a file is a block of nothing, and not EOF.
    :param failing: how many times each READ at an offset that is a multiple of 64 KiB fails first.
    :param seventh: every seventh READ fails.
    :param denied: how many times each OPEN fails first.
    """

    def __init__(
        self,
        files: dict[bytes, bytes],
        *,
        at_once: int = 10_000,
        code: int = FAILURE,
        fstat: str | int = "size",
        stat: str | int = UNSUPPORTED,
        empty_end: bool = False,
        failing: int = 0,
        seventh: bool = False,
        denied: int = 0,
    ) -> None:
        super().__init__(files)
        self.at_once, self.code = at_once, code
        self.by_fstat, self.by_stat = fstat, stat
        self.empty_end, self.failing, self.seventh, self.denied = empty_end, failing, seventh, denied
        self.open: set[bytes] = set()
        self.most = 1 << 20
        self.refused = 0
        self.tries: Counter[Any] = Counter()

    def on_open(self, number: int, body: bytes) -> bytes:
        self.tries[body] += 1
        if len(self.open) >= self.at_once or self.tries[body] <= self.denied:
            self.refused += 1
            return status(number, self.code, b"Too many open files in this session, maximum 100")
        answer = super().on_open(number, body)
        self.open.add(b"h%d" % (len(self.handles) - 1))
        return answer

    def on_close(self, number: int, body: bytes) -> bytes:
        self.open.remove(body[4:])
        return super().on_close(number, body)

    def on_fstat(self, number: int, body: bytes) -> bytes:
        assert body[4:] in self.open
        return self.told(number, self.by_fstat, len(self.content(body)[0]))

    def on_stat(self, number: int, body: bytes) -> bytes:
        return self.told(number, self.by_stat, len(self.files[body[4:]]))

    def told(self, number: int, how: str | int, size: int) -> bytes:
        if isinstance(how, int):
            return status(number, how, b"The message is not extractable")
        if how == "no size":
            return packet(ATTRS, number, struct.pack(">I", 0))
        size = {"size": size, "zero": 0, "small": max(0, size - 3), "large": size + 1000}[how]
        return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, size, 0o100644, 5, 5))

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        if self.seventh and self.requests.count(READ) % 7 == 0:
            return status(number, FAILURE, b"Failure")
        if offset % (64 << 10) == 0:
            self.tries[len(content), offset] += 1
            if self.tries[len(content), offset] <= self.failing:
                return status(number, FAILURE, b"Failure")
        data = content[offset : offset + length]
        if not data and not self.empty_end:
            return status(number, EOF)
        return packet(DATA, number, string(data))


def check_all_come(server: Odd, **options: int) -> Reader:
    """Fetch all files, and have each of them be whole; nothing is left of them."""
    reader = Reader(server, **options)
    found = fetch_all(reader, {path: md5(content) for path, content in server.files.items()})
    for path, content in server.files.items():
        came, fetched = found[path]
        assert fetched.refusal is None and came == content and fetched.md5 == md5(content), path
        assert fetched.before is not None
    assert reader._claimed == reader._outstanding == 0 and not reader.busy
    return reader


# --- how many at a time -----------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 100, 127])
def test_a_server_with_few_handles_brings_all_files(at_once: int) -> None:
    """It says nothing of its limit. What it refuses is asked for again, with fewer in flight."""
    server = Odd(MANY, at_once=at_once)
    check_all_come(server)
    assert server.refused < 128 + 401 / at_once  # at first, and when one more is tried now and then


def test_a_file_that_cannot_be_opened_ever_costs_no_others_their_pace() -> None:
    """It is asked for a few times and fails; and as many as before are in flight after a while."""

    class Sick(Odd):
        def on_open(self, number: int, body: bytes) -> bytes:
            if body[4:].startswith(b"/13\0"):
                self.refused += 1
                return status(number, FAILURE, b"Input/output error")
            return super().on_open(number, body)

    files = {b"/%d" % number: b"x" for number in range(5000)}
    server = Sick(files)
    reader = Reader(server)
    found = fetch_all(reader, {path: md5(content) for path, content in files.items()})
    refusals = {path: fetched.refusal for path, (_, fetched) in found.items() if fetched.refusal is not None}
    assert refusals == {b"/13": (Code.FAILURE, "Input/output error")}
    assert 2 <= server.refused <= 6
    assert reader._max_files >= 64


def test_a_limit_that_the_server_told_is_where_it_begins() -> None:
    class Telling(Odd):
        extensions = LIMITS

    server = Telling(MANY, at_once=37)
    check_all_come(server)
    assert server.refused > 0


@pytest.mark.parametrize("code", [2, 3])
def test_no_other_refusal_is_asked_for_again(code: int) -> None:
    """A file that is not there, or is denied, will be so a moment later."""
    server = Odd(MANY, denied=1, code=code)
    found = fetch_all(Reader(server), dict.fromkeys(MANY))
    assert {fetched.refusal.code for _, fetched in found.values() if fetched.refusal} == {code}
    assert server.refused == len(found) == 401


# --- failures that pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1 << 20, 32 << 20])
@pytest.mark.parametrize("how", [{"failing": 1}, {"failing": 2}, {"failing": 3}, {"seventh": True}])
def test_reads_that_fail_now_and_then_are_tried_again(how: dict[str, Any], window: int) -> None:
    """Each once at once, and if that fails too, the whole file once more."""
    check_all_come(Odd({path: FILES[path] for path in (b"/100", b"/32769")}, **how), window=window)
    if how not in ({"failing": 2}, {"failing": 3}):
        check_all_come(Odd(FILES, **how), window=window)


def test_an_open_that_failed_once_is_tried_once_more() -> None:
    check_all_come(Odd(MANY, denied=1))


def test_what_fails_again_is_refused_with_the_servers_word() -> None:
    server = Odd({b"/f": PATTERN, b"/g": b""}, failing=4)
    found = fetch_all(Reader(server), {b"/f": md5(PATTERN), b"/g": None})
    assert found[b"/f"][1].refusal == (Code.FAILURE, "Failure")


def test_more_failures_than_are_remembered_end_too() -> None:
    """No more than some hundred files wait for their last try."""
    files = {b"/%d" % number: b"%d" % number for number in range(2000)}
    reader = check_all_come(Odd(files, denied=1))
    assert not reader._last_tries and not reader._to_reopen


# --- attributes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty_end", [False, True])
@pytest.mark.parametrize("stat", ["size", "zero", "small", "no size", UNSUPPORTED, FAILURE])
@pytest.mark.parametrize("fstat", ["size", "zero", "small", "large", "no size", FAILURE, UNSUPPORTED])
def test_files_of_all_sizes_come_whatever_the_server_tells_of_them(
    fstat: str | int, stat: str | int, empty_end: bool
) -> None:
    """By the md5 alone; sizes are not believed where that is wrong."""
    server = Odd(FILES, fstat=fstat, stat=stat, empty_end=empty_end)
    check_all_come(server)
    check_all_come(Odd(FILES, fstat=fstat, stat=stat, empty_end=empty_end), window=1 << 20)


@pytest.mark.parametrize("fstat", ["size", "zero", "small", "large", "no size", FAILURE])
def test_a_file_of_any_md5_is_read_to_its_end(fstat: str | int) -> None:
    """As the index is."""
    found = fetch_all(Reader(Odd(FILES, fstat=fstat)), dict.fromkeys(FILES))
    assert {path: content for path, (content, _) in found.items()} == FILES


def test_a_wrong_md5_costs_one_more_read_and_no_endless_ones() -> None:
    """Behind the end there is nothing; then the md5 is wrong indeed."""
    server = Odd({b"/f": PATTERN[:100]})
    ((_, fetched),) = fetch_all(Reader(server), {b"/f": b"0" * 32}).values()
    assert fetched.md5 == md5(PATTERN[:100]) and fetched.after is not None
    assert server.requests.count(READ) == 2


def test_a_file_that_grows_meanwhile_is_not_run_after() -> None:
    """FSTAT tells another size afterwards."""

    class Growing(Odd):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            self.files[b"/f"] += b"more"
            return super().on_fstat(number, body)

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return super().read(number, self.files[b"/f"][:5000], offset, length)

    ((_, fetched),) = fetch_all(Reader(Growing({b"/f": PATTERN[:5000]})), {b"/f": b"0" * 32}).values()
    assert fetched.before is not None and fetched.after is not None and fetched.refusal is None
    assert fetched.before.size != fetched.after.size


@pytest.mark.parametrize("fstat", [FAILURE, "small"])
def test_a_file_without_an_end_is_refused_where_its_sink_has_no_more_room(fstat: str | int) -> None:
    """It would fill the disk."""

    class Endless(Odd):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return packet(DATA, number, string(bytes(length)))

    def sink(_: Attributes) -> Stream:
        stream = Stream(len)
        stream.room = 5_000_000
        return stream

    reader = Reader(Endless({b"/f": PATTERN, b"/g": b"x"}, fstat=fstat))
    reader.submit(Wanted(b"/f", b"0" * 32, sink))
    (fetched,) = reader.wait()
    assert isinstance(fetched, Fetched) and fetched.refusal is not None
    assert fetched.refusal.code == Code.TOO_LONG and fetched.size <= 10_000_000
    assert reader._claimed == reader._outstanding == 0


def test_attributes_are_unknown_where_the_server_knows_no_stat() -> None:
    """That is no reason to fail a file; another code is."""
    for code, known in ((UNSUPPORTED, True), (FAILURE, False)):
        reader = Reader(Odd(FILES, stat=code))
        reader.submit_stat(b"/1", "key")
        (stated,) = reader.wait()
        assert isinstance(stated, Stated)
        assert (stated.attributes == Attributes(None, None, None)) is known
        assert (stated.refusal is None) is known
