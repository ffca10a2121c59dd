"""Kept for DAG files that were copied before: see :mod:`airflow_mdbackup.dags.restore`."""

from __future__ import annotations

import warnings

from airflow_mdbackup.dags.restore import restore_dags

__all__ = ["restore_dags"]

warnings.warn(
    "airflow_mdbackup.restoration is airflow_mdbackup.dags.restore now: copy the DAG files of this version"
    " again",
    DeprecationWarning,
    stacklevel=2,
)
