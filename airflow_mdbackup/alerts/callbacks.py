"""What Airflow calls when a task or a run of a provider begins, ends or fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from airflow_mdbackup.alerts import context as alert_context
from airflow_mdbackup.alerts.message import Alert
from airflow_mdbackup.alerts.senders import send
from airflow_mdbackup.config import AlertRule, Provider

log = logging.getLogger(__name__)


def callbacks(provider: Provider) -> dict[str, Any]:
    """Return what tells through a provider's ``alerts`` when a task fails: keyword arguments of that task.

    For a task that no other one of its DAG speaks for: it tells at once. Nothing if there are no alerts.
    """
    return {"on_failure_callback": [RunCallbacks(provider).tell_failed_task]} if provider.alerts else {}


@dataclass(frozen=True, slots=True)
class RunCallbacks:
    """The callbacks of one provider's runs. Each takes the context of Airflow, and none raises."""

    provider: Provider

    def note_start(self, context: Any) -> None:
        """Say that a run begins, and keep when the last good backup was, for the alert if this one fails.

        For ``on_execute_callback`` of the first task, which has the provider's asset as inlet.
        """
        with _nothing_raised("tell of the start"):
            alert_context.keep_last_good(context, self.provider.name)
        self._tell("start", context, lambda: None)

    def note_failure(self, context: Any) -> None:
        """Keep why a task has failed for good, for the run's alert. For its ``on_failure_callback``."""
        with _nothing_raised("keep why the task failed"):
            alert_context.keep_failure(context)

    def tell_failed_run(self, context: Any) -> None:
        """Tell of a failed run. For the DAG's ``on_failure_callback``."""
        self._tell("failure", context, lambda: alert_context.failed_run(context, self.provider.name))

    def tell_failed_verification(self, context: Any) -> None:
        """Tell people of a failed verification. For the ``on_failure_callback`` of its DAG.

        Pings are of backups, and are not told.
        """
        self._tell(
            "verification", context, lambda: alert_context.failed_verification(context, self.provider.name)
        )

    def tell_failed_task(self, context: Any) -> bool:
        """Tell of a failed task, and return whether any way of telling took it.

        For the ``on_failure_callback`` of one that stands alone.
        """
        return self._tell("failure", context, lambda: alert_context.failed_task(context, self.provider.name))

    def tell_approval(self, context: Any) -> None:
        """Tell that a run waits for a person. For ``notifiers`` of ApproveChanges."""
        self._tell("approval", context, lambda: alert_context.approval(context, self.provider.name))

    def tell_good_run(self, context: Any) -> None:
        """Tell of a good run, if asked. For ``on_success_callback`` of ``commit_backup``.

        One that was superseded by a run that failed is none: that one has told.
        """
        if alert_context.is_doubtful(context):
            return
        self._tell("success", context, lambda: alert_context.good_run(context, self.provider.name))

    def _tell(self, event: str, context: Any, alert_of: Callable[[], Alert | None]) -> bool:
        told = False
        with _nothing_raised(f"tell of the {event}"):
            try:
                alert = alert_of()
            except Exception:
                # Better a meagre word than none.
                log.exception("The alert of %s says less than it should", self.provider.name)
                alert = alert_context.meagre(context, self.provider.name, event)
            for rule in sorted(self.provider.alerts, key=lambda rule: rule.ping_url is None):
                if rule.ping_url is not None and not _is_of_all(context):
                    continue
                if _wanted(rule, event, alert):
                    told |= send(rule, event, alert, context)
        return told


def _is_of_all(context: Any) -> bool:
    """Tell whether a run is to back all up.

    One that a person limits, or that is refused for a parameter that he misspelt, says nothing to pings: it
    is no backup, good or failed.
    """
    return not alert_context.limits(context) and not alert_context.is_mistaken(context)


def _wanted(rule: AlertRule, event: str, alert: Alert | None) -> bool:
    """Tell whether a rule asks for this event.

    Pings know no approval, with which the run goes on, and no verification, which is no backup.
    """
    if rule.ping_url is not None:
        return event not in ("approval", "verification")
    if event == "success":
        return "success" in rule.also or ("warning" in rule.also and alert is not None and alert.warning)
    return event != "start"


@contextmanager
def _nothing_raised(what: str) -> Iterator[None]:
    """Log what the ``with`` block raises: an alert never fails what it tells of."""
    try:
        yield
    except Exception:
        log.exception("Could not %s", what)
