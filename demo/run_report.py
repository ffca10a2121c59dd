"""Runs the demo's DAG once, and prints a report of what the run did."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from demo.scene import DAG_ID, Scene

RUN_TIMEOUT = 600.0

console = Console(highlight=False, soft_wrap=True)


class RunFailed(RuntimeError):
    """A DAG run failed; the message holds the logs of the tasks that did."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did.

    :ivar run_id: Airflow's id of the run.
    :ivar outcomes: how many files had each outcome.
    :ivar transferred: bytes received from A, without the index.
    :ivar summary: the summary that CommitBackup returns.
    :ivar log: the log of DiffIndexes.
    """

    run_id: str
    outcomes: Counter[str]
    transferred: int
    summary: str
    log: str


def back_up(both: Scene, title: str) -> RunReport:
    """Run the DAG once, print what it did, and return it.

    :raises RunFailed: the run failed.
    """
    airflow = both.airflow
    console.print(f"\n[bold]{title}[/]")
    started = time.monotonic()
    run_id = airflow.trigger(DAG_ID)
    with console.status("the DAG is running"):
        state = airflow.wait_for_run(DAG_ID, run_id, timeout=RUN_TIMEOUT)
    seconds = time.monotonic() - started
    tasks = airflow.task_instances(DAG_ID, run_id)

    def log(task: dict[str, Any]) -> str:
        return airflow.task_log(DAG_ID, run_id, task["task_id"], task["try_number"], task["map_index"])

    if state != "success":
        logs = [log(task) for task in tasks if task["state"] == "failed"]
        raise RunFailed("\n".join([f"The run {run_id} of {DAG_ID} has failed.", *logs]))

    index = airflow.xcom(DAG_ID, run_id, "build_provider_index")
    plan = airflow.xcom(DAG_ID, run_id, "diff_indexes", "plan")
    shards = [
        airflow.xcom(DAG_ID, run_id, "pull_changed", map_index=task["map_index"])
        for task in tasks
        if task["task_id"] == "pull_changed"
    ]
    report = RunReport(
        run_id=run_id,
        outcomes=sum((Counter(shard["outcomes"]) for shard in shards), Counter()),
        transferred=sum(shard["bytes"] for shard in shards),
        summary=airflow.xcom(DAG_ID, run_id, "commit_backup")["summary"],
        log="\n".join(log(task) for task in tasks if task["task_id"] == "diff_indexes"),
    )
    pulling = max(shard["seconds"] for shard in shards)
    rate = f", {report.transferred / 1e6 / pulling:.0f} MB/s" if report.transferred > 1e6 else ""
    rows = {
        "plan": f"{plan['new']:,} new, {plan['changed']:,} changed, {plan['gone']:,} gone, "
        f"{plan['same']:,} unchanged",
        "outcomes": ", ".join(f"{count:,} {outcome}" for outcome, count in report.outcomes.items()) or "none",
        "transferred": f"{report.transferred:,} of {index['bytes']:,} bytes in {pulling:.1f} s{rate}",
        "commit said": report.summary,
        "took": f"{seconds:.0f} s for {len(tasks)} task instances, {len(shards)} of them pulling",
    }
    for name, value in rows.items():
        console.print(f"  [dim]{name:<13}[/]{value}")
    return report
