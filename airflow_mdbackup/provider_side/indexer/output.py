"""The index and the next cache, in path order, renamed into place at the end."""

import contextlib
import os
from typing import Any, Iterator, List, Tuple

from airflow_mdbackup.provider_side.indexer.batch import Batch, Big
from airflow_mdbackup.provider_side.indexer.cache import cache_end, checksum
from airflow_mdbackup.provider_side.indexer.common import BLOCK_BYTES, reason_of, time_ns
from airflow_mdbackup.provider_side.indexer.lines import first_line, index_line, last_line, remark_line
from airflow_mdbackup.provider_side.indexer.place import Place
from airflow_mdbackup.provider_side.indexer.report import Report


class Output:
    """The index and the cache that are being written, under temporary names."""

    def __init__(self, place: Place, report: Report, started: int) -> None:
        self._place = place
        self._report = report
        suffix = b".%d.%d.tmp" % (os.getpid(), started)
        self._temporary_index = place.name_of(suffix)
        self._temporary_cache = place.name_of(b".cache" + suffix)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self._temporary_index, flags, 0o644, dir_fd=place.folder)
        os.fchmod(descriptor, 0o644)
        self._index = os.fdopen(descriptor, "wb", BLOCK_BYTES)
        self._index_bytes = self._index.write(first_line(started))
        self._cache: Any = None
        self._cache_bytes = 0
        with self._cache_may_fail():
            descriptor = os.open(self._temporary_cache, flags, 0o600, dir_fd=place.folder)
            self._cache = os.fdopen(descriptor, "wb", BLOCK_BYTES)
        self._big: List[Big] = []

    @contextlib.contextmanager
    def _cache_may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._cache = None
            self._report.note(
                f"the cache cannot be written, the next build hashes more than it must: {reason_of(error)}"
            )

    def write(self, batch: Batch) -> None:
        """Write the lines and records of a batch without gaps."""
        for position, big in batch.big:
            big.line_at = self._index_bytes + sum(map(len, batch.lines[:position]))
            big.record_at = self._cache_bytes + sum(map(len, batch.records[:position]))
            self._big.append(big)
        lines, records = b"".join(batch.lines), b"".join(batch.records)
        self._index.write(lines)
        self._index_bytes += len(lines)
        if self._cache is not None:
            with self._cache_may_fail():
                self._cache.write(records)
                self._cache_bytes += len(records)

    def finish(self) -> None:
        """Write the rest of the index and make it durable, still under its temporary name."""
        self._overwrite_placeholders()
        report = self._report
        for word, paths in ((b"unreadable", sorted(report.unreadable)), (b"rotten", sorted(report.rotten))):
            for path in paths:
                self._index.write(remark_line(word, path))
        self._index.write(last_line(report.files, len(report.unreadable), report.bytes))
        self._index.flush()
        os.fsync(self._index.fileno())

    def _overwrite_placeholders(self) -> None:
        """Write the lines of big files into their places, and close the gaps of those that have none."""
        self._index.flush()
        gaps = []
        for big in self._big:
            if big.line:
                os.pwrite(self._index.fileno(), big.line, big.line_at)
            else:
                gaps.append((big.line_at, len(index_line(b"0" * 32, big.path))))
        if gaps:
            close_gaps(self._index.fileno(), gaps, self._index_bytes)
            self._index.seek(0, os.SEEK_END)
        if self._cache is not None:
            with self._cache_may_fail():
                self._cache.flush()
                for big in self._big:
                    os.pwrite(self._cache.fileno(), big.record, big.record_at)

    def put_in_place(self, position: int, rotten: bytes) -> None:
        """Rename the index into place, and then the cache, which ends with the records of rotten files."""
        self._place.rename(self._temporary_index)
        self._index.close()
        if self._cache is not None:
            with self._cache_may_fail():
                self._cache.write(rotten)
                self._cache.flush()
                crc = checksum(self._cache.fileno(), self._cache_bytes + len(rotten))
                self._cache.write(cache_end(time_ns(), position, len(rotten), crc))
                self._cache.flush()
                os.fsync(self._cache.fileno())
                self._place.rename(self._temporary_cache, "cache")
                self._cache.close()

    def discard(self) -> None:
        """Remove what has not been renamed."""
        self._place.remove(self._temporary_index)
        self._place.remove(self._temporary_cache)


def close_gaps(descriptor: int, gaps: List[Tuple[int, int]], length: int) -> None:
    """Move a file's content together over gaps (offset, bytes; ascending), and shorten it."""
    to = gaps[0][0]
    for (offset, size), (following, _) in zip(gaps, [*gaps[1:], (length, 0)]):  # noqa: B905
        at = offset + size
        while at < following:
            data = os.pread(descriptor, min(BLOCK_BYTES, following - at), at)
            os.pwrite(descriptor, data, to)
            at += len(data)
            to += len(data)
    os.ftruncate(descriptor, to)
