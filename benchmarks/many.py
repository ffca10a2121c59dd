"""What many providers and runs cost Airflow: ``python -m benchmarks.many``, which is ``make bench-many``.

1. Parsing: the seconds in which `dags/mdbackup.py` makes its DAGs, in a process of its own, after all
   imports: as the DAG processor does it, and as a worker does it for one task.
2. Rows: what one run adds to each table of Airflow's database, with four shards and with nothing to do.
3. Scheduling: the seconds of such a run, alone and beside the DAGs of all other providers.

What this does not give: several schedulers, another database than SQLite, several runs at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.scene import REPOSITORY
from demo.sshd import ProviderServer
from demo.stack import AirflowStack

SHARDS = 4
FILES = 200
DAG_ID = "mdbackup_p0"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

# Prints seconds. Its argument: the DAG of the task for which a worker parses; empty, as the DAG processor.
PARSE = """
import runpy, sys, time
import airflow_mdbackup.dags.backup
from airflow.sdk.definitions._internal.dag_parsing_context import _airflow_parsing_context_manager
with _airflow_parsing_context_manager(dag_id=sys.argv[1] or None):
    started = time.perf_counter()
    runpy.run_path("dags/mdbackup.py")
    print(time.perf_counter() - started)
"""


def main() -> None:
    """Measure, and print tables."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="mdbackup-many-") as name:
        folder = Path(name)
        with ProviderServer(folder / "server") as server:
            _parsing(folder, server, options)
            _running(folder, server, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("--providers", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def _configure(folder: Path, server: ProviderServer, count: int) -> Path:
    """Write the configuration of `count` providers, of which only the first is ever run."""
    providers: dict[str, Any] = {
        f"p{number}": {
            "sftp_conn_id": "backupop",
            "ssh_conn_id": "index",
            "chroot": server.chroot,
            "source": [f"{server.prefix}/backups"],
            "index": f"{server.prefix}/.mdbackup/index.md5",
            "dest": str(folder / "dest" / f"{count}-p{number}"),
            "schedule": None,
            "shards": SHARDS,
            "exclude": ["*.tmp", "cache/"],
            "bandwidth_limit": "500MB",
            "tags": ["many"],
        }
        for number in range(count)
    }
    file = folder / f"{count}.json"
    file.write_text(json.dumps({"providers": providers}))
    return file


# --- parsing ----------------------------------------------------------------------------------------


def _parsing(folder: Path, server: ProviderServer, options: argparse.Namespace) -> None:
    table = Table("providers", "all DAGs, s", "the DAG of one task, s", title="Parsing, median and worst")
    for count in sorted({1, 10, options.providers}):
        file = _configure(folder, server, count)
        figures = [[_seconds(folder, file, only) for _ in range(options.runs)] for only in ("", DAG_ID)]
        table.add_row(str(count), *(f"{median(seconds):.3f}  {max(seconds):.3f}" for seconds in figures))
    console.print(table)


def _seconds(folder: Path, file: Path, only: str) -> float:
    ours = {"AIRFLOW_HOME": str(folder / "parsing"), "AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(file)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    command = [sys.executable, "-c", PARSE, only]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=inherited | ours, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.splitlines()[-1])


# --- runs -------------------------------------------------------------------------------------------


def _running(folder: Path, server: ProviderServer, options: argparse.Namespace) -> None:
    for number in range(FILES):
        path = server.tree / "backups" / f"dir{number % 10}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2000))
    rows = Table("rows that a run adds to", f"{SHARDS} shards", "nothing to do", title="Database")
    seconds = Table("providers", "a run with nothing to do, s: median and worst", title="Scheduling")
    for count in sorted({1, options.providers}):
        with _airflow(folder, server, count) as airflow:
            before = _sizes(airflow)
            _run(airflow)
            first = _sizes(airflow)
            durations = [_run(airflow) for _ in range(options.runs)]
            last = _sizes(airflow)
        seconds.add_row(str(count), f"{median(durations):.1f}  {max(durations):.1f}")
    for name in sorted(last):
        added = first[name] - before[name]
        each = (last[name] - first[name]) / options.runs
        if added or each:
            rows.add_row(name, f"{added:,.0f}", f"{each:,.1f}")
    console.print(rows)
    console.print(seconds)


@contextmanager
def _airflow(folder: Path, server: ProviderServer, count: int) -> Iterator[AirflowStack]:
    env = {
        "AIRFLOW_CONN_BACKUPOP": json.dumps(server.sftp_connection()),
        "AIRFLOW_CONN_INDEX": json.dumps(server.ssh_connection()),
        "AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(_configure(folder, server, count)),
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        # As by default, where the throw-away Airflow looks for changes much more often.
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
    }
    home = folder / f"airflow-{count}"
    with AirflowStack(home, dags_folder=REPOSITORY / "dags", env=env) as airflow:
        airflow.wait_for_dag(f"mdbackup_p{count - 1}", timeout=180)
        yield airflow


def _run(airflow: AirflowStack) -> float:
    """Do a run, and return how long the scheduler says that it took."""
    run_id = airflow.trigger(DAG_ID)
    state = airflow.wait_for_run(DAG_ID, run_id)
    if state != "success":
        raise SystemExit(f"The run is {state}: {airflow.task_states(DAG_ID, run_id)}")
    return float(airflow.get(f"/dags/{DAG_ID}/dagRuns/{run_id}")["duration"])


def _sizes(airflow: AirflowStack) -> dict[str, float]:
    """Return the rows of each table that are of the DAG which is run, or of no DAG; and bytes."""
    with closing(
        sqlite3.connect(f"file:{airflow.home}/airflow.db?mode=ro", uri=True, timeout=60)
    ) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = [name for (name,) in names if not name.startswith("sqlite_")]
        sizes: dict[str, float] = {}
        for table in tables:
            columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            mine = f" WHERE dag_id = '{DAG_ID}'" if "dag_id" in columns else ""
            (sizes[table],) = database.execute(f"SELECT count(*) FROM {table}{mine}").fetchone()
        (sizes["bytes of all XComs"],) = database.execute(
            f"SELECT coalesce(sum(length(value)), 0) FROM xcom WHERE dag_id = '{DAG_ID}'"
        ).fetchone()
    return sizes


if __name__ == "__main__":
    main()
