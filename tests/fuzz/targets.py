"""What the fuzzers feed: the reader of a received index, and the parser of a server's packets.

Each target takes any bytes. It passes when they are read, or refused as they should be, and fails by any
other error, by a turn too many, or by a result that is not what it must be.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from airflow_mdbackup.scheme.common.paths import from_text, to_text
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.index.canonical import (
    MalformedIndex,
    Remark,
    check_path,
    read_entries,
    read_remarks,
)
from airflow_mdbackup.scheme.index.received import canonicalise
from airflow_mdbackup.scheme.transfer import sftp, sftp_handshake
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted

CORPUS = Path(__file__).parent / "corpus"


def read_index(data: bytes) -> bool:
    """Read ``data`` as a received index. What is accepted must be canonical, and the same when read again.

    :return: whether it was accepted.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        received, first, second = (Path(folder, name) for name in ("received", "first", "second"))
        received.write_bytes(data)
        try:
            summary = canonicalise(received, first, name="srv1: index /i", chunk=3)
        except MalformedIndex as error:
            assert str(error).isprintable()
            return False
        paths = [entry.path for entry in read_entries(first)]
        assert paths == sorted(set(paths)) and len(paths) == summary.files
        for path in paths:
            check_path(path)
            assert from_text(to_text(path)) == path and to_text(path).isprintable()
        directories = {path[:at] for path in paths for at in range(len(path)) if path[at] == 0x2F}
        assert directories.isdisjoint(paths)
        for remark in Remark:
            remarked = list(read_remarks(first, remark))
            assert remarked == sorted(set(remarked))
        again = canonicalise(first, second, name="srv1: index /i", chunk=3)
        assert first.read_bytes() == second.read_bytes()
        assert (again.files, again.size, again.started) == (summary.files, summary.size, summary.started)
        return True


class Replay:
    """A channel on which a server says what it says, whatever it is asked.

    :param data: bytes that one piece has at most, as one byte, and then all that the server sends. A packet
        begins a new piece, since what a server answers it has been asked before.
    :ivar turns: how often it was asked for more.
    :ivar sent: bytes of the requests.
    """

    def __init__(self, data: bytes) -> None:
        self._piece = (data[0] if data else 0) * 64 + 1
        self._data = data[1:]
        self._position = 0
        self._end = 0  # of the packet
        self.turns = 0
        self.sent = 0

    def sendall(self, data: bytes) -> None:
        self.sent += len(data)

    def recv(self, size: int) -> bytes:
        self.turns += 1
        if self._position >= self._end:
            length = int.from_bytes(self._data[self._position : self._position + 4], "big")
            self._end = self._position + 4 + length
        end = min(self._position + min(size, self._piece), self._end)
        piece = self._data[self._position : end]
        self._position += len(piece)
        if not piece:
            raise TimeoutError("timed out")
        return piece


# What is asked for: small and large files, with and without an md5 that fits, and attributes.
CONTENTS = {b"/small": b"small", b"/empty": b"", b"/large": bytes(range(251)) * 12}
WRONG = hashlib.md5(b"wrong").hexdigest().encode()


# A reader whose files, reads and window are small, so that all that it does fits into a few kilobytes.
SCALE = {"SMALL": 1024, "FIRST_READ": 256}
READ_SCALE = {"DEFAULT_READ": 256, "_MAX_READ": 512}
WINDOW = 4096


def ask(reader: Reader) -> None:
    """Ask for all that a recorded session asks for, in its order."""
    for path, content in CONTENTS.items():
        md5 = hashlib.md5(content).hexdigest().encode()
        for wanted in (md5, WRONG, None):
            reader.submit(Wanted(path, wanted, lambda _: Stream(len), content))
    reader.submit_stat(b"/small", b"")
    reader.submit(Wanted(b"/missing", None, lambda _: Stream(len), b""))


def read_packets(data: bytes) -> int:
    """Play ``data`` to a reader. Whatever it says of a file must be true of the bytes that came.

    :return: how many results there were before the connection was lost, or all of them.
    """
    channel = Replay(data)
    results = 0
    with patch.multiple(sftp, **SCALE), patch.multiple(sftp_handshake, **READ_SCALE):
        try:
            reader = Reader(channel, window=WINDOW)
            ask(reader)
            while reader.busy:
                for answer in reader.wait():
                    results += 1
                    if isinstance(answer, Fetched) and answer.content is not None and not answer.refusal:
                        assert len(answer.content) == answer.size
                        assert hashlib.md5(answer.content).hexdigest().encode() == answer.md5
        except ConnectionLost as error:
            assert str(error).isprintable()
    # Each time that it asks, it gets a byte or is told that the connection stalls.
    assert channel.turns <= len(data) + 1
    assert channel.sent <= 10_000 + 64 * len(data)
    return results


TARGETS: dict[str, Callable[[bytes], object]] = {"index": read_index, "sftp": read_packets}


def seeds(target: str) -> list[Path]:
    """Return the files of the corpus of a target."""
    return sorted((CORPUS / target).iterdir())
