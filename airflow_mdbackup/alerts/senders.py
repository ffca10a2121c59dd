"""Sending an alert: as an e-mail, by any notifier, or as a ping. Nothing here raises.

A DAG processor kills a callback that takes too long, so pings give up after ten seconds.
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

PING_TIMEOUT = 10.0
"""Seconds that a ping may take for each of connecting, sending and the answer."""

SEND_TIMEOUT = 15.0
"""Seconds that one channel gets, out of the 50 that a DAG processor allows for all."""

_PING_PATHS = {"start": "/start", "failure": "/fail", "success": "", "test": "/log"}
_MAX_PING_BODY = 10_000


def send(rule: AlertRule, event: str, alert: Alert | None, context: Any) -> bool:
    """Send an alert through one channel, log the result, and return whether it was accepted.

    :param event: ``start``, ``failure``, ``approval``, ``success`` or ``verification``.
    :param alert: the message; None for ``start``, for which there are only pings.
    """
    if problem := deliver(rule, event, alert, context):
        log.error(
            "The alert was NOT sent by %s: %s. Backups continue; correct `alerts` in the configuration, or "
            "what it refers to",
            *(describe_rule(rule), problem),
        )
    else:
        log.info("%s alert sent by %s", event.capitalize(), describe_rule(rule))
    return not problem


def deliver(rule: AlertRule, event: str, alert: Alert | None, context: Any) -> str:
    """Send an alert through one channel, and return why it was not accepted; empty if it was.

    :param event: as for :func:`send`; or ``test``, for which a ping makes an entry in the check's log.
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

    # A silent or endless server must not keep the other channels, or the backup, waiting.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SEND_TIMEOUT)
    if thread.is_alive():
        failed.append(TimeoutError(f"it took longer than {SEND_TIMEOUT:.0f} s"))
    return f"{type(failed[0]).__name__}: {failed[0]}" if failed else ""


def describe_rule(rule: AlertRule) -> str:
    """Return the name of a rule's channel, without its secrets."""
    if rule.ping_url is not None:
        return f"ping_url at {urlsplit(rule.ping_url).hostname}"
    return f"e-mail to {', '.join(rule.email)}" if rule.email else str(rule.notifier)


def _ping(url: str, event: str, body: str) -> None:
    import httpx

    address = url + _PING_PATHS[event]
    answer = httpx.post(address, content=body[:_MAX_PING_BODY].encode(errors="replace"), timeout=PING_TIMEOUT)
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
    # A call of the notifier itself would render the texts of the alert as templates.
    notifier.notify(context)


def _notify(rule: AlertRule, alert: Alert, context: Any) -> None:
    notifier = find_class(str(rule.notifier))(**copy.deepcopy(rule.arguments))
    # Without the DAG: in the DAG processor it is serialized, and cannot render templates.
    notifier({**{key: context[key] for key in context if key != "dag"}, "alert": alert})
