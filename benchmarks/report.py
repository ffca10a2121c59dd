"""The figures as Markdown, for docs/performance.md: ``python -m benchmarks.report build/bench/*.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.results import Results, read, table

_OF_WORK = ("rounds", "scale")  # what may differ from one work to the next


def main() -> None:
    """Print the works of the files that are named, and each machine before the first of its works."""
    machine: dict[str, str] = {}
    for path in sys.argv[1:]:
        results = read(Path(path))
        measured_on = {name: told for name, told in results.machine.items() if name not in _OF_WORK}
        if measured_on != machine:
            machine = measured_on
            print("\n".join(["| measured on | |", "|---|---|", *(_line(*item) for item in machine.items())]))
        print(f"\n{_section(results)}")


def _section(results: Results) -> str:
    head, lines = table(results)
    rule = _line("---", *["--:"] * (len(head) - 1))
    body = [_line(*head), rule, *(_line(*line) for line in lines)]
    how = " ".join(f"{name.capitalize()}: {results.machine[name]}." for name in _OF_WORK)
    return "\n".join([f"### {results.work}: {results.about}", "", *body, "", f"{results.note} {how}"])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
