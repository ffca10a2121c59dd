"""Shows problems of the configuration among Airflow's import errors.

A separate file without DAGs, because an import error stops all DAGs of its file.
"""

from airflow_mdbackup.config import load, providers_file, raise_for_problems
from airflow_mdbackup.config.foreign import unusable

configuration = load(providers_file())
raise_for_problems(configuration, unusable(configuration, providers_file()))
