"""Step 1, on server A: rebuild the provider index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_mdbackup.operators.base import megabytes, provider_hook
from airflow_mdbackup.provider_side import IndexRequest

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mdbackup.hooks.provider import ProviderHook


class BuildProviderIndex(BaseOperator):
    """Have the provider rebuild its index, atomically, over SSH with the index account.

    What cannot be read there is told in the index, and fails the run at its end; this task stays green.

    :param provider: the provider's name.
    :param ssh_conn_id: connection of the index account.
    :param chroot: where the index account sees what the backup account sees as ``/``.
    :param source: absolute paths to index, as the backup account sees them.
    :param index: absolute path of the index, likewise.
    """

    template_fields: Sequence[str] = ("provider", "ssh_conn_id", "chroot", "source", "index")
    ui_color = "#f5e6cc"

    def __init__(
        self,
        *,
        provider: str,
        ssh_conn_id: str,
        chroot: str,
        source: Sequence[str],
        index: str = "/.mdbackup/index.md5",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.provider = provider
        self.ssh_conn_id = ssh_conn_id
        self.chroot = chroot
        self.source = source
        self.index = index
        self._hook: ProviderHook | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        source = tuple(path.encode() for path in self.source)
        request = IndexRequest(self.chroot.encode(), source, self.index.encode())
        with provider_hook(self.ssh_conn_id) as self._hook:
            done = self._hook.build_index(request)
        self.log.info(
            "%s: %s files, %s; %s hashed in %.1f s; %s unreadable",
            *(self.provider, done.files, megabytes(done.bytes), done.hashed, done.seconds, done.unreadable),
        )
        return {
            "files": done.files,
            "bytes": done.bytes,
            "hashed": done.hashed,
            "unreadable": done.unreadable,
            "seconds": done.seconds,
        }

    def on_kill(self) -> None:
        if self._hook is not None:
            self._hook.close()
