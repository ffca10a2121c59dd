"""The command line: `airflow mdbackup`, `mdbackup` and `python -m airflow_mdbackup` are equivalent."""

from __future__ import annotations
