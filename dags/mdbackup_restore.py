"""The DAG that restores files, with a form in the Airflow UI. Goes beside mdbackup.py.

It restores nothing until the Airflow option `[mdbackup] restore_below` is set.
"""

from airflow_mdbackup.dags.restore import restore_dags

globals().update(restore_dags())
