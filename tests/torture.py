"""What the tests of `docs/guarantees.md` share: how long they go on, and what they have tried.

A test of a guarantee is marked with its section, takes the fixture `cases`, and tells of each case that the
backup came through. `make test` runs the short forms; `make torture` the long ones. Both end with a table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

LONG = os.environ.get("MDBACKUP_TORTURE") == "long"


def scaled(short: T, long: T) -> T:
    """Return how far a test goes: as a part of `make test`, or of `make torture`."""
    return long if LONG else short


class Cases:
    """Counts what one test has tried."""

    def __init__(self) -> None:
        self.tried = 0
        self.survived = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold while a case is tried; it counts as lost unless the block ends well."""
        self.tried += 1
        yield
        self.survived += 1

    def add(self, number: int) -> None:
        """Note that so many cases were tried and ended as they should."""
        self.tried += number
        self.survived += number


@dataclass
class Report:
    """What all tests of the guarantees have tried, by section."""

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, section: str, cases: Cases, *, passed: bool) -> None:
        """Count in what one test has tried."""
        self.tried[section] += cases.tried
        self.survived[section] += cases.survived
        self.failed[section] += not passed

    def as_json(self) -> dict[str, list[int]]:
        """Return the numbers of each section, for another process to add to its own."""
        sections = self.tried.keys() | self.failed.keys()
        return {name: [self.tried[name], self.survived[name], self.failed[name]] for name in sections}

    def add_json(self, sections: Mapping[str, Sequence[int]]) -> None:
        """Count in what :meth:`as_json` of another process returned."""
        for name, (tried, survived, failed) in sections.items():
            self.tried[name] += tried
            self.survived[name] += survived
            self.failed[name] += failed

    def lines(self) -> list[str]:
        """Return the table, one line per section."""
        form = "{:<44} {:>12} {:>16} {:>8}"
        lines = [form.format("section", "cases tried", "survived", "losses")]
        for section in sorted(self.tried.keys() | self.failed.keys(), key=_number):
            tried, survived = self.tried[section], self.survived[section]
            losses = max(tried - survived, self.failed[section])
            lines.append(form.format(section, f"{tried:,}", f"{survived:,}", f"{losses:,}"))
        return lines


def _number(section: str) -> tuple[int, str]:
    """Return where a section stands, such as ``10. Leak and soak``."""
    return int(section.partition(".")[0]), section
