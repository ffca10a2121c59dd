"""The pipelined reader, against OpenSSH's sftp-server and against servers that misbehave."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stated, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Code
from tests.guarantees.transport.channels import (
    ATTRS,
    DATA,
    EXTENDED,
    FAILURE,
    HANDLE,
    STATUS,
    CutChannel,
    ScriptedServer,
    packet,
    status,
    string,
)
from tests.pair import ServerProcess, md5

PATTERN = random.Random(1).randbytes(1_000_003)
LIMITS = string(b"limits@openssh.com") + string(b"1")


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    server = ServerProcess()
    yield server
    server.stop()


def sink_of(content: list[bytes]) -> Callable[[Attributes], Stream]:
    """Return what gives a larger file a sink that collects it."""
    return lambda _: Stream(lambda data: content.append(bytes(data)))


def fetch_all(reader: Reader, paths: dict[bytes, bytes | None]) -> dict[bytes, tuple[bytes, Fetched]]:
    """Read files with the given expected md5s, as many at a time as there is room for."""
    waiting = list(paths.items())
    contents: dict[bytes, list[bytes]] = {path: [] for path in paths}
    found = {}
    while waiting or reader.busy:
        while waiting and reader.room:
            path, expected = waiting.pop()
            reader.submit(Wanted(path, expected, sink_of(contents[path]), path))
        assert reader.busy, "there is no room, and nothing is on its way"
        for answer in reader.wait():
            assert isinstance(answer, Fetched)
            content = b"".join(contents[answer.wanted.key])
            found[answer.wanted.path] = content or answer.content or b"", answer
    return found


def fetch(channel: Any, expected: bytes | None = None, **options: int) -> tuple[bytes, Fetched]:
    """Read the file /f."""
    return fetch_all(Reader(channel, **options), {b"/f": expected})[b"/f"]


# --- a real server ----------------------------------------------------------------------------------


def test_files_of_all_sizes_arrive_whole_with_their_attributes(server: ServerProcess, tmp_path: Path) -> None:
    """Around each boundary: nothing, the first read, one read, the window."""
    sizes = [0, 1, 32767, 32768, 32769, 261119, 261120, 261121, 522240, 522241, 1_000_003]
    for size in sizes:
        (tmp_path / str(size)).write_bytes(PATTERN[:size])
        os.utime(tmp_path / str(size), (size, size))
        (tmp_path / str(size)).chmod(0o640)
    wanted = {bytes(tmp_path / str(size)): md5(PATTERN[:size]) for size in sizes}
    reader = Reader(server.channel)
    for path, (content, fetched) in fetch_all(reader, wanted).items():
        size = int(os.path.basename(path))
        assert content == PATTERN[:size] and fetched.md5 == md5(content) and fetched.size == size
        assert fetched.refusal is None and fetched.after is None
        assert fetched.before is not None
        assert (fetched.before.size, fetched.before.mtime) == (size, size)
        assert fetched.before.mode == 0o100640
    assert reader.received == sum(sizes)


@pytest.mark.parametrize("window", [32 << 10, 300 << 10, 16 << 20])
def test_a_file_larger_than_the_window_arrives_whole(
    server: ServerProcess, tmp_path: Path, window: int
) -> None:
    """Also when the window takes no more than one request."""
    content = PATTERN * 20
    (tmp_path / "large").write_bytes(content)
    reader = Reader(server.channel, window=max(window, 255 << 10))
    path = bytes(tmp_path / "large")
    assert fetch_all(reader, {path: md5(content)})[path][0] == content


def test_thousands_of_files_in_flight_are_told_apart(server: ServerProcess, tmp_path: Path) -> None:
    """Each result belongs to its own file."""
    wanted = {}
    for number in range(2000):
        content = b"%d " % number * (number % 50)
        (tmp_path / str(number)).write_bytes(content)
        wanted[bytes(tmp_path / str(number))] = md5(content)
    found = fetch_all(Reader(server.channel), wanted)
    assert {path: fetched.md5 for path, (_, fetched) in found.items()} == wanted


def test_what_cannot_be_opened_is_refused_with_the_servers_word(
    server: ServerProcess, tmp_path: Path
) -> None:
    """A missing file and a directory; the others arrive all the same."""
    (tmp_path / "good").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    paths = {bytes(tmp_path / name): None for name in ("good", "missing", "folder", "good/below")}
    found = fetch_all(Reader(server.channel), paths)
    codes = {
        os.path.basename(path): fetched.refusal and fetched.refusal.code
        for path, (_, fetched) in found.items()
    }
    assert codes == {
        b"good": None,
        b"missing": Code.NO_SUCH_FILE,
        b"folder": Code.SPECIAL,
        b"below": Code.NO_SUCH_FILE,
    }


def test_attributes_can_be_asked_for_among_files(server: ServerProcess, tmp_path: Path) -> None:
    """STAT follows symlinks; what is missing is refused."""
    (tmp_path / "f").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("f")
    reader = Reader(server.channel)
    reader.submit_stat(bytes(tmp_path / "link"), "link")
    reader.submit_stat(bytes(tmp_path / "missing"), "missing")
    answers = {}
    while reader.busy:
        for answer in reader.wait():
            assert isinstance(answer, Stated)
            answers[answer.key] = answer
    assert answers["link"].attributes.size == 5
    assert answers["missing"].refusal.code == Code.NO_SUCH_FILE


def test_a_wrong_md5_has_the_attributes_asked_for_once_more(server: ServerProcess, tmp_path: Path) -> None:
    """To tell a file that changed while it was read from a bad one."""
    (tmp_path / "f").write_bytes(b"12345")
    path = bytes(tmp_path / "f")
    _, fetched = fetch_all(Reader(server.channel), {path: b"0" * 32})[path]
    assert fetched.before == fetched.after is not None and fetched.md5 == md5(b"12345")


def test_an_error_of_the_writer_reaches_the_caller(server: ServerProcess, tmp_path: Path) -> None:
    """A full disk is not a lost connection."""

    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "f").write_bytes(PATTERN)
    reader = Reader(server.channel)
    reader.submit(Wanted(bytes(tmp_path / "f"), None, lambda _: Stream(full)))
    with pytest.raises(OSError, match="No space left"):
        reader.wait()


@pytest.mark.parametrize("limit", [0, 1, 8, 40, 100, 200, 400, 1000, 33000, 400_000])
def test_a_connection_that_breaks_at_any_byte_is_lost(
    server: ServerProcess, tmp_path: Path, limit: int
) -> None:
    """In the handshake, in a header, in the data."""
    (tmp_path / "f").write_bytes(PATTERN)
    with pytest.raises(ConnectionLost):
        fetch_all(Reader(CutChannel(server.channel, limit)), {bytes(tmp_path / "f"): None})


# --- a limit ----------------------------------------------------------------------------------------


class Counting(ScriptedServer):
    """Counts what it was asked for and what was received of it."""

    extensions = LIMITS
    asked = sent = most_coming = 0

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        self.asked += min(length, len(content) - offset)
        self.most_coming = max(self.most_coming, self.asked - self.sent)
        return super().read(number, content, offset, length)

    def recv(self, size: int) -> bytes:
        data = super().recv(size)
        self.sent += len(data)
        return data


@pytest.mark.parametrize("rate", [1000, 200_000, 10_000_000])
def test_under_a_limit_no_more_than_a_second_of_it_is_asked_for_ahead(rate: int) -> None:
    """But at least what a read or two bring; and all that was received is charged."""
    charged: list[int] = []

    def throttle(received: int) -> int:
        charged.append(received)
        return rate

    files = {b"/large": PATTERN * 4, **{b"/%d" % n: PATTERN[:50_000] for n in range(40)}}
    server = Counting(files)
    found = fetch_all(Reader(server, throttle=throttle), {path: md5(c) for path, c in files.items()})
    assert {path: content for path, (content, _) in found.items()} == files
    assert server.most_coming <= max(rate, 64 << 10)
    assert sum(charged) == server.sent and max(charged) <= max(rate // 32, 4096)


def test_a_limit_that_begins_when_the_window_is_full_of_beginnings_stalls_nothing() -> None:
    """What is held in memory already does not count as coming. Limits that come and go change nothing."""
    files = {b"/%d" % n: PATTERN[:200_000] for n in range(300)}
    changes = random.Random(1)
    calls = 0

    def throttle(received: int) -> int | None:
        nonlocal calls
        calls += 1
        return None if calls < 60 else changes.choice([None, 1000, 1_000_000_000])

    server = Counting(files)
    found = fetch_all(Reader(server, throttle=throttle), {path: md5(c) for path, c in files.items()})
    assert all(content == PATTERN[:200_000] for content, _ in found.values())
    assert calls > 200


def test_a_reader_that_waits_longer_than_the_connection_may_be_silent_does_not_stall(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Only silence while it listens counts."""
    (tmp_path / "f").write_bytes(PATTERN)
    server.channel.settimeout(0.5)
    waits = [0.7, 0.7]

    def throttle(received: int) -> int:
        time.sleep(waits.pop() if waits and received > 1000 else 0)
        return 1_000_000

    path = bytes(tmp_path / "f")
    assert fetch_all(Reader(server.channel, throttle=throttle), {path: None})[path][0] == PATTERN
    assert not waits


# --- servers with ways of their own -----------------------------------------------------------------


def test_a_server_without_limits_is_asked_for_what_every_server_can_send() -> None:
    """32 KiB at a time, and the extension is not asked for."""

    class Plain(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            assert length <= 32 << 10
            return super().read(number, content, offset, length)

    server = Plain({b"/f": PATTERN})
    assert fetch(server, md5(PATTERN))[0] == PATTERN
    assert EXTENDED not in server.requests


def test_a_server_that_denies_its_limits_is_used_without_them() -> None:
    """It told of the extension, and then does not know it."""

    class Denying(ScriptedServer):
        extensions = LIMITS

        def on_extended(self, number: int, body: bytes) -> bytes:
            return status(number, 8)

    assert fetch(Denying({b"/f": PATTERN}))[0] == PATTERN


@pytest.mark.parametrize("handles", [1, 2, 5])
def test_no_more_files_are_open_than_the_server_allows(handles: int) -> None:
    """The limit on handles is respected."""

    class Strict(ScriptedServer):
        extensions = LIMITS
        opened = 0

        def on_extended(self, number: int, body: bytes) -> bytes:
            return packet(201, number, struct.pack(">QQQQ", 0, 0, 0, handles))

        def on_open(self, number: int, body: bytes) -> bytes:
            self.opened += 1
            assert self.opened <= handles
            return super().on_open(number, body)

        def on_close(self, number: int, body: bytes) -> bytes:
            self.opened -= 1
            return super().on_close(number, body)

    files = {b"/%d" % n: b"%d" % n for n in range(40)}
    assert len(fetch_all(Reader(Strict(files)), dict.fromkeys(files))) == 40


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_packets_may_come_in_pieces(most: int) -> None:
    """Down to single bytes."""
    content = PATTERN[: 3000 * most]
    assert fetch(ScriptedServer({b"/f": content}, most), md5(content))[0] == content


@pytest.mark.parametrize("step", [1, 1000, 20_000])
def test_short_reads_are_asked_for_again(step: int) -> None:
    """A server may send less than it was asked for, as little as it likes."""

    class Short(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return super().read(number, content, offset, min(length, step))

    content = PATTERN[: step * 50 + 1]
    found, fetched = fetch(Short({b"/f": content}), md5(content))
    assert found == content and fetched.md5 == md5(content)


class Shuffled(ScriptedServer):
    """Answers in another order, once nothing more is asked."""

    def __init__(self, files: dict[bytes, bytes], seed: int) -> None:
        super().__init__(files)
        self._random = random.Random(seed)
        self._held: list[bytes] = []

    def send(self, data: bytes) -> None:
        if self.requests[-1] in (1, EXTENDED):
            super().send(data)
        else:
            self._held.append(data)

    def silent(self) -> bytes:
        if not self._held:
            return super().silent()
        return self._held.pop(self._random.randrange(len(self._held)))


@pytest.mark.parametrize("seed", range(10))
def test_answers_may_come_in_any_order(seed: int) -> None:
    """Bytes are hashed and written in theirs."""
    files = {b"/%d" % n: PATTERN[n : n + 150_000 * (n % 3)] for n in range(12)}
    found = fetch_all(Reader(Shuffled(files, seed), window=1 << 20), {p: md5(c) for p, c in files.items()})
    assert {path: content for path, (content, _) in found.items()} == files
    assert all(fetched.after is None for _, fetched in found.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_file_that_shrank_ends_where_it_ends(seed: int) -> None:
    """FSTAT told of more than there is; the answers come in any order."""

    class Shrunk(Shuffled):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQII", 1 | 8, 500_000, 5, 5))

    content, fetched = fetch(Shrunk({b"/f": PATTERN[:100_000]}, seed), md5(PATTERN[:500_000]))
    assert content == PATTERN[:100_000] and fetched.size == 100_000 and fetched.md5 == md5(content)


def test_a_window_is_free_again_after_files_that_went_wrong() -> None:
    """Refused opens, failed reads, and files that shrank give back all they claimed."""

    class Moody(ScriptedServer):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQII", 1 | 8, 300_000, 5, 5))

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if content == PATTERN[:300_000] and offset == 32 << 10:
                return status(number, FAILURE)
            return super().read(number, content, offset, length)

    files = {b"/%d" % n: (PATTERN[:300_000], b"short", PATTERN[:40_000])[n % 3] for n in range(300)}
    wanted = dict.fromkeys([*files, *(b"/missing%d" % n for n in range(100))])
    reader = Reader(Moody(files), window=200 << 10)
    assert len(fetch_all(reader, wanted)) == 400
    assert reader._claimed == 0 and reader.room


def test_files_that_are_done_are_let_go_of_while_others_fill_the_window() -> None:
    """They did not get their first READ before their size was known, and are not kept for it."""
    files = {b"/%d" % n: PATTERN[: 300_000 if n % 4 == 0 else 100] for n in range(600)}
    reader = Reader(ScriptedServer(files), window=1 << 20)
    waiting = [b"/%d" % n for n in range(600)]
    most = done = 0
    while waiting or reader.busy:
        while waiting and reader.room:
            path = waiting.pop()
            reader.submit(Wanted(path, md5(files[path]), lambda _: Stream(len)))
        done += len(reader.take_turn())
        most = max(most, len(reader._unread))
        assert len(reader._unread) <= reader._files
    assert done == 600 and most > 0 and reader._claimed == reader._outstanding == 0


def test_a_read_that_fails_is_a_refusal_of_that_file() -> None:
    """With the server's word; nothing else suffers."""

    class Broken(ScriptedServer):
        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if offset:
                return status(number, FAILURE, b"Input/output \x1b[2Jerror")
            return super().read(number, content, offset, length)

    _, fetched = fetch(Broken({b"/f": PATTERN}))
    assert fetched.refusal is not None and fetched.refusal.code == FAILURE
    assert fetched.refusal.message == "Input/output \\x1b[2Jerror"


def test_what_is_held_in_memory_stays_within_the_window() -> None:
    """A server that keeps back the first block of a file cannot make us hold all others."""

    class Withholding(ScriptedServer):
        sent = 0

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if offset == 0:
                return b""
            self.sent += length
            return packet(DATA, number, string(bytes(length)))

        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQ", 1, 1 << 30))

    server = Withholding({b"/f": b"x"})
    with pytest.raises(ConnectionLost, match="stalled"):
        fetch(server, window=1 << 20)
    assert server.sent <= 1 << 20


# --- servers that break the protocol ----------------------------------------------------------------


class Hostile(ScriptedServer):
    """Answers one kind of request with the bytes given."""

    def __init__(self, kind: int, answer: Any) -> None:
        super().__init__({b"/f": PATTERN})
        self.answers = {**self.answers, kind: lambda self, number, body: answer(number)}


@pytest.mark.parametrize(
    ("kind", "answer", "why"),
    [
        (1, lambda n: b"This account is not available.\r\n", "does not speak SFTP"),
        (1, lambda n: b"\0\0\0\x20Welcome to the machine, dear user...", "does not speak SFTP"),
        (1, lambda n: packet(STATUS, 0), "does not speak SFTP"),
        (1, lambda n: b"\0\0\0\0", "does not speak SFTP"),
        (1, lambda n: b"\xff\xff\xff\xff", "does not speak SFTP"),
        (1, lambda n: packet(2, 3, b"\0\0"), "malformed version packet"),
        (1, lambda n: packet(2, 3, b"\0\0\0\xffx"), "malformed packet"),
        (1, lambda n: b"", "stalled"),
        (3, lambda n: packet(HANDLE, n + 1000, string(b"h")), "a request that was never sent"),
        (3, lambda n: packet(HANDLE, n, string(b"h" * 257)), "more than was requested"),
        (3, lambda n: packet(HANDLE, n, b"\0"), "malformed packet"),
        (3, lambda n: packet(HANDLE, n, string(b"h")[:-1]), "malformed packet"),
        (3, lambda n: packet(DATA, n, string(b"h")), "type 103, which does not fit"),
        (3, lambda n: packet(77, n), "type 77, which does not fit"),
        (3, lambda n: packet(STATUS, n), "malformed packet"),
        (3, lambda n: packet(STATUS, n, b"\0\0\0\2\0\0\xff\xff"), "malformed packet"),
        (3, lambda n: b"\0\0\0\1\0", "does not speak SFTP"),
        (3, lambda n: struct.pack(">I", 1 << 20), "does not speak SFTP"),
        (3, lambda n: packet(HANDLE, n, string(b"h")) * 2, "a request that was never sent"),
        (5, lambda n: packet(DATA, n, string(bytes(32769))), "more than was requested"),
        (5, lambda n: packet(DATA, n, struct.pack(">I", 500) + b"x"), "malformed packet"),
        (5, lambda n: packet(DATA, n), "malformed packet"),
        (5, lambda n: packet(ATTRS, n, bytes(4)), "type 105, which does not fit"),
        (5, lambda n: b"", "stalled"),
        (8, lambda n: packet(ATTRS, n, b"\0\0\0\1\0"), "malformed packet"),
        (8, lambda n: packet(HANDLE, n, string(b"h")), "type 102, which does not fit"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_a_lost_connection(kind: int, answer: Any, why: str) -> None:
    """With a message that says what it did; never an error of our own making, never more memory."""
    with pytest.raises(ConnectionLost, match=why):
        fetch(Hostile(kind, answer))


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_never_end_in_anything_but_a_lost_connection(seed: int) -> None:
    """A server whose packets have some bytes turned over."""
    noise = random.Random(seed)

    class Noisy(ScriptedServer):
        extensions = LIMITS

        def send(self, data: bytes) -> None:
            if data and noise.random() < 0.3:
                at = noise.randrange(min(len(data), 40))
                data = data[:at] + bytes([noise.randrange(256)]) + data[at + 1 :]
            super().send(data)

    try:
        for content, fetched in fetch_all(
            Reader(Noisy({b"/%d" % n: PATTERN[:40_000] for n in range(20)})),
            {b"/%d" % n: md5(PATTERN[:40_000]) for n in range(20)},
        ).values():
            assert fetched.refusal or fetched.md5 == md5(content)
    except ConnectionLost:
        pass


def test_a_server_that_takes_no_more_requests_is_a_lost_connection() -> None:
    """A send that times out, or fails."""

    class Full(ScriptedServer):
        def sendall(self, data: bytes) -> None:
            if self.requests:
                raise TimeoutError
            super().sendall(data)

    with pytest.raises(ConnectionLost, match="takes no more requests"):
        fetch(Full({}))
