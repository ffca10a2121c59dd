"""Step 1, on A: update the provider index."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.common.compat.sdk import conf
from airflow.sdk import BaseOperator

from airflow_mdbackup.operators.base import index_hook
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.scheme import errors
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import format_count, format_size

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mdbackup.hooks.provider import IndexHook

REHASH = "rehash"  # a parameter of a manual run


class BuildProviderIndex(BaseOperator):
    """Have the provider update its index, atomically, over SSH with the index account.

    Only files that changed since the last build are hashed. Unreadable files and bit rot are recorded in the
    index, and fail the run at its end; this task succeeds. A lost connection does not stop the build, and a
    retry joins it. Killing the task stops it. A provider that is silent for three minutes counts as a lost
    connection.

    Returns counts and ``ended``: when the build ended, in Unix seconds by this machine's clock. FetchIndex
    uses it to compare the two clocks.

    If the account's key has the indexer as its forced command, the provider determines what is indexed and
    how; the parameters below then only state what is expected.

    :param provider: the provider's name.
    :param ssh_conn_id: connection of the index account.
    :param chroot: the directory that the backup account sees as ``/``, as the index account sees it.
    :param source: absolute paths to index, as the backup account sees them.
    :param index: absolute path of the index, as the backup account sees it.
    :param exclude: gitignore patterns of files that need not be hashed, because DiffIndexes excludes them
        too.
    :param indexer: options of the indexer: any of the fields ``jobs``, ``nice``, ``limit``, ``rehash`` and
        ``one_file_system`` of :class:`airflow_mdbackup.provider_side.request.IndexRequest`.
    :param deferrable: wait in a triggerer, without occupying a worker slot.
    """

    template_fields: Sequence[str] = ("provider", "ssh_conn_id", "chroot", "source", "index", "exclude")
    ui_color = "#f5e6cc"

    def __init__(
        self,
        *,
        provider: str,
        ssh_conn_id: str,
        chroot: str,
        source: Sequence[str],
        index: str = "/.mdbackup/index.md5",
        exclude: Sequence[str] = (),
        indexer: Mapping[str, Any] | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.provider = provider
        self.ssh_conn_id = ssh_conn_id
        self.chroot = chroot
        self.source = source
        self.index = index
        self.exclude = exclude
        self.indexer = dict(indexer or {})
        self.deferrable = deferrable
        self._hook: IndexHook | None = None
        self._killed = False

    def execute(self, context: Context) -> dict[str, Any]:
        if self.deferrable:
            self._defer(self._request(context))
        return self._build(context)

    def _request(self, context: Context) -> IndexRequest:
        return IndexRequest(
            self.chroot.encode(),
            tuple(path.encode() for path in self.source),
            self.index.encode(),
            id=_request_id(context),
            exclude=tuple(self.exclude),
            **self.indexer | ({"rehash": "all"} if context["params"].get(REHASH) else {}),
        )

    def _build(self, context: Context) -> dict[str, Any]:
        with index_hook(self.ssh_conn_id) as self._hook:
            if self._killed:  # before there was a hook
                self._hook.stop_build()
            done = self._hook.build_index(self._request(context))
        return self._summary(done, time.time())

    def _defer(self, request: IndexRequest) -> NoReturn:
        # Here, since asyncssh is slow to import, which would slow down every parse of a DAG file.
        from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger

        self.defer(
            trigger=BuildProviderIndexTrigger(self.ssh_conn_id, request_line(request).decode()),
            method_name="execute_complete",
            timeout=self.execution_timeout,  # a retry joins the build if it continues
        )

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Return the trigger's result; build in this task if the trigger cannot connect.

        :raises BackupError: see :meth:`.IndexHook.build_index`.
        """
        if "no_way" in event:
            self.log.info("Building in this task, since the triggerer cannot connect: %s", event["no_way"])
            return self._build(context)
        if "error" in event:
            kind: type[errors.BackupError] = getattr(errors, event["error"])
            raise kind(event["message"])
        # The event has the time, since this task may have waited for a worker.
        return self._summary(Done(**event["done"]), event.get("ended", time.time()))

    def _summary(self, done: Done, ended: float) -> dict[str, Any]:
        self.log.info(
            "%s: %s, %s; %s hashed in %.1f s; %s unreadable, %s corrupted",
            *(self.provider, format_count(done.files, "file"), format_size(done.bytes)),
            *(f"{done.hashed:,}", done.seconds, f"{done.unreadable:,}", f"{done.rotten:,}"),
        )
        return {
            "files": done.files,
            "bytes": done.bytes,
            "hashed": done.hashed,
            "unreadable": done.unreadable,
            "rotten": done.rotten,
            "seconds": done.seconds,
            "ended": round(ended),
        }

    def on_kill(self) -> None:
        self._killed = True
        if self._hook is not None:
            self._hook.stop_build()


def _request_id(context: Context) -> str:
    """Return an id that retries of this task share, and no other task of any Airflow installation."""
    run = context["dag_run"]
    unique = f"{run.dag_id}/{run.run_id}/{run.start_date}"
    name = to_text(run.run_id.encode("utf-8", "surrogateescape")).encode("ascii", "replace").decode()
    return f"{name[:100]} {hashlib.sha256(unique.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
