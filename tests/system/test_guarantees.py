"""What docs/guarantees.md promises, where it takes a real scheduler: overlapping runs, and secrets."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.index.canonical import read_entries
from tests.system.conftest import SharedAirflow, Site, dag_files, provider_yaml
from tests.system.connections import GARBAGE, PASSPHRASE, PASSWORD
from tests.torture import Cases, scaled
from tests.waiting import until


@pytest.fixture(scope="module")
def site(shared_airflow: SharedAirflow) -> Site:
    server, folder = shared_airflow.server, shared_airflow.folder / "guaranteed"
    providers = {
        name: provider_yaml(server, folder, name, **keys)
        for name, keys in {
            "raced": {"schedule": "@daily", "shards": 2, "retries": 1},
            "plain": {"sftp_conn_id": "plain"},
            "locked": {"sftp_conn_id": "locked", "ssh_conn_id": "index_locked"},
            "triggered": {"ssh_conn_id": "index_locked", "deferrable": True},
            "spoilt": {"sftp_conn_id": "spoilt"},
            "password": {"sftp_conn_id": "password"},
        }.items()
    }
    return shared_airflow.site("guaranteed", providers=providers, dags=dag_files("mdbackup.py"))


@pytest.mark.guarantee("5. Races")
def test_backfill_beside_other_runs_brings_everything_once(site: Site, cases: Cases) -> None:
    """A real backfill, a run by the schedule, and one by hand. Long form: thirty days, ten runs at a time.

    All end well, and one has work to do.
    """
    for number in range(200):
        site.put("raced", f"dir{number % 7}/file{number}", b"%d" % number * number)
    site.put("raced", "big", b"big" * 1_000_000)
    days, at_once = scaled((6, 6), (30, 10))
    site.stack.wait_for_dag("mdbackup_raced")
    created = site.stack.airflow(
        *("backfill", "create", "--dag-id", "mdbackup_raced", "--max-active-runs", str(at_once)),
        *("--from-date", "2026-01-01", "--to-date", f"2026-01-{days:02}"),
    )
    assert created.returncode == 0, created.stdout
    manual = site.start("raced")
    until(lambda: len(runs_of(site, "raced")) >= days + 2, 90, every=0.5)
    runs = runs_of(site, "raced")
    assert Counter(runs.values()) == {"backfill": days, "scheduled": 1, "manual": 1}
    ids = list(runs)
    assert manual in ids
    states = {run_id: site.finish("raced", run_id, timeout=1200) for run_id in ids}
    assert set(states.values()) == {"success"}, states
    received, added = 0, []
    for run_id in ids:
        tasks = site.stack.task_states("mdbackup_raced", run_id)
        for shard in [task for task in tasks if task.startswith("pull_changed[")]:
            number = int(shard.removeprefix("pull_changed[").rstrip("]"))
            received += site.stack.xcom("mdbackup_raced", run_id, "pull_changed", map_index=number)["bytes"]
        added.append(site.stack.xcom("mdbackup_raced", run_id, "commit_backup")["added"])
    assert sorted(added) == [0] * (len(ids) - 1) + [201], added
    expected = sum(path.stat().st_size for path in site.source("raced").rglob("*") if path.is_file())
    # A run that pulls while another one is just committing may bring a few small files again.
    assert received < 1.1 * expected, "something was transferred twice"
    backfilled = next(run_id for run_id, kind in runs.items() if kind == "backfill")
    assert "copies the current state" in site.stack.task_log("mdbackup_raced", backfilled, "fetch_index")
    mirror = site.folder / "raced"
    assert len(list(read_entries(mirror / "index.md5"))) == 201
    assert not list((mirror / "files").rglob(".old")), "there are versions, though nothing changed"
    cases.add(len(ids))


def runs_of(site: Site, provider: str) -> dict[str, str]:
    """Return the type of each run of a provider."""
    runs = site.stack.get(f"/dags/mdbackup_{provider}/dagRuns", limit=100)["dag_runs"]
    return {run["dag_run_id"]: run["run_type"] for run in runs}


@pytest.mark.guarantee("8. Secrets")
@pytest.mark.parametrize(
    ("provider", "state"),
    [
        ("plain", "success"),
        ("locked", "success"),
        ("triggered", "success"),
        ("spoilt", "failed"),
        ("password", "failed"),
    ],
)
def test_no_secret_is_written_or_shown_anywhere(
    site: Site, shared_airflow: SharedAirflow, cases: Cases, provider: str, state: str
) -> None:
    """Not in a log, in Airflow's database, below dest, or on a command line; nor when the key is refused."""
    site.put(provider, "file", b"content" * 100_000)
    seen = CommandLines()
    with seen:
        run_id = site.start(provider)
        assert site.finish(provider, run_id) == state
    secrets = [PASSPHRASE, PASSWORD, GARBAGE, *key_lines(shared_airflow.keys)]
    assert len(secrets) > 10
    places = [site.stack.home, site.folder / provider, site.server.folder / "sshd.log"]
    files = [file for place in places for file in (place, *place.rglob("*")) if file.is_file()]
    assert {"sshd.log", "logs-scheduler.log"} <= {file.name for file in files}
    assert state == "failed" or site.live(provider, "file") in files
    ran = [task for task in site.stack.task_instances(f"mdbackup_{provider}", run_id) if task["hostname"]]
    logs = [file for file in files if f"run_id={run_id}" in file.parts and file.name == "attempt=1.log"]
    assert len(logs) == len(ran) > 0
    contents = {file: file.read_bytes() for file in files}
    contents[Path("the database")] = shared_airflow.database.dump()
    for text in (b"backupop", b"mdbackup_" + provider.encode()):
        assert any(text in content for content in contents.values()), "nothing would be found this way"
    for file, content in contents.items():
        found = [secret for secret in secrets if secret.encode() in content]
        assert not found, f"{file} has {found}"
    assert any("sshd" in line for line in seen.lines)
    assert not [line for line in seen.lines if any(secret in line for secret in secrets)]
    cases.add(len(files) + len(seen.lines))


def key_lines(keys: Path) -> list[str]:
    """Return what is secret in the key files, line by line; their beginnings are the same for all keys."""
    return [line for key in keys.iterdir() for line in key.read_text().splitlines()[3:-1] if len(line) > 20]


class CommandLines:
    """Collects the command lines of all processes while it is held."""

    def __init__(self) -> None:
        self.lines: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._collect)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _collect(self) -> None:
        while not self._end.wait(0.02):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.lines.add(process.read_text(errors="replace").replace("\0", " "))
                except OSError:  # it has ended
                    continue
