"""Names of versions in ``.old``, and stamps in file names."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.index.canonical import MAX_COMPONENT

OLD = b".old"


def version_path(path: bytes, stamp: str, attempt: int = 0) -> bytes:
    """Return the place of the version of ``path`` displaced at ``stamp``: in ``.old`` beside it.

    :param attempt: a number to append if the name is taken.
    """
    directory, _, name = path.rpartition(b"/")
    suffix = b"." + stamp.encode() + (b".%d" % attempt if attempt else b"")
    if len(name) + len(suffix) > MAX_COMPONENT:
        name_hash = b"~" + _name_hash(name)
        cut = MAX_COMPONENT - len(suffix) - len(name_hash)
        # Some filesystems refuse names that are not UTF-8, so do not cut a character in two.
        cut -= next((n for n in range(4) if name[cut - n] & 0xC0 != 0x80), 0)
        name = name[:cut] + name_hash
    return b"/".join((directory, OLD, name + suffix))


def stamp_of_version(version: bytes) -> str:
    """Return the stamp in the name of a version; empty if it has none."""
    found = _VERSION.fullmatch(version)
    return found[2].decode() if found else ""


def versions_on_disk(tree: Tree, path: bytes) -> list[bytes]:
    """Return the places in ``.old`` with a version name of ``path``, oldest first, judged by name only."""
    directory, _, name = path.rpartition(b"/")
    old = directory + b"/" + OLD
    return sorted(old + b"/" + other for other in tree.names_in(old) if _is_version(other, name))


def _is_version(other: bytes, name: bytes) -> bool:
    version = _VERSION.fullmatch(other)
    if version is None or version[1] == name:
        return version is not None
    shortened = _SHORTENED.fullmatch(version[1])
    return shortened is not None and name.startswith(shortened[1]) and _name_hash(name) == shortened[2]


class Displacement(NamedTuple):
    """What a version name says: ``path`` was displaced at ``stamp``, and was at ``version`` from then on."""

    path: bytes
    version: bytes
    stamp: str


def parse_version_place(place: bytes) -> tuple[bytes, list[Displacement]] | None:
    """Return which path a file of the mirror belongs to, and what was moved to ``.old``, oldest first.

    If the first of these is not that path itself, a directory above it was moved as a whole.

    :returns: None if the names do not say: one was shortened, or is not ours.
    """
    path, found = b"", list[Displacement]()
    components = iter(place.split(b"/")[1:])
    for component in components:
        if component == OLD:
            name = _VERSION.fullmatch(next(components, b""))
            if name is None or not is_stamp(name[2].decode()) or _SHORTENED.fullmatch(name[1]):
                return None
            version = b"/".join((path, OLD, name[0]))
            component = name[1]
            found.insert(0, Displacement(path + b"/" + component, version, name[2].decode()))
        path += b"/" + component
    return path, found


_VERSION = re.compile(rb"(.+)\.([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)(?:\.[0-9]+)?", re.DOTALL)
_SHORTENED = re.compile(rb"(.+)~([0-9a-f]{12})", re.DOTALL)


NO_STAMP = "9999"  # no stamp begins with this, so there is always a later time


def _name_hash(name: bytes) -> bytes:
    """Return a hash that distinguishes names which are too long for a version name."""
    return hashlib.md5(name, usedforsecurity=False).hexdigest()[:12].encode()


def now_stamp() -> str:
    return _format(datetime.now(UTC))


def _format(moment: datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%S.%fZ")


def is_stamp(text: str) -> bool:
    """Whether a text is a stamp as :meth:`Mirror.next_stamp` returns."""
    return bool(text) and _stamp_in(text.encode(errors="replace")) == text


def stamp_in_name(name: str) -> str:
    """Return the stamp at the beginning of the name of a history file."""
    return name[: len("20261123T031500.123456Z")]


def stamp_beside(stamp: str, microseconds: int) -> str:
    """Return a stamp shifted by some microseconds, which may be negative."""
    return _format(_parse(stamp) + timedelta(microseconds=microseconds))


def stamp_of_file(path: Path) -> str:
    """Return the modification time of a file as a stamp."""
    return _format(datetime.fromtimestamp(path.stat().st_mtime, UTC))


def _stamp_in(text: bytes) -> str:
    """Return ``text`` if it is a stamp; otherwise an empty text."""
    try:
        stamp = text.decode("ascii")
        return stamp if _format(_parse(stamp)) == stamp < NO_STAMP else ""
    except ValueError:
        return ""


def _parse(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp).astimezone(UTC)
