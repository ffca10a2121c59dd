"""A provider that attacks: its index, its names and its replies get it nothing but failures of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.definitions._internal.mixins import ResolveMixin

from airflow_mdbackup.config import load
from airflow_mdbackup.dags.backup import provider_dags
from airflow_mdbackup.operators.approve_changes import ApproveChanges
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.backup.diff import make_plan
from airflow_mdbackup.scheme.backup.fetch import IndexLimits, fetch_index
from airflow_mdbackup.scheme.backup.plan import Limits, PlanOptions
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import BackupError, DestinationRefused, IndexRefused
from airflow_mdbackup.scheme.index.canonical import escape, format_line
from airflow_mdbackup.scheme.index.received import canonicalise
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from tests.guarantees.transport.channels import (
    ATTRS,
    DATA,
    EXTENDED_REPLY,
    PERMISSION_DENIED,
    ScriptedServer,
    packet,
    status,
    string,
)
from tests.guarantees.whatever_happens.soundness import check_sound, digest
from tests.pair import Pair
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("7. Hostile provider")

MD5 = b"d41d8cd98f00b204e9800998ecf8427e"
MIB = 1 << 20

# Names that are legal, and mean something to some program that a name may pass on its way.
NAMES = [
    *(
        b"..%2f..%2fetc%2fpasswd",
        b"%2e%2e",
        b"..\\..\\etc",
        b"\\..\\",
        b"\\n",
        b"...",
        b".. ",
        b"..\n",
        b"\n..",
    ),
    *(b"-rf", b"--", b"-", b"~", b"~root", b" ", b"*", b"$(id)", b"`id`", b"${HOME}", b"a;b", b"a|b", b"'\""),
    *(b"{{ 7*78901 }}", b"{% raw %}", b"{{ conn.password }}", b"{# x #}", b"%(x)s", b"%s%n", b"{0}"),
    *(b"<script>alert(1)<", b"<img src=x onerror=alert(1)>", b"&amp;", b"[x](javascript:alert(1))", b"|"),
    *(b"\x1b[31mred\x1b[0m", b"\x1b]0;title\x07", b"\x1b]8;;http:x\x1b\\y", b"\x9b31m", "\u009b31m".encode()),
    *("\u202eexe.txt".encode(), "\u2066a\u2069".encode(), "\u200b".encode(), "\u2028".encode(), b"\x7f\x08"),
    *(b"a\nb", b"a\rb", b"a\r\nb", b"\xff\xfe", b"\xed\xb2\x80", "\u00e9".encode(), "e\u0301".encode()),
    *(b"Name", b"name", b"NAME", "stra\u00dfe".encode(), b"strasse", b"STRASSE", b"x" * 255),
    *(b"index.md5", b".mdbackup", b"lost+found", b"files", b"provider-id", b".old2", b"old", b"con", b"aux."),
    *(b"x::endgroup::y", b"::group::x", b"::group:", b"::endgroup:"),
    *(b"a.20261123T031500.123456Z", MD5, MD5 + b".part", b"# mdbackup end format=1 files=0 unreadable=0"),
]

# What no path of an index may be.
TRAVERSALS = [
    *(
        b"/..",
        b"/../x",
        b"/a/..",
        b"/a/../../x",
        b"/a/../../../../../../../etc/passwd",
        b"/.",
        b"/./x",
        b"/a/.",
    ),
    *(b"//x", b"//etc/passwd", b"/a//x", b"/a//../x", b"/a/", b"/a//", b"/", b"//", b"///", b"/a/./../x"),
    *(
        b"..",
        b"../x",
        b"x",
        b"./../x",
        b".//x",
        b"././x",
        b"./",
        b".",
        b"~/x",
        b"C:\\x",
        b"\\\\host\\x",
        b"a/../x",
    ),
    *(b"/a\0/../x", b"/a\0", b"/" + b"x" * 256, b"/x" * 2049, b"/..\r"),
]


def is_harmless(text: str) -> bool:
    """Tell that a text acts on no terminal, and that Airflow's page of a log folds nothing by it."""
    folds = "::group::" in text or "::endgroup::" in text
    return not folds and all(character.isprintable() for character in text)


def index_file(pair: Pair) -> Path:
    return Path(os.fsdecode(pair.index))


def write_index(pair: Pair, entries: dict[bytes, bytes], remarks: bytes = b"") -> None:
    """Write A's index by hand, of whatever paths, the way A's indexer would."""
    lines = b"".join(format_line(path, md5) for path, md5 in sorted(entries.items())) + remarks
    end = b"# mdbackup end format=1 files=%d unreadable=%d\n"
    index_file(pair).write_bytes(lines + end % (len(entries), remarks.count(b"# mdbackup unreadable ")))


def snapshot(root: Path, but: Path) -> dict[Path, tuple[object, ...]]:
    """Return what is known of everything below ``root``, but for what is below ``but``."""
    found: dict[Path, tuple[object, ...]] = {}
    for folder, directories, names in os.walk(root):
        directories[:] = [name for name in directories if Path(folder, name) != but]
        for path in (Path(folder, name) for name in directories + names):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[path] = status.st_mode, status.st_ino, status.st_nlink, status.st_mtime_ns, content
    return found


def everything_in(folder: Path) -> bytes:
    """Return all names and contents below a directory in one."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return b"\n".join(os.fsencode(p) + (p.read_bytes() if p.is_file() else b"") for p in paths)


@pytest.fixture
def canary(pair: Pair, tmp_path: Path) -> Iterator[bytes]:
    """Something outside ``dest``, with a content that nobody else has. All outside stays as it is."""
    content = b"canary of whoever runs the backup"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_bytes(content)
    yield content
    assert (outside / "canary").read_bytes() == content
    assert sorted(path.name for path in outside.iterdir()) == ["canary"]
    assert content not in everything_in(pair.mirror.dest)


# --- where names lead -------------------------------------------------------------------------------


@pytest.mark.parametrize("escaped", [False, True])
def test_no_path_of_an_index_leads_out_of_the_mirror(
    pair: Pair, tmp_path: Path, cases: Cases, escaped: bool
) -> None:
    """Each refuses the whole index, before anything is fetched; what there is stays, and so does the rest."""
    good = pair.put("good", b"1")
    pair.backup()
    before, outside = everything_in(pair.mirror.files), snapshot(tmp_path, pair.mirror.dest)
    del outside[index_file(pair)]
    for path in TRAVERSALS:
        if escaped and path.endswith(b"\r"):
            continue  # escaped, it is a name
        with cases.one():
            line = format_line(path, MD5) if escaped else b"%s  %s\n" % (MD5, path)
            end = b"# mdbackup end format=1 files=2 unreadable=0\n"
            index_file(pair).write_bytes(format_line(good, digest(b"1")) + line + end)
            with pytest.raises(IndexRefused, match="line 2: ") as caught:
                pair.fetch(pair.new_run(), still=0.0)
            assert is_harmless(str(caught.value))
            assert everything_in(pair.mirror.files) == before
    now = snapshot(tmp_path, pair.mirror.dest)
    del now[index_file(pair)]
    assert now == outside


def test_names_that_look_like_something_else_are_only_names(pair: Pair, tmp_path: Path, cases: Cases) -> None:
    """Escapes, other separators, our own file names: twice through the whole scheme, byte for byte."""
    outside = None
    for content in (b"one ", b"two "):
        for name in NAMES:
            pair.put(b"dir/" + name, content + name)
            pair.put(b"sub/" + name + b"/" + name, content + name)
        outside = snapshot(tmp_path, pair.mirror.dest)
        outside.pop(index_file(pair), None)
        assert pair.backup(may_trip=True).failed == 0
    now = snapshot(tmp_path, pair.mirror.dest)
    assert {path: what for path, what in now.items() if path != index_file(pair)} == outside
    for name in NAMES:
        with cases.one():
            for path in (b"dir/" + name, b"sub/" + name + b"/" + name):
                assert pair.live(path).read_bytes() == b"two " + name
    assert set(os.listdir(os.fsencode(pair.live("dir")))) == {*NAMES, b".old"}
    assert len(os.listdir(pair.live("dir/.old"))) == len(NAMES)
    assert pair.index_b() == pair.index_a() and len(pair.index_b()) == 2 * len(NAMES)
    check_sound(pair)


def test_names_are_as_exact_in_records_as_in_the_index(pair: Pair, cases: Cases) -> None:
    """Newlines and all: in the plan, what to forget, the results and the history, one line for each."""
    for name in NAMES:
        pair.put(b"dir/" + name, name)
    pair.put("stays", b"1")
    pair.backup()
    for name in NAMES:
        os.unlink(pair.path(b"dir/" + name))
    assert pair.backup(may_trip=True).forgotten == len(NAMES)
    expected = {pair.path(b"dir/" + name) for name in NAMES}
    run = pair.mirror.run("manual__2")
    assert len(run.forget.read_bytes().splitlines()) == len(NAMES) + 1
    assert {change.path for change in pair.history()[-1]} == expected
    assert set(pair.index_b()) == {pair.path("stays")}
    cases.add(len(NAMES))


@pytest.mark.parametrize("first", ["a", "a/b"])
def test_a_name_that_is_a_directory_of_another_refuses_the_index(
    pair: Pair, cases: Cases, first: str
) -> None:
    """In either order, and with names between them that only begin alike."""
    second = "a/b" if first == "a" else "a"
    with cases.one():
        lines = b"".join(format_line(pair.path(name), MD5) for name in (first, "a-b", "a!", second, "a0"))
        index_file(pair).write_bytes(lines + b"# mdbackup end format=1 files=5 unreadable=0\n")
        with pytest.raises(IndexRefused, match="also the directory of another"):
            pair.fetch(pair.new_run(), still=0.0)


@pytest.mark.parametrize("name", [b".old", b".old/x", b"a/.old/b", b".old/.old"])
def test_nobody_but_us_writes_versions(pair: Pair, cases: Cases, name: bytes) -> None:
    """A provider that names a version could replace it."""
    with cases.one():
        write_index(pair, {pair.path(name): MD5})
        run = pair.new_run()
        pair.fetch(run)
        with pytest.raises(IndexRefused, match="reserved"):
            pair.diff(run)


# --- what is planted on B ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["files", ".mdbackup", "staging", "runs", "history"])
def test_a_symlink_in_place_of_a_directory_of_ours_is_refused(
    pair: Pair, tmp_path: Path, canary: bytes, cases: Cases, place: str
) -> None:
    """Even to a directory of the same form: what it leads to is not touched."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.put("alpha", b"2")
    within = pair.mirror.dest if place in ("files", ".mdbackup") else pair.mirror.dest / ".mdbackup"
    real = within / place
    moved = tmp_path / "moved"
    real.rename(moved)
    real.symlink_to(moved)
    before = snapshot(moved, tmp_path)
    with cases.one(), pytest.raises(DestinationRefused, match="is a symlink"):
        pair.backup()
    assert snapshot(moved, tmp_path) == before


@pytest.mark.parametrize("name", ["", "received.md5", "provider.md5", "plan.json.tmp", "items.jsonl.tmp"])
def test_a_symlink_in_a_run_directory_is_not_written_through(
    pair: Pair, tmp_path: Path, canary: bytes, cases: Cases, name: str
) -> None:
    """The run fails, or takes the link away."""
    pair.put("alpha", b"1")
    pair.build_index()
    pair.mirror.claim()
    run = pair.mirror.run("manual__1")
    planted = run.folder / name
    if name:
        run.folder.mkdir()
    planted.symlink_to(tmp_path / "outside" / ("canary" if name else "."))
    with cases.one(), pytest.raises((OSError, DestinationRefused), match=r"symlink|symbolic links"):
        pair.finish(pair.prepare())


@pytest.mark.parametrize("what", ["parent", "leaf", "staged", "part", "version", "source"])
def test_a_symlink_in_the_mirror_or_in_staging_leads_nowhere(
    pair: Pair, tmp_path: Path, canary: bytes, cases: Cases, what: str
) -> None:
    """Neither is written through it, nor is what it leads to taken for content, whatever md5 A names."""
    outside = tmp_path / "outside"
    stolen = digest(canary)
    large = os.urandom(300_000)
    pair.put("dir/leaf", b"one")
    pair.put("good", b"one!")
    pair.backup()
    pair.put("dir/leaf", b"two")
    pair.put("dir/large", large)
    pair.put("good", b"two!")
    pair.build_index()
    entries = {**pair.index_a(), pair.path("stolen"): stolen, pair.path("dir/canary"): stolen}
    if what == "parent":
        pair.live("dir").rename(pair.live("kept"))
        pair.live("dir").symlink_to(outside)
    elif what == "leaf":
        pair.live("dir/canary").symlink_to(outside / "canary")
    elif what == "staged":
        (pair.mirror.staging / stolen.decode()).symlink_to(outside / "canary")
        (pair.mirror.staging / digest(b"two").decode()).symlink_to(outside / "canary")
    elif what == "part":
        pair.part(stolen).symlink_to(outside / "canary")
        pair.part(digest(large)).symlink_to(outside / "canary")
    elif what == "version":
        (pair.live("dir") / ".old").symlink_to(outside)
    else:
        pair.live("good").unlink()
        pair.live("good").symlink_to(outside / "canary")
        with index_file(pair).open("rb") as file:
            assert file.read(1)
        index_b = {**pair.index_b(), pair.path("good"): stolen}
        lines = b"".join(format_line(path, md5) for path, md5 in sorted(index_b.items()))
        end = b"# mdbackup end format=1 files=%d unreadable=0\n" % len(index_b)
        pair.mirror.index.write_bytes(lines + end)
    write_index(pair, entries)
    with cases.one():
        try:
            pair.finish(pair.prepare(may_trip=True))
            assert pair.live("stolen").exists() is False
        except (OSError, BackupError) as error:
            assert what in ("staged", "part"), error  # nobody but us has anything to do there


# --- what an md5 gets -------------------------------------------------------------------------------


def test_the_md5_of_another_providers_file_gets_nothing_of_it(
    pair: Pair, tmp_path: Path, cases: Cases
) -> None:
    """Rows 7 and 8: content is shared within one dest only, by index, live path or staging."""
    secret = b"what only the first provider may have"
    pair.put("secret", secret)
    pair.put("staged", b"staged " + secret)
    pair.backup()
    pair.staged(digest(b"staged " + secret)).write_bytes(b"staged " + secret)
    (tmp_path / "second").mkdir()
    other = Pair(tmp_path / "second")
    try:
        other.put("there", b"other bytes")
        other.build_index()
        wanted = {other.path("there"): digest(secret), other.path("absent"): digest(secret)}
        wanted |= {pair.path("secret"): digest(secret), other.path("staged"): digest(b"staged " + secret)}
        pair_a = pair.a.rename(tmp_path / "hidden")  # both servers see all of this machine
        write_index(other, wanted)
        with cases.one():
            outcome = other.finish(other.prepare(allow_empty=True))
            assert outcome.outcomes == {"vanished": 3, "changed": 1}
            assert secret not in everything_in(other.mirror.dest)
        pair_a.rename(pair.a)
    finally:
        for server in other.servers:
            server.stop()


def test_within_a_dest_an_md5_copies_only_what_the_same_provider_still_has_there(
    pair: Pair, cases: Cases
) -> None:
    """Not a file that a person put into the mirror, nor one that the provider gave up, nor a version."""
    pair.put("forgotten", b"forgotten")
    pair.put("versioned", b"old")
    pair.put("stays", b"stays")
    pair.backup()
    os.unlink(pair.path("forgotten"))
    pair.put("versioned", b"new")
    pair.backup(may_trip=True)
    by_hand = pair.live("by-hand")
    by_hand.write_bytes(b"by hand")
    pair.build_index()
    contents = {"x1": b"forgotten", "x2": b"old", "x3": b"by hand", "x4": b"stays"}
    write_index(pair, {**pair.index_a(), **{pair.path(n): digest(c) for n, c in contents.items()}})
    with cases.one():
        pair.put("x4", b"not looked at")
        assert pair.finish(pair.prepare()).outcomes == {"vanished": 3, "copied": 1}
        assert pair.live("x4").read_bytes() == b"stays"
        assert not any(pair.live(name).exists() for name in ("x1", "x2", "x3"))


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


# --- what people get to see -------------------------------------------------------------------------

WORDS = b"::endgroup:: \x1b[2J\x1b]0;owned\x07\x9b31m\r\n"
WORDS += "\u202e\u0085\u200b".encode() + b"<b>{{ 7*78901 }}</b>\0"


def said_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    formatter = logging.Formatter()
    traces = [formatter.formatException(r.exc_info) for r in caplog.records if r.exc_info]
    return [record.getMessage() for record in caplog.records] + [
        line for t in traces for line in t.split("\n")
    ]


class Rude(ScriptedServer):
    """Denies, loses, fails and spoils files by the number in their name, with words that act on terminals."""

    def on_open(self, number: int, body: bytes) -> bytes:
        kind = body[-9:-8]
        if kind in b"0123":
            return status(number, {b"0": 2, b"1": PERMISSION_DENIED, b"2": 4, b"3": 77}[kind], WORDS)
        return super().on_open(number, body)

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        return (
            status(number, 4, WORDS)
            if content == b"unreadable"
            else super().read(number, content, offset, length)
        )


def test_nothing_that_a_provider_says_reaches_a_log_or_a_person_as_it_is(
    pair: Pair, caplog: pytest.LogCaptureFixture, cases: Cases
) -> None:
    """A whole failing run with hostile names and words: logs, errors, summaries, plans, records, status."""
    caplog.set_level(logging.DEBUG)
    names = [b"/rude/" + name + b"%d" % kind for kind in range(6) for name in NAMES if len(name) < 250]
    files = {name: b"unreadable" if name.endswith(b"4") else b"other bytes" for name in names}
    entries = {name: digest(name) for name in names}
    remarks = b"".join(
        b"# mdbackup %s /remark/%s\n" % (kind, escape(name))
        for kind in (b"unreadable", b"rotten")
        for name in sorted(NAMES)
    )
    write_index(pair, entries, remarks)
    run = pair.new_run()
    pair.fetch(run)
    plan = make_plan(pair.mirror, run, PlanOptions(source=[b"/rude"]))
    summary = pull(pair.mirror, run, 0, lambda: Reader(Rude(files)))
    pair.archive(run)
    committed = commit(pair.mirror, run)
    with pytest.raises(BackupError) as caught:
        committed.raise_for_failures("srv1")
    assert committed.failed > 200 and committed.outcomes["denied"] and committed.outcomes["vanished"]
    assert summary.outcomes.items() <= committed.outcomes.items()
    # A second one, over which the guard trips.
    write_index(pair, {}, b"# mdbackup unreadable /%s\n" % escape(NAMES[32]))
    second = pair.new_run()
    pair.fetch(second)
    with pytest.raises(BackupError) as tripped:
        make_plan(pair.mirror, second, PlanOptions(source=[b"/rude"]))
    told = [str(caught.value), str(tripped.value), *said_by(caplog)]
    told += [str(value) for value in (asdict(plan), asdict(summary), asdict(committed))]
    for file in [pair.mirror.status, *pair.mirror.history.iterdir(), *run.folder.glob("*.json*")]:
        told += file.read_text().splitlines()
    assert len(told) > 500
    bad = [text for text in told if not is_harmless(text)]
    assert not bad
    cases.add(len(told))


def test_nothing_that_the_index_account_says_reaches_a_log_as_it_is(
    caplog: pytest.LogCaptureFixture, cases: Cases
) -> None:
    """Greetings, reports of every kind and things that only look like them."""
    caplog.set_level(logging.DEBUG)
    log = logging.getLogger("hostile")
    request = IndexRequest(b"/", (b"/backups",), b"/i", id="1")
    kinds = [
        b"ready",
        b"waiting",
        b"joined",
        b"note",
        b"error",
        b"unreadable",
        b"rotten",
        b"progress",
        b"done",
    ]
    said = [WORDS, b"mdbackup " + WORDS]
    for kind in kinds:
        said += [b"mdbackup %s %s" % (kind, words) for words in (WORDS, b"/" + WORDS, b"/a: " + WORDS)]
        said += [b"mdbackup %s /%s: x" % (kind, name) for name in NAMES]
        said += [b"mdbackup %s /\\x1b[31m: \\x1b" % kind, b"mdbackup %s files=%s" % (kind, b"9" * 5000)]
    conversation = None
    for words in said:
        with cases.one():
            conversation = Conversation(request, "connection web_index", log)
            conversation.receive(words + b"\n")
            conversation.is_over(1)
            try:
                conversation.result()
            except BackupError as error:
                assert is_harmless(str(error))
    assert len(caplog.records) > 200
    assert all(is_harmless(record.getMessage()) for record in caplog.records)


def test_neither_markdown_nor_a_template_acts_on_names_that_a_person_is_asked_about(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, cases: Cases
) -> None:
    """The reasons of the guard are indented text to Markdown, and no template when the task gets them."""
    for number in range(120):
        pair.put(b"dir/%03d" % number, b"x")
    for name in NAMES:
        pair.put(b"dir/" + name, name)
    pair.backup()
    dag = provider_dags(_configuration(pair.a.parent, "on_guard: approve"))["mdbackup_web"]
    task = dag.get_task("approve")
    assert isinstance(task, ApproveChanges)
    shown: list[str] = []
    monkeypatch.setattr(ApproveChanges.__mro__[1], "execute", lambda self, context: shown.append(self.body))
    for name in NAMES:
        with cases.one():
            for other in NAMES:
                pair.put(b"dir/" + other, other)
            os.unlink(pair.path(b"dir/" + name))
            pair.build_index()
            run = pair.new_run()
            pair.fetch(run)
            reasons = pair.diff(run, limits=Limits(0.0), may_trip=True).guard
            asked = ApproveChanges(task_id="a", subject="s", reasons=Pushed(reasons))
            asked.render_template_fields({"ti": None})  # type: ignore[arg-type]
            asked.execute({})  # type: ignore[arg-type]
            text, _, choice = shown.pop().partition("\n\n")
            assert choice.startswith("**Approve**")
            assert all(line.startswith("    ") and is_harmless(line) for line in text.split("\n"))
            assert text.count("\n") + 1 == len(reasons)
            assert "552307" not in text, "a template in a name was filled in"


def _configuration(folder: Path, keys: str) -> Path:
    path = folder / "providers.yaml"
    path.write_text(f"providers: {{web: {{sftp_conn_id: a, source: /backups, dest: {folder}/dest, {keys}}}}}")
    return path


class Pushed(ResolveMixin):
    """What a task pushed, as the XCom argument of another."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def iter_references(self) -> Iterator[tuple[Any, str]]:
        return iter(())

    def resolve(self, context: Any) -> Any:
        return self.value


def test_what_the_configuration_names_is_shown_as_it_is(tmp_path: Path, cases: Cases) -> None:
    """On the page of a DAG: in code spans that no backtick ends, on one line."""
    names = [name.decode() for name in NAMES if is_utf8(name) and b"{" not in name]
    for name in names:
        with cases.one():
            source = json.dumps(f"/`x`/{name}")
            page = _configuration(tmp_path, f"index: {source}")
            doc = provider_dags(page)["mdbackup_web"].doc_md
            (row,) = [line for line in str(doc).split("\n") if line.startswith("| index |")]
            assert is_harmless(row)
            assert re.search(r"\| (`+) /`x`/.* \1, built by", row), row


@pytest.mark.parametrize("begin", ["{{", "{%", "{#"])
def test_a_path_that_airflow_would_take_for_a_template_is_refused(
    tmp_path: Path, cases: Cases, begin: str
) -> None:
    """It would be another path, or the outcome of an expression, by the time that a task runs."""
    for keys in (f"index: '/x/{begin} 7*78901'", f"exclude: ['{begin} 7*78901']"):
        with cases.one():
            (problems,) = load(_configuration(tmp_path, keys)).refused.values()
            assert "a template" in str(problems[0])


def is_utf8(name: bytes) -> bool:
    return name.decode("utf-8", "replace").encode() == name
