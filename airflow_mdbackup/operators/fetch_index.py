"""Step 2, from A to B: fetch and check the provider index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_mdbackup.operators.base import BackupOperator, provider_hook
from airflow_mdbackup.scheme.backup.fetch import MAX_SIZE, IndexLimits, fetch_index
from airflow_mdbackup.scheme.common.units import format_count

if TYPE_CHECKING:
    from airflow.sdk import Context


class FetchIndex(BackupOperator):
    """Fetch the provider index with the backup account, and create the run's directory.

    The first step that touches ``dest``. It sets up a new one. It refuses one that belongs to another
    provider, or that is empty although the provider's asset (see ``inlets``) records an earlier good run.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param sftp_conn_id: connection of the backup account.
    :param index: absolute path of the index, as the backup account sees it.
    :param max_index_age: the maximum age of the index; None: no limit.
    :param max_index_size: the maximum size of the index, in bytes.
    :param mount: a path that must be a mount point on the worker.
    :param stall_timeout: how long the connection may be silent.
    :param built: what BuildProviderIndex returned in this run (its ``output``), to compare the clocks by the
        age of the index. None: this run does not build the index.
    """

    template_fields: Sequence[str] = (
        *BackupOperator.template_fields,
        *("sftp_conn_id", "index", "mount", "built"),
    )
    ui_color = "#f5e6cc"

    def __init__(
        self,
        *,
        sftp_conn_id: str,
        index: str = "/.mdbackup/index.md5",
        max_index_age: timedelta | None = None,
        max_index_size: int = MAX_SIZE,
        mount: str | None = None,
        stall_timeout: timedelta = timedelta(seconds=60),
        built: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sftp_conn_id = sftp_conn_id
        self.index = index
        self.max_index_age = max_index_age
        self.max_index_size = max_index_size
        self.mount = mount
        self.stall_timeout = stall_timeout
        self.built = built

    def execute(self, context: Context) -> dict[str, Any]:
        if context["dag_run"].run_type == "backfill":
            self.log.warning(
                "%s: a backup always copies the current state of the provider, so a backfill cannot recover "
                "the state of an earlier day. Its first run does all the work",
                self.provider,
            )
        mirror = self.mirror
        mirror.claim(known=self.had_good_run(context), mount=self.mount)
        run = mirror.run(context["run_id"])
        max_age = None if self.max_index_age is None else self.max_index_age.total_seconds()
        with provider_hook(self.sftp_conn_id, self.stall_timeout) as self._hook:
            fetched = fetch_index(
                *(mirror, run, self._hook.reader, self.index.encode()),
                IndexLimits(max_age, self.max_index_size),
                attempt=context["ti"].try_number,
                built=(self.built or {}).get("ended"),
            )
        if fetched.clock:
            self.log.warning("%s: %s", self.provider, fetched.clock)
        self.log.info(
            "%s: the index has %s, %s unreadable, %s corrupted, and is %s s old",
            *(self.provider, format_count(fetched.files, "file"), f"{fetched.unreadable:,}"),
            *(f"{fetched.rotten:,}", fetched.age),
        )
        return {
            "path": str(run.index),
            "files": fetched.files,
            "unreadable": fetched.unreadable,
            "rotten": fetched.rotten,
            "digest": fetched.digest,
            "age": fetched.age,
        }
