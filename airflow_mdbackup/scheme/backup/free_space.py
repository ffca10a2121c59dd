"""Decides which files of a run fit on the disk, before its first byte arrives, once for all its shards.

::

    by the index    its end line states the total size: if even that fits, no sizes are requested
    by the plan     otherwise request the sizes of what is planned, many at a time, and add them up
    it fits         no shard decides again, nor a retry, which would count its own staged files against itself
    it does not     the smallest contents are pulled, as many as fit; among those of one size, chance decides.
                    The others fail, each by name, and do not keep anything else from being backed up
    a retry         fails the same ones, unless there is more room, or another run was committed meanwhile:
                    then decide again, with new sizes if necessary

Sizes are added up by cell. A cell is a size together with a bucket, which is a hash of the md5. There are
never more than a few thousand cells. As long as that suffices each content has its own; beyond that, sizes
and buckets become coarser. So memory is bounded, and so is the recorded decision, which shards and retries
use.

What counts: content to pull and to copy, in whole blocks, and inodes; also records, indexes and history. What
does not: staged files, parts that earlier tries left, what is to be adopted, what another run has committed
since the plan was made, and the bytes of copies that share the blocks of their original.

Limitations: the room is not reserved. Other runs and programs may take it, a user's quota may end before the
disk does, and files that grow on the provider need more. If not even records can be written, the run fails,
with a message from :mod:`.disk`. Versions are hard links and need no room; if links do not work, their copies
are not counted. Nor are new directories. On a compressing file system, a file may fail that would have fit.

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
from airflow_mdbackup.scheme.store.staging import Staging
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stated

log = logging.getLogger(__name__)

_RESERVE = 64 << 20  # bytes to keep free for records
_RESERVED_FILES = 100
_BLOCK = 4096  # not the value of statvfs, which on NFS is the size of a transfer
_OVERHEAD = 1024  # bytes per file: its inode, and its lines in results, archive records and history
_FAILED_OVERHEAD = 256  # of that: what is written for a file even if it fails, besides its path
_MAX_CELLS = 4096
_BUCKET_BITS = 32
_MIN_DIGITS = 3  # significant binary digits of a size that are always kept

_Cell = tuple[int, int]  # blocks, bucket


@dataclass(frozen=True, slots=True)
class SkippedForSpace:
    """The contents for which there is no room. False if there are none, as usual.

    :ivar cells: the skipped cells; True if inodes are lacking, False if bytes are.
    :ivar bits: how fine cells are.
    :ivar salt: changes the buckets with each plan, so that nobody can choose a file's md5 by its bucket.
    :ivar copies_are_free: whether copies share the blocks of their original.
    """

    cells: Mapping[_Cell, bool] = field(default_factory=dict)
    bits: int = _BUCKET_BITS
    salt: str = ""
    copies_are_free: bool = False

    def __bool__(self) -> bool:
        return bool(self.cells)

    def why(self, md5: bytes, size: int, *, is_copy: bool = False) -> str | None:
        """Return why a file with this content is skipped, and what to do; None if it is not.

        :param size: bytes.
        :param is_copy: whether the content is already on the disk.
        """
        if not self.cells:
            return None
        blocks = 0 if is_copy and self.copies_are_free else _blocks(size)
        inodes_lack = self.cells.get(_cell(blocks, _bucket(md5, self.salt), self.bits))
        if inodes_lack is None:
            return None
        lack = "no inodes are free for it" if inodes_lack else f"there is no room for its {format_size(size)}"
        return f"{lack}: free some, enlarge the disk, or exclude it; what fits is backed up"


def check_free_space(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: CommittedByOthers,
    connect: Callable[[], Reader],
    max_file_size: int | None = None,
) -> SkippedForSpace:
    """Decide what of the plan fits on the disk, before anything is transferred.

    :param committed: see :func:`.concurrent_runs.committed_since`.
    :param connect: returns a reader, the same one each time; only called if sizes must be requested.
    :param max_file_size: bytes; larger files are not pulled, and need no room.
    :return: what has to be skipped, so that all else fits.
    :raises ConnectionLost: the connection broke while sizes were requested.
    :raises DestinationBusy: another shard takes too long to decide.
    """
    if sum(plan.shards) == plan.adopt:
        return SkippedForSpace()
    with run.space_lock(mirror.provider):
        decision = _Check(mirror, run, plan, committed, connect, max_file_size).decision()
    skipped = SkippedForSpace(
        {(blocks, bucket): inodes_lack for blocks, bucket, inodes_lack in decision["cells"]},
        *(decision["bits"], plan.digest, decision["copies_are_free"]),
    )
    if skipped:
        log.warning(
            "%s: %s on %s lacks room, or inodes, for %s of what is new (files: %s). These fail, and what fits"
            " is backed up",
            *(mirror.provider, mirror.dest, socket.gethostname()),
            *(format_size(decision["left_size"]), f"{decision['left_files']:,}"),
        )
    return skipped


def room_left(mirror: Mirror) -> int:
    """Return how many bytes a file may have whose stated size is missing, or too small."""
    return max(free_space(mirror.staging).size - _RESERVE, 0)


@dataclass(slots=True)
class _Needed:
    """What a run needs. For ``salt``, ``bits`` and ``copies_are_free`` see :class:`SkippedForSpace`.

    :ivar size: bytes that are needed even if all files are skipped; ``files``: inodes.
    :ivar cells: what the files of each cell need in addition.
    """

    salt: str
    size: int = 0
    files: int = 0
    copies_are_free: bool = False
    bits: int = _BUCKET_BITS
    cells: dict[_Cell, Space] = field(default_factory=dict)

    def add(self, md5: bytes, size: int, lacking: int) -> None:
        """Add a file, of which ``lacking`` bytes are not on the disk yet."""
        self.size += _FAILED_OVERHEAD
        cell = _cell(_blocks(size), _bucket(md5, self.salt), self.bits)
        self._add(cell, Space(_blocks(lacking) * _BLOCK + _OVERHEAD - _FAILED_OVERHEAD, 1))
        while len(self.cells) > _MAX_CELLS:
            finer, self.cells = self.cells, {}
            self.bits -= 1
            for (blocks, bucket), need in finer.items():
                self._add(_cell(blocks, bucket, self.bits), need)

    def _add(self, cell: _Cell, need: Space) -> None:
        so_far = self.cells.get(cell, Space(0, 0))
        self.cells[cell] = Space(so_far.size + need.size, so_far.files + need.files)

    def total(self) -> Space:
        """Return what everything needs."""
        size = self.size + sum(need.size for need in self.cells.values())
        return Space(min(size, NO_LIMIT), self.files + sum(need.files for need in self.cells.values()))

    def decide(self, has: Space) -> dict[str, Any]:
        """Return what is needed, and which cells are skipped so that the others fit."""
        size, files, cells = self.size, self.files, []
        left_size = left_files = 0
        for (blocks, bucket), need in sorted(self.cells.items()):
            is_too_large, are_too_many = size + need.size > has.size, files + need.files > has.files
            if is_too_large or are_too_many:
                cells.append((blocks, bucket, not is_too_large))
                left_size, left_files = left_size + need.size, left_files + need.files
            else:
                size, files = size + need.size, files + need.files
        return {
            **self.total()._asdict(),
            **{"cells": cells, "bits": self.bits, "copies_are_free": self.copies_are_free},
            **{"left_size": min(left_size, NO_LIMIT), "left_files": left_files},
        }


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _bucket(md5: bytes, salt: str) -> int:
    return zlib.crc32(salt.encode() + md5)


def _cell(blocks: int, bucket: int, bits: int) -> _Cell:
    """Return the cell of a content, or of a finer cell: both numbers with their low bits cleared."""
    of_blocks = max(blocks.bit_length() - bits - _MIN_DIGITS, 0)
    of_bucket = _BUCKET_BITS - bits
    return blocks >> of_blocks << of_blocks, bucket >> of_bucket << of_bucket


@dataclass(frozen=True, slots=True)
class _Check:
    """One decision; for the attributes see :func:`check_free_space`."""

    mirror: Mirror
    run: Run
    plan: Plan
    committed: CommittedByOthers
    connect: Callable[[], Reader]
    max_file_size: int | None

    def decision(self) -> dict[str, Any]:
        """Return the run's recorded decision if it is still valid, else make and record a new one."""
        mirror, run, plan = self.mirror, self.run, self.plan
        known = read_header(run.space) if run.space.exists() else {}
        is_known = known.get("plan") == plan.digest and "cells" in known
        if is_known and not known["cells"]:
            return known
        has = free_space(mirror.staging)
        is_current = is_known and known["committed"] == mirror.last_commit()
        if is_current and known["max_file_size"] == self.max_file_size:
            if Space(*known["free"]).holds(has):
                return known
            if has.holds(Space(known["size"], known["files"])):
                known["cells"] = []
                write_state(run.space, known)
                return known
        decision = {
            **{"plan": plan.digest, "committed": self.committed.stamp},
            **{"max_file_size": self.max_file_size, "free": has},
            **self._needed(has).decide(has),
        }
        write_state(run.space, decision)
        return decision

    def _needed(self, has: Space) -> _Needed:
        """Return how much room the run needs, or an upper bound if that is free."""
        beside = _RESERVE + 2 * self.run.index.stat().st_size  # consumer index and its copy, old and new
        files = sum(self.plan.shards) - self.plan.adopt
        stated = read_header(self.run.state)["index"]["size"]
        if stated is not None:
            most = Space(stated + files * (_BLOCK + _OVERHEAD) + beside, files + _RESERVED_FILES)
            if has.holds(most):
                return _Needed(self.plan.digest, *most)
        needed = self._add_up()
        needed.size += beside
        needed.files += _RESERVED_FILES
        log.info("%s: this run needs %s, and %s are free", self.mirror.provider, needed.total(), has)
        return needed

    def _add_up(self) -> _Needed:
        """Return what the files of the plan need, by the sizes that the provider states.

        A file whose size it refuses counts as empty: it will refuse its content too.
        """
        needed = _Needed(self.plan.digest, copies_are_free=shares_blocks(self.mirror.staging))
        seen = BloomFilter(sum(self.plan.shards))
        requested = 0
        reader: Reader | None = None
        timer = ReportTimer()
        with self.mirror.open_staging() as staging:
            for item in self._items():
                # The first of equal files uses what is staged, or partly received; the others are copies.
                is_copy = seen.seen_before(item.md5)
                if not is_copy and staging.has(item.md5):
                    continue
                if (is_copy or item.source) and needed.copies_are_free:
                    needed.add(item.md5, 0, 0)
                    continue
                reader = reader or self.connect()
                while not reader.room:
                    self._add(needed, staging, reader.wait())
                reader.submit_stat(item.path, (item.md5, is_copy))
                requested += 1
                if timer.due():
                    log.info("%s sizes requested so far", f"{requested:,}")
            while reader is not None and reader.busy:
                self._add(needed, staging, reader.wait())
        return needed

    def _add(self, needed: _Needed, staging: Staging, answers: list[Fetched | Stated]) -> None:
        for answer in answers:
            assert isinstance(answer, Stated)
            size = (answer.attributes.size or 0) if answer.attributes is not None else 0
            if self.max_file_size is None or size <= self.max_file_size:
                md5, is_copy = answer.key
                needed.add(md5, size, size if is_copy else staging.lacks(md5, size))
            else:
                needed.size += _FAILED_OVERHEAD

    def _items(self) -> Iterator[PlanItem]:
        """Yield the items of all shards to pull or copy that no other run has committed."""
        for shard in range(len(self.plan.shards)):
            others = ContentOfOthers(self.committed)
            for item in read_records(self.run.pulls(shard), PlanItem):
                if not others.has(item) and not item.adopt:
                    yield item
