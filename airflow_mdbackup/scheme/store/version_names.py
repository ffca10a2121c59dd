"""TODO"""

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
    """Return where the version of ``path`` displaced at ``stamp`` lies: in ``.old`` beside it.

    :param attempt: counts on when the name is taken.
    """
    directory, _, name = path.rpartition(b"/")
    suffix = b"." + stamp.encode() + (b".%d" % attempt if attempt else b"")
    if len(name) + len(suffix) > MAX_COMPONENT:
        known_by = b"~" + _known_by(name)
        cut = MAX_COMPONENT - len(suffix) - len(known_by)
        # Some filesystems take no name that is not UTF-8, so that no character may be cut in two.
        cut -= next((n for n in range(4) if name[cut - n] & 0xC0 != 0x80), 0)
        name = name[:cut] + known_by
    return b"/".join((directory, OLD, name + suffix))


def displaced_at(version: bytes) -> str:
    """Return the stamp in the name of a version."""
    found = _VERSION.fullmatch(version)
    return found[2].decode() if found else ""


def versions_on_disk(tree: Tree, path: bytes) -> list[bytes]:
    """Return what lies in ``.old`` under a version name of ``path``, the oldest first, by its name alone."""
    directory, _, name = path.rpartition(b"/")
    old = directory + b"/" + OLD
    return sorted(old + b"/" + other for other in tree.names_in(old) if _is_version(other, name))


def _is_version(other: bytes, name: bytes) -> bool:
    version = _VERSION.fullmatch(other)
    if version is None or version[1] == name:
        return version is not None
    shortened = _SHORTENED.fullmatch(version[1])
    return shortened is not None and name.startswith(shortened[1]) and _known_by(name) == shortened[2]


class Displaced(NamedTuple):
    """What a version name tells: ``path`` was displaced at ``stamp``, and lay at ``version`` from then on."""

    path: bytes
    version: bytes
    stamp: str


def displaced(place: bytes) -> tuple[bytes, list[Displaced]] | None:
    """Return which path a file of the mirror belongs to, and what of it went to ``.old``, the oldest first.

    If the first of these is not that path itself, a directory above it went there as a whole.

    :returns: None where names do not tell: one was shortened, or is none of ours.
    """
    path, found = b"", list[Displaced]()
    components = iter(place.split(b"/")[1:])
    for component in components:
        if component == OLD:
            name = _VERSION.fullmatch(next(components, b""))
            if name is None or not is_stamp(name[2].decode()) or _SHORTENED.fullmatch(name[1]):
                return None
            version = b"/".join((path, OLD, name[0]))
            component = name[1]
            found.insert(0, Displaced(path + b"/" + component, version, name[2].decode()))
        path += b"/" + component
    return path, found


_VERSION = re.compile(rb"(.+)\.([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)(?:\.[0-9]+)?", re.DOTALL)
_SHORTENED = re.compile(rb"(.+)~([0-9a-f]{12})", re.DOTALL)


NO_STAMP = "9999"  # with which none begins, so that there is always a later time


def _known_by(name: bytes) -> bytes:
    """Return what tells apart names that are too long for a version name of theirs."""
    return hashlib.md5(name, usedforsecurity=False).hexdigest()[:12].encode()


def now_stamp() -> str:
    return _format(datetime.now(UTC))


def _format(moment: datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%S.%fZ")


def is_stamp(text: str) -> bool:
    """Whether a text is a stamp as :meth:`Mirror.next_stamp` gives them."""
    return bool(text) and _stamp_in(text.encode(errors="replace")) == text


def stamp_in_name(name: str) -> str:
    """Return the stamp with which the name of a file of history begins."""
    return name[: len("20261123T031500.123456Z")]


def stamp_beside(stamp: str, microseconds: int) -> str:
    """Return the stamp so much later; earlier if it is negative."""
    return _format(_parse(stamp) + timedelta(microseconds=microseconds))


def stamp_of_file(path: Path) -> str:
    """Return when a file was written last, as a stamp."""
    return _format(datetime.fromtimestamp(path.stat().st_mtime, UTC))


def _stamp_in(text: bytes) -> str:
    """Return the stamp that ``text`` is, or an empty text if a crash has spoilt it."""
    try:
        stamp = text.decode("ascii")
        return stamp if _format(_parse(stamp)) == stamp < NO_STAMP else ""
    except ValueError:
        return ""


def _parse(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp).astimezone(UTC)
