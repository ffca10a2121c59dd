"""How an alert is sent: as an e-mail, by any notifier, or as a ping. Nothing here raises.

A DAG processor ends a callback that takes too long, so pings give up after ten seconds.
"""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any
from urllib.parse import urlsplit

from airflow_mdbackup.alerts.message import Alert
from airflow_mdbackup.config import AlertRule
from airflow_mdbackup.config.classes import find_class

log = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that a ping may wait for each of connection, sending and answer."""

PATIENCE = 15.0
"""Seconds that one way of telling gets, of the 50 that a DAG processor has for all."""

_PATHS = {"start": "/start", "failure": "/fail", "success": "", "test": "/log"}
_LONGEST_BODY = 10_000


def send(rule: AlertRule, event: str, alert: Alert | None, context: Any) -> bool:
    """Send an alert in one way, log what came of it, and return whether it was taken.

    :param event: ``start``, ``failure``, ``approval``, ``success`` or ``verification``.
    :param alert: what is told; None for the start, which only pings tell of.
    """
    if why := deliver(rule, event, alert, context):
        log.error(
            "The alert was NOT sent by %s: %s. Backups go on; correct `alerts` in the configuration, or what"
            " it names",
            *(name_of(rule), why),
        )
    else:
        log.info("Told of the %s by %s", event, name_of(rule))
    return not why


def deliver(rule: AlertRule, event: str, alert: Alert | None, context: Any) -> str:
    """Send an alert in one way, and return why it was not taken; nothing if it was.

    :param event: as for :func:`send`, or ``test``, of which a ping makes an entry in the check's log.
    """
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            if rule.ping_url is not None:
                _ping(rule.ping_url, event, alert.text if alert else "")
            elif alert is not None and rule.email is not None:
                _mail(rule, alert, context)
            elif alert is not None:
                _notify(rule, alert, context)
        except Exception as error:
            failed.append(error)

    # A server that is silent, or never ends, must keep neither the other ways nor the backup waiting.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        failed.append(TimeoutError(f"it took longer than {PATIENCE:.0f} s"))
    return f"{type(failed[0]).__name__}: {failed[0]}" if failed else ""


def name_of(rule: AlertRule) -> str:
    """Return how a rule tells, without what is secret of it."""
    if rule.ping_url is not None:
        return f"ping_url at {urlsplit(rule.ping_url).hostname}"
    return f"e-mail to {', '.join(rule.email)}" if rule.email else str(rule.notifier)


def _ping(url: str, event: str, body: str) -> None:
    import httpx

    address = url + _PATHS[event]
    answer = httpx.post(address, content=body[:_LONGEST_BODY].encode(errors="replace"), timeout=TIMEOUT)
    if answer.is_error or answer.is_redirect:
        raise RuntimeError(f"the service answered {answer.status_code} {answer.reason_phrase}")


def _mail(rule: AlertRule, alert: Alert, context: Any) -> None:
    from airflow.providers.smtp.notifications.smtp import SmtpNotifier

    notifier = SmtpNotifier(
        to=list(rule.email or ()),
        from_email=rule.sender,
        subject=alert.subject,
        html_content=alert.html,
        smtp_conn_id=rule.smtp_conn_id,
    )
    # Not called but told to notify: a call would take what is in the alert for templates.
    notifier.notify(context)


def _notify(rule: AlertRule, alert: Alert, context: Any) -> None:
    notifier = find_class(str(rule.notifier))(**copy.deepcopy(rule.arguments))
    # Without the DAG, which in some places is one that cannot render.
    notifier({**{key: context[key] for key in context if key != "dag"}, "alert": alert})
