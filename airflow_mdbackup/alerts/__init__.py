"""People are told of a provider's runs, as its ``alerts`` say.

::

    tasks, on the workers                                        the DAG processor, when a run has failed
    ------------------------------------------------------       -----------------------------------------
    the first one begins   -> note_start: ping, and remember
                              the last good backup as XCom  ->
    one fails for good     -> note_failure: remember what   ->   tell_failed_run: one alert, made of what
                              was raised, as XCom                the failed tasks have left
    approve asks           -> tell_approval: an alert
    commit_backup is good  -> tell_good_run: ping, an alert if asked

Airflow calls the DAG's own callback once for each failed run, whatever ended it: an exception, a timeout of
task or run, a killed process, a lost worker. So each failed run is one alert, however many of its tasks have
failed; a task that could leave no word is told as killed. The tasks' callbacks, on the workers, know the
exception, which the DAG's does not; they send nothing themselves.

===============  ======================================================================
module           what it does
===============  ======================================================================
:mod:`.message`  what is said: from failures to texts; pure
:mod:`.context`  what Airflow knows of a run: from a callback's context to an alert
:mod:`.senders`  how it is sent; never raises
===============  ======================================================================

A failed verification is told likewise, with words of its own, and without pings: it is no failed backup.

What is told must not depend on what it tells of: a way of telling that does not work is logged, with what to
do, and neither fails a task nor keeps the other ways from being tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from airflow_mdbackup.alerts import context as seen
from airflow_mdbackup.alerts.message import Alert
from airflow_mdbackup.alerts.senders import send
from airflow_mdbackup.config import AlertRule, Provider

log = logging.getLogger(__name__)


def callbacks(provider: Provider) -> dict[str, Any]:
    """Return what tells through a provider's ``alerts`` when a task fails: keyword arguments of that task.

    For a task that no other one of its DAG speaks for: it tells at once. Nothing if there are no alerts.
    """
    return {"on_failure_callback": [Teller(provider).tell_failed_task]} if provider.alerts else {}


@dataclass(frozen=True, slots=True)
class Teller:
    """The callbacks of one provider's runs. Each takes the context of Airflow, and none raises."""

    provider: Provider

    def note_start(self, context: Any) -> None:
        """Say that a run begins, and keep when the last good backup was, for the alert if this one fails.

        For ``on_execute_callback`` of the first task, which has the provider's asset as inlet.
        """
        with _nothing_raised("tell of the start"):
            seen.keep_last_good(context, self.provider.name)
        self._tell("start", context, lambda: None)

    def note_failure(self, context: Any) -> None:
        """Keep why a task has failed for good, for the run's alert. For its ``on_failure_callback``."""
        with _nothing_raised("keep why the task failed"):
            seen.keep_failure(context)

    def tell_failed_run(self, context: Any) -> None:
        """Tell of a failed run. For the DAG's ``on_failure_callback``."""
        self._tell("failure", context, lambda: seen.failed_run(context, self.provider.name))

    def tell_failed_verification(self, context: Any) -> None:
        """Tell people of a failed verification. For the ``on_failure_callback`` of its DAG.

        Pings are of backups, and are not told.
        """
        self._tell("verification", context, lambda: seen.failed_verification(context, self.provider.name))

    def tell_failed_task(self, context: Any) -> bool:
        """Tell of a failed task, and return whether any way of telling took it.

        For the ``on_failure_callback`` of one that stands alone.
        """
        return self._tell("failure", context, lambda: seen.failed_task(context, self.provider.name))

    def tell_approval(self, context: Any) -> None:
        """Tell that a run waits for a person. For ``notifiers`` of ApproveChanges."""
        self._tell("approval", context, lambda: seen.approval(context, self.provider.name))

    def tell_good_run(self, context: Any) -> None:
        """Tell of a good run, if asked. For ``on_success_callback`` of ``commit_backup``.

        One that was superseded by a run that failed is none: that one has told.
        """
        if seen.is_doubtful(context):
            return
        self._tell("success", context, lambda: seen.good_run(context, self.provider.name))

    def _tell(self, event: str, context: Any, alert_of: Callable[[], Alert | None]) -> bool:
        told = False
        with _nothing_raised(f"tell of the {event}"):
            try:
                alert = alert_of()
            except Exception:
                # Better a meagre word than none.
                log.exception("The alert of %s says less than it should", self.provider.name)
                alert = seen.meagre(context, self.provider.name, event)
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
    return not seen.limits(context) and not seen.is_mistaken(context)


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
