"""One DAG for each provider that verifies its backup, by its key `verify`. Goes beside mdbackup.py.

It never raises: an invalid provider has none, and its DAG in mdbackup.py says why.
"""

from airflow_mdbackup.dags.verify import verify_dags

globals().update(verify_dags())
