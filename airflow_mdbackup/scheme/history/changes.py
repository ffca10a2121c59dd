"""What each commit changed: one immutable file per commit.

The header of a file has the run's id, the commit's stamp, and the SHA-256 of the consumer index before and
after. Then follow the manual edits of the index: first those made before the commit, in path order; then
those made while it was cut off, in path order. Then one :class:`Change` per path, in path order. (Imported
versions are in the order in which they were found.) The state as of a commit is the consumer index as
committed then: applying the files of history in the order of their names reproduces it.

A commit writes its history ahead under a name that ends in ``.pending``. Whoever finds such a file finishes
that commit first (see :func:`.history.journal.recover`).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.files.jsonl import CorruptFile, Record, read_header
from airflow_mdbackup.scheme.store.mirror import Mirror

PENDING = ".pending"
PRUNE = "prune"  # `kind` in the header of a history that does not change the index
FORGET, REPAIR = "forget", "repair"
"""What removes entries of files that the provider may still have, so that they are copied again."""


class ChangeKind(StrEnum):
    """What happened to a path."""

    EDITED = "edited"  # the index entry, by hand, since the last commit
    ADDED = "added"
    REPLACED = "replaced"  # the old file is the version named
    ADOPTED = "adopted"  # the live file already had these bytes
    FORGOTTEN = "forgotten"  # left the index; the file stays
    KEPT = "kept"  # could not be replaced, so the entry stays; only while a commit is carried out
    IMPORTED = "imported"  # an old version from elsewhere; index and live file are unchanged
    MOVED = "moved"  # what was in the way became the version named, as a whole; entries below are forgotten
    PRUNED = "pruned"  # the version named was deleted on request; the index is unchanged


class Change(Record, frozen=True):
    """One line of history.

    :ivar old_md5: of the displaced file, by hashing; of a forgotten or edited path, what the index said; of
        a pruned or imported version, its own.
    :ivar md5: what the index says now.
    :ivar size: in bytes; ``mtime`` in Unix seconds and ``mode`` are the provider's; of a pruned or imported
        version, its own; None for a pruned one that had already been deleted by hand.
    :ivar version: where the displaced file or directory is now; where a pruned version was.
    :ivar content: where the new bytes wait for the commit: ``staging``, or the number of a copy; for a
        version that is imported by a rename, its absolute path.
    :ivar replaces: what the index said before; on a forgotten path, only if it makes room for an earlier
        change at or above it. This and ``content`` are only in a history written ahead.
    """

    path: bytes
    what: str
    outcome: str | None = None
    old_md5: bytes | None = None
    md5: bytes | None = None
    size: int | None = None
    mtime: int | None = None
    mode: int | None = None
    version: bytes | None = None
    content: str | None = None
    replaces: bytes | None = None


def run_id_of(who: str, stamp: str) -> str:
    """Return the id of a commit that is not a run's, such as one by :data:`FORGET`."""
    return f"{who}__{stamp}"


def taken_out_by(run_id: str, stamp: str) -> str:
    """Return :data:`FORGET` or :data:`REPAIR` if that made a commit; otherwise an empty text."""
    return next((who for who in (FORGET, REPAIR) if run_id == run_id_of(who, stamp)), "")


def commits(mirror: Mirror) -> list[Path]:
    """Return the history files of finished commits, oldest first."""
    return _files(mirror, ".jsonl")


def pending(mirror: Mirror) -> list[Path]:
    """Return the history files of unfinished commits, oldest first."""
    return _files(mirror, PENDING)


def last(mirror: Mirror) -> dict[str, Any]:
    """Return the header of the last finished commit; empty if there is none.

    :raises CorruptFile: it cannot be read.
    """
    finished = commits(mirror)
    try:
        return read_header(finished[-1]) if finished else {}
    except CorruptFile as error:
        raise CorruptFile(
            f"{mirror.provider}: {error}. Nothing was changed. Move that file away: what was committed then "
            "is then no longer known, and backups continue"
        ) from None


def _files(mirror: Mirror, suffix: str) -> list[Path]:
    return [mirror.history / name for name in mirror.names_in_history() if name.endswith(suffix)]
