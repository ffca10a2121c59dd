"""A provider that sends too much, or in crumbs: neither memory nor disk is taken beyond bounds."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup.fetch import IndexLimits, fetch_index
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import IndexRefused
from airflow_mdbackup.scheme.index.canonical import format_line
from airflow_mdbackup.scheme.index.received import canonicalise
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from tests.guarantees.hostile.attack import MD5, MIB, index_file, write_index
from tests.guarantees.transport.channels import ATTRS, DATA, EXTENDED_REPLY, ScriptedServer, packet, string
from tests.guarantees.whatever_happens.soundness import check_sound, digest
from tests.pair import Pair
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("7. Hostile provider")


# --- sizes ------------------------------------------------------------------------------------------


class LargeIndex(ScriptedServer):
    """Says how large its index is, and sends as much as it is asked for."""

    def __init__(self, told: int, line: bytes = MD5 + b"  /a\n") -> None:
        super().__init__({b"/i": b""})
        self.told = told
        self.block = (line * (32768 // len(line) + 1))[:32768]
        self.sent = 0

    def on_fstat(self, number: int, body: bytes) -> bytes:
        return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, self.told, 0o100644, 5, 5))

    def on_stat(self, number: int, body: bytes) -> bytes:
        return self.on_fstat(number, body)

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        self.sent += length
        return packet(DATA, number, string(self.block[:length]))


def fetch_from(pair: Pair, server: ScriptedServer, **options: Any) -> Any:
    pair.mirror.claim()
    run = pair.new_run()
    return fetch_index(
        pair.mirror, run, lambda: Reader(server), b"/i", IndexLimits(**{"still": 0.0, **options})
    )


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Hold while no more than so many bytes are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("told", [MIB + 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_index_that_says_it_is_too_large_is_refused_at_once(pair: Pair, cases: Cases, told: int) -> None:
    """Nothing is allocated for it, and hardly anything asked for."""
    server = LargeIndex(told)
    refused = pytest.raises(IndexRefused, match=rf"{told:,} bytes.*more than the allowed.*max_index_size")
    with cases.one(), memory_below(8 * MIB), refused:
        fetch_from(pair, server, max_size=MIB)
    assert server.sent <= 64 << 10
    assert not pair.mirror.run("manual__1").received.exists()


@pytest.mark.parametrize("told", [0, 1, 9_999, 10_000])
def test_an_index_that_is_larger_than_it_says_is_limited_by_what_comes(
    pair: Pair, cases: Cases, told: int
) -> None:
    """What the server says of the size is not believed. Nothing of it stays."""
    with cases.one(), pytest.raises(IndexRefused, match="more than the allowed 10,000 "):
        fetch_from(pair, LargeIndex(told), max_size=10_000)
    assert not pair.mirror.run("manual__1").received.exists()


def test_an_index_that_grows_while_it_is_read_ends_at_the_limit(pair: Pair, cases: Cases) -> None:
    """Each look at it finds more; sooner or later it is too large."""

    class Growing(LargeIndex):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            self.told += 300_000
            return super().on_fstat(number, body)

    with cases.one(), memory_below(40 * MIB), pytest.raises(IndexRefused, match="max_index_size"):
        fetch_from(pair, Growing(0), max_size=MIB)


def test_a_refused_index_leaves_nothing_large_behind(pair: Pair, cases: Cases) -> None:
    """Not as it came, not half in order: else a provider fills the disk, run by run."""
    line = b"".join(b"%s  /%06d%s\n" % (MD5, number, b"x" * 200) for number in range(10_000))
    index_file(pair).write_bytes(line + b"nonsense\n")
    with cases.one():
        with pytest.raises(IndexRefused):
            pair.fetch(pair.new_run(), still=0.0)
        left = pair.mirror.run("manual__1").folder.iterdir()
        assert sum(path.stat().st_size for path in left) < 4096


def test_a_limit_that_is_just_met_is_no_reason_to_refuse(pair: Pair, cases: Cases) -> None:
    """To the byte."""
    pair.put("alpha", b"1")
    pair.build_index()
    size = index_file(pair).stat().st_size
    with cases.one():
        assert pair.fetch(pair.new_run(), max_size=size).files == 1
        with pytest.raises(IndexRefused):
            pair.fetch(pair.new_run(), max_size=size - 1)


def bomb(kind: str, size: int) -> Iterator[bytes]:
    """Yield the lines of an index whose every name is as long as one can be."""
    deep = b"/".join([b"x" * 255] * 15) + b"/"  # 3,839 bytes
    for number in range(size):
        place = size - number if kind == "unsorted" else number
        name = deep + b"%09d" % place
        if kind == "remarks":
            yield b"# mdbackup unreadable /%s\n" % name
        elif kind == "backslashes":
            yield b"%s  /%s\n" % (MD5, name.replace(b"x", b"\\"))
        else:
            yield b"%s  /%s\n" % (MD5, name)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("sorted", scaled(20_000, 1_000_000)),  # of 4 KB: as large as an index may be
        ("unsorted", scaled(20_000, 200_000)),
        ("remarks", scaled(20_000, 100_000)),
        ("backslashes", scaled(20_000, 100_000)),
    ],
)
def test_a_bomb_of_long_names_is_read_within_bounds(
    tmp_path: Path, cases: Cases, kind: str, size: int
) -> None:
    """In memory by a fixed amount, whatever their number, and on the disk by a multiple of the index."""
    source, target = tmp_path / "received", tmp_path / "canonical"
    with source.open("wb") as file:
        file.writelines(bomb(kind, size))
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = 3
        try:
            canonicalise(source, target, name="bomb")
            code = 0 if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10 else 4
        finally:
            os._exit(code)
    with cases.one():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    source.unlink()
    target.unlink()


@pytest.mark.parametrize("kind", ["entries", "remarks"])
def test_sorting_takes_no_more_of_the_disk_than_promised(tmp_path: Path, cases: Cases, kind: str) -> None:
    """Seven times the index, on a filesystem that has no more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if kind == "entries":  # each byte of a name becomes two
        lines = b"".join(b"%s  /%s%06d\n" % (MD5, b"\\" * 200, n) for n in range(20_000, 0, -1))
    else:  # the shortest remark becomes a longer line
        lines = b"%s  /b\n%s  /a\n" % (MD5, MD5)
        lines += b"".join(b"# mdbackup rotten /%x\n" % n for n in range(100_000, 0, -1))
    room = 7 * len(lines) + (64 << 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
    try:
        (disk / "received").write_bytes(lines)
        with cases.one():
            canonicalise(disk / "received", disk / "canonical", name="i", chunk=100)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_an_amount_in_an_end_line_that_no_disk_can_hold_is_not_believed(pair: Pair, cases: Cases) -> None:
    """Numbers of thousands of digits neither stop the reader nor get into our records."""
    for digits in (b"9" * 19, b"9" * 4000, b"9" * 8000, b"1" + b"0" * 5000):
        with cases.one():
            end = b"# mdbackup end format=1 files=1 unreadable=0 bytes=%s\n" % digits
            index_file(pair).write_bytes(format_line(b"/a", MD5) + end)
            assert pair.fetch(pair.new_run()).size is None
            end = b"# mdbackup end format=1 files=%s unreadable=0\n" % digits
            index_file(pair).write_bytes(format_line(b"/a", MD5) + end)
            with pytest.raises(IndexRefused, match="None files"):
                pair.fetch(pair.new_run(), still=0.0)


@pytest.mark.parametrize("told", [2**63, 2**64 - 1])
def test_a_size_that_the_server_invents_is_not_written_down(pair: Pair, cases: Cases, told: int) -> None:
    """A file is as long as what came of it; sums of such sizes would have no place in any record."""

    class Boasting(ScriptedServer):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, told, 0o100644, 5, 5))

        def on_stat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, 3, 0o100644, 5, 5))

    files = {b"/%d" % n: b"%03d" % n for n in range(20)}
    write_index(pair, {path: digest(content) for path, content in files.items()})
    run = pair.new_run()
    pair.fetch(run)
    pair.diff(run)
    with cases.one(), memory_below(60 * MIB):
        pull(pair.mirror, run, 0, lambda: Reader(Boasting(files)))
        assert pair.finish(run).outcomes == {"pulled": 20}
        assert pair.outcome.size == 60
        assert {change.size for change in pair.history()[-1]} == {3}


# --- the other side of the channel ------------------------------------------------------------------


class LimitedServer(ScriptedServer):
    extensions = string(b"limits@openssh.com") + string(b"1")


@pytest.mark.parametrize("most", [1, 2, 1000])
def test_a_server_that_allows_tiny_reads_is_not_asked_for_millions_of_them(cases: Cases, most: int) -> None:
    """A request takes more memory than the byte that it brings."""

    class Tiny(LimitedServer):
        def on_extended(self, number: int, body: bytes) -> bytes:
            return packet(EXTENDED_REPLY, number, struct.pack(">QQQQ", 262144, most, most, 1000))

    content = bytes(range(256)) * 8192  # 2 MiB
    server = Tiny({b"/f": content})
    with cases.one(), memory_below(16 * MIB):
        reader = Reader(server, window=MIB)
        reader.submit(Wanted(b"/f", digest(content), lambda _: Stream(len)))
        (answer,) = reader.wait()
        assert isinstance(answer, Fetched) and answer.md5 == digest(content)
    assert len(server.requests) < 200


def test_crumbs_behind_a_hole_take_no_more_memory_than_the_window(cases: Cases) -> None:
    """The first piece is kept back until the rest has come, 16 bytes at a time."""
    size, step = 2 * MIB, 16

    class Crumbs(LimitedServer):
        kept = 0

        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 1 | 4 | 8, size, 0o100644, 5, 5))

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            if not offset:
                self.kept = number
                return b""
            return packet(DATA, number, string(bytes(min(step, length))))

        def silent(self) -> bytes:
            if self.kept:
                number, self.kept = self.kept, 0
                return packet(DATA, number, string(bytes(32768)))
            return super().silent()

    with cases.one(), memory_below(5 * MIB):
        reader = Reader(Crumbs({b"/f": b""}, most=1 << 16), window=MIB)
        reader.submit(Wanted(b"/f", digest(bytes(size)), lambda _: Stream(len)))
        (answer,) = reader.wait()
        assert isinstance(answer, Fetched) and answer.md5 == digest(bytes(size))


# --- what a run leaves on the disk ------------------------------------------------------------------


def _kept(pair: Pair) -> tuple[float, float]:
    """Return how many times the index all runs, and all history, take on the disk."""
    sizes = [
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in (pair.mirror.run("x").folder.parent, pair.mirror.history)
    ]
    return sizes[0] / index_file(pair).stat().st_size, sizes[1] / index_file(pair).stat().st_size


def _back_up_long_names(pair: Pair, byte: bytes, content: bytes) -> tuple[float, float]:
    for number in range(60):
        pair.put(b"/".join([byte * (200 // len(byte))] * 4) + b"/%03d" % number, b"%d " % number + content)
    assert pair.backup(may_trip=True).failed == 0
    return _kept(pair)


@pytest.mark.parametrize("byte", [b"\1", b"\n", b"\\", b"\xff", "\u202e".encode(), b'"'], ids=ascii)
def test_names_of_odd_bytes_take_no_more_room_in_records_than_others(
    pair: Pair, tmp_path: Path, cases: Cases, byte: bytes
) -> None:
    """A byte would be five as an escape: 20 times the index with each run, and ten times with each commit."""
    (tmp_path / "ordinary").mkdir()
    other = Pair(tmp_path / "ordinary")
    try:
        with cases.one():
            for content in (b"one", b"two"):
                odd = _back_up_long_names(pair, byte, content)
                usual = _back_up_long_names(other, b"x" * len(byte), content)
                assert odd[0] < 2 * usual[0] and odd[1] < 2 * usual[1]
            assert set(pair.index_b()) == set(pair.index_a())
            check_sound(pair)
    finally:
        for server in other.servers:
            server.stop()
