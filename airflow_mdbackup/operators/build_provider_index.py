"""Step 1, on server A: rebuild the provider index."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.common.compat.sdk import conf
from airflow.sdk import BaseOperator

from airflow_mdbackup.operators.base import index_hook, megabytes
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.scheme import errors
from airflow_mdbackup.scheme.common.paths import to_text

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mdbackup.hooks.provider import IndexHook

REHASH = "rehash"  # a parameter of a run that a person starts


class BuildProviderIndex(BaseOperator):
    """Have the provider renew its index, atomically, over SSH with the index account.

    Only what changed there since the last time is hashed. What cannot be read, or has rotted, is told in the
    index, and fails the run at its end; this task stays green. A lost connection does not stop the build, and
    a retry joins it; a task that is killed stops it. A provider of which nothing is heard for three minutes
    counts as a lost connection.

    Returns counts and ``ended``: when the build ended, in Unix seconds by the clock of this side, with which
    FetchIndex judges the clocks of both.

    With an account whose key has the indexer as forced command, what is indexed and how is fixed on the
    provider, and the parameters below say nothing but what is expected.

    :param provider: the provider's name.
    :param ssh_conn_id: connection of the index account.
    :param chroot: where the index account sees what the backup account sees as ``/``.
    :param source: absolute paths to index, as the backup account sees them.
    :param index: absolute path of the index, likewise.
    :param exclude: gitignore patterns of what need not be hashed, because DiffIndexes leaves it out as well.
    :param indexer: how to go about it: any of the fields ``jobs``, ``nice``, ``limit``, ``rehash`` and
        ``one_file_system`` of :class:`airflow_mdbackup.provider_side.request.IndexRequest`.
    :param deferrable: wait in a triggerer, without a worker's slot.
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
            if self._killed:  # while there was no hook yet
                self._hook.stop_build()
            done = self._hook.build_index(self._request(context))
        return self._told(done, time.time())

    def _defer(self, request: IndexRequest) -> NoReturn:
        # Here, because asyncssh is slow to import, and every parse of a DAG file would pay for it.
        from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger

        self.defer(
            trigger=BuildProviderIndexTrigger(self.ssh_conn_id, request_line(request).decode()),
            method_name="execute_complete",
            timeout=self.execution_timeout,  # a retry joins the build, if it goes on
        )

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Return what the trigger found; or build here, where it has no way to.

        :raises BackupError: as ``execute`` does.
        """
        if "no_way" in event:
            self.log.info("Building in this task, and not in the triggerer: %s", event["no_way"])
            return self._build(context)
        if "error" in event:
            kind: type[errors.BackupError] = getattr(errors, event["error"])
            raise kind(event["message"])
        # It may have waited for a worker since.
        return self._told(Done(**event["done"]), event.get("ended", time.time()))

    def _told(self, done: Done, ended: float) -> dict[str, Any]:
        self.log.info(
            "%s: %s files, %s; %s hashed in %.1f s; %s unreadable, %s rotten",
            *(self.provider, done.files, megabytes(done.bytes), done.hashed, done.seconds),
            *(done.unreadable, done.rotten),
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
    """Return what a retry of this task shares with it, and no other task of any Airflow."""
    run = context["dag_run"]
    whole = f"{run.dag_id}/{run.run_id}/{run.start_date}"
    name = to_text(run.run_id.encode("utf-8", "surrogateescape")).encode("ascii", "replace").decode()
    return f"{name[:100]} {hashlib.sha256(whole.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
