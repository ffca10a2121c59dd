"""Kept for DAG files copied from an older version: see :mod:`airflow_mdbackup.dags.backup`."""

from __future__ import annotations

import warnings

from airflow_mdbackup.dags.backup import provider_dag, provider_dags

__all__ = ["provider_dag", "provider_dags"]

warnings.warn(
    "airflow_mdbackup.dag moved to airflow_mdbackup.dags.backup: copy the DAG files of this version again",
    DeprecationWarning,
    stacklevel=2,
)
