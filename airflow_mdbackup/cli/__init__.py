"""The command line: `airflow mdbackup`, `mdbackup` and `python -m airflow_mdbackup` are the same."""

from __future__ import annotations


class UsageError(Exception):
    """What was asked for cannot be done like this; the message says what to write instead. Exit status 2."""
