"""The command line: `airflow mdbackup`, `mdbackup` and `python -m airflow_mdbackup` are the same."""

from __future__ import annotations
