"""Prove that a provider's accounts can do nothing but what backups need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

if TYPE_CHECKING:
    from airflow.sdk import Context


class AuditProvider(BaseOperator):
    """Try everything that a provider's accounts must refuse; fail, without retry, if anything works.

    It needs no index, and changes nothing on the provider or the worker.

    :param provider: the provider's name.
    :param sftp_conn_id: connection of the backup account.
    :param source: absolute paths that are backed up, as the backup account sees them; or a single one.
    :param index: absolute path of the index, as the backup account sees it.
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
        # Here, since paramiko and rich are slow to import, which would slow down every parse of a DAG file.
        from airflow_mdbackup.account.audit import audit
        from airflow_mdbackup.account.findings import as_text, summary

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
            "loose": [f"{finding.account}: {finding.check}" for finding in found.loose],
        }
        if found.loose:
            # A task that fails returns nothing, but this is when its result is needed most.
            context["ti"].xcom_push(key="return_value", value=result)
            raise AirflowFailException("\n".join(summary(self.provider, found)))
        return result
