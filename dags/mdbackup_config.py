"""Shows what is wrong with the configuration where people look for it: among Airflow's import errors.

A file of its own, without DAGs, because an import error stops all DAGs of its file.
"""

from airflow_mdbackup.config import load, providers_file, raise_for_problems
from airflow_mdbackup.config.foreign import unusable

configuration = load(providers_file())
raise_for_problems(configuration, unusable(configuration, providers_file()))
