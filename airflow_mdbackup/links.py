"""Links of tasks in the Airflow UI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from airflow_mdbackup.config import web_path
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.store.mirror import Mirror

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey


class LastGoodRunLink(BaseOperatorLink):
    """The last good run of the provider, to compare a failed one with."""

    name = "Last good backup"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the run's page, or an empty text if there is none yet. Called on the worker."""
        mirror = Mirror(_parameter(operator, "dest"), _parameter(operator, "provider"))
        try:
            last_good = mirror.read_status().get("last_good")
        except (BackupError, OSError):  # other messages report it
            return ""
        return _run_page(ti_key.dag_id, last_good["run_id"]) if last_good else ""


class RunReportLink(BaseOperatorLink):
    """What the run did or failed to do: the XCom of its commit."""

    name = "Run report"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the XCom page of the provider's commit: this task or one downstream; else an empty text."""
        provider = _parameter(operator, "provider")
        for task in (operator, *operator.get_flat_relatives()):
            if task.task_type == "CommitBackup" and task.provider == provider:
                run = _run_page(ti_key.dag_id, ti_key.run_id)
                return f"{run}/tasks/{quote(task.task_id, safe='')}/xcom"
        return ""


def _parameter(operator: Any, name: str) -> Any:
    """Return a parameter of a task; works for a mapped one that failed before it was expanded."""
    return operator.partial_kwargs[name] if hasattr(operator, "partial_kwargs") else getattr(operator, name)


def _run_page(dag_id: str, run_id: str) -> str:
    return f"{web_path()}/dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"
