"""The steps of a backup as Airflow operators, and the operators for audit, watchdog, verify and restore.

They only orchestrate: they take connections and context, call :mod:`airflow_mdbackup.scheme` once, and return
a summary. The state of a run is on the consumer's disk, below ``dest``, so a retried or cleared task resumes
from it.
"""

from airflow_mdbackup.operators.approve_changes import ApproveChanges
from airflow_mdbackup.operators.archive_old import ArchiveOld
from airflow_mdbackup.operators.audit_provider import AuditProvider
from airflow_mdbackup.operators.base import RETRY_POLICY
from airflow_mdbackup.operators.build_provider_index import BuildProviderIndex
from airflow_mdbackup.operators.commit_backup import CommitBackup
from airflow_mdbackup.operators.diff_indexes import DiffIndexes
from airflow_mdbackup.operators.fetch_index import FetchIndex
from airflow_mdbackup.operators.pull_changed import PullChanged
from airflow_mdbackup.operators.restore_files import RestoreFiles
from airflow_mdbackup.operators.verify_mirror import VerifyMirror
from airflow_mdbackup.operators.watch_backup import WatchBackup

__all__ = [
    "RETRY_POLICY",
    "ApproveChanges",
    "ArchiveOld",
    "AuditProvider",
    "BuildProviderIndex",
    "CommitBackup",
    "DiffIndexes",
    "FetchIndex",
    "PullChanged",
    "RestoreFiles",
    "VerifyMirror",
    "WatchBackup",
]
