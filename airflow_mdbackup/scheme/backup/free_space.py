"""Which files of a run fit on the disk is judged before its first byte comes, once for all its shards.

::

    by the index    its end line tells the bytes of all files: where even those would fit, nothing is asked
    by the plan     else the sizes of what is planned are asked for, many at a time, and added up
    it fits         no shard judges again, nor a retry, which would count against itself what it has staged
    it does not     the smallest contents come, as many as fit; of those of one size, which ones is left to
                    chance. The others fail, each with its name, and keep nobody else from being backed up
    a retry         fails the same ones, unless there is more room, or another run was committed meanwhile:
                    then it is judged anew, by sizes asked for again if need be

The sums are kept for cells of contents: the same size, and the same lot, a hash of their md5. There are never
more than a few thousand cells. While that is enough each content has its own; beyond it sizes and lots are
told apart less finely, so that memory is bounded, and the judgement too, which shards and retries look up.

Counted are content to pull and to copy, in whole blocks, and inodes; and what is written beside it: records,
indexes, history. Not so what is staged, the beginnings that earlier tries left, what is to be adopted, what
another run has brought since the plan was made, and the bytes of copies that share the blocks of their
original.

What this does not give: the room is not kept free. Other runs and other programs may take it, a user's quota
may end before the disk does, and files that grow on the provider need more. Where not even records can be
written, the run fails, with the words of :mod:`.disk`. Versions are hard links and need no room; where links
do not work, their copies are not counted. Neither are new directories. On a filesystem that compresses, a
file may fail that would have fitted.

Source: statvfs(3).
"""

from __future__ import annotations

import logging
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_mdbackup.scheme.backup.concurrent_runs import CommittedByOthers, ContentOfOthers
from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem
from airflow_mdbackup.scheme.common.bloom import BloomFilter
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.files.content import shares_blocks
from airflow_mdbackup.scheme.files.disk import NO_LIMIT, Space, free_space
from airflow_mdbackup.scheme.files.jsonl import read_header, read_records, write_state
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stated

log = logging.getLogger(__name__)

_RESERVE = 64 << 20
_RESERVED_FILES = 100
_BLOCK = 4096  # not what statvfs tells, which on NFS is the size of a transfer
_BESIDE = 1024  # of each file: its inode, and its lines in results, archive records and history
_TOLD = 256  # of that: what is written of a file even if it fails, beside its path
_MOST_CELLS = 4096
_LOT_BITS = 32
_LEAST_DIGITS = 3  # to which sizes are told apart in any case, in binary

_Cell = tuple[int, int]  # blocks, and lot


@dataclass(frozen=True, slots=True)
class SkippedForSpace:
    """The contents for which a run has no room. It is false if there are none, as is usual.

    :ivar cells: those that are left out; true where inodes are lacking, false where bytes are.
    :ivar bits: how finely cells are told apart.
    :ivar salt: makes lots others in each plan, so that nobody can choose a file's md5 by its lot.
    :ivar copies_are_free: whether copies share the blocks of their original.
    """

    cells: Mapping[_Cell, bool] = field(default_factory=dict)
    bits: int = _LOT_BITS
    salt: str = ""
    copies_are_free: bool = False

    def __bool__(self) -> bool:
        return bool(self.cells)

    def why(self, md5: bytes, size: int, *, is_copy: bool = False) -> str | None:
        """Return why a file with this content may not come, and what to do; None if it may.

        :param size: bytes.
        :param is_copy: whether the content is on the disk already.
        """
        if not self.cells:
            return None
        blocks = 0 if is_copy and self.copies_are_free else _blocks(size)
        inodes_lack = self.cells.get(_coarse(blocks, _lot(md5, self.salt), self.bits))
        if inodes_lack is None:
            return None
        lack = "no inodes are free for it" if inodes_lack else f"there is no room for its {format_size(size)}"
        return f"{lack}: free some, enlarge the disk, or exclude it; what fits is backed up"


def judge_room(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: CommittedByOthers,
    connect: Callable[[], Reader],
    max_file_size: int | None = None,
) -> SkippedForSpace:
    """Judge what of the plan fits on the disk, before anything is transferred.

    :param committed: see :func:`.backup.concurrent_runs.committed_since`.
    :param connect: gives a reader, the same one each time; only called if sizes must be asked for.
    :param max_file_size: bytes; what is larger does not come, and needs no room.
    :return: what has to be left out, so that all else fits.
    :raises ConnectionLost: the connection broke while sizes were asked for.
    :raises DestinationBusy: another shard takes too long to judge.
    """
    if sum(plan.shards) == plan.adopt:
        return SkippedForSpace()
    with run.space_lock(mirror.provider):
        judged = _judgement(mirror, run, plan, committed, connect, max_file_size)
    left_out = SkippedForSpace(
        {(blocks, lot): inodes_lack for blocks, lot, inodes_lack in judged["cells"]},
        *(judged["bits"], plan.digest, judged["copies_are_free"]),
    )
    if left_out:
        log.warning(
            "%s: %s on %s lacks room, or inodes, for %s of what is new (files: %s). These fail, and what fits"
            " is backed up",
            *(mirror.provider, mirror.dest, socket.gethostname()),
            *(format_size(judged["left_size"]), f"{judged['left_files']:,}"),
        )
    return left_out


def _judgement(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: CommittedByOthers,
    connect: Callable[[], Reader],
    max_file_size: int | None,
) -> dict[str, Any]:
    """Return the run's judgement of the plan, which is made now unless an earlier one still holds."""
    judged = read_header(run.space) if run.space.exists() else {}
    is_known = judged.get("plan") == plan.digest and "cells" in judged
    if is_known and not judged["cells"]:
        return judged
    has = free_space(mirror.staging)
    if is_known and judged["committed"] == mirror.last_commit() and judged["max_file_size"] == max_file_size:
        if Space(*judged["free"]).holds(has):
            return judged
        if has.holds(Space(judged["size"], judged["files"])):
            judged["cells"] = []
            write_state(run.space, judged)
            return judged
    needed = _needed(mirror, run, plan, committed, has, connect, max_file_size)
    judged = {"plan": plan.digest, "committed": committed.stamp, "max_file_size": max_file_size, "free": has}
    judged |= needed.judged(has)
    write_state(run.space, judged)
    return judged


def room_left(mirror: Mirror) -> int:
    """Return how many bytes a file may have of whose size its server told nothing, or too little."""
    return max(free_space(mirror.staging).size - _RESERVE, 0)


@dataclass(slots=True)
class _Needed:
    """What a run needs.

    :ivar salt: see :class:`SkippedForSpace`, also for ``bits`` and ``copies_are_free``.
    :ivar size: bytes that are needed whatever comes; ``files``: inodes.
    :ivar cells: what the files of a cell need beyond that.
    """

    salt: str
    size: int = 0
    files: int = 0
    copies_are_free: bool = False
    bits: int = _LOT_BITS
    cells: dict[_Cell, Space] = field(default_factory=dict)

    def add(self, md5: bytes, size: int, lacking: int) -> None:
        """Count a file in, of whose bytes some are lacking."""
        self.size += _TOLD
        cell = _coarse(_blocks(size), _lot(md5, self.salt), self.bits)
        self._add(cell, Space(_blocks(lacking) * _BLOCK + _BESIDE - _TOLD, 1))
        while len(self.cells) > _MOST_CELLS:
            finer, self.cells = self.cells, {}
            self.bits -= 1
            for (blocks, lot), need in finer.items():
                self._add(_coarse(blocks, lot, self.bits), need)

    def _add(self, cell: _Cell, need: Space) -> None:
        so_far = self.cells.get(cell, Space(0, 0))
        self.cells[cell] = Space(so_far.size + need.size, so_far.files + need.files)

    def room(self) -> Space:
        """Return what all of it needs."""
        size = self.size + sum(need.size for need in self.cells.values())
        return Space(min(size, NO_LIMIT), self.files + sum(need.files for need in self.cells.values()))

    def judged(self, has: Space) -> dict[str, Any]:
        """Return what is needed, and which cells are left out to make the others fit."""
        size, files, cells = self.size, self.files, []
        left_size = left_files = 0
        for (blocks, lot), need in sorted(self.cells.items()):
            is_too_large, are_too_many = size + need.size > has.size, files + need.files > has.files
            if is_too_large or are_too_many:
                cells.append((blocks, lot, not is_too_large))
                left_size, left_files = left_size + need.size, left_files + need.files
            else:
                size, files = size + need.size, files + need.files
        return {
            **self.room()._asdict(),
            **{"cells": cells, "bits": self.bits, "copies_are_free": self.copies_are_free},
            **{"left_size": min(left_size, NO_LIMIT), "left_files": left_files},
        }


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _lot(md5: bytes, salt: str) -> int:
    return zlib.crc32(salt.encode() + md5)


def _coarse(blocks: int, lot: int, bits: int) -> _Cell:
    """Return the cell of a content, or of a finer cell."""
    of_blocks = max(blocks.bit_length() - bits - _LEAST_DIGITS, 0)
    of_lot = _LOT_BITS - bits
    return blocks >> of_blocks << of_blocks, lot >> of_lot << of_lot


def _needed(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: CommittedByOthers,
    has: Space,
    connect: Callable[[], Reader],
    max_file_size: int | None,
) -> _Needed:
    """Return how much room the run needs, or the most that it can need if that is free."""
    beside = _RESERVE + 2 * run.index.stat().st_size  # consumer index and its copy, each beside the old one
    files = sum(plan.shards) - plan.adopt
    told = read_header(run.state)["index"]["size"]
    if told is not None:
        most = Space(told + files * (_BLOCK + _BESIDE) + beside, files + _RESERVED_FILES)
        if has.holds(most):
            return _Needed(plan.digest, *most)
    needed = _asked(mirror, run, plan, committed, connect, max_file_size)
    needed.size += beside
    needed.files += _RESERVED_FILES
    log.info("%s: this run needs %s, and %s are free", mirror.provider, needed.room(), has)
    return needed


def _asked(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: CommittedByOthers,
    connect: Callable[[], Reader],
    max_file_size: int | None,
) -> _Needed:
    """Return what the files take that the plan brings, by the sizes that the provider tells.

    What it refuses to tell counts as empty: pulling it will be refused too.
    """
    needed = _Needed(plan.digest, copies_are_free=shares_blocks(mirror.staging))
    seen = BloomFilter(sum(plan.shards))
    asked = 0
    reader: Reader | None = None
    pace = ReportTimer()
    with mirror.open_staging() as staging:

        def take(answers: list[Fetched | Stated]) -> None:
            for answer in answers:
                assert isinstance(answer, Stated)
                size = (answer.attributes.size or 0) if answer.attributes is not None else 0
                if max_file_size is None or size <= max_file_size:
                    md5, is_copy = answer.key
                    needed.add(md5, size, size if is_copy else staging.lacks(md5, size))
                else:
                    needed.size += _TOLD

        for item in _items(run, plan, committed):
            if item.adopt:
                continue
            # What is staged, or has partly come, goes to the first of equal files; the others are copies.
            is_copy = seen.seen_before(item.md5)
            if not is_copy and staging.has(item.md5):
                continue
            if (is_copy or item.source) and needed.copies_are_free:
                needed.add(item.md5, 0, 0)
                continue
            reader = reader or connect()
            while not reader.room:
                take(reader.wait())
            reader.submit_stat(item.path, (item.md5, is_copy))
            asked += 1
            if pace.due():
                log.info("%s sizes asked for so far", f"{asked:,}")
        while reader is not None and reader.busy:
            take(reader.wait())
    return needed


def _items(run: Run, plan: Plan, committed: CommittedByOthers) -> Iterator[PlanItem]:
    """Yield the items of all shards, but for those that another run has brought."""
    for shard in range(len(plan.shards)):
        brought = ContentOfOthers(committed)
        yield from (item for item in read_records(run.pulls(shard), PlanItem) if not brought.has(item))
