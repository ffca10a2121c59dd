"""What the operators share: the provider's backup, hooks, the retry policy, and checks of parameters."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, BaseOperatorLink, ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.assets import LAST_GOOD, provider_asset
from airflow_mdbackup.links import LastGoodRunLink
from airflow_mdbackup.scheme import errors
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook

RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=[
                errors.AccessRefused,
                errors.IndexRefused,
                errors.ConsumerIndexDamaged,
                errors.GuardTripped,
                errors.DestinationRefused,
                errors.RunIncomplete,
                # Rejected by an operator, so not to be asked again.
                "airflow.providers.standard.exceptions.HITLRejectException",
                "airflow.providers.standard.exceptions.HITLTimeoutError",
            ],
            action=RetryAction.FAIL,
            reason="a retry cannot succeed: an operator must look into it",
        )
    ]
)
"""Pass it as ``retry_policy``: only failures that may resolve themselves are retried."""


class BackupOperator(BaseOperator):
    """A step that works on the backup of one provider.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    """

    template_fields: Sequence[str] = ("provider", "dest")
    operator_extra_links: Collection[BaseOperatorLink] = (LastGoodRunLink(),)
    ui_color = "#dbe9f4"
    _hook: ProviderHook | None = None  # of a step that has a connection

    def __init__(self, *, provider: str, dest: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.provider = provider
        self.dest = dest

    @property
    def mirror(self) -> Mirror:
        """The provider's backup on this worker."""
        return Mirror(self.dest, self.provider, self.queue)

    def run_of(self, context: Context) -> tuple[Mirror, Run]:
        """Check that ``dest`` is the provider's; return its backup, and this DAG run's directory in it."""
        mirror = self.mirror
        with mirror.translate_os_errors():
            mirror.check()
        return mirror, mirror.run(context["run_id"])

    def had_good_run(self, context: Context) -> bool:
        """Return whether Airflow knows of a good run, even if the disk with ``dest`` is lost.

        Without the provider's asset among the task's inlets, it cannot know.
        """
        asset = provider_asset(self.provider)
        if asset not in self.inlets:
            return False
        return context["asset_state_store"][asset].get(LAST_GOOD) is not None

    def on_kill(self) -> None:
        if self._hook is not None:
            self._hook.close()


def provider_hook(conn_id: str, stall_timeout: timedelta = timedelta(seconds=60)) -> ProviderHook:
    """Return the hook for a provider's backup account."""
    # Here, since SSH is slow to import, which would slow down every parse of a DAG file.
    from airflow_mdbackup.hooks.provider import ProviderHook

    return ProviderHook(conn_id, stall_timeout=stall_timeout.total_seconds())


def index_hook(conn_id: str) -> IndexHook:
    """Return the hook for a provider's index account."""
    from airflow_mdbackup.hooks.provider import IndexHook

    return IndexHook(conn_id)


def refused(why: str) -> AirflowFailException:
    """Return the error for invalid parameters, with which a task fails without retry.

    By its cause, alerts recognise a mistake of whoever started the run, not a failed backup.
    """
    error = AirflowFailException(why)
    error.__cause__ = errors.ParameterRefused(why)
    return error


def refuse_misspelt(context: Context, known: Collection[str]) -> None:
    """Refuse a misspelt parameter: Airflow accepts any name, and would start a real run.

    :raises AirflowFailException: a parameter is misspelt.
    """
    if why := misspelt(context["dag_run"].conf, known):
        raise refused(why)


def misspelt(conf: Mapping[str, Any] | None, known: Collection[str]) -> str:
    """Return a message about the first misspelt parameter; an empty one if none is."""
    for name in conf or {}:
        similar = difflib.get_close_matches(str(name), known, n=1, cutoff=0.75)
        if similar and name not in known:
            return f"there is no parameter {name!r}: did you mean {similar[0]}?"
    return ""


@contextmanager
def log_group(log: Any, title: str) -> Iterator[None]:
    """Fold what is logged meanwhile: Airflow's log page shows only ``title`` at first."""
    log.info("::group::%s", title)
    try:
        yield
    finally:
        log.info("::endgroup::")
