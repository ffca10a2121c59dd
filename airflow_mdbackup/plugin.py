"""The Airflow plugin, which registers what the UI needs at start."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin

from airflow_mdbackup.links import LastGoodRunLink, RunReportLink


class MdBackupPlugin(AirflowPlugin):
    """Registers the links of the operators."""

    name = "mdbackup"
    operator_extra_links = [LastGoodRunLink(), RunReportLink()]  # noqa: RUF012 - as Airflow expects it
