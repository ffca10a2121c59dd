"""Beside the steps of a backup: prove that the provider's accounts can do nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

if TYPE_CHECKING:
    from airflow.sdk import Context


class AuditProvider(BaseOperator):
    """Ask a provider's accounts for everything that they must refuse; fail, without retry, if one gives it.

    It needs no index and changes nothing, neither on the provider nor on the worker.

    :param provider: the provider's name.
    :param sftp_conn_id: connection of the backup account.
    :param source: absolute paths that are backed up, as the backup account sees them; or one of them.
    :param index: absolute path of the index, likewise.
    :param ssh_conn_id: connection of the index account; None if the provider builds its index itself.
    """

    template_fields: Sequence[str] = ("provider", "sftp_conn_id", "ssh_conn_id", "source", "index")
    ui_color = "#f5e6cc"

    def __init__(
        self,
        *,
        provider: str,
        sftp_conn_id: str,
        source: Sequence[str] | str,
        index: str = "/.mdbackup/index.md5",
        ssh_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.provider = provider
        self.sftp_conn_id = sftp_conn_id
        self.source = source
        self.index = index
        self.ssh_conn_id = ssh_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        # Here, because paramiko and rich are slow to import, and every parse of a DAG file would pay for it.
        from airflow_mdbackup.account.audit import audit
        from airflow_mdbackup.account.findings import as_text, told

        source = [self.source] if isinstance(self.source, str) else self.source
        for path in (*source, self.index):
            if not path.startswith("/"):
                raise AirflowFailException(f"{self.provider}: {path!r} must be an absolute path")
        found = audit(
            self.provider,
            sftp_conn_id=self.sftp_conn_id,
            source=source,
            index=self.index,
            ssh_conn_id=self.ssh_conn_id,
        )
        self.log.info("%s", as_text(self.provider, found))
        result = {
            **found.counts,
            "loose": [f"{one.account}: {one.check}" for one in found.loose],
        }
        if found.loose:
            # A task that fails returns nothing, and its result is wanted most then.
            context["ti"].xcom_push(key="return_value", value=result)
            raise AirflowFailException("\n".join(told(self.provider, found)))
        return result
