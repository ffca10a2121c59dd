"""What was measured, as JSON, and the medians and ratios of it, as a table.

A ratio is how many times faster ours was than another in the same run: the other's median over ours. What was
done with a part of the files counts as so many times longer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

OURS = "ours"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One round of one contestant.

    :ivar files: that were copied, or entries of an index; ``size`` is their bytes.
    :ivar portion: these files were one of so many parts of the work.
    :ivar rtt: milliseconds of a round trip.
    :ivar peak: the most memory that the process had, in bytes, where that was measured.
    :ivar parts: the seconds of each step; ``busy`` the share of all cores that was busy meanwhile.
    :ivar base: who it is compared with; nobody if it is empty.
    """

    who: str
    round: int
    seconds: float
    files: int
    size: int = 0
    portion: float = 1
    rtt: float = 0
    shards: int = 1
    peak: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    base: str = OURS

    def told(self) -> str:
        """Return it for people."""
        told = [f"{self.seconds:.2f} s", f"{self.files:,} files", f"{self.size / 1e6:,.1f} MB"]
        told += [f"{self.rtt:g} ms away"] * bool(self.rtt) + [f"{self.shards} shards"] * (self.shards > 1)
        return f"{self.who}: {', '.join(told)}; {_steps(self.parts, self.busy)}".rstrip("; ")


@dataclass(frozen=True, slots=True)
class Results:
    """A work, as measured on a machine.

    :ivar about: what was done, for people; ``note``: what is counted.
    :ivar machine: what a reader must know to judge the figures.
    :ivar targets: what is wanted, by contestant, as text.
    """

    work: str
    about: str
    note: str
    machine: dict[str, str]
    targets: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(path: Path) -> Results:
    """Return what `Results.write` wrote."""
    row = json.loads(path.read_text())
    row["measurements"] = [Measurement(**measurement) for measurement in row["measurements"]]
    return Results(**row)


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one contestant with one task: ``one`` of them, the seconds of each, and medians."""

    one: Measurement
    times: Sequence[float]
    seconds: float
    parts: dict[str, float]
    busy: dict[str, float]
    peak: int
    ratio: float | None  # None for ours


def rows(results: Results) -> list[Row]:
    """Return the medians, in the order in which they were measured."""
    contests: dict[tuple[Any, ...], list[Measurement]] = {}
    for one in results.measurements:
        contests.setdefault((one.who, one.rtt, one.shards, one.files), []).append(one)
    bases = {
        (who, same[0].rtt, round(same[0].files * same[0].portion)): median(one.seconds for one in same)
        for (who, _, shards, _), same in contests.items()
        if shards == 1
    }
    found = []
    for same in contests.values():
        one, times = same[0], sorted(each.seconds for each in same)
        named = (one.base, one.rtt, round(one.files * one.portion))
        base = bases.get(named) if one.base != one.who else None
        seconds = median(times)
        ratio = seconds * one.portion / base if base else None
        parts = {step: median(each.parts[step] for each in same) for step in one.parts}
        busy = {step: median(each.busy[step] for each in same) for step in one.busy}
        found.append(Row(one, times, seconds, parts, busy, max(each.peak for each in same), ratio))
    return found


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return heading and lines of the table, without columns in which there would be nothing."""
    cells = [_cells(row, results.targets) for row in rows(results)]
    head = [name for name in (cells[0] if cells else ()) if any(line[name] for line in cells)]
    return head, [[line[name] for name in head] for line in cells]


def _cells(row: Row, targets: dict[str, str]) -> dict[str, str]:
    one = row.one
    return {
        "who": one.who,
        "round trip": f"{one.rtt:g} ms" if one.rtt else "",
        "shards": f"{one.shards}" if one.shards > 1 else "",
        "files": f"{one.files:,}" + (f" (1/{one.portion:.0f})" if one.portion > 1 else ""),
        "seconds": f"{row.seconds:.2f}" if row.seconds else "",
        "least-most": f"{row.times[0]:.2f}-{row.times[-1]:.2f}" if len(row.times) > 1 else "",
        "files/s": _rate(one.files, row.seconds) if one.files >= 100 else "",
        "MB/s": _rate(one.size / 1e6, row.seconds),
        "peak MiB": f"{row.peak / (1 << 20):,.0f}" if row.peak else "",
        "ours is": f"{row.ratio:.2f} x" if row.ratio else "",
        "aim": targets.get(one.who, ""),
        "steps": _steps(row.parts, row.busy),
    }


def _steps(parts: dict[str, float], busy: dict[str, float]) -> str:
    """Return the seconds of each step, and how busy all cores were in those that took a while."""
    return ", ".join(
        f"{step} {seconds:.2f}" + (f" ({busy[step]:.0%} busy)" if step in busy and seconds > 0.2 else "")
        for step, seconds in parts.items()
    )


def _rate(amount: float, seconds: float) -> str:
    rate = amount / seconds if seconds else 0
    return f"{rate:,.{0 if rate >= 10 else 1}f}" if rate else ""
