"""Step 5, on B: archive old versions in ``.old``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mdbackup.operators.base import BackupOperator
from airflow_mdbackup.scheme.backup.archive import archive
from airflow_mdbackup.scheme.common.units import format_count, format_size

if TYPE_CHECKING:
    from airflow.sdk import Context


class ArchiveOld(BackupOperator):
    """Archive the old version of each file that is about to be replaced in ``.old``, without overwriting any.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    """

    def execute(self, context: Context) -> dict[str, Any]:
        summary = archive(*self.run_of(context))
        self.log.info(
            "%s: %s archived, %s",
            *(self.provider, format_count(summary.archived, "version"), format_size(summary.size)),
        )
        return {"archived": summary.archived, "bytes": summary.size}
