"""The index: the paths that one side has, and the md5 of each. An md5sum text file, parsed strictly.

A line is 32 lowercase hexadecimal digits, two blanks, and the full path as the backup account sees it,
with names escaped as GNU coreutils 9 writes them (``\\``, LF and CR as ``\\\\``, ``\\n``, ``\\r``, and then a
backslash before the digits). Comment lines, which ``md5sum -c`` ignores, carry the rest::

    # mdbackup started 1795402800
    d41d8cd98f00b204e9800998ecf8427e  /backups/alpha
    # mdbackup unreadable /backups/private
    # mdbackup rotten /backups/alpha
    # mdbackup end format=1 files=1 unreadable=1 bytes=0

There are two forms. A *received* index is hostile input: :func:`.received.canonicalise` parses it strictly,
sorts it, and writes the *canonical* form (sorted by raw path bytes, each path once, remarks after the
entries, an end line), which the functions here trust and read fast. All of it works in bounded memory,
whatever the number of lines.

Limitations: md5 detects accidents, not forgeries. Whoever can write the index can name any md5.

Sources: coreutils 9 ``src/cksum.c`` (``print_filename``, ``split_3``), the seed's section "Index Files".
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.files.syscalls import not_followed
from airflow_mdbackup.scheme.index.malformed import HOW, ends_in_cr_alone, why_malformed

FORMAT = 1
_BLOCK = 1 << 20  # bytes of lines to hold in memory at a time
_RUN = 16  # lines to compare at a time
MAX_PATH = 4096
MAX_COMPONENT = 255

_LINE = re.compile(rb"(\\?)([0-9a-f]{32})(?:  | \*| (?=\.?/))(.+)", re.DOTALL)
_ESCAPED = re.compile(rb"\\(.?)", re.DOTALL)
_PLAIN = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}
_ODD_COMPONENT = re.compile(rb"/(?:\.{0,2}(?:/|\Z)|[^/]{256})")

STARTED = b"# mdbackup started "
END = b"# mdbackup end "


class Remark(StrEnum):
    """What the provider reports about a path, besides or instead of an entry."""

    UNREADABLE = "unreadable"  # a file or directory it could not read; there are no entries at or below it
    ROTTEN = "rotten"  # content changed, times did not (bit rot); the entry has the md5 from before

    @property
    def mark(self) -> bytes:
        """The prefix of such a line."""
        return b"# mdbackup %s " % self.value.encode()


class Entry(NamedTuple):
    """One file of an index. A tuple, so that entries sort by path, and millions of them are cheap."""

    path: bytes
    md5: bytes  # 32 lowercase hexadecimal digits


class Difference(NamedTuple):
    """One path of two merged indexes, with its md5 on each side that has it."""

    path: bytes
    left: bytes | None
    right: bytes | None


class IdenticalEntries:
    """Entries that two compared indexes have in common, many at a time.

    :ivar count: how many there are.
    """

    __slots__ = ("_lines", "_others", "count")

    def __init__(self, lines: list[bytes], others: Container[bytes] = (), count: int = 1) -> None:
        self.count = count
        self._lines = lines
        self._others = others  # those of the lines that differ

    @classmethod
    def one(cls, path: bytes) -> IdenticalEntries:
        """Return a single entry, of any md5."""
        return cls([format_line(path, b"-" * 32)])

    @property
    def span(self) -> tuple[bytes, bytes]:
        """The first and last path of a range that contains all of them."""
        return trusted_entry(self._lines[0]).path, trusted_entry(self._lines[-1]).path

    def paths(self) -> Iterator[bytes]:
        """Yield the path of each, in order."""
        return (trusted_entry(line).path for line in self._lines if line not in self._others)


class MalformedIndex(ValueError):
    """An index breaks the grammar. The message names file and line.

    If another tool wrote or converted the list, the message says so, and how to write a correct one.
    """


# --- one line ---------------------------------------------------------------------------------------


def escape(path: bytes) -> bytes:
    """Return ``path`` with backslash, LF and CR escaped as GNU md5sum does."""
    return path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def unescape(name: bytes) -> bytes:
    """Undo :func:`escape`.

    :raises ValueError: an escape that GNU md5sum does not write.
    """

    def plain(match: re.Match[bytes]) -> bytes:
        try:
            return _PLAIN[match[1]]
        except KeyError:
            raise ValueError(f"unknown escape {to_text(match[0])}") from None

    return _ESCAPED.sub(plain, name)


def format_line(path: bytes, md5: bytes) -> bytes:
    """Return the canonical index line of an entry, with its line end."""
    escaped = escape(path)
    return b"%s%s  %s\n" % (b"" if escaped == path else b"\\", md5, escaped)


def parse_line(line: bytes) -> Entry:
    """Return the entry of one received index line.

    Accepted besides the canonical form: one blank before a path (as in the seed's sample), the marker ``*``
    of binary mode, a leading ``./`` for the root of the chroot, a missing line end.

    :raises ValueError: anything else; the message says what is wrong.
    """
    line = line.removesuffix(b"\n")
    match = _LINE.fullmatch(line)
    if match is None or ends_in_cr_alone(line):
        raise ValueError(why_malformed(line))
    if line.endswith(b"\r"):
        raise ValueError(
            "the line ends in CR LF. If all lines do, convert the list to LF line ends (dos2unix). If the "
            "name itself ends in CR, it must be escaped, as md5sum of GNU coreutils does since version 9"
        )
    marked, md5, name = match.groups()
    if marked:
        name = unescape(name)
    if name.startswith(b"./"):
        name = name[1:]
    if not name.startswith(b"/"):
        raise ValueError(f"the path is not absolute: {to_text(name[:200])}{HOW}")
    check_path(name)
    return Entry(name, md5)


def check_path(path: bytes) -> None:
    """Check that a path is safe to use below a mirror.

    :raises ValueError: it is relative, contains NUL, an empty, ``.`` or ``..`` component, a trailing slash or
        a component over 255 bytes, or is over 4096 bytes long.
    """
    if not path.startswith(b"/"):
        raise ValueError(f"the path is not absolute: {to_text(path[:200])}")
    if b"\0" in path:
        raise ValueError("a NUL byte in the path (was the list written by `md5sum --zero`?)")
    if len(path) > MAX_PATH:
        raise ValueError(f"the path is {len(path)} bytes long; the limit is {MAX_PATH}")
    if odd := _ODD_COMPONENT.search(path):
        component = odd[0].strip(b"/")
        if len(component) > MAX_COMPONENT:
            raise ValueError(f"a name in the path is over {MAX_COMPONENT} bytes long")
        what = f"the component {component.decode()!r}" if component else "an empty component"
        raise ValueError(f"{what} in the path: {to_text(path[:200])}")


# --- the canonical form -----------------------------------------------------------------------------


class IndexWriter:
    """Writes a canonical index from entries in path order. Use as a context manager.

    When the ``with`` block ends without an error, the file is complete, with its end line, and durable; else
    it is left empty. Renaming it into place is up to the caller.

    :raises OSError: ``path`` is a symlink, which is not followed.
    """

    def __init__(self, path: Path) -> None:
        self.files = 0
        self.remarks: Counter[Remark] = Counter()
        self.size: int | None = None
        self.started: int | None = None
        self._path = path
        self._file = open(path, "wb", buffering=1 << 20, opener=not_followed)  # noqa: SIM115 - closed by `with`

    def __enter__(self) -> IndexWriter:
        return self

    def add(self, path: bytes, md5: bytes) -> None:
        """Append an entry. Its path must sort after the previous one."""
        self._file.write(format_line(path, md5))
        self.files += 1

    def add_line(self, line: bytes) -> None:
        """Append an entry as a canonical line. Its path must sort after the previous one."""
        self._file.write(line)
        self.files += 1

    def add_lines(self, lines: list[bytes]) -> None:
        """Append entries as canonical lines. Their paths must sort after the previous one."""
        self._file.writelines(lines)
        self.files += len(lines)

    def add_remark(self, remark: Remark, path: bytes) -> None:
        """Append a remark. All entries must be written by then."""
        self._file.write(b"%s%s\n" % (remark.mark, escape(path)))
        self.remarks[remark] += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._file as file:
            if kind is None:
                if self.started is not None:
                    file.write(b"%s%d\n" % (STARTED, self.started))
                file.write(_end_line(self.files, self.remarks[Remark.UNREADABLE], self.size))
                file.flush()
                os.fsync(file.fileno())
        if kind is not None:
            os.truncate(self._path, 0)


def _end_line(files: int, unreadable: int, size: int | None) -> bytes:
    total = b"" if size is None else b" bytes=%d" % size
    return b"%sformat=%d files=%d unreadable=%d%s\n" % (END, FORMAT, files, unreadable, total)


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a canonical index in path order, without checking them."""
    with path.open("rb", buffering=1 << 20) as file:
        yield from trusted_entries(file)


def trusted_entries(file: BinaryIO) -> Iterator[Entry]:
    return (trusted_entry(line) for line in file if line[0] != 0x23)  # skip comments


def trusted_entry(line: bytes) -> Entry:
    if line[0] == 0x5C:  # a backslash marks an escaped name
        return Entry(unescape(line[35:-1]), line[1:33])
    return Entry(line[34:-1], line[:32])


def has_path(index: Path, path: bytes) -> bool:
    """Whether a canonical index has an entry at this path or below it."""
    above = path.rstrip(b"/") + b"/"
    return any(entry.path == path or entry.path.startswith(above) for entry in read_entries(index))


def count_entries(path: Path) -> int:
    """Return how many entries a canonical index has."""
    with path.open("rb") as file:
        return sum(map(len, line_blocks(file)))


def read_remarks(path: Path, remark: Remark) -> Iterator[bytes]:
    """Yield, in path order, the paths for which a canonical index has this remark."""
    mark = remark.mark
    with path.open("rb", buffering=1 << 20) as file:
        for line in file:
            if line.startswith(mark):
                yield unescape(line[len(mark) : -1])


def merge(left: Iterable[Entry], right: Iterable[Entry]) -> Iterator[Difference]:
    """Yield every path of two sorted streams in path order, with its md5 on each side."""
    lefts, rights = iter(left), iter(right)
    a, b = next(lefts, None), next(rights, None)
    while a is not None and b is not None:
        if a[0] == b[0]:
            yield Difference(a[0], a[1], b[1])
            a, b = next(lefts, None), next(rights, None)
        elif a[0] < b[0]:
            yield Difference(a[0], a[1], None)
            a = next(lefts, None)
        else:
            yield Difference(b[0], None, b[1])
            b = next(rights, None)
    while a is not None:
        yield Difference(a[0], a[1], None)
        a = next(lefts, None)
    while b is not None:
        yield Difference(b[0], None, b[1])
        b = next(rights, None)


def compare(left: Path, right: Path | None) -> Iterator[IdenticalEntries | Difference]:
    """Yield the differences of two canonical indexes in path order, and what they share, block by block.

    Most lines are equal on both sides. Comparing runs of lines finds them many times faster than merging
    entries.

    :param right: None means an index without entries.
    """
    with ExitStack() as stack:
        lefts = line_blocks(stack.enter_context(left.open("rb")))
        rights = line_blocks(stack.enter_context(right.open("rb"))) if right else iter(())
        for ours, theirs in _aligned_blocks(lefts, rights):
            only_left, only_right = _differing_lines(ours, theirs)
            if same := len(ours) - len(only_left):
                yield IdenticalEntries(ours, set(only_left), same)
            yield from merge(map(trusted_entry, only_left), map(trusted_entry, only_right))


def _differing_lines(left: list[bytes], right: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the lines that only the left list has, and those that only the right has, in path order."""
    only_left, only_right = [], []
    here = there = 0
    while here < len(left) and there < len(right):
        if left[here : here + _RUN] == right[there : there + _RUN]:
            here, there = here + _RUN, there + _RUN
            continue
        while here < len(left) and there < len(right) and left[here] == right[there]:
            here, there = here + 1, there + 1
        if here < len(left) and there < len(right):
            path, other = _path_of(left[here]), _path_of(right[there])
            if path <= other:
                only_left.append(left[here])
                here += 1
            if other <= path:
                only_right.append(right[there])
                there += 1
    return only_left + left[here:], only_right + right[there:]


def entries_with_md5(index: Path, md5s: Container[bytes]) -> Iterator[Entry]:
    """Yield, in path order, the entries of a canonical index with one of these md5s."""
    with index.open("rb") as file:
        for lines in line_blocks(file):
            for line in [line for line in lines if line[:32] in md5s or line[0] == 0x5C]:
                entry = trusted_entry(line)
                if entry.md5 in md5s:
                    yield entry


def revise(writer: IndexWriter, index: Path | None, changes: Iterable[Entry]) -> None:
    """Write the entries of a canonical index, with changes applied.

    :param index: None means an index without entries.
    :param changes: in path order; an empty md5 removes the entry. Lines in between are copied.
    """
    pending = iter(changes)
    change = next(pending, None)
    with ExitStack() as stack:
        for lines in line_blocks(stack.enter_context(index.open("rb"))) if index else ():
            end = _path_of(lines[-1])
            done = 0
            while change is not None and change.path <= end:
                here = bisect_left(lines, change.path, done, key=_path_of)
                writer.add_lines(lines[done:here])
                done = here + (_path_of(lines[here]) == change.path)
                if change.md5:
                    writer.add(*change)
                change = next(pending, None)
            writer.add_lines(lines[done:] if done else lines)
    while change is not None:
        if change.md5:
            writer.add(*change)
        change = next(pending, None)


def line_blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines of entries, many at a time."""
    while lines := file.readlines(_BLOCK):
        if lines[-1][0] == 0x23:  # comments come last
            lines = [line for line in lines if line[0] != 0x23]
        if lines:
            yield lines


def _aligned_blocks(
    lefts: Iterator[list[bytes]], rights: Iterator[list[bytes]]
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Yield all lines of both, as pairs of lists that cover the same range of paths."""
    left: list[bytes] = []
    right: list[bytes] = []
    while True:
        left = left or next(lefts, [])
        right = right or next(rights, [])
        if not left and not right:
            return
        ends = [_path_of(lines[-1]) for lines in (left, right) if lines]
        here = bisect_right(left, min(ends), key=_path_of)
        there = bisect_right(right, min(ends), key=_path_of)
        yield left[:here], right[:there]
        left, right = left[here:], right[there:]


def _path_of(line: bytes) -> bytes:
    return trusted_entry(line).path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits, by which later steps identify an index."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_empty_index() -> str:
    """Return the :func:`digest` of a canonical index without entries."""
    return hashlib.sha256(_end_line(0, 0, None)).hexdigest()
