"""The consumer index: finding it, reading it, and the manual edits in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, last, pending
from airflow_mdbackup.scheme.index.canonical import MalformedIndex, digest, merge, read_entries
from airflow_mdbackup.scheme.index.received import canonicalise
from airflow_mdbackup.scheme.store.mirror import Mirror

log = logging.getLogger(__name__)


def consumer_index(mirror: Mirror, target: Path) -> Path | None:
    """Return the consumer index in canonical form; None if there is none.

    If it is as the last commit left it, that is the file itself; otherwise it is read strictly, into
    ``target``.

    :raises ConsumerIndexDamaged: it is malformed or incomplete.
    """
    if not _is_there(mirror, mirror.index):
        return None
    if digest(mirror.index) == last(mirror).get("after"):
        return mirror.index
    return _read_strictly(mirror, mirror.index, target)


def index_to_look_at(mirror: Mirror, target: Path) -> Path | None:
    """Return the consumer index as the next run would find it; None if there is none. Needs no lock.

    While a commit is unfinished, that is the index it began with.

    :param target: where it is written in canonical form.
    :raises ConsumerIndexDamaged: see :func:`consumer_index`.
    """
    index = mirror.committed if any(pending(mirror)) else mirror.index
    return _read_strictly(mirror, index, target) if _is_there(mirror, index) else None


def _is_there(mirror: Mirror, index: Path) -> bool:
    """Whether there is an index.

    :raises ConsumerIndexDamaged: something other than a file has its name.
    """
    if index.exists() and not index.is_file():
        what = "is a directory" if index.is_dir() else "is not a regular file"
        raise ConsumerIndexDamaged(
            f"{mirror.provider}: the consumer index {index} {what}. (Docker makes a directory where a "
            f"file that it is to mount is missing.) Remove it. {_ways_out(mirror)}"
        )
    return index.exists()


def _ways_out(mirror: Mirror) -> str:
    return (
        f"Nothing was changed. Either restore it ({mirror.committed} is what the last commit wrote), or "
        "delete it: then all files are copied again, and versions are kept."
    )


def _read_strictly(mirror: Mirror, index: Path, target: Path) -> Path:
    ways_out = _ways_out(mirror)
    try:
        summary = canonicalise(index, target, name=f"{mirror.provider}: consumer index {index}")
    except MalformedIndex as error:
        raise ConsumerIndexDamaged(f"{error}. {ways_out}") from None
    if not summary.complete:
        raise ConsumerIndexDamaged(
            f"{mirror.provider}: the consumer index {index} has no end line: truncated. {ways_out}"
        )
    return target


def present_index(mirror: Mirror, target: Path) -> Path | None:
    """Return the consumer index in canonical form, for readers; None if there is none.

    If a commit was cut off or the index is damaged, that is the index of the last commit.

    :param target: where it is written.
    """
    index = mirror.committed if any(pending(mirror)) or not mirror.index.is_file() else mirror.index
    for path in (index, mirror.committed):
        try:
            if path.is_file() and canonicalise(path, target, name=str(path)).complete:
                return target
        except MalformedIndex as error:
            log.warning("%s", error)
    return None


def is_canonical(index: Path, target: Path) -> bool:
    """Whether an index exists, complete and in canonical form.

    :param target: where its canonical form is written.
    """
    try:
        return (
            index.is_file()
            and canonicalise(index, target, name=str(index)).complete
            and digest(index) == digest(target)
        )
    except MalformedIndex:
        return False


def hand_edits(mirror: Mirror, current: Path | None) -> Iterator[Change]:
    """Yield the manual edits of the consumer index since the last commit.

    :param current: see :func:`consumer_index`.
    """
    after = last(mirror).get("after")
    if after is None or (current is not None and after == digest(mirror.index)):
        return
    if not is_index(mirror.committed, after):
        log.warning(
            "The consumer index was edited; the edits are not recorded, because %s is lost", mirror.committed
        )
        return
    for path, old, new in merge(read_entries(mirror.committed), read_entries(current) if current else ()):
        if old != new:
            yield Change(path, ChangeKind.EDITED, old_md5=old, md5=new)


def is_index(path: Path, known: str | None) -> bool:
    """Whether an index exists and has this digest."""
    return path.is_file() and digest(path) == known
