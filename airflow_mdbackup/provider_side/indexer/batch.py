"""Neighbours in the index, some known from the cache, some still to be hashed."""

from typing import List, Tuple

from airflow_mdbackup.provider_side.indexer.cache import STATUS, VALUE_BYTES
from airflow_mdbackup.provider_side.indexer.hasher import Answer
from airflow_mdbackup.provider_side.indexer.lines import index_line

BATCH_FILES = 200  # to be hashed, or up to twice as many
BATCH_LINES = 2000


class Batch:
    """Lines and records in path order, with gaps for the files that are still to be hashed."""

    __slots__ = ("big", "folder", "gaps", "known", "length", "lines", "names", "records", "size")

    def __init__(self) -> None:
        self.lines: List[bytes] = []
        self.records: List[bytes] = []
        self.size = 0  # of the files that need not be hashed
        self.gaps: List[int] = []  # positions in `lines`
        self.names: List[bytes] = []  # as in a Job
        self.known: List[bytes] = []
        self.folder = b""
        self.big: List[Tuple[int, Big]] = []
        self.length = 0  # in lines, once it is complete

    def add_gaps(self, folder: bytes, names: List[bytes], known: List[bytes]) -> None:
        """Add files of a directory that are to be hashed."""
        if folder != self.folder:
            self.folder = folder
            self.names.append(folder)
        self.names += names
        self.known += known
        self.gaps += range(len(self.lines), len(self.lines) + len(names))
        self.lines += [b""] * len(names)
        self.records += [b""] * len(names)

    @property
    def joined(self) -> bool:
        """Whether there are only gaps, so that the answer replaces everything."""
        return len(self.gaps) == len(self.lines)

    def fill(self, answer: Answer) -> None:
        """Put an answer into the gaps."""
        if self.joined:
            self.lines, self.records = answer.lines, answer.records
        else:
            for gap, line, record in zip(self.gaps, answer.lines, answer.records):  # noqa: B905
                self.lines[gap] = line
                self.records[gap] = record
        for number, path, known in answer.big:
            big = Big(path, known)
            gap = self.gaps[number]
            self.lines[gap], self.records[gap] = big.line, big.record
            self.big.append((gap, big))
        self.big.sort(key=lambda item: item[0])
        self.gaps = []


class Big:
    """A big file, a job of its own. Placeholders for its line and record are overwritten afterwards."""

    __slots__ = ("known", "line", "line_at", "names", "path", "record", "record_at")
    joined = False

    def __init__(self, path: bytes, known: bytes) -> None:
        self.path = path
        folder, name = path.rsplit(b"/", 1)
        self.names = [folder + b"/", name]
        self.known = [known]
        self.line = index_line(b"0" * 32, path)
        self.record = bytes(STATUS.size) + path + b"\0" + bytes(VALUE_BYTES)
        self.line_at = self.record_at = 0
