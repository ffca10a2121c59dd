"""The index: which paths a side has, and the md5 of each. An md5sum text file, read strictly.

A line is 32 lowercase hexadecimal digits, two blanks, and the full path as the backup account sees it,
with names escaped as GNU coreutils 9 writes them (``\\``, LF and CR as ``\\\\``, ``\\n``, ``\\r``, and then a
backslash before the digits). Comment lines, which ``md5sum -c`` passes over, carry the rest::

    # mdbackup started 1795402800
    d41d8cd98f00b204e9800998ecf8427e  /backups/alpha
    # mdbackup unreadable /backups/private
    # mdbackup rotten /backups/alpha
    # mdbackup end format=1 files=1 unreadable=1 bytes=0

Two forms are told apart. A *received* index is hostile input: :func:`canonicalise` reads it strictly, sorts
it, and writes the *canonical* form (sorted by raw path bytes, each path once, remarks after the entries, an
end line), which the other functions trust and read fast. All of it in bounded memory, whatever the number of
lines.

What this does not give: md5 tells accidents, not forgeries. Who can write the index can name any md5.

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
_BLOCK = 1 << 20  # bytes of lines that are in memory at a time
_RUN = 16  # lines that are compared at a time
MAX_PATH = 4096
MAX_COMPONENT = 255

_LINE = re.compile(rb"(\\?)([0-9a-f]{32})(?:  | \*| (?=\.?/))(.+)", re.DOTALL)
_ESCAPED = re.compile(rb"\\(.?)", re.DOTALL)
_PLAIN = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}
_ODD_COMPONENT = re.compile(rb"/(?:\.{0,2}(?:/|\Z)|[^/]{256})")

STARTED = b"# mdbackup started "
END = b"# mdbackup end "


class Remark(StrEnum):
    """What the provider has to say of a path, beside or instead of an entry."""

    UNREADABLE = "unreadable"  # a file or directory that it could not read; no entries at or below it
    ROTTEN = "rotten"  # its content changed, its times did not; the entry has the md5 of when it was sound

    @property
    def mark(self) -> bytes:
        """What such a line begins with."""
        return b"# mdbackup %s " % self.value.encode()


class Entry(NamedTuple):
    """One file of an index. A tuple, so that entries sort by path and are cheap by the million."""

    path: bytes
    md5: bytes  # 32 lowercase hexadecimal digits


class Difference(NamedTuple):
    """One path of two merged indexes, with its md5 on each side that has it."""

    path: bytes
    left: bytes | None
    right: bytes | None


class IdenticalEntries:
    """Entries that two compared indexes have alike, a good many at a time.

    :ivar count: how many.
    """

    __slots__ = ("_lines", "_others", "count")

    def __init__(self, lines: list[bytes], others: Container[bytes] = (), count: int = 1) -> None:
        self.count = count
        self._lines = lines
        self._others = others  # those of the lines that are not the same

    @classmethod
    def one(cls, path: bytes) -> IdenticalEntries:
        """Return a single entry, of any md5."""
        return cls([format_line(path, b"-" * 32)])

    @property
    def span(self) -> tuple[bytes, bytes]:
        """Two paths between which, themselves included, all of them lie."""
        return trusted_entry(self._lines[0]).path, trusted_entry(self._lines[-1]).path

    def paths(self) -> Iterator[bytes]:
        """Yield the path of each, in order."""
        return (trusted_entry(line).path for line in self._lines if line not in self._others)


class MalformedIndex(ValueError):
    """A line, or the whole, breaks the grammar. The message names file and line.

    Of a list that another tool wrote, or that was converted, it says so, and how to write the right one.
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

    Accepted beside the canonical form: one blank when a path follows (the seed's own sample), the mark
    ``*`` of binary mode, a leading ``./`` for the root of the chroot, a missing line end.

    :raises ValueError: anything else, telling what.
    """
    line = line.removesuffix(b"\n")
    match = _LINE.fullmatch(line)
    if match is None or ends_in_cr_alone(line):
        raise ValueError(why_malformed(line))
    if line.endswith(b"\r"):
        raise ValueError(
            "the line ends in CR LF. If all lines do, give the list plain LF line ends (dos2unix). If it is "
            "the name that ends in CR, it is to be escaped, as by md5sum of GNU coreutils since version 9"
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
    """Pass a path that can safely lie below a mirror.

    :raises ValueError: relative, NUL, an empty, ``.`` or ``..`` component, a trailing slash, a component over
        255 bytes, over 4096 bytes in all.
    """
    if not path.startswith(b"/"):
        raise ValueError(f"the path is not absolute: {to_text(path[:200])}")
    if b"\0" in path:
        raise ValueError("a NUL byte in the path (is the list of `md5sum --zero`?)")
    if len(path) > MAX_PATH:
        raise ValueError(f"the path is {len(path)} bytes long; at most {MAX_PATH} are possible")
    if odd := _ODD_COMPONENT.search(path):
        component = odd[0].strip(b"/")
        if len(component) > MAX_COMPONENT:
            raise ValueError(f"a name in the path is over {MAX_COMPONENT} bytes long")
        what = f"the component {component.decode()!r}" if component else "an empty component"
        raise ValueError(f"{what} in the path: {to_text(path[:200])}")


# --- the canonical form -----------------------------------------------------------------------------


class IndexWriter:
    """Writes a canonical index, given its entries in path order. Use as a context manager.

    The file is complete, with its end line and on the disk, when the ``with`` block ends without an error;
    else it is left empty. Renaming it into place is the caller's.

    :raises OSError: a symlink stands at ``path``, which is not followed.
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
        """Append an entry. Its path must sort after those before it."""
        self._file.write(format_line(path, md5))
        self.files += 1

    def add_line(self, line: bytes) -> None:
        """Append an entry that is a line of a canonical index. Its path must sort after those before it."""
        self._file.write(line)
        self.files += 1

    def add_lines(self, lines: list[bytes]) -> None:
        """Append entries that are lines of a canonical index. Their paths must sort after those before."""
        self._file.writelines(lines)
        self.files += len(lines)

    def add_remark(self, remark: Remark, path: bytes) -> None:
        """Append what the provider says of a path. After all entries."""
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
    told = b"" if size is None else b" bytes=%d" % size
    return b"%sformat=%d files=%d unreadable=%d%s\n" % (END, FORMAT, files, unreadable, told)


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a canonical index in path order, trusting it to be one."""
    with path.open("rb", buffering=1 << 20) as file:
        yield from trusted_entries(file)


def trusted_entries(file: BinaryIO) -> Iterator[Entry]:
    return (trusted_entry(line) for line in file if line[0] != 0x23)  # but for comments


def trusted_entry(line: bytes) -> Entry:
    if line[0] == 0x5C:  # a backslash: the name is escaped
        return Entry(unescape(line[35:-1]), line[1:33])
    return Entry(line[34:-1], line[:32])


def has_path(index: Path, path: bytes) -> bool:
    """Whether a canonical index has an entry of this path, or below it."""
    above = path.rstrip(b"/") + b"/"
    return any(entry.path == path or entry.path.startswith(above) for entry in read_entries(index))


def count_entries(path: Path) -> int:
    """Return how many entries a canonical index has."""
    with path.open("rb") as file:
        return sum(map(len, line_blocks(file)))


def read_remarks(path: Path, remark: Remark) -> Iterator[bytes]:
    """Yield, in path order, the paths of which a canonical index has this remark."""
    mark = remark.mark
    with path.open("rb", buffering=1 << 20) as file:
        for line in file:
            if line.startswith(mark):
                yield unescape(line[len(mark) : -1])


def merge(left: Iterable[Entry], right: Iterable[Entry]) -> Iterator[Difference]:
    """Yield every path of two streams in path order, with the md5 of each side that has it."""
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
    """Yield how two canonical indexes differ, in path order, and what they have alike, block by block.

    Most lines are the same on both sides. They are found by comparing runs of them, many times faster than by
    a walk over entries.

    :param right: None is an index without entries.
    """
    with ExitStack() as stack:
        lefts = line_blocks(stack.enter_context(left.open("rb")))
        rights = line_blocks(stack.enter_context(right.open("rb"))) if right else iter(())
        for ours, theirs in _alongside(lefts, rights):
            only_left, only_right = _lines_apart(ours, theirs)
            if same := len(ours) - len(only_left):
                yield IdenticalEntries(ours, set(only_left), same)
            yield from merge(map(trusted_entry, only_left), map(trusted_entry, only_right))


def _lines_apart(left: list[bytes], right: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the lines that only one of two lists has, both in path order."""
    only_left, only_right = [], []
    here = there = 0
    while here < len(left) and there < len(right):
        if left[here : here + _RUN] == right[there : there + _RUN]:
            here, there = here + _RUN, there + _RUN
            continue
        while here < len(left) and there < len(right) and left[here] == right[there]:
            here, there = here + 1, there + 1
        if here < len(left) and there < len(right):
            path, other = _path(left[here]), _path(right[there])
            if path <= other:
                only_left.append(left[here])
                here += 1
            if other <= path:
                only_right.append(right[there])
                there += 1
    return only_left + left[here:], only_right + right[there:]


def holders(index: Path, md5s: Container[bytes]) -> Iterator[Entry]:
    """Yield, in path order, the entries of a canonical index that have one of these md5s."""
    with index.open("rb") as file:
        for lines in line_blocks(file):
            for line in [line for line in lines if line[:32] in md5s or line[0] == 0x5C]:
                entry = trusted_entry(line)
                if entry.md5 in md5s:
                    yield entry


def revise(writer: IndexWriter, index: Path | None, changes: Iterable[Entry]) -> None:
    """Write the entries of a canonical index anew, with changes.

    :param index: None is an index without entries.
    :param changes: in path order; one with an empty md5 takes the entry out. Lines between them are copied.
    """
    pending = iter(changes)
    change = next(pending, None)
    with ExitStack() as stack:
        for lines in line_blocks(stack.enter_context(index.open("rb"))) if index else ():
            end = _path(lines[-1])
            done = 0
            while change is not None and change.path <= end:
                here = bisect_left(lines, change.path, done, key=_path)
                writer.add_lines(lines[done:here])
                done = here + (_path(lines[here]) == change.path)
                if change.md5:
                    writer.add(*change)
                change = next(pending, None)
            writer.add_lines(lines[done:] if done else lines)
    while change is not None:
        if change.md5:
            writer.add(*change)
        change = next(pending, None)


def line_blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines of entries, a good many at a time."""
    while lines := file.readlines(_BLOCK):
        if lines[-1][0] == 0x23:  # comments come last
            lines = [line for line in lines if line[0] != 0x23]
        if lines:
            yield lines


def _alongside(
    lefts: Iterator[list[bytes]], rights: Iterator[list[bytes]]
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Yield all lines of both, in pairs of lists that lie between the same two paths."""
    left: list[bytes] = []
    right: list[bytes] = []
    while True:
        left = left or next(lefts, [])
        right = right or next(rights, [])
        if not left and not right:
            return
        ends = [_path(lines[-1]) for lines in (left, right) if lines]
        here = bisect_right(left, min(ends), key=_path)
        there = bisect_right(right, min(ends), key=_path)
        yield left[:here], right[:there]
        left, right = left[here:], right[there:]


def _path(line: bytes) -> bytes:
    return trusted_entry(line).path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits. Later steps know an index by it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_nothing() -> str:
    """Return the :func:`digest` of a canonical index without entries."""
    return hashlib.sha256(_end_line(0, 0, None)).hexdigest()
