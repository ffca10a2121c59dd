"""Kept for DAG files copied from an older version: see :mod:`airflow_mdbackup.dags.verify`."""

from __future__ import annotations

import warnings

from airflow_mdbackup.dags.verify import verify_dags

__all__ = ["verify_dags"]

warnings.warn(
    "airflow_mdbackup.verification moved to airflow_mdbackup.dags.verify: copy the DAG files of this"
    " version again",
    DeprecationWarning,
    stacklevel=2,
)
