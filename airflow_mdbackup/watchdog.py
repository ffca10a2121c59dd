"""Kept for DAG files copied from an older version: see :mod:`airflow_mdbackup.dags.watchdog`."""

from __future__ import annotations

import warnings

from airflow_mdbackup.dags.watchdog import watchdog_dag

__all__ = ["watchdog_dag"]

warnings.warn(
    "airflow_mdbackup.watchdog moved to airflow_mdbackup.dags.watchdog: copy the DAG files of this"
    " version again",
    DeprecationWarning,
    stacklevel=2,
)
