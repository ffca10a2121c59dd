"""What the DAGs of a provider have in common: where and how often they run, and one that only fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import DAG, get_parsing_context

from airflow_mdbackup.alerts.callbacks import RunCallbacks
from airflow_mdbackup.config import Problem, Provider
from airflow_mdbackup.config.schedule import Assets, Timetable
from airflow_mdbackup.operators import RETRY_POLICY
from airflow_mdbackup.operators.invalid_configuration import InvalidConfiguration
from airflow_mdbackup.scheme.common.paths import to_text

START = datetime(2020, 1, 1)
"""Naive, so that Airflow reads it, and with it every cron expression, in its own default time zone."""
_LONGEST_DELAY = timedelta(hours=1)


def made(makers: dict[str, Callable[[], DAG]]) -> dict[str, DAG]:
    """Make DAGs, by id; where a worker reads the file for one task, that task's DAG is the only one."""
    only = get_parsing_context().dag_id
    if only in makers:
        makers = {only: makers[only]}
    return {dag_id: make() for dag_id, make in makers.items()}


def schedule_of(schedule: Any) -> Any:
    """Return what a DAG takes for a schedule of the configuration.

    :raises UnusableSchedule: Airflow cannot use it.
    """
    return schedule.made() if isinstance(schedule, Assets | Timetable) else schedule


def task_defaults(provider: Provider, teller: RunCallbacks | None) -> dict[str, Any]:
    """Return what all tasks of a provider have in common."""
    defaults: dict[str, Any] = {
        "retries": provider.retries,
        "retry_delay": provider.retry_delay,
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": max(provider.retry_delay, _LONGEST_DELAY),
        "retry_policy": RETRY_POLICY,
        # Runs of a backfill overlap whatever max_active_runs says; so their steps do not.
        "max_active_tis_per_dag": 1,
    }
    if teller is not None:
        defaults["on_failure_callback"] = [teller.note_failure]
    return defaults | placement(provider)


def placement(provider: Provider) -> dict[str, Any]:
    """Return what has a task run where a provider's ``dest`` is: keyword arguments of that task."""
    where: dict[str, Any] = {}
    if provider.queue is not None:
        where["queue"] = provider.queue
    if provider.pod_template_file is not None:
        where["executor_config"] = {"pod_template_file": provider.pod_template_file}
    if provider.pool is not None:
        where["pool"] = provider.pool
    return where


def invalid_dag(dag_id: str, what: str, problems: Sequence[Problem | str]) -> DAG:
    """Return a DAG that fails each day, and says why.

    :param what: what is not done because of it.
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
    """Return text that Markdown shows as it is, whatever is in it."""
    text = to_text(text.encode("utf-8", "surrogateescape"))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
