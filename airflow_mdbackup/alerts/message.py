"""What an alert says, as plain text, as HTML and for Slack. Knows no Airflow.

What comes from a provider is escaped by :func:`.common.paths.to_text` wherever it enters a message; for a
place where characters mean something, it is escaped here once more.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

LONGEST = 4000
"""How many characters of an error's text are told."""

MISTAKEN = "a parameter of the run is misspelt or malformed"
_KINDS = {
    "ConnectionLost": "the connection to the provider was lost",
    "AccessRefused": "no access: by the connection on this side, the account, or the host key",
    "NotOnProvider": "the provider lacks a file that the run needs",
    "IndexRefused": "the provider's index was refused",
    "ConsumerIndexDamaged": "the consumer's index is damaged",
    "GuardTripped": "the guard stopped the run: too much is gone or changed",
    "ParameterRefused": MISTAKEN,
    "DestinationRefused": "dest is not what it should be",
    "DestinationFull": "the disk of dest is full",
    "DestinationBroken": "the disk of dest fails",
    "WorkerExhausted": "the worker has no open files or no memory left",
    "DestinationBusy": "another run held dest for too long",
    "RunIncomplete": "an earlier step left no result",
    "EntriesFailed": "some files could not be backed up",
    "DamageFound": "files of the backup are damaged",
    "AirflowTaskTimeout": "it took longer than its execution_timeout",
    "TaskDeferralTimeout": "it took longer than its execution_timeout",
    "HITLRejectException": "a person refused what the guard stopped",
    "HITLTimeoutError": "nobody answered in time whether to go on",
    "AirflowFailException": "it failed for good",
}
KILLED = "it was killed, or its worker was lost"
TIMED_OUT = "the run took longer than its dagrun_timeout"


def kind_of(error: BaseException) -> tuple[str, str]:
    """Return in words what kind of failure an exception is, and its text."""
    # Airflow's own exception, by which a task fails without retry, was raised for ours, or in handling it.
    cause = error.__cause__ or error.__context__
    if type(error).__name__ == "AirflowFailException" and type(cause).__name__ in _KINDS:
        error = cause  # type: ignore[assignment]
    name = type(error).__name__
    return _KINDS.get(name, name), cut(str(error))


def cut(text: str) -> str:
    """Return at most :data:`LONGEST` characters of a text."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of one failed task.

    :ivar step: the task, with the number of its shard.
    :ivar kind: what kind of failure it was, in words.
    :ivar text: what the error said; empty if that is not known.
    :ivar log_url: where its log is.
    """

    step: str
    kind: str
    text: str
    log_url: str


@dataclass(frozen=True, slots=True)
class Alert:
    """What people are told. Its texts are what a notifier's templates use.

    :ivar event: ``failure``, ``approval``, ``success``, ``verification`` (one that failed) or ``test``.
    :ivar headline: what happened, after the provider's name.
    :ivar facts: pairs of what and which, in their order.
    :ivar failures: the tasks that failed, in the order of the DAG.
    :ivar warning: it is a success with warnings.
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
        """All of it as plain text, lines of any length."""
        return self._text(str, str)

    @property
    def mrkdwn(self) -> str:
        """The text, in which Slack sees neither mentions nor links of somebody else's making."""
        return html.escape(self._text(_in_a_block, _in_a_line), quote=False)

    def _text(self, block: Callable[[str], str], line: Callable[[str], str]) -> str:
        """Return all of it, with what may have names from elsewhere as ``block`` and ``line`` show it."""
        parts = [line(f"{self.provider}: {self.headline}")]
        for failure in self.failures:
            said = block(failure.text) if failure.text else ""
            lines = [f"{failure.step}: {failure.kind}", said, f"Log: {failure.log_url}"]
            parts.append("\n".join(filter(None, lines)))
        facts = (f"{name}: {value if _is_link(value) else line(value)}" for name, value in self.facts)
        parts.append("\n".join(facts))
        return "\n\n".join(filter(None, parts)) + "\n"

    @property
    def html(self) -> str:
        """All of it as a fragment of HTML."""
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


def _in_a_block(text: str) -> str:
    """Return a text as code, in which Slack makes no link of a name such as www.example.com."""
    return "```\n" + text.replace("`", "'") + "\n```"


def _in_a_line(text: str) -> str:
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
    """Return the alert of a failed run.

    :param last_good: since when there is a good backup, in words; None if that is not known.
    :param outcomes: what became of the files, as far as anything did.
    :param headline: what happened; by default the kind of the first failure.
    """
    if not headline:
        headline = f"backup FAILED in {failures[0].step}: {failures[0].kind}" if failures else "backup FAILED"
    facts = [("Last good backup", last_good or "unknown")]
    if outcomes:
        facts.insert(0, ("Files", outcomes))
    return Alert(provider, "failure", headline, (*facts, ("Run", run_url)), tuple(failures))


def age(at: datetime, now: datetime) -> str:
    """Return how long ago a time is, in words: ``2 days 3 hours ago (2026-11-24 03:00 UTC)``."""
    minutes = max(now - at, timedelta()) // timedelta(minutes=1)
    parts = {"day": minutes // 1440, "hour": minutes // 60 % 24, "minute": minutes % 60}
    told = [f"{count} {unit}{'s' * (count > 1)}" for unit, count in parts.items() if count]
    return f"{' '.join(told[:2]) or 'less than a minute'} ago ({at:%Y-%m-%d %H:%M} UTC)"
