"""The findings of an audit, and how they are displayed."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Verdict(StrEnum):
    """The result of a check."""

    TIGHT = "tight"
    LOOSER = "looser"  # than it should be
    UNKNOWN = "unknown"  # could not be determined, and so not proven


@dataclass(frozen=True, slots=True)
class Observation:
    """What a probe observed, and its verdict.

    :ivar text: printable.
    :ivar change: what to change, if that depends on the observation; if empty, the check has it.
    """

    verdict: Verdict
    text: str
    change: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the audit's table. All texts are printable.

    :ivar account: ``backup account`` or ``index account``.
    :ivar check: what is to be proven, such as ``no shell``.
    :ivar change: what to change; empty when tight.
    """

    account: str
    check: str
    verdict: Verdict
    seen: str
    change: str


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings about a provider.

    :ivar logins: the login of each account.
    """

    findings: tuple[Finding, ...]
    logins: dict[str, str]

    @property
    def loose(self) -> tuple[Finding, ...]:
        """The findings that are not proven to be tight."""
        return tuple(finding for finding in self.findings if finding.verdict is not Verdict.TIGHT)

    @property
    def counts(self) -> dict[str, int]:
        """The number of findings of each verdict."""
        counts = Counter(finding.verdict for finding in self.findings)
        return {verdict.value: counts[verdict] for verdict in Verdict}


_COLOURS = {Verdict.TIGHT: "green", Verdict.LOOSER: "bold red", Verdict.UNKNOWN: "yellow"}
_WIDTH = 140  # characters, without a terminal


def show(provider: str, audit: Audit, console: Console | None = None) -> None:
    """Print the tables, and below them what to change, so that it can be copied."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    for account, login in audit.logins.items():
        # Text, since rich interprets brackets in plain strings, which may quote the server.
        table = Table(
            title=Text(f"{provider}: {account} {login} (in sshd_config: Match User {login})"),
            title_justify="left",
            show_lines=False,
        )
        for heading in ("check", "verdict", "seen", "change"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "verdict")
        for finding in audit.findings:
            if finding.account == account:
                verdict = Text(finding.verdict.value, _COLOURS[finding.verdict])
                table.add_row(Text(finding.check), verdict, Text(finding.seen), Text(finding.change))
        console.print(table)
    for line in summary(provider, audit):
        console.print(Text(line), soft_wrap=True)


def as_text(provider: str, audit: Audit) -> str:
    """Return what :func:`show` prints, without colours."""
    output = io.StringIO()
    show(provider, audit, Console(file=output, width=_WIDTH))
    return output.getvalue()


def summary(provider: str, audit: Audit) -> list[str]:
    """Return the findings in a few lines, with what to change."""
    counts = audit.counts
    if not audit.loose:
        return [f"{provider}: all {counts['tight']} checks are tight."]
    lines = [
        f"{provider}: of {len(audit.findings)} checks, {counts['looser']} found settings looser than they"
        f" should be, and {counts['unknown']} could not be determined. What to change:"
    ]
    checks: dict[tuple[str, str], list[str]] = {}
    for finding in audit.loose:
        checks.setdefault((finding.account, finding.change or finding.seen), []).append(finding.check)
    lines += [f"- {account}: {change} ({', '.join(names)})" for (account, change), names in checks.items()]
    return lines


def as_json(provider: str, audit: Audit) -> str:
    """Return the audit as a JSON document."""
    document: dict[str, Any] = {
        "provider": provider,
        "tight": not audit.loose,
        "counts": audit.counts,
        "accounts": audit.logins,
        "findings": [asdict(finding) for finding in audit.findings],
    }
    return json.dumps(document, indent=2)
