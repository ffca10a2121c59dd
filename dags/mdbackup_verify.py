"""One DAG for each provider that reads its backup again, by its key `verify`. Goes beside mdbackup.py.

It never raises: a provider that is not configured validly has none, and its DAG in mdbackup.py says why.
"""

from airflow_mdbackup.dags.verify import verify_dags

globals().update(verify_dags())
