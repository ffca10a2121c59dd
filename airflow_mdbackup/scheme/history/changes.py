"""What each commit changed: one immutable file per commit, and how a crashed one is settled.

A file's header has the run's id, the commit's stamp, and the SHA-256 of the consumer index before and after.
One :class:`Change` per path follows, in path order, behind those that tell of an index edited by hand: first
what was edited before the commit; then, in path order again, what was edited while it was cut off. (Imported
versions come in the order in which they were found.) The state
as of a moment is the consumer index as committed then, so that the files of history, applied in the order of
their names, give it back.

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
PRUNE = "prune"  # the kind, in its header, of a history that changes nothing in the index
FORGET, REPAIR = "forget", "repair"
"""Who takes out entries of files that the provider may still have, to have them copied again."""


class ChangeKind(StrEnum):
    """What happened to a path."""

    EDITED = "edited"  # in the index, by hand, since the last commit
    ADDED = "added"
    REPLACED = "replaced"  # the old file is the version named
    ADOPTED = "adopted"  # the live file was it already
    FORGOTTEN = "forgotten"  # left the index; the file stays
    KEPT = "kept"  # could not be replaced, so that the entry stays; only while a commit is carried out
    IMPORTED = "imported"  # an old version came from elsewhere; index and live file are as they were
    MOVED = "moved"  # what stood in the way went as a whole to the version named; entries below are forgotten
    PRUNED = "pruned"  # what was at the place named is gone, for a person wanted that; no entry is concerned


class Change(Record, frozen=True):
    """One line of history.

    :ivar old_md5: what the displaced file really had, by hashing; of a forgotten or edited path, what the
        index said; of a pruned version, what it had; of an imported one, what it has.
    :ivar md5: what the index says now.
    :ivar size: in bytes; ``mtime`` in Unix seconds and ``mode`` are the provider's; of a pruned or imported
        version, its own; None for a pruned one that hands had taken away before.
    :ivar version: where the displaced file or directory lies now; where a pruned version lay.
    :ivar content: where the new bytes wait for the commit: ``staging``, or the number of a copy; or, of a
        version that is imported by a rename, its absolute path.
    :ivar replaces: what the index said before; of a forgotten path, if it is only to give way to a change
        before it, at or above it. It and ``content`` are only in a history written ahead.
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
    """Return the id of a commit that no run makes, but :data:`FORGET` or :data:`REPAIR`."""
    return f"{who}__{stamp}"


def taken_out_by(run_id: str, stamp: str) -> str:
    """Return which of :data:`FORGET` and :data:`REPAIR` made a commit; empty for a run's."""
    return next((who for who in (FORGET, REPAIR) if run_id == run_id_of(who, stamp)), "")


def commits(mirror: Mirror) -> list[Path]:
    """Return the files of finished commits, oldest first."""
    return _files(mirror, ".jsonl")


def pending(mirror: Mirror) -> list[Path]:
    """Return the files of commits that were not finished, oldest first."""
    return _files(mirror, PENDING)


def last(mirror: Mirror) -> dict[str, Any]:
    """Return the header of the last finished commit; empty if there is none.

    :raises Damaged: it cannot be read.
    """
    finished = commits(mirror)
    try:
        return read_header(finished[-1]) if finished else {}
    except CorruptFile as error:
        raise CorruptFile(
            f"{mirror.provider}: {error}. Nothing was changed. Move that file away: what was committed then "
            "is no longer known, and backups go on"
        ) from None


def _files(mirror: Mirror, suffix: str) -> list[Path]:
    return [mirror.history / name for name in mirror.names_in_history() if name.endswith(suffix)]
