"""A backup is verified, repaired and restored by DAGs, with a real scheduler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.airflow_client import AirflowClientError
from tests.system.conftest import SharedAirflow, Site, dag_files, provider_yaml
from tests.system.listeners import Checks
from tests.waiting import until

VERIFY, RESTORE = "mdbackup_verify_web", "mdbackup_restore"


@pytest.fixture(scope="module")
def checks() -> Iterator[Checks]:
    with Checks() as running:
        yield running


@pytest.fixture(scope="module")
def site(shared_airflow: SharedAirflow, checks: Checks) -> Site:
    """Two providers with workers of their own; alerts of the first one go to a file, and to pings."""
    server, folder = shared_airflow.server, shared_airflow.folder / "verified"
    (folder / "restored").mkdir(parents=True, exist_ok=True)
    to_file = {
        "notifier": "own_notifier.ToFile",
        "arguments": {"path": str(folder / "told"), "text": "{{ alert.event }}: {{ alert.text }}"},
    }
    verify = {"schedule": None, "part": "1/1", "repair": True}
    alerts = [{"ping_url": f"{checks.url}/check"}, to_file]
    site = shared_airflow.site(
        "verified",
        providers={
            "web": provider_yaml(server, folder, "web", verify=verify, alerts=alerts),
            "new": provider_yaml(server, folder, "new", verify=verify, queue="elsewhere"),
        },
        dags=dag_files("mdbackup.py", "mdbackup_verify.py", "mdbackup_restore.py"),
        env={"AIRFLOW__MDBACKUP__RESTORE_BELOW": str(folder / "restored")},
    )
    site.put("web", "kept", b"as it was")
    site.put("web", "other", b"another one")
    assert site.run("web")[0] == "success"
    return site


def run(site: Site, dag_id: str, **conf: Any) -> tuple[str, str]:
    """Do a run of a DAG, and return its state and id."""
    site.stack.wait_for_dag(dag_id)
    site.stack.unpause(dag_id)
    run_id = site.stack.trigger(dag_id, conf)
    return site.stack.wait_for_run(dag_id, run_id), run_id


def test_damage_is_found_reported_and_repaired_by_the_next_backup(site: Site, checks: Checks) -> None:
    """There is one alert, about the verification; pings, which are about backups, are not sent."""
    live = site.live("web", "kept")
    before = live.stat()
    live.write_bytes(b"as it WAS")
    os.utime(live, ns=(before.st_atime_ns, before.st_mtime_ns))
    state, run_id = run(site, VERIFY)
    assert state == "failed"
    log = site.stack.task_log(VERIFY, run_id, "verify_mirror")
    assert f"rotten: {site.server.prefix}/web/kept" in log and "left the index" in log
    counts = site.stack.xcom(VERIFY, run_id, "verify_mirror")
    assert (counts["rotten"], counts["sound"], counts["repaired"]) == (1, 1, 1)
    (task,) = site.stack.task_instances(VERIFY, run_id)
    assert task["try_number"] == 1
    told = site.folder / "told"
    until(told.exists)
    said = told.read_text()
    assert said.startswith("verification: web: verification FAILED: files of the backup are damaged")
    assert f"rotten: {site.server.prefix}/web/kept" in said and "airflow dags trigger mdbackup_web" in said

    assert site.run("web")[0] == "success"
    assert live.read_bytes() == b"as it was"
    (version,) = (live.parent / ".old").iterdir()
    assert version.read_bytes() == b"as it WAS"
    state, run_id = run(site, VERIFY)
    assert state == "success"
    assert site.stack.xcom(VERIFY, run_id, "verify_mirror")["sound"] == 3
    assert told.read_text() == said
    until(lambda: len(checks.of("check")) >= 4)  # a good run may tell a moment after its end
    assert checks.of("check") == ["/check/start", "/check"] * 2  # of the two backups


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def test_a_backup_that_does_not_exist_yet_is_skipped_without_an_alert(site: Site) -> None:
    state, run_id = run(site, "mdbackup_verify_new")
    assert (state, site.stack.task_states("mdbackup_verify_new", run_id)) == (
        "success",
        {"verify_mirror": "skipped"},
    )


def test_the_form_restores_files_below_the_directory_that_the_worker_allows(
    site: Site, shared_airflow: SharedAirflow
) -> None:
    """The task for the chosen provider's workers does it; an unknown name is refused at once."""
    conf = {"provider": "web", "paths": ["other"], "target": "here", "as_of": "now"}
    state, run_id = run(site, RESTORE, **conf)
    assert state == "success"
    assert site.stack.task_states(RESTORE, run_id) == {
        "choose_worker": "success",
        "restore_files_on_default": "success",
        "restore_files_on_elsewhere": "skipped",
    }
    restored = site.folder / "restored" / "here"
    assert Path(f"{restored}{site.server.prefix}/web/other").read_bytes() == b"another one"
    assert site.stack.xcom(RESTORE, run_id, "restore_files_on_default") == {
        **{"restored": 1, "there": 0, "kept": 0, "lost": 0, "pruned": 0, "failed": 0},
        **{"bytes": 11, "target": str(restored)},
    }
    before = files_in(shared_airflow.dags)
    state, run_id = run(site, RESTORE, provider="web", target=str(shared_airflow.dags))
    assert state == "failed"
    assert "is not below" in site.stack.task_log(RESTORE, run_id, "restore_files_on_default")
    assert files_in(shared_airflow.dags) == before
    with pytest.raises(AirflowClientError, match="400"):
        site.stack.trigger(RESTORE, {"provider": "nobody"})
