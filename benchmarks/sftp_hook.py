"""Airflow's SFTPHook with one connection, file after file: what a DAG without this project would do.

Reads ``{"source": ..., "dest": ..., "names": [...]}`` from standard input, and prints the seconds that it
took, without the imports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from airflow.providers.sftp.hooks.sftp import SFTPHook


def main() -> None:
    """Get every file, and make the directories for them."""
    wanted = json.load(sys.stdin)
    dest = Path(wanted["dest"])
    started = time.monotonic()
    hook = SFTPHook("listing")
    with hook.get_managed_conn():
        for name in wanted["names"]:
            target = dest / name
            target.parent.mkdir(parents=True, exist_ok=True)
            hook.retrieve_file(f"{wanted['source']}/{name}", str(target))
    print(time.monotonic() - started)


if __name__ == "__main__":
    main()
