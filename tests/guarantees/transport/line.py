"""A run that is pulled over lines that break, spoil what they carry, or never end.

Whatever happens on the line: nothing is staged but what has its md5, no other file suffers, a retry transfers
just the rest, and then everything is here.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from airflow_mdbackup.scheme.backup.pull import PullSummary, pull
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import PacketChannel
from tests.pair import Pair, ServerProcess
from tests.torture import scaled

# What is read as a large file, and in what portions: little, so that each byte of a run can be tried.
SMALL, FIRST, PORTION = 600, 200, 400
FILES = {"a": 10, "b": 150, "c": 500, "empty": 0, "large": 1500, "larger": 1900, "more/d": 230}


Wire = Callable[[Any], Any]


class Line:
    """A run that is planned, and pulled over one line after the other."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        for name, size in FILES.items():
            pair.put(name, random.Random(name).randbytes(size))
        pair.put("same", random.Random("a").randbytes(FILES["a"]))
        pair.build_index()
        self.run: Run = pair.new_run()
        pair.fetch(self.run)
        pair.plan = pair.diff(self.run)
        self.number = len(FILES) + 1

    def begin(self) -> None:
        """Forget all that was pulled."""
        for path in [*self.pair.mirror.staging.iterdir()]:
            path.unlink()
        self.run.results(0).unlink(missing_ok=True)

    def pull(self, wire: Wire, timeout: float = 20) -> PullSummary:
        server = ServerProcess(self.pair.user)
        server.channel.settimeout(timeout)
        try:
            return pull(self.pair.mirror, self.run, 0, lambda: Reader(wire(server.channel), window=1))
        finally:
            server.stop()

    def results(self) -> list[Result]:
        return list(read_records(self.run.results(0), Result))

    def check_staged(self) -> set[bytes]:
        """Make sure that what counts as staged has its md5, and that results tell of nothing else."""
        staged = {
            os.fsencode(path.name): path.read_bytes()
            for path in self.pair.mirror.staging.iterdir()
            if path.suffix != ".part"
        }
        for md5, content in staged.items():
            assert hashlib.md5(content).hexdigest().encode() == md5
        if self.run.results(0).exists():
            for result in self.results():
                if result.outcome in ("pulled", "copied"):
                    assert len(staged[result.md5]) == result.size
        return staged.keys() & set(self.pair.index_a().values())

    def missing(self) -> int:
        """Return how many bytes a retry may transfer."""
        here = self.check_staged()
        wanted = {md5: os.path.getsize(path) for path, md5 in self.pair.index_a().items()}
        begun = [path.stat().st_size for path in self.pair.mirror.staging.glob("*.part")]
        lacking = sum(size for md5, size in wanted.items() if md5 not in here)
        # The first portion of a file is asked for before it is known that its beginning is here.
        return lacking - sum(begun) + FIRST * len(begun)

    def retry(self, *, spoilt: bool = False) -> None:
        """Pull over a good line, which brings the rest.

        :param spoilt: beginnings may have wrong bytes, and then come a second time.
        """
        missing = self.missing() + (sum(FILES.values()) if spoilt else 0)
        summary = self.pull(lambda channel: channel)
        assert summary.outcomes.get("pulled", 0) + summary.outcomes.get("copied", 0) == self.number
        assert summary.transferred <= missing
        assert len(self.check_staged()) == len(set(self.pair.index_a().values()))

    def lost(self, wire: Wire, timeout: float = 20, *, spoilt: bool = False) -> str:
        """Pull over a line that breaks, from nothing, and again; return how it broke, or nothing if not."""
        self.begin()
        said = ""
        try:
            self.pull(wire, timeout)
        except ConnectionLost as error:
            said = str(error)
        self.retry(spoilt=spoilt)
        return said

    def not_brought(self, wire: Wire) -> list[Result]:
        """Pull over a line that spoils things, from nothing; return what did not come. A retry brings it."""
        self.begin()
        self.pull(wire)
        found = [result for result in self.results() if result.outcome not in ("pulled", "copied")]
        self.retry()
        return found

    def finish(self) -> None:
        """Commit, and make sure that B has what A has."""
        assert self.pair.finish(self.run).failed == 0
        assert self.pair.index_b() == self.pair.index_a()
        for name in [*FILES, "same"]:
            with open(self.pair.path(name), "rb") as file:
                assert self.pair.live(name).read_bytes() == file.read()


def replies(line: Line) -> list[bytes]:
    """Return each packet that the server sends in a pull over a good line."""
    found = []

    def noted(number: int, kind: int, whole: bytes) -> Iterator[bytes]:
        found.append(whole)
        yield whole

    line.begin()
    line.pull(lambda channel: PacketChannel(channel, noted))
    return found


def places(packets: list[bytes]) -> list[int]:
    """Return after which bytes to cut: each one, or those of the beginning and of each packet's ends."""
    total = sum(map(len, packets))
    ends = [0]
    for each in packets:
        ends.append(ends[-1] + len(each))
    near = {end + step for end in ends for step in (-1, 0, 1, 4)} | set(range(0, 300, 3))
    return scaled(sorted(near & set(range(total))), list(range(total)))


def id_of(whole: bytes) -> int:
    number: int = struct.unpack_from(">I", whole, 5)[0]
    return number
