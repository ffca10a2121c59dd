"""The benchmarks run; what they measure is no matter here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.results import read

PROJECT = Path(__file__).parents[2]
WORKS = ["small", "percent", "restore", "verify"]


def test_works_are_measured_with_little_data(tmp_path: Path) -> None:
    """Ours always; of the others, those that are installed."""
    command = [sys.executable, "-m", "benchmarks.run", *WORKS, "--rounds", "1", "--scale", "0.005"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for work in WORKS:
        measured = {measurement.who for measurement in read(tmp_path / f"{work}.json").measurements}
        assert {"ours", {"verify": "md5sum -c", "percent": "rsync -ac"}.get(work, "rsync -a")} <= measured
