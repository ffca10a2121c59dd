"""Fuzz one target with atheris, guided by what the code covers: `python -m tests.fuzz index 60`.

What is of interest on the way goes to a directory below ``build/``; an input that fails is written there, and
belongs into the corpus once the defect is mended. See `make fuzz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["airflow_mdbackup"]):
    from tests.fuzz.targets import CORPUS, TARGETS


def main(target: str, seconds: str) -> None:
    """Fuzz ``target`` for so many seconds."""
    found = Path("build", "fuzz", target)
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=20000", "-timeout=20", "-rss_limit_mb=1000"]
    options += ["-print_final_stats=1", f"-artifact_prefix={found.parent}/failed-{target}-"]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / target)], TARGETS[target])
    atheris.Fuzz()


main(*sys.argv[1:])
