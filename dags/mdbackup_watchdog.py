"""Every hour, fails and alerts for each provider whose last good backup is too old. Goes beside mdbackup.py.

A separate file, so that it also notices when the DAGs of the other file do not load.
"""

from airflow_mdbackup.dags.watchdog import watchdog_dag

mdbackup_watchdog = watchdog_dag()
