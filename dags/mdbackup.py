"""One DAG for each provider of the configuration. Put this file into Airflow's dags folder.

It never raises: an invalid provider gets a DAG that fails and says why; the others are not affected.
"""

from airflow_mdbackup.dags.backup import provider_dags

globals().update(provider_dags())
