"""One DAG for each provider of the configuration. Put this file into Airflow's dags folder.

It never raises: an invalid provider becomes a DAG that fails and says why, and all others keep theirs.
"""

from airflow_mdbackup.dags.backup import provider_dags

globals().update(provider_dags())
