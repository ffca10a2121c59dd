"""Links that tasks show in the Airflow UI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from airflow_mdbackup.config import web_path
from airflow_mdbackup.scheme.mirror import Mirror

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey


class LastGoodRunLink(BaseOperatorLink):
    """The last run of the provider that backed up everything: what to compare a failed one with."""

    name = "Last good backup"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the run's page, or an empty text if there is none yet. Called where dest is."""
        last_good = Mirror(operator.dest, operator.provider).read_status().get("last_good")
        if not last_good:
            return ""
        return f"{web_path()}/dags/{quote(ti_key.dag_id, safe='')}/runs/{quote(last_good['run_id'], safe='')}"
