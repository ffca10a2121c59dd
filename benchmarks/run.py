"""Measure, and print tables: ``python -m benchmarks.run [WORK ...]``, which is ``make bench``."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Column, Table

from benchmarks.peers import versions
from benchmarks.results import Results, table
from benchmarks.scene import REPOSITORY, filesystem, scene
from benchmarks.work import Work
from benchmarks.works import WORKS

OUT = REPOSITORY / "build" / "bench"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def main() -> int:
    """Measure the works that are asked for, one after the other; return the exit status."""
    signal.signal(signal.SIGTERM, _end)
    options = _options()
    try:
        for name in options.work:
            _measure(name, WORKS[name], options)
    except KeyboardInterrupt:
        console.print("\nInterrupted, everything is stopped.")
        return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"of {' '.join(WORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rtt", type=float, help="milliseconds of a round trip, for works of copying")
    parser.add_argument("--scale", type=float, default=1, help="the share of the data, to try it out")
    parser.add_argument("--dest", type=Path, help="an existing directory in which copies are made")
    parser.add_argument("--out", type=Path, default=OUT, help="directory for the figures, as JSON")
    options = parser.parse_args()
    options.work = options.work or list(WORKS)
    if unknown := set(options.work) - set(WORKS):
        parser.error(f"there is no work {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    return options


def _measure(name: str, work: Work, options: argparse.Namespace) -> None:
    if options.rtt is not None and work.rtt:
        work, name = replace(work, rtt=(options.rtt,)), f"{name}-{options.rtt:g}ms"
    work = work.scaled(options.scale)
    with scene(work.room, options.dest) as place:
        machine = _machine(options, place.folder, place.dest)
        results = Results(name, work.about, work.note, machine, work.targets)
        console.print(f"\n[bold]{name}[/]: {work.about}")
        console.print(f"  server's files: {machine['source']}; copies: {machine['dest']}; {machine['scale']}")
        try:
            for measurement in work.measure(place, work, options.rounds):
                results.measurements.append(measurement)
                console.print(f"  round {measurement.round + 1}: {measurement.told()}", style="dim")
        finally:
            _tell(results)
    results.write(options.out / f"{name}.json")


def _tell(results: Results) -> None:
    head, lines = table(results)
    shown = Table(
        *(
            Column(name, no_wrap=name != "steps", justify="left" if name in ("who", "steps") else "right")
            for name in head
        )
    )
    for line in lines:
        shown.add_row(*line)
    console.print(shown if lines else "Nothing was measured.")
    console.print(results.note, style="dim")


def _machine(options: argparse.Namespace, source: Path, dest: Path) -> dict[str, str]:
    """Return what a reader must know to judge the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": f"{os.cpu_count()}, shared by client and server",
        "memory": f"{memory / (1 << 30):.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "source": filesystem(source),
        "dest": filesystem(dest),
        "rounds": str(options.rounds),
        "scale": f"{options.scale:g} of the data",
        **versions(),
    }


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
