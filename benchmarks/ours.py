"""The operators, one after the other as a DAG runs them, in a process of its own. No scheduler.

``python -m benchmarks.ours`` reads a `Request` as JSON from standard input, and writes an `Answer` as JSON to
the file that it names. Nothing is counted before all is imported, as in a task that has begun. Shards are
pulled at the same time, each in a forked process.

What this does not give: the seconds that Airflow takes to start six tasks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.scene import DATA, REPOSITORY, Scene

STEPS = ("build", "fetch", "diff", "pull", "archive", "commit")
PROVIDER = "bench"


@dataclass(frozen=True, slots=True)
class Request:
    """What to do: ``steps`` of the backup of ``source`` in ``dest``, in one process."""

    steps: Sequence[str]
    dest: str
    source: str
    chroot: str
    index: str
    answer: str
    run_id: str
    shards: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The seconds of each step, and the most memory that the process ever had, in bytes.

    :ivar busy: what share of the machine's cores was busy during each step, with client, server and all.
    """

    seconds: dict[str, float]
    peak: int
    busy: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def figures(self) -> dict[str, Any]:
        """What a `Measurement` has of it."""
        return {"seconds": self.total, "parts": self.seconds, "peak": self.peak, "busy": self.busy}


def run_name(run_id: str) -> str:
    """Return what Airflow would call a run."""
    return f"manual__{run_id}"


def run(
    scene: Scene,
    steps: Sequence[str],
    dest: Path,
    *,
    port: int | None = None,
    shards: int = 1,
    run_id: str = "1",
) -> Answer:
    """Do some steps of the backup of /backups/data in a new process.

    :param port: of a proxy that leads to the server.
    """
    prefix, chroot = scene.server.prefix, scene.server.chroot
    source, index = prefix + DATA, f"{prefix}/.mdbackup/index.md5"
    answer = scene.folder / "answer.json"
    request = Request(steps, str(dest), source, chroot, index, str(answer), run_name(run_id), shards)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ours"],
        input=json.dumps(asdict(request)),
        env=scene.environment(port or scene.server.port),
        cwd=REPOSITORY,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(steps)} failed.")
    return Answer(**json.loads(answer.read_text()))


def peak() -> int:
    """Return the most memory that this process ever had, in bytes.

    Not ru_maxrss, which begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Do what standard input asks for."""
    request = Request(**json.load(sys.stdin))
    operators = _operators(request)
    seconds, busy = {}, {}
    for step in request.steps:
        started, (idle, ticks) = time.monotonic(), _ticks()
        _execute(operators[step], request.run_id)
        seconds[step] = time.monotonic() - started
        idle_then, ticks_then = _ticks()
        busy[step] = 1 - (idle_then - idle) / max(ticks_then - ticks, 1)
    Path(request.answer).write_text(json.dumps(asdict(Answer(seconds, peak(), busy))))


def _ticks() -> tuple[int, int]:
    """Return the ticks that all cores together were idle since the machine started, and all ticks."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


class TaskInstance:
    """What our operators use of one."""

    try_number = 1

    def xcom_push(self, key: str, value: Any) -> None:
        """Forget it."""


def _operators(request: Request) -> dict[str, list[Any]]:
    """Return the operators of each step. The imports are here, because the caller has no use for Airflow."""
    import airflow_mdbackup.hooks.provider  # noqa: F401 - as a task has when its connection is made
    from airflow_mdbackup import operators

    provider = {"provider": PROVIDER}
    common: dict[str, Any] = {**provider, "dest": request.dest}
    backupop: dict[str, Any] = {**common, "sftp_conn_id": "backupop"}
    source: dict[str, Any] = {"source": [request.source]}
    index: dict[str, Any] = {"index": request.index}
    account: dict[str, Any] = {"ssh_conn_id": "index", "chroot": request.chroot}
    return {
        "build": [operators.BuildProviderIndex(task_id="build", **provider, **source, **index, **account)],
        "fetch": [operators.FetchIndex(task_id="fetch", **backupop, **index)],
        "diff": [operators.DiffIndexes(task_id="diff", **common, **source, shards=request.shards)],
        "pull": [
            operators.PullChanged(task_id=f"pull{shard}", **backupop, shard={"shard": shard, "files": 0})
            for shard in range(request.shards)
        ],
        "archive": [operators.ArchiveOld(task_id="archive", **common)],
        "commit": [operators.CommitBackup(task_id="commit", **common)],
    }


def _execute(operators: Sequence[Any], run_id: str) -> None:
    dag_run = SimpleNamespace(dag_id="bench", run_id=run_id, run_type="manual", start_date=None, conf={})
    context = {"run_id": run_id, "ti": TaskInstance(), "dag_run": dag_run, "params": {}}
    if len(operators) == 1:
        operators[0].execute(context)
        return
    children = []
    for operator in operators:
        child = os.fork()
        if not child:
            try:
                operator.execute(context)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit("A shard failed.")


if __name__ == "__main__":
    main()
