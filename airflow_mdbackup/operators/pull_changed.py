"""Step 4, from A to B: pull one shard of the plan into staging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_mdbackup.config.airflow_options import local_time
from airflow_mdbackup.config.bandwidth import BandwidthLimit, parse_bandwidth_limit
from airflow_mdbackup.links import RunReportLink
from airflow_mdbackup.operators.base import BackupOperator, provider_hook
from airflow_mdbackup.operators.lineage import report_lineage
from airflow_mdbackup.operators.metrics import record_pull
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.common.units import format_rate, format_size
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter
from airflow_mdbackup.scheme.transfer.sftp import Reader

if TYPE_CHECKING:
    from airflow.sdk import Context


PULLED = "mdbackup_pulled"
"""Key of the context: the pulled bytes as text, for a task's ``map_index_template``."""


class PullChanged(BackupOperator):
    """Pull the files of one shard into staging, and verify their md5 on the fly.

    The outcome of each file is written to disk, durably. The task fails only if the connection or the disk is
    lost, so that Airflow retries it. A retry resumes from what is already on disk.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param sftp_conn_id: connection of the backup account. It is not opened if there is nothing to pull.
    :param shard: one of the shards that DiffIndexes returned.
    :param stall_timeout: how long the connection may be silent.
    :param bandwidth_limit: the total rate of all tasks that pull into ``dest``: a rate such as ``20MB``, or
        hours and rates as in the configuration; None: no limit.
    :param max_file_size: the maximum size of a file, in bytes; only larger files fail. None: no limit.
    :param source: the paths that the provider should index, as configured; reported as lineage.
    """

    template_fields: Sequence[str] = (*BackupOperator.template_fields, "sftp_conn_id", "shard", "source")
    operator_extra_links = (*BackupOperator.operator_extra_links, RunReportLink())
    ui_color = "#cfe8cf"

    def __init__(
        self,
        *,
        sftp_conn_id: str,
        shard: Mapping[str, int],
        stall_timeout: timedelta = timedelta(seconds=60),
        bandwidth_limit: BandwidthLimit | str | Mapping[str, Any] | Sequence[Any] | None = None,
        max_file_size: int | None = None,
        source: Sequence[str] = ("/",),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sftp_conn_id = sftp_conn_id
        self.shard = shard
        self.stall_timeout = stall_timeout
        self.bandwidth_limit = None if bandwidth_limit is None else parse_bandwidth_limit(bandwidth_limit)
        self.max_file_size = max_file_size
        self.source = source

    def execute(self, context: Context) -> dict[str, Any]:
        mirror, run = self.run_of(context)
        throttle = None
        if (limit := self.bandwidth_limit) is not None:
            throttle = RateLimiter(mirror.bandwidth, lambda: limit.at(local_time()))
            self.log.info("%s: bandwidth limit for all tasks together: %s", self.provider, limit)
        with ExitStack() as stack:

            def connect() -> Reader:
                self._hook = stack.enter_context(provider_hook(self.sftp_conn_id, self.stall_timeout))
                return self._hook.reader(throttle, run.round_trip)

            summary = pull(mirror, run, self.shard["shard"], connect, self.max_file_size)
        context[PULLED] = format_size(summary.transferred)  # type: ignore[literal-required]
        record_pull(self.provider, summary)
        if self._hook is not None:
            report_lineage(self._hook, self.provider, self.source)
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(summary.outcomes.items()))
        rate = summary.transferred / max(summary.seconds, 0.001)
        self.log.info(
            "%s: %s; %s in %.1f s, %s",
            *(
                self.provider,
                outcomes or "nothing to pull",
                format_size(summary.transferred),
                summary.seconds,
            ),
            format_rate(rate),
        )
        if summary.telltale:
            self.log.warning(
                "%s: %s, as ransomware does. Check the provider. The previous content of these files becomes "
                "versions in .old",
                *(self.provider, summary.telltale),
            )
        return {
            "outcomes": summary.outcomes,
            "bytes": summary.transferred,
            "seconds": summary.seconds,
        }
