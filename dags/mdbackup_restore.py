"""The DAG by which people get files back, with a form in the Airflow UI. Goes beside mdbackup.py.

It restores nothing until the Airflow option `[mdbackup] restore_below` says where to.
"""

from airflow_mdbackup.dags.restore import restore_dags

globals().update(restore_dags())
