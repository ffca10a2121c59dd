"""Files of records: a header line and one JSON line per record, written whole or not at all.

A record is a frozen dataclass with fields of ``bytes`` (stored as text by :func:`.names.to_text`), ``str``,
``int``, ``bool``, or None. The header says ``format`` and ``kind``; a newer format is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TextIO, TypeVar

from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.names import from_text, to_text
from airflow_mdbackup.scheme.tree import fsync_directory

FORMAT = 1

T = TypeVar("T")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(record: object) -> dict[str, Any]:
    """Return a record as a plain dict of JSON values. Fields that are None are left out."""
    row = {}
    for name in _names(type(record)):  # type: ignore[arg-type]
        value = getattr(record, name)
        if value is not None:
            row[name] = to_text(value) if type(value) is bytes else value
    return row


def decode(kind: type[T], row: dict[str, Any]) -> T:
    """Return the record of class ``kind`` that :func:`encode` made ``row`` of.

    :raises ValueError: it was made of something else.
    """
    names, binary = _names(kind), _binary(kind)  # type: ignore[arg-type]
    try:
        return kind(*(from_text(row[n]) if n in binary and n in row else row.get(n) for n in names))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a record of kind {kind.__name__}: {error}") from None


@cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


@cache
def _binary(kind: type[Any]) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind) if str(field.type).startswith("bytes"))


class RecordWriter(Generic[T]):
    """Writes a file of records beside its name, and gives it the name when the ``with`` block ends well.

    Then it is on the disk, whole. After an error nothing is left, and an older file of that name stays.
    """

    def __init__(self, path: Path, **header: Any) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("w", encoding="utf-8", newline="\n", buffering=1 << 18)
        self._line({"format": FORMAT, **header})

    def __enter__(self) -> RecordWriter[T]:
        return self

    def _line(self, row: dict[str, Any]) -> None:
        self._file.write(_encode(row))
        self._file.write("\n")

    def add(self, record: T) -> None:
        self._line(encode(record))

    def copy(self, lines: TextIO) -> None:
        """Append records that are lines already."""
        shutil.copyfileobj(lines, self._file)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        with self._file as file:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
        if kind is None:
            self._temporary.replace(self._path)
            fsync_directory(self._path.parent)
        else:
            self._temporary.unlink(missing_ok=True)


def write_records(path: Path, records: Iterable[Any], **header: Any) -> int:
    """Write a whole file of records and return how many there were."""
    count = 0
    with RecordWriter[Any](path, **header) as writer:
        for record in records:
            writer.add(record)
            count += 1
    return count


def copy_records(source: Path, target: Path, **header: Any) -> None:
    """Write the records of ``source`` as the file ``target`` with another header."""
    with RecordWriter[Any](target, **header) as writer, source.open(encoding="utf-8", newline="\n") as file:
        file.readline()
        writer.copy(file)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file of records, or the whole of a file that :func:`write_state` wrote.

    :raises FileNotFoundError: there is none.
    :raises DestinationRefused: it is of a newer format, or no file of records.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        return _header(path, file.readline())


def read_records(path: Path, kind: type[T]) -> Iterator[T]:
    """Yield the records of a file.

    :raises FileNotFoundError: there is none.
    :raises DestinationRefused: it is of a newer format, or damaged.
    """
    with path.open(encoding="utf-8", newline="\n", buffering=1 << 18) as file:
        _header(path, file.readline())
        for number, line in enumerate(file, 2):
            try:
                yield decode(kind, json.loads(line))
            except ValueError as error:
                raise DestinationRefused(f"{path}, line {number}: damaged: {error}") from None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a small file that is one JSON object, durably and in one step."""
    write_records(path, (), **state)


def _header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
        newer = int(header["format"]) > FORMAT
    except (ValueError, TypeError, KeyError):
        raise DestinationRefused(f"{path} is damaged: it has no header of ours") from None
    if newer:
        raise DestinationRefused(
            f"{path} has format {header['format']}, newer than this version knows: update airflow-mdbackup"
        )
    return header
