"""The steps of a backup as Airflow operators, in the order in which they run; and what stands beside them.

They only orchestrate: connections and context in, one call of :mod:`airflow_mdbackup.scheme`, a summary
out. All steps find the run's state on the consumer's disk, below ``dest``, so that a retried or cleared
task goes on from there.
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
