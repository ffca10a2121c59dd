"""Every hour, fails and tells for each provider whose last good backup is too old. Goes beside mdbackup.py.

A file of its own: it sees that backups stay away also when the DAGs of the other file do not load.
"""

from airflow_mdbackup.dags.watchdog import watchdog_dag

mdbackup_watchdog = watchdog_dag()
