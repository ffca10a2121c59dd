"""Kept for DAG files copied from an older version: see :mod:`airflow_mdbackup.dags.restore`."""

from __future__ import annotations

import warnings

from airflow_mdbackup.dags.restore import restore_dags

__all__ = ["restore_dags"]

warnings.warn(
    "airflow_mdbackup.restoration moved to airflow_mdbackup.dags.restore: copy the DAG files of this"
    " version again",
    DeprecationWarning,
    stacklevel=2,
)
