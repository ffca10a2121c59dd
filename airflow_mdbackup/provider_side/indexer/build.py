"""Walk -> cache or crew -> output."""

import collections
import os
import zlib
from typing import Deque, Dict, Union

from airflow_mdbackup.provider_side.indexer.batch import BATCH_FILES, BATCH_LINES, Batch, Big
from airflow_mdbackup.provider_side.indexer.cache import (
    DEVICE_BYTES,
    SOUND,
    STATUS,
    VALUE_BYTES,
    WRITEBACK_NS,
    YOUNG,
    open_cache,
    path_of,
    status_of,
)
from airflow_mdbackup.provider_side.indexer.common import SLASH, time_ns
from airflow_mdbackup.provider_side.indexer.crew import Crew
from airflow_mdbackup.provider_side.indexer.exclude import Excluded
from airflow_mdbackup.provider_side.indexer.lines import index_line
from airflow_mdbackup.provider_side.indexer.output import Output
from airflow_mdbackup.provider_side.indexer.place import Place
from airflow_mdbackup.provider_side.indexer.report import Report
from airflow_mdbackup.provider_side.indexer.request import Request
from airflow_mdbackup.provider_side.indexer.walk import Level, Walk
from airflow_mdbackup.provider_side.indexer.watch import Watch

MAX_CRC = 1 << 32
MAX_WAITING_LINES = 20000  # complete, but behind lines that are not


class Builder:
    """Builds one index."""

    def __init__(self, request: Request, root: int, place: Place, report: Report) -> None:
        self._nice = request.nice
        self._place = place
        self._report = report
        self._excluded = Excluded(request.exclude)
        self._started = time_ns()
        self._cache = cache = open_cache(place, report)
        self._crew = Crew(request, root, self._started - cache.ended if cache else 0)
        report.bytes_in_progress = self._crew.bytes_in_progress
        visit = self._add_files_unhashed if cache is None else self._add_files
        self._walk = Walk(request, root, place, report, self._excluded, visit)
        # Records of rotten files by path. Those that this build does not hash are kept for the next one.
        self._rotten: Dict[bytes, bytes] = dict(cache.rotten) if cache else {}
        self._rotten_being_hashed: Dict[bytes, bytes] = {}
        self._batch = Batch()
        self._waiting: Deque[Batch] = collections.deque()  # in order; behind one that has gaps
        self._waiting_lines = 0
        # The files whose paths have one of these CRC-32 values are hashed again.
        self._due_from = cache.position if cache else 0
        self._due = rehash_share(request.rehash)

    def build(self, watch: Watch) -> None:
        """Build the index and put it in place of the old one; if that fails, the old one is unchanged."""
        if self._nice:
            os.nice(self._nice)
        self._output = output = Output(self._place, self._report, self._started // 10**9)
        try:
            if self._cache is None:
                self._crew.start()  # while this process, which they copy, is small
            self._walk.run()
            self._close_batch()
            while self._waiting or self._crew.busy:
                self._pump(1.0)
            output.finish()
            watch.end()
            position = (self._due_from + self._due) % MAX_CRC
            output.put_in_place(position, b"".join(self._rotten[path] for path in sorted(self._rotten)))
        finally:
            watch.end()
            self._crew.end()
            output.discard()

    # The files of a directory: the hot loops.

    def _add_files_unhashed(self, level: Level) -> bytes:
        """Without a cache: have each file hashed, up to the next directory, whose name is returned."""
        folder, subdirectory = level.path, b""
        excluded = self._excluded.has if self._excluded else None
        files = []
        for name in level.names:
            if name[-1] == SLASH:
                subdirectory = name
                break
            if excluded is None or not excluded(folder + name):
                files.append(name)
        for start in range(0, len(files), BATCH_FILES):
            some = files[start : start + BATCH_FILES]
            self._batch.add_gaps(folder, some, [b""] * len(some))
            if len(self._batch.gaps) >= BATCH_FILES:
                self._close_batch()
        return subdirectory

    def _add_files(self, level: Level) -> bytes:
        """Take from the cache what it knows, and have the rest hashed, up to the next directory."""
        assert self._cache is not None
        folder, escape, batch = level.path, level.escape, self._batch
        excluded = self._excluded.has if self._excluded else None
        take, lstat, due = self._cache.take, os.lstat, self._due
        for name in level.names:
            if name[-1] == SLASH:
                return name
            path = folder + name
            if excluded is not None and excluded(path):
                continue
            try:
                found = lstat(name)
            except OSError as error:
                self._walk.refuse(path, error)
                continue
            status = status_of(found)
            key = status + path + b"\0"
            value = take(key)
            # A file is not hashed again if its status is unchanged, it was not young then, and it is not due.
            if (
                value is not None
                and (value[0] == SOUND or self._has_matured(value, found))
                and not (due and self._is_due(path))
            ):
                line = index_line(value[1:], path) if escape else value[1:] + b"  " + path + b"\n"
                batch.lines.append(line)
                batch.records.append(key + value)
                batch.size += found.st_size
                if len(batch.lines) >= BATCH_LINES:
                    batch = self._close_batch()
                continue
            known = status + value if value is not None else self._known_before(path, key)
            if path in self._rotten:
                self._rotten_being_hashed[path] = self._rotten.pop(path)
            batch.add_gaps(folder, [name], [known])
            if len(batch.gaps) >= BATCH_FILES:
                batch = self._close_batch()
        return b""

    def _has_matured(self, value: bytes, found: os.stat_result) -> bool:
        """Whether a file that was young when it was hashed has not been modified for a minute by now."""
        modified = max(found.st_mtime_ns, found.st_ctime_ns)
        return value[0] == YOUNG and self._started - WRITEBACK_NS < modified < self._started

    def _is_due(self, path: bytes) -> bool:
        return (zlib.crc32(path) - self._due_from) % MAX_CRC < self._due

    def _known_before(self, path: bytes, key: bytes) -> bytes:
        """Return status, trust and md5 of a file of which the cache has no record that begins with `key`."""
        assert self._cache is not None
        value = self._cache.value_on_other_device(key)
        record = self._rotten.get(path)
        before_device = STATUS.size - DEVICE_BYTES
        if not value and record is not None and record[:before_device] == key[:before_device]:
            value = record[-VALUE_BYTES:]
        return key[: STATUS.size] + value if value else b""

    # From batches to lines.

    def _close_batch(self) -> Batch:
        """Pass on the current batch, and begin the next."""
        batch = self._batch
        self._batch = Batch()
        if not batch.lines:
            return self._batch
        self._report.files += len(batch.lines) - len(batch.gaps)
        self._report.bytes += batch.size
        if batch.gaps:
            self._crew.start()
            self._crew.batches.append(batch)
        self._waiting.append(batch)
        batch.length = len(batch.lines)
        self._waiting_lines += batch.length
        self._write_complete()
        if self._waiting:
            self._pump(0)
            while self._waiting_lines > MAX_WAITING_LINES or not self._crew.has_room:
                self._pump(1.0)
        return self._batch

    def _pump(self, seconds: float) -> None:
        """Keep the workers busy for at most so long, and use their answers."""
        for work, answer in self._crew.pump(seconds):
            report = self._report
            report.files += answer.hashed
            report.hashed += answer.hashed
            report.bytes += answer.size
            for path, reason in answer.refused:
                if path in self._rotten_being_hashed:
                    self._rotten[path] = self._rotten_being_hashed[path]
                if not self._excluded.has(path):
                    report.add_unreadable(path, reason)
            for record in answer.rotten:
                report.add_rotten(path_of(record))
                self._rotten[path_of(record)] = record
            if isinstance(work, Big):
                work.line = answer.lines[0]
                work.record = answer.records[0] or work.record
            else:
                work.fill(answer)
                self._crew.big.extend(big for _, big in work.big)
        self._write_complete()

    def _write_complete(self) -> None:
        """Write the batches up to the first one that has gaps."""
        while self._waiting and not self._waiting[0].gaps:
            batch = self._waiting.popleft()
            self._waiting_lines -= batch.length
            self._output.write(batch)


def rehash_share(rehash: Union[str, float]) -> int:
    """Return for how many CRC-32 values of a path its file is hashed even if it is unchanged."""
    if rehash == "changed":
        return 0
    if rehash == "all":
        return MAX_CRC
    return min(MAX_CRC, int(float(rehash) * MAX_CRC / 100) + 1)
