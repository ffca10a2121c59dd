"""Step 5, on B: give old versions their place in ``.old``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mdbackup.operators.base import BackupOperator, megabytes
from airflow_mdbackup.scheme.backup.archive import archive

if TYPE_CHECKING:
    from airflow.sdk import Context


class ArchiveOld(BackupOperator):
    """Give the old version of every file about to be replaced its place in ``.old``, overwriting none.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    """

    def execute(self, context: Context) -> dict[str, Any]:
        summary = archive(*self.run_of(context))
        self.log.info(
            "%s: %s versions archived, %s", self.provider, summary.archived, megabytes(summary.size)
        )
        return {"archived": summary.archived, "bytes": summary.size}
