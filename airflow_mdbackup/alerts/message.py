"""What an alert says, as plain text, as HTML and for Slack. Independent of Airflow.

Names that came from a provider are escaped by :func:`.common.paths.to_text` when they enter a message;
characters that have a meaning in HTML or Slack are escaped here in addition.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

MAX_TEXT = 4000
"""How many characters of an error's text an alert contains."""

BAD_PARAMETER = "a parameter of the run is misspelt or malformed"
KILLED = "the task was killed, or its worker was lost"
TIMED_OUT = "the run exceeded its dagrun_timeout"
UNEXPECTED = "unexpected error"
_KINDS = {
    "ConnectionLost": "the connection to the provider was lost",
    "AccessRefused": "login refused: check the connection's key, the account on A and the host key",
    "NotOnProvider": "the provider lacks a file that the run needs",
    "IndexRefused": "the provider's index was refused",
    "ConsumerIndexDamaged": "the consumer index is damaged",
    "GuardTripped": "the guard stopped the run: too much is gone or changed",
    "ParameterRefused": BAD_PARAMETER,
    "DestinationRefused": "dest is not usable",
    "DestinationFull": "the disk of dest is full",
    "DestinationBroken": "the disk of dest is failing",
    "WorkerExhausted": "the worker is out of open files or memory",
    "DestinationBusy": "another run held the lock on dest for too long",
    "RunIncomplete": "an earlier step left no result",
    "EntriesFailed": "some files could not be backed up",
    "DamageFound": "files of the backup are damaged",
    "AirflowTaskTimeout": "the task exceeded its execution_timeout",
    "TaskDeferralTimeout": "the task exceeded its execution_timeout",
    "HITLRejectException": "an operator rejected the changes",
    "HITLTimeoutError": "nobody approved or rejected the changes in time",
    "AirflowFailException": "the task failed and is not retried",
}
"""What happened, by the name of the exception's class."""


def describe_error(error: BaseException) -> tuple[str, str]:
    """Return what kind of failure an exception is, in words, and its text.

    The text of an unexpected exception begins with the name of its class.
    """
    # Airflow's own exception, by which a task fails without retry, was raised for ours, or in handling it.
    cause = error.__cause__ or error.__context__
    if type(error).__name__ == "AirflowFailException" and type(cause).__name__ in _KINDS:
        error = cause  # type: ignore[assignment]
    name = type(error).__name__
    if name not in _KINDS:
        return UNEXPECTED, shorten(f"{name}: {error}")
    return _KINDS[name], shorten(str(error))


def shorten(text: str) -> str:
    """Return at most :data:`MAX_TEXT` characters of a text."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known about one failed task.

    :ivar step: the task, with the number of its shard.
    :ivar kind: what kind of failure it was, in words.
    :ivar text: the error's text; empty if not known.
    :ivar log_url: where its log is.
    """

    step: str
    kind: str
    text: str
    log_url: str


@dataclass(frozen=True, slots=True)
class Alert:
    """A message to people. The templates of a notifier use its texts.

    :ivar event: ``failure``, ``approval``, ``success``, ``verification`` (a failed one) or ``test``.
    :ivar headline: what happened, without the provider's name.
    :ivar facts: pairs of name and value, in order.
    :ivar failures: the tasks that failed, in the order of the DAG.
    :ivar warning: a success with warnings.
    """

    provider: str
    event: str
    headline: str
    facts: tuple[tuple[str, str], ...] = ()
    failures: tuple[Failure, ...] = ()
    warning: bool = False

    @property
    def subject(self) -> str:
        """One line."""
        return f"[mdbackup] {self.provider}: {self.headline}"

    @property
    def text(self) -> str:
        """The whole message as plain text, with lines of any length."""
        return self._text(str, str)

    @property
    def mrkdwn(self) -> str:
        """The text for Slack, which sees no mentions or links in names from the provider."""
        return html.escape(self._text(_as_code_block, _as_code), quote=False)

    def _text(self, block: Callable[[str], str], line: Callable[[str], str]) -> str:
        """Return the whole message.

        :param block: formats a text of several lines that may contain names from the provider; ``line``
            likewise one line.
        """
        parts = [line(f"{self.provider}: {self.headline}")]
        for failure in self.failures:
            text = block(failure.text) if failure.text else ""
            lines = [f"{failure.step}: {failure.kind}", text, f"Log: {failure.log_url}"]
            parts.append("\n".join(filter(None, lines)))
        facts = (f"{name}: {value if _is_link(value) else line(value)}" for name, value in self.facts)
        parts.append("\n".join(facts))
        return "\n\n".join(filter(None, parts)) + "\n"

    @property
    def html(self) -> str:
        """The whole message as a fragment of HTML."""
        parts = [f"<h3>{html.escape(f'{self.provider}: {self.headline}')}</h3>"]
        for failure in self.failures:
            parts.append(f"<p><b>{html.escape(failure.step)}</b>: {html.escape(failure.kind)}</p>")
            if failure.text:
                parts.append(f'<pre style="white-space: pre-wrap">{html.escape(failure.text)}</pre>')
            parts.append(
                f'<p><a href="{html.escape(failure.log_url)}">Log of {html.escape(failure.step)}</a></p>'
            )
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_linked(value)}</td></tr>" for name, value in self.facts
        )
        return "\n".join([*parts, f"<table>{rows}</table>" if rows else ""])


def _as_code_block(text: str) -> str:
    """Return a text as code, in which Slack does not turn a name such as www.example.com into a link."""
    return "```\n" + text.replace("`", "'") + "\n```"


def _as_code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`" if text else ""


def _is_link(value: str) -> bool:
    return value.startswith(("http://", "https://"))


def _linked(value: str) -> str:
    escaped = html.escape(value)
    return f'<a href="{escaped}">{escaped}</a>' if _is_link(value) else escaped


def failed(
    provider: str,
    failures: Sequence[Failure],
    *,
    last_good: str | None,
    run_url: str,
    outcomes: str = "",
    headline: str = "",
) -> Alert:
    """Return the alert about a failed run.

    :param last_good: the age of the last good backup, as text; None if not known.
    :param outcomes: what became of the files; empty if not known.
    :param headline: what happened; by default the kind of the first failure.
    """
    if not headline:
        headline = f"backup FAILED in {failures[0].step}: {failures[0].kind}" if failures else "backup FAILED"
    facts = [("Last good backup", last_good or "unknown")]
    if outcomes:
        facts.insert(0, ("Files", outcomes))
    return Alert(provider, "failure", headline, (*facts, ("Run", run_url)), tuple(failures))


def age(at: datetime, now: datetime) -> str:
    """Return how long ago a time was, as in ``2 days 3 hours ago (2026-11-24 03:00 UTC)``."""
    minutes = max(now - at, timedelta()) // timedelta(minutes=1)
    parts = {"day": minutes // 1440, "hour": minutes // 60 % 24, "minute": minutes % 60}
    units = [f"{count} {unit}{'s' * (count > 1)}" for unit, count in parts.items() if count]
    return f"{' '.join(units[:2]) or 'less than a minute'} ago ({at:%Y-%m-%d %H:%M} UTC)"
