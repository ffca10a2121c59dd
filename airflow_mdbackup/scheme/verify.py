"""The files of the mirror are read again, and compared with what history says of them.

::

    walked    all contents that history knows, live files and versions, path by path (see past)
    read      each from where it should be, several at a time, not faster than asked
    judged    missing; rotten, if its bytes are others while size and time are as they were; else changed
    looked    at whatever lies in the mirror besides, when all of it is walked

What a run displaces meanwhile is looked for where history says that it went. Nothing is changed. A walk may
be cut into parts, of so many bytes each, and goes on where the last one ended.

What this does not give: damage of what history knows nothing of, such as empty directories, owners and ACLs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.names import from_text, to_text
from airflow_mdbackup.scheme.past import Content, Past
from airflow_mdbackup.scheme.records import Damaged, read_header, write_state
from airflow_mdbackup.scheme.threads import TreePerThread, spread
from airflow_mdbackup.scheme.tree import concerns_one_file, md5_of


class Found(StrEnum):
    """What became of one content."""

    SOUND = "sound"
    MISSING = "missing"  # it is not where it should be
    ROTTEN = "rotten"  # other bytes, though size and time are as they were: a bad disk
    CHANGED = "changed"  # other bytes, and another size or time: by hand
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"  # no history tells of it

    @property
    def good(self) -> bool:
        """Whether it is no damage. What is unknown harms nothing."""
        return self in (Found.SOUND, Found.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found at one place.

    :ivar place: a path of the mirror's tree.
    :ivar content: what should be there; None for what is unknown.
    :ivar size: bytes that were read.
    """

    place: bytes
    found: Found
    content: Content | None = None
    size: int = 0


def verify(
    mirror: Mirror,
    past: Past,
    contents: Iterable[Content],
    *,
    threads: int = 2,
    wait: Callable[[int], Any] = lambda size: None,
) -> Iterator[Verified]:
    """Read contents again and yield what was found, in their order.

    :param past: where they are from.
    :param threads: how many files are read at a time.
    :param wait: is told how many bytes were read, by any thread, and waits as long as it wants.
    :raises OSError: the disk fails as a whole.
    """
    with TreePerThread(mirror.tree) as trees:
        reader = _Reader(mirror, past, trees, wait)
        yield from spread((content for content in contents if content.places), reader.read, threads)


def unknown(mirror: Mirror, past: Past) -> Iterator[Verified]:
    """Yield the files of the mirror of which no history tells.

    :param past: all of it.
    """
    if not past.noted:
        for _ in past.noting(past.contents()):
            pass
    root = os.fsencode(mirror.files)
    for folder, _, names in os.walk(root):
        for name in names:
            place = folder[len(root) :] + b"/" + name
            if not past.has_place(place):
                yield Verified(place, Found.UNKNOWN)


class _Reader:
    """Reads contents, in any thread."""

    def __init__(self, mirror: Mirror, past: Past, trees: TreePerThread, wait: Callable[[int], Any]) -> None:
        self._mirror = mirror
        self._newest = past.moments[-1].stamp if past.moments else ""
        self._trees = trees
        self._wait = wait

    def read(self, content: Content) -> Verified:
        """Read a file.

        :raises OSError: no other one can be read either.
        """
        known = self._newest
        verified = self._read(content, content.places[0])
        while not verified.found.good and (newest := self._mirror.last_commit()) != known:
            # A run that was committed meanwhile, or has begun to be, may have displaced it.
            known = newest
            for place in _places_now(self._mirror, content):
                again = self._read(content, place)
                if again.found.good:
                    return again
        return verified

    def _read(self, content: Content, place: bytes) -> Verified:
        tree = self._trees()
        size = 0
        try:
            with tree.opened(place) as descriptor:
                sound = md5_of(descriptor, progress=self._limited) == content.md5
                status = os.fstat(descriptor)
                size = status.st_size
                found = Found.SOUND if sound else _judge(content, status)
        except FileNotFoundError:
            found = Found.MISSING
        except OSError as error:
            if not concerns_one_file(error):
                raise
            found = Found.UNREADABLE
        if not found.good:
            tree.forget_directories()  # they may have been moved
        return Verified(place, found, content, size)

    def _limited(self, size: int) -> None:
        try:
            self._wait(size)
        except OSError as error:  # which is not of the file that is read
            raise DestinationRefused(
                f"the limit cannot be kept: {error.filename}: {error.strerror}"
            ) from error


def _places_now(mirror: Mirror, content: Content) -> list[bytes]:
    """Return where a content should be by the history as it is now."""
    with Past(mirror, lambda path: path == content.path) as past:
        return [
            place
            for now in past.contents()
            if (now.md5, now.since) == (content.md5, content.since)
            for place in now.places
        ]


def _judge(content: Content, status: os.stat_result) -> Found:
    """Return what is wrong with a file that has other bytes."""
    as_it_was = content.size in (None, status.st_size) and content.mtime in (None, int(status.st_mtime))
    return Found.ROTTEN if as_it_was and stat.S_ISREG(status.st_mode) else Found.CHANGED


# --- in parts ---------------------------------------------------------------------------------------


class Part:
    """So many bytes of all contents, from where the last part ended. Iterate once; then :meth:`keep` its end.

    :param size: bytes; the contents of the path that makes them full come as a whole.
    :ivar is_last: whether the next part begins anew.
    """

    def __init__(self, mirror: Mirror, past: Past, size: int) -> None:
        self._mirror = mirror
        self._contents = past.contents(_first_path(mirror))
        self._left = size
        self._next = b""

    def __iter__(self) -> Iterator[Content]:
        path = None
        for content in self._contents:
            if self._left <= 0 and content.path != path:
                self._next = content.path
                return
            path = content.path
            self._left -= content.size or 0
            yield content

    @property
    def is_last(self) -> bool:
        return not self._next

    def keep(self) -> None:
        """Remember where the next part begins.

        :raises OSError: the disk is full or broken.
        """
        write_state(self._mirror.verified, {"next": to_text(self._next)})


def _first_path(mirror: Mirror) -> bytes:
    try:
        return from_text(str(read_header(mirror.verified).get("next", "")))
    except (FileNotFoundError, Damaged, ValueError):
        return b""
