"""The figures as pictures, in docs/images: ``python -m benchmarks.plot [DIRECTORY]``, ``make bench-plots``.

Draws what there is in the directory, build/bench by default: rtt.json, growth.json, shards.json,
index-million.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.indexer import FIND, MD5SUM, WARM
from benchmarks.results import OURS, Results, read, rows
from benchmarks.scene import REPOSITORY

IMAGES = REPOSITORY / "docs" / "images"
STYLE = {OURS: ("#0b6e4f", "o"), "rsync -a": ("#c8553d", "s"), "sftp": ("#588b8b", "^")}
STEPS = {
    "pull": ("PullChanged", "#0b6e4f", "o"),
    "commit": ("CommitBackup", "#c8553d", "s"),
    "diff": ("DiffIndexes", "#588b8b", "^"),
    "reading": ("reading the index", "#f28f3b", "v"),
}

INDEXERS = {
    OURS: ("ours, everything hashed", "#0b6e4f", "o"),
    MD5SUM: ("find and md5sum", "#c8553d", "s"),
    WARM: ("ours, nothing changed", "#588b8b", "^"),
    FIND: ("find", "#f28f3b", "v"),
}


def main() -> None:
    """Draw what has been measured."""
    directory = Path(sys.argv[1]) if sys.argv[1:] else REPOSITORY / "build" / "bench"
    pyplot.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    for name, draw, image in (
        ("rtt", _rtt, "rtt"),
        ("growth", _growth, "growth"),
        ("shards", _shards, "shards"),
        ("index-million", _index, "index"),
    ):
        if (path := directory / f"{name}.json").exists():
            figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
            draw(axes, read(path))
            figure.savefig(IMAGES / f"benchmark-{image}.png", dpi=120)
            print(IMAGES / f"benchmark-{image}.png")


def _rtt(axes: Axes, results: Results) -> None:
    """Files per second against the round trip, of each contestant."""
    found = rows(results)
    for who in dict.fromkeys(row.one.who for row in found):
        his = [row.one for row in found if row.one.who == who]
        points = [(row.one.rtt, row.one.files / row.seconds) for row in found if row.one.who == who]
        color, marker = STYLE[who]
        label = who if his[0].portion == 1 else f"{who}, with {his[0].files:,} of them"
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
    most = max(row.one.files for row in found)
    axes.set(xlabel="round trip, ms", ylabel="files per second", yscale="log")
    axes.set_title(f"{most:,} files of 0.5 to 8 KB")
    _plain(axes, "y")
    axes.legend()


def _growth(axes: Axes, results: Results) -> None:
    """Seconds against files, of the steps whose cost grows with them."""
    found = rows(results)
    for step, (label, color, marker) in STEPS.items():
        points = [(row.one.files, row.parts[step]) for row in found]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
    axes.set(xlabel="files", ylabel="seconds", xscale="log", yscale="log")
    axes.set_title("A first run: seconds of each step")
    _plain(axes, "xy")
    axes.legend()


def _index(axes: Axes, results: Results) -> None:
    """Seconds against files, of an index that is built and of what does half of it."""
    found = rows(results)
    for who, (label, color, marker) in INDEXERS.items():
        points = [(row.one.files, row.seconds) for row in found if row.one.who == who]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
    axes.set(xlabel="files", ylabel="seconds", xscale="log", yscale="log")
    axes.set_title(f"Building the provider index. Cores: {results.machine['cores'].split(',')[0]}")
    _plain(axes, "xy")
    axes.legend()


def _shards(axes: Axes, results: Results) -> None:
    """Files per second with each number of shards."""
    found = rows(results)
    names = [str(row.one.shards) for row in found]
    bars = axes.bar(names, [row.one.files / row.seconds for row in found], color="#0b6e4f", width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=2)
    axes.set(xlabel="shards", ylabel="files per second")
    axes.margins(y=0.1)
    axes.set_title(f"{found[0].one.files:,} files of 0.5 to 8 KB. Cores: {results.machine['cores']}")
    _plain(axes, "y")


def _plain(axes: Axes, which: str) -> None:
    """Write numbers out, with commas, instead of powers of ten."""
    for name in which:
        getattr(axes, f"{name}axis").set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


if __name__ == "__main__":
    main()
