"""What an audit found, and how it is shown."""

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
    """What a check came to."""

    TIGHT = "tight"
    LOOSER = "looser"  # than it should be
    UNKNOWN = "unknown"  # it could not be judged, which is no proof


@dataclass(frozen=True, slots=True)
class Seen:
    """What a probe saw, printable, and what it makes of that.

    :ivar change: what to change, where that depends on what was seen; else the check knows.
    """

    verdict: Verdict
    text: str
    change: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the audit's table. All texts are printable.

    :ivar account: ``backup account`` or ``index account``.
    :ivar check: what is proven, such as ``no shell``.
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
        """What is not proven to be tight."""
        return tuple(finding for finding in self.findings if finding.verdict is not Verdict.TIGHT)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each verdict."""
        counts = Counter(finding.verdict for finding in self.findings)
        return {verdict.value: counts[verdict] for verdict in Verdict}


_COLOURS = {Verdict.TIGHT: "green", Verdict.LOOSER: "bold red", Verdict.UNKNOWN: "yellow"}
_WIDTH = 140  # characters, where there is no terminal that has a width


def show(provider: str, audit: Audit, console: Console | None = None) -> None:
    """Print the tables and, free of them so that it can be copied, what to change."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    for account, login in audit.logins.items():
        # Text, because in strings rich reads brackets as instructions, and here may be words of the server.
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
    for line in told(provider, audit):
        console.print(Text(line), soft_wrap=True)


def as_text(provider: str, audit: Audit) -> str:
    """Return what :func:`show` prints, without colours."""
    output = io.StringIO()
    show(provider, audit, Console(file=output, width=_WIDTH))
    return output.getvalue()


def told(provider: str, audit: Audit) -> list[str]:
    """Return the lines that say in short what was found, and what to change."""
    counts = audit.counts
    if not audit.loose:
        return [f"{provider}: all {counts['tight']} checks are tight."]
    lines = [
        f"{provider}: of {len(audit.findings)} checks, {counts['looser']} are looser than they should be and"
        f" {counts['unknown']} could not be judged. What to change:"
    ]
    checks: dict[tuple[str, str], list[str]] = {}
    for one in audit.loose:
        checks.setdefault((one.account, one.change or one.seen), []).append(one.check)
    lines += [f"- {account}: {change} ({', '.join(names)})" for (account, change), names in checks.items()]
    return lines


def as_json(provider: str, audit: Audit) -> str:
    """Return the same for programs."""
    document: dict[str, Any] = {
        "provider": provider,
        "tight": not audit.loose,
        "counts": audit.counts,
        "accounts": audit.logins,
        "findings": [asdict(finding) for finding in audit.findings],
    }
    return json.dumps(document, indent=2)
