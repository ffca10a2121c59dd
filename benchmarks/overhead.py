"""What an unchanged provider costs beside the tasks themselves: its DAG, against one whose tasks do nothing.

Both DAGs have the same shape, and run in turn in one Airflow, with one scheduler. Counted is a whole run, by
the scheduler's clock: from its start to the end of its last task.

What this does not give: another executor than the LocalExecutor, another database than SQLite, or what a
longer line to the provider adds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import demo.scene
from benchmarks.results import OURS, Measurement
from benchmarks.scene import REPOSITORY, Scene
from benchmarks.work import Work
from demo.stack import AirflowStack

NOTHING = "tasks that do nothing"
RUNS = 5  # of each, in each round
_DAGS = {OURS: demo.scene.DAG_ID, NOTHING: "nothing"}
_WARM = 2  # runs of each that are not counted, the first of which copies everything
# As by default, where the throw-away Airflow looks more often whether there is something to do.
_SETTINGS = {
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "5",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "1",
}


def overhead(scene: Scene, work: Work, rounds: int) -> Iterator[Measurement]:
    """Run both DAGs in turn, after a first backup.

    :raises SystemExit: a run failed, or the DAGs are not of one shape.
    """
    dags = scene.folder / "dags"
    dags.mkdir()
    shutil.copy(REPOSITORY / "dags" / "mdbackup.py", dags)
    shutil.copy(REPOSITORY / "benchmarks" / "nothing.py", dags)
    with (
        scene.offering(work.data),
        demo.scene.scene(scene.folder, scene.server, dags_folder=dags, env=_SETTINGS) as both,
    ):
        airflow = both.airflow
        airflow.wait_for_dag(_DAGS[NOTHING])
        airflow.unpause(_DAGS[NOTHING])
        if _shape(airflow, _DAGS[OURS]) != _shape(airflow, _DAGS[NOTHING]):
            raise SystemExit("benchmarks/nothing.py has not the shape of a provider's DAG any more.")
        for number in range(-_WARM, RUNS * rounds):
            for who, dag_id in _DAGS.items():
                seconds, parts = _run(airflow, dag_id)
                if number >= 0:
                    files = work.data.files
                    yield Measurement(who, number, seconds, files, parts=parts)


def _run(airflow: AirflowStack, dag_id: str) -> tuple[float, dict[str, float]]:
    """Do a run, and return the seconds of it, and those of each of its tasks."""
    run_id = airflow.trigger(dag_id)
    state = airflow.wait_for_run(dag_id, run_id, timeout=600)
    if state != "success":
        raise SystemExit(f"The run is {state}: {airflow.task_states(dag_id, run_id)}")
    tasks = [task for task in airflow.task_instances(dag_id, run_id) if task["operator"] != "EmptyOperator"]
    tasks.sort(key=lambda task: str(task["start_date"]))
    parts = {str(task["task_id"]).split("_")[0]: float(task["duration"]) for task in tasks}
    return float(airflow.get(f"/dags/{dag_id}/dagRuns/{run_id}")["duration"]), parts


def _shape(airflow: AirflowStack, dag_id: str) -> list[tuple[Any, ...]]:
    """Return what the scheduler sees of a DAG: its tasks, and what follows each, and when."""
    names = ("task_id", "downstream_task_ids", "trigger_rule", "retries", "is_mapped")
    return [
        tuple(task[name] for name in names)
        for task in airflow.get(f"/dags/{dag_id}/tasks", order_by="task_id")["tasks"]
    ]
