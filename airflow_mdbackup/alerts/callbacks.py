"""What Airflow calls when a task or a run of a provider starts, ends or fails."""

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


def failure_callbacks(provider: Provider) -> dict[str, Any]:
    """Return keyword arguments for a task that alerts about its own failure, at once.

    For tasks that are not part of a provider's own DAG. Empty if the provider has no ``alerts``.
    """
    return {"on_failure_callback": [RunCallbacks(provider).alert_failed_task]} if provider.alerts else {}


@dataclass(frozen=True, slots=True)
class RunCallbacks:
    """The callbacks of one provider's runs. Each takes Airflow's context; none raises."""

    provider: Provider

    def note_start(self, context: Any) -> None:
        """Ping that a run starts, and store when the last good backup was, for an alert if the run fails.

        For ``on_execute_callback`` of the first task, which has the provider's asset as inlet.
        """
        with _log_exceptions("store the time of the last good backup"):
            alert_context.store_last_good(context, self.provider.name)
        self._alert("start", context, lambda: None)

    def note_failure(self, context: Any) -> None:
        """Store why a task failed for good, for the run's alert. For its ``on_failure_callback``."""
        with _log_exceptions("store why the task failed"):
            alert_context.store_failure(context)

    def alert_failed_run(self, context: Any) -> None:
        """Alert about a failed run. For the DAG's ``on_failure_callback``."""
        self._alert("failure", context, lambda: alert_context.failed_run(context, self.provider.name))

    def alert_failed_verification(self, context: Any) -> None:
        """Alert about a failed verification. For the ``on_failure_callback`` of its DAG.

        Sends no pings: those are about backups.
        """
        self._alert(
            "verification", context, lambda: alert_context.failed_verification(context, self.provider.name)
        )

    def alert_failed_task(self, context: Any) -> bool:
        """Alert about a failed task, and return whether any channel accepted the alert.

        For the ``on_failure_callback`` of a task on its own.
        """
        return self._alert("failure", context, lambda: alert_context.failed_task(context, self.provider.name))

    def alert_approval(self, context: Any) -> None:
        """Alert that a run waits for approval. For ``notifiers`` of ApproveChanges."""
        self._alert("approval", context, lambda: alert_context.approval(context, self.provider.name))

    def alert_good_run(self, context: Any) -> None:
        """Alert about a good run, if configured. For ``on_success_callback`` of ``commit_backup``.

        Does nothing if the run was superseded by one that failed, which has sent its own alert.
        """
        if alert_context.is_doubtful(context):
            return
        self._alert("success", context, lambda: alert_context.good_run(context, self.provider.name))

    def _alert(self, event: str, context: Any, make_alert: Callable[[], Alert | None]) -> bool:
        """Send an alert through each channel that wants it, pings first; return whether any accepted it."""
        is_sent = False
        with _log_exceptions(f"send the {event} alert"):
            try:
                alert = make_alert()
            except Exception:
                # A short alert is better than none.
                log.exception("The alert for %s says less than it should", self.provider.name)
                alert = alert_context.minimal(context, self.provider.name, event)
            for rule in sorted(self.provider.alerts, key=lambda rule: rule.ping_url is None):
                if rule.ping_url is not None and not _is_full_backup(context):
                    continue
                if _wants(rule, event, alert):
                    is_sent |= send(rule, event, alert, context)
        return is_sent


def _is_full_backup(context: Any) -> bool:
    """Whether a run is meant to back up everything.

    Pings ignore other runs, which are no backup, good or failed: those limited by whoever started them, and
    those refused because of a misspelt parameter.
    """
    return not alert_context.describe_limits(context) and not alert_context.has_misspelt_parameter(context)


def _wants(rule: AlertRule, event: str, alert: Alert | None) -> bool:
    """Whether a rule asks for this event.

    Pings exist for neither approvals, after which the run continues, nor verifications, which are no backup.
    """
    if rule.ping_url is not None:
        return event not in ("approval", "verification")
    if event == "success":
        return "success" in rule.also or ("warning" in rule.also and alert is not None and alert.warning)
    return event != "start"


@contextmanager
def _log_exceptions(what: str) -> Iterator[None]:
    """Log what the ``with`` block raises: an alert never fails the run that it is about."""
    try:
        yield
    except Exception:
        log.exception("Could not %s", what)
