"""What is left of PullChanged without a disk: files read over SSH, hashed, and kept nowhere; and md5 alone.

``python -m benchmarks.floor DEST`` reads what the run in DEST has planned, in a process of its own, and
prints the seconds of both as JSON. Whoever writes the files too, in one process here, is not faster.

What this does not give: what several connections reach where there are more cores.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator

from airflow_mdbackup.scheme.backup.plan import PlanItem
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from benchmarks import ours
from benchmarks.data import measure
from benchmarks.results import Measurement
from benchmarks.scene import REPOSITORY, Scene
from benchmarks.work import Work


def floor(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Read everything, and hash as many bytes without reading them."""
    with scene.offering(work.data), scene.new_dest("ours") as dest:
        ours.run(scene, ("build", "fetch", "diff"), dest)
        files, size = measure(scene.data)
        environment = scene.environment(scene.server.port)
        command = [sys.executable, "-m", "benchmarks.floor", str(dest)]
        for number in range(rounds):
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE
            )
            for what, seconds in json.loads(done.stdout).items():
                yield Measurement(what, number, seconds, files, size)


def _read(reader: Reader, items: Iterator[PlanItem]) -> int:
    """Read all items, keeping none, and return how many bytes they had."""
    size = 0
    more = True
    while more or reader.busy:
        while more and reader.room:
            item = next(items, None)
            more = item is not None
            if item is not None:
                reader.submit(Wanted(item.path, item.md5, lambda _: Stream(len)))
        for answer in reader.wait():
            assert isinstance(answer, Fetched) and answer.md5 == answer.wanted.md5
            size += answer.size
    return size


def _hash(size: int) -> None:
    md5, block = hashlib.md5(usedforsecurity=False), bytes(255 << 10)
    for _ in range(size // len(block)):
        md5.update(block)


def main() -> None:
    """Measure both for the directory that is named."""
    from airflow_mdbackup.hooks.provider import ProviderHook

    run = Mirror(sys.argv[1], ours.PROVIDER).run(ours.run_name("1"))
    started = time.monotonic()
    with ProviderHook("backupop") as hook:
        size = _read(hook.reader(), read_records(run.pulls(0), PlanItem))
    read = time.monotonic()
    _hash(size)
    print(json.dumps({"reading": read - started, "md5 alone": time.monotonic() - read}))


if __name__ == "__main__":
    main()
