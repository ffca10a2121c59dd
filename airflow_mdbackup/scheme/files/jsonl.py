"""Files of records: a header line and one JSON line per record, written whole or not at all.

A record is a :class:`Record` with fields of ``bytes``, ``str``, ``int``, ``bool``, or None. Bytes are stored
as text by :func:`.to_text`; if that would be more than twice as long, as ``\\\\=`` and base64:
a control byte takes five bytes of JSON, and strange names should not take much more space than others.
The header says ``format`` and ``kind``; a newer format is refused.
"""

from __future__ import annotations

import os
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

from airflow_mdbackup.scheme.common.paths import from_text, to_text
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.files.syscalls import fsync_directory, not_followed

FORMAT = 1
_BUFFER = 1 << 18
_BASE64 = "\\="  # never in a text of to_text
_TEXT: dict[Any, Any] = {bytes: str, bytes | None: str | None}  # as what bytes are stored


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base class of records. Fields with their default value are not stored."""


R = TypeVar("R", bound=Record)
_to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode


def encode(record: Record) -> bytes:
    """Return a record as one line of JSON, without its line end."""
    values = msgspec.structs.astuple(record)
    texts = [_text(value) if type(value) is bytes else value for value in values]
    return _to_json(_stored(type(record))[0](*texts))


def decode(kind: type[R], line: bytes) -> R:
    """Return the record of class ``kind`` that :func:`encode` turned into ``line``.

    :raises ValueError: the line is something else.
    """
    _, read, binary = _stored(kind)
    values = list(msgspec.structs.astuple(read(line)))
    for position in binary:
        if values[position] is not None:
            values[position] = _bytes(values[position])
    return kind(*values)


def _text(value: bytes) -> str:
    text = to_text(value)
    if len(text) > 2 * len(value):
        return _BASE64 + b64encode(value).decode()
    return text


def _bytes(text: str) -> bytes:
    if text.startswith(_BASE64):
        return b64decode(text[len(_BASE64) :], validate=True)
    return from_text(text)


@cache
def _stored(kind: type[Record]) -> tuple[type[Any], Callable[[bytes], Any], tuple[int, ...]]:
    """Return the class of which ``kind`` is stored, its decoder, and which fields are bytes in ``kind``."""
    fields = msgspec.structs.fields(kind)
    binary = tuple(n for n, field in enumerate(fields) if field.type in _TEXT)
    stored = msgspec.defstruct(kind.__name__, map(_stored_field, fields), omit_defaults=True)
    return stored, msgspec.json.Decoder(stored).decode, binary


def _stored_field(field: msgspec.structs.FieldInfo) -> tuple[str, Any] | tuple[str, Any, Any]:
    kind = _TEXT.get(field.type, field.type)
    return (field.name, kind) if field.default is msgspec.NODEFAULT else (field.name, kind, field.default)


class CorruptFile(DestinationRefused):
    """A file is not a file of records, or a state, as its name says."""


class RecordWriter(Generic[R]):
    """Writes a file of records under a temporary name, and renames it when the ``with`` block ends well.

    Then it is durable. After an error nothing is left, and an older file of that name stays.
    """

    def __init__(self, path: Path, **header: Any) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb", _BUFFER, opener=not_followed)  # noqa: SIM115 - closed by `with`
        self._line(_to_json({"format": FORMAT, **header}))

    def __enter__(self) -> RecordWriter[R]:
        return self

    def _line(self, line: bytes) -> None:
        self._file.write(line)
        self._file.write(b"\n")

    def add(self, record: R) -> None:
        self._line(encode(record))

    def copy(self, lines: BinaryIO) -> None:
        """Append records that are encoded already."""
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
    with RecordWriter[Any](target, **header) as writer, source.open("rb") as file:
        file.readline()
        writer.copy(file)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file of records, or the whole of a file that :func:`write_state` wrote.

    :raises FileNotFoundError: it is missing.
    :raises CorruptFile: it is not a file of records.
    :raises DestinationRefused: its format is newer.
    """
    with path.open("rb") as file:
        return _header(path, file.readline())


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Yield the records of a file.

    :raises FileNotFoundError: it is missing.
    :raises CorruptFile: it is not a file of records, or is damaged.
    :raises DestinationRefused: its format is newer.
    """
    with path.open("rb", buffering=_BUFFER) as file:
        _header(path, file.readline())
        for number, line in enumerate(file, 2):
            try:
                yield decode(kind, line)
            except ValueError as error:
                raise CorruptFile(f"{path}, line {number}: damaged: {error}") from None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a small file that is one JSON object, durably and in one step."""
    write_records(path, (), **state)


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = _from_json(line)
        newer = int(header["format"]) > FORMAT
    except (ValueError, TypeError, KeyError):
        raise CorruptFile(f"{path} is damaged: it does not have our header") from None
    if newer:
        raise DestinationRefused(
            f"{path} has format {header['format']}, newer than this version knows: update airflow-mdbackup"
        )
    return header
