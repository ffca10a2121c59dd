"""Parses an index that came from outside, strictly, and writes it in canonical form.

::

    parse     each line against the grammar; the first error refuses the whole index
    sort      unless it is sorted already: by an external merge sort
    write     each path once, and no path that is also a directory of another; then remarks and the end line

Memory is bounded, whatever the size of the index or of its lines.
"""

from __future__ import annotations

import heapq
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import Prefixes, batches
from airflow_mdbackup.scheme.index.canonical import (
    END,
    FORMAT,
    MAX_COMPONENT,
    MAX_PATH,
    STARTED,
    Entry,
    IndexWriter,
    MalformedIndex,
    Remark,
    check_path,
    format_line,
    parse_line,
    trusted_entries,
    trusted_entry,
    unescape,
)
from airflow_mdbackup.scheme.index.malformed import ends_in_cr_alone, why_malformed, why_too_long

# The longest path with every byte escaped, plus digits, markers and line end.
MAX_LINE = 2 * MAX_PATH + 64
# A canonical line without escapes, which needs no further check. Nearly all lines match.
_PLAIN_LINE = re.compile(
    rb"[0-9a-f]{32}  (?=.{1,%d}\n)(?:/(?!\.{0,2}[/\n])[^/\\\n\r\0]{1,%d})+\n" % (MAX_PATH, MAX_COMPONENT)
)


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """What :func:`canonicalise` found. ``size`` is the total size of the files in bytes, if stated."""

    files: int
    unreadable: int
    rotten: int
    size: int | None
    started: int | None  # when the indexer's walk began: Unix seconds by the provider's clock
    complete: bool  # it had an end line


# --- the received form ------------------------------------------------------------------------------


def canonicalise(source: Path, target: Path, *, name: str, chunk: int = 100_000) -> IndexSummary:
    """Read the received index ``source`` strictly and write it as the canonical index ``target``.

    :param name: how messages refer to the index.
    :param chunk: how many entries of an unsorted index to sort in memory at a time.
    :raises MalformedIndex: the first violation of the grammar; the content of ``target`` is then undefined.
    """
    try:
        with ExitStack() as stack:
            received = _Received(source, name)
            received.collect_remarks(stack, target.parent)
            return _write_canonical(received, received.lines(), target, stack)
    except _Unsorted:
        pass
    with ExitStack() as stack:
        received = _Received(source, name)
        received.collect_remarks(stack, target.parent)
        entries = _sorted((trusted_entry(line) for _, line in received.lines()), chunk, stack, target.parent)
        lines = ((entry.path, format_line(*entry)) for entry in entries)
        return _write_canonical(received, lines, target, stack)


class _Unsorted(Exception):
    """An entry sorts before its predecessor, so the index must be sorted first."""


def _write_canonical(
    received: _Received, entries: Iterator[tuple[bytes, bytes]], target: Path, stack: ExitStack
) -> IndexSummary:
    """Write a canonical index from the path and the canonical line of each entry."""
    above = Prefixes()
    last_path, last_line = b"\0", b""  # sorts before every path, and is a prefix of none
    with IndexWriter(target) as writer:
        for path, line in entries:
            if path <= last_path:
                if path < last_path:
                    raise _Unsorted
                if line != last_line:
                    raise received.refuse_paths("the same path with different md5s", path)
                continue
            if path.startswith(last_path):  # else no later path does
                above.push(last_path)
            if above.last() is not None:
                above.advance(path)
                if directory := above.above(path):
                    why = "a path that is also the directory of another"
                    raise received.refuse_paths(why, directory, path)
            writer.add_line(line)
            last_path, last_line = path, line
        for remark, lines in received.remarks.items():
            lines.seek(0)
            for entry, _ in groupby(_sorted(trusted_entries(lines), 100_000, stack, target.parent)):
                writer.add_remark(remark, entry.path)
        writer.size, writer.started = received.size, received.started
    return IndexSummary(
        *(writer.files, writer.remarks[Remark.UNREADABLE], writer.remarks[Remark.ROTTEN]),
        *(received.size, received.started),
        complete=received.complete,
    )


class _Received:
    """A strict parser of the lines of an index that came from outside."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.remarks: dict[Remark, BinaryIO] = {}  # collected paths of each, as index lines
        self.size: int | None = None
        self.started: int | None = None
        self.complete = False
        self.line = 0  # number of the current line

    def collect_remarks(self, stack: ExitStack, folder: Path) -> None:
        """Have :meth:`lines` keep the paths of remarks in unnamed files in ``folder``."""
        self.remarks = {remark: stack.enter_context(_temporary(folder)) for remark in Remark}

    def lines(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield path and canonical line of each entry in file order, and parse the comments."""
        files = unreadable = 0
        line = b"\n"
        with self.path.open("rb", buffering=1 << 20) as file:
            for self.line, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                if _PLAIN_LINE.fullmatch(line) and not self.complete:
                    files += 1
                    yield line[34:-1], line
                    continue
                if len(line) > MAX_LINE:
                    raise self.refuse(why_too_long(line, MAX_LINE))
                if self.complete:
                    raise self.refuse("a line after the end line")
                try:
                    if not line.strip():
                        raise ValueError(why_malformed(line, _next_text(file)))
                    if not line.startswith(b"#") or ends_in_cr_alone(line):
                        files += 1
                        entry = parse_line(line)
                        yield entry.path, format_line(*entry)
                    elif line.startswith(Remark.UNREADABLE.mark):
                        unreadable += 1
                        self._add_remark(Remark.UNREADABLE, line)
                    elif line.startswith(Remark.ROTTEN.mark):
                        self._add_remark(Remark.ROTTEN, line)
                    elif line.startswith(END):
                        self._check_end_line(line, files, unreadable)
                    elif line.startswith(STARTED):
                        self.started = _parse_seconds(line[len(STARTED) :].removesuffix(b"\n"))
                except ValueError as error:
                    raise self.refuse(str(error)) from None
        if not line.endswith(b"\n"):
            raise self.refuse("the last line has no line end: truncated")

    def _add_remark(self, remark: Remark, line: bytes) -> None:
        path = unescape(line[len(remark.mark) :].removesuffix(b"\n"))
        if path != b"/":
            check_path(path)
        if remark in self.remarks:
            self.remarks[remark].write(format_line(path, b"-" * 32))

    def _check_end_line(self, line: bytes, files: int, unreadable: int) -> None:
        stated: dict[bytes, int] = {}
        for word in line[len(END) :].split():
            key, equals, value = word.partition(b"=")
            if equals and re.fullmatch(rb"[0-9]{1,18}", value):  # fits in 64 bits
                stated[key] = int(value)
        if stated.get(b"format", 0) > FORMAT:
            raise ValueError(f"index format {stated[b'format']} is newer than this version knows; update it")
        if stated.get(b"files") != files or stated.get(b"unreadable") != unreadable:
            raise ValueError(
                f"truncated or edited: the end line counts {stated.get(b'files')} files and "
                f"{stated.get(b'unreadable')} unreadable paths, but there are {files} and {unreadable}"
            )
        self.size = stated.get(b"bytes")
        self.complete = True

    def refuse(self, why: str) -> MalformedIndex:
        """Return the error for the current line."""
        return MalformedIndex(f"{self.name}, line {self.line}: {why}")

    def refuse_paths(self, why: str, *paths: bytes) -> MalformedIndex:
        """Return the error for conflicting paths, with their line numbers."""
        again = _Received(self.path, self.name)
        where = islice((str(again.line) for path, _ in again.lines() if path in paths), 2)
        names = " and ".join(to_text(path) for path in dict.fromkeys(paths))
        return MalformedIndex(f"{self.name}, lines {' and '.join(where)}: {why}: {names}")


def _next_text(file: BinaryIO) -> bytes:
    """Return the beginning of the next line that is not blank, if it is among the next few."""
    lines = islice(iter(partial(file.readline, MAX_LINE), b""), 5)
    return next((line for line in lines if line.strip()), b"")


def _parse_seconds(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,12}", digits):
        raise ValueError(f"started at {to_text(digits[:50])}, which is not a time in Unix seconds")
    return int(digits)


# --- sorting ----------------------------------------------------------------------------------------

_FAN_IN = 64  # sorted runs to merge at a time


def _sorted(entries: Iterator[Entry], chunk: int, stack: ExitStack, folder: Path) -> Iterator[Entry]:
    """Yield ``entries`` in path order by an external merge sort.

    Sorted runs of at most ``chunk`` entries are kept in unnamed files in ``folder``.
    """
    runs: list[BinaryIO] = []
    for batch in batches(entries, chunk):
        runs.append(_write_run(sorted(batch), stack, folder))
        if len(runs) == _FAN_IN:
            merged = _write_run(heapq.merge(*map(trusted_entries, runs)), stack, folder)
            for run in runs:
                run.close()
            runs = [merged]
    return heapq.merge(*map(trusted_entries, runs))


def _write_run(entries: Iterable[Entry], stack: ExitStack, folder: Path) -> BinaryIO:
    file = stack.enter_context(_temporary(folder))
    file.writelines(format_line(*entry) for entry in entries)
    file.seek(0)
    return file


def _temporary(folder: Path) -> BinaryIO:
    return tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # type: ignore[return-value]
