"""Verified pull backups over read-only SFTP, as Apache Airflow DAGs."""

__version__ = "0.1.0"
