"""What the DAGs of providers have in common: making them, where they run, and one that only fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import DAG, get_parsing_context

from airflow_mdbackup.alerts.callbacks import RunCallbacks
from airflow_mdbackup.config import Problem, Provider
from airflow_mdbackup.config.schedule import Assets, Timetable, UnusableSchedule
from airflow_mdbackup.operators import RETRY_POLICY
from airflow_mdbackup.operators.invalid_configuration import InvalidConfiguration
from airflow_mdbackup.scheme.common.paths import to_text

START = datetime(2020, 1, 1)
"""Naive, so that Airflow interprets it and every cron expression in its default time zone."""
_LONGEST_DELAY = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class DagMaker:
    """How to make one DAG.

    :ivar make: raises :class:`UnusableSchedule` if Airflow cannot use its schedule.
    :ivar failure: what is not done then, for the DAG that says so instead.
    :ivar key: the configuration key of the schedule.
    """

    dag_id: str
    make: Callable[[], DAG]
    failure: str
    key: str

    def __call__(self) -> DAG:
        try:
            return self.make()
        except UnusableSchedule as error:
            return invalid_dag(self.dag_id, self.failure, (f"{self.key}: {error}",))


def make_dags(makers: Iterable[DagMaker]) -> dict[str, DAG]:
    """Make DAGs, by id; if a worker reads the file for one task, only that task's DAG."""
    by_id = {maker.dag_id: maker for maker in makers}
    only = get_parsing_context().dag_id
    if only in by_id:
        by_id = {only: by_id[only]}
    return {dag_id: make() for dag_id, make in by_id.items()}


def schedule_of(schedule: Any) -> Any:
    """Return the ``schedule`` argument of a DAG for a schedule of the configuration.

    :raises UnusableSchedule: Airflow cannot use it.
    """
    return schedule.for_airflow() if isinstance(schedule, Assets | Timetable) else schedule


def task_defaults(provider: Provider, callbacks: RunCallbacks | None) -> dict[str, Any]:
    """Return the default arguments of all tasks of a provider."""
    defaults: dict[str, Any] = {
        "retries": provider.retries,
        "retry_delay": provider.retry_delay,
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": max(provider.retry_delay, _LONGEST_DELAY),
        "retry_policy": RETRY_POLICY,
        # Backfill runs overlap despite max_active_runs; this keeps their steps apart.
        "max_active_tis_per_dag": 1,
    }
    if callbacks is not None:
        defaults["on_failure_callback"] = [callbacks.note_failure]
    return defaults | placement(provider)


def placement(provider: Provider) -> dict[str, Any]:
    """Return the keyword arguments that make a task run where a provider's ``dest`` is."""
    where: dict[str, Any] = {}
    if provider.queue is not None:
        where["queue"] = provider.queue
    if provider.pod_template_file is not None:
        where["executor_config"] = {"pod_template_file": provider.pod_template_file}
    if provider.pool is not None:
        where["pool"] = provider.pool
    return where


def invalid_dag(dag_id: str, what: str, problems: Sequence[Problem | str]) -> DAG:
    """Return a DAG that fails every day, and says why.

    :param what: what is not done, as a sentence.
    """
    message = "\n\n".join(map(str, problems))
    with DAG(
        dag_id=dag_id,
        description=f"{what}: its configuration is invalid",
        doc_md=f"# {what}\n\n```\n{message}\n```\n",
        schedule="@daily",
        start_date=START,
        catchup=False,
        max_active_runs=1,
        tags={"mdbackup", "invalid"},
    ) as dag:
        InvalidConfiguration(task_id="invalid_configuration", message=message)
    return dag


def as_code(text: str) -> str:
    """Return Markdown that shows any text literally."""
    text = to_text(text.encode("utf-8", "surrogateescape"))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
