"""A run to have trouble with a disk at any of its steps."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from airflow_mdbackup.scheme.backup.pull import pull
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of
from tests.pair import Pair

STEPS = ("fetch", "diff", "pull", "archive", "commit")


@contextmanager
def pair_at(folder: Path) -> Iterator[Pair]:
    folder.mkdir(exist_ok=True)
    pair = Pair(folder)
    try:
        yield pair
    finally:
        for server in pair.servers:
            server.stop()


class Scene:
    """A run with every kind of entry, on a backup that is there already."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        for name in ("changed", "large", "twin", "dir/file", "moved", "gone", "same"):
            pair.put(name, name.encode() * 3000)
        pair.backup()
        self.before = contents_of(pair)
        pair.put("changed", b"new " * 5000)
        pair.put("large", os.urandom(300_000))
        pair.put("twin", b"twin" * 2000)
        pair.put("twin2", b"twin" * 2000)
        shutil.rmtree(pair.a / "dir")
        pair.put("dir", b"a file now " * 1000)
        os.rename(pair.path("moved"), pair.path("moved2"))
        os.unlink(pair.path("gone"))
        pair.build_index()
        self.run = pair.new_run()

    def act(self, step: str) -> None:
        pair, run = self.pair, self.run
        if step == "fetch":
            pair.fetch(run)
        elif step == "diff":
            pair.diff(run)
        elif step == "pull":
            pull(pair.mirror, run, 0, pair.connect)
        elif step == "archive":
            pair.archive(run)
        elif not pair.commit(run).superseded:
            # What could not be pulled fails the run, as the operator of this step has it.
            pair.outcome.raise_for_failures("srv1")

    def forward(self, before: str) -> None:
        for step in STEPS[: STEPS.index(before)]:
            self.act(step)

    def rest(self, after: str) -> None:
        for step in STEPS[STEPS.index(after) :]:
            self.act(step)

    def check(self) -> None:
        """Nothing was lost, and nothing that is not there is claimed."""
        assert self.before <= contents_of(self.pair), "bytes are lost"
        check_sound(self.pair)

    def check_end(self) -> None:
        self.check()
        assert self.pair.index_b() == self.pair.index_a()


def check_words(told: BaseException, pair: Pair, *words: str) -> None:
    """Make sure that a message names provider, host and path, and says what to do."""
    assert isinstance(told.__cause__, OSError)
    for word in ("srv1", socket.gethostname(), str(pair.mirror.dest), *words):
        assert word in str(told), f"{word!r} is not in {told}"
