"""What stands beside a backup: the off-site example, links that its tasks show, and lineage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.index.canonical import read_entries
from tests.system.conftest import PROJECT, SharedAirflow, Site, dag_files, provider_yaml
from tests.waiting import until

OFFSITE = "offsite_copied"
RUDE = "rude\x1b[31m::endgroup::"


@pytest.fixture(scope="module")
def site(shared_airflow: SharedAirflow) -> Site:
    server, folder = shared_airflow.server, shared_airflow.folder / "beside"
    (folder / "vault").mkdir(parents=True, exist_ok=True)
    example = (PROJECT / "docs" / "example_offsite.py").read_text()
    edits = {"/srv/backups/srv1": str(folder / "copied"), "srv1": "copied", '"retries": 2': '"retries": 0'}
    for old, new in edits.items():
        assert old in example
        example = example.replace(old, new)
    return shared_airflow.site(
        "beside",
        providers={name: provider_yaml(server, folder, name) for name in ("copied", "failing")},
        dags={**dag_files("mdbackup.py"), "example_offsite.py": example},
        env={"AIRFLOW_VAR_OFFSITE_COPIED": str(folder / "vault")},
    )


def follower(site: Site, known: set[str]) -> tuple[str, str]:
    """Wait for the run of the off-site DAG that is not known yet, and return its id and state."""
    (run_id,) = until(lambda: {run["dag_run_id"] for run in runs(site)} - known, every=0.5)
    known.add(run_id)
    return run_id, site.stack.wait_for_run(OFFSITE, run_id)


def runs(site: Site) -> list[dict[str, Any]]:
    return list(site.stack.get(f"/dags/{OFFSITE}/dagRuns")["dag_runs"])


def test_offsite_example_copies_whole_backups_that_are_as_the_index_says_and_no_others(site: Site) -> None:
    """A limited run copies nothing, and says so; nor is a spoilt file copied over the good one."""
    vault, known = site.folder / "vault", set[str]()
    for name, content in {"a/b": b"1", "two  /names\nand \\": b"2", RUDE: b"good", "empty": b""}.items():
        site.put("copied", name, content)
    site.stack.wait_for_dag(OFFSITE)
    site.stack.unpause(OFFSITE)
    assert site.run("copied")[0] == "success"
    run_id, state = follower(site, known)
    assert state == "success", site.stack.task_log(OFFSITE, run_id, "copy")
    mirror = site.folder / "copied"
    assert (vault / "index.md5").read_bytes() == (mirror / "index.md5").read_bytes()
    paths = [path for path, _ in read_entries(vault / "index.md5")]
    assert len(paths) == 4
    for path in paths:
        there = Path(f"{vault}/files{path.decode()}")
        assert there.read_bytes() == (site.source("copied") / there.relative_to(copied(site))).read_bytes()
    for name in ("staging", "runs"):
        assert not list((vault / ".mdbackup" / name).iterdir())

    site.put("copied", "wanted", b"x")
    limited = site.start("copied", only=[f"{site.server.prefix}/copied/wanted"])
    assert site.finish("copied", limited) == "success"
    run_id, state = follower(site, known)
    assert site.stack.task_states(OFFSITE, run_id)["copy"] == "skipped"
    assert "limited to some paths" in site.stack.task_log(OFFSITE, run_id, "whole_backup")
    assert site.live("copied", "wanted").exists() and not (copied(site) / "wanted").exists()

    site.live("copied", RUDE).write_bytes(b"spoilt")
    assert site.run("copied")[0] == "success"
    run_id, state = follower(site, known)
    assert state == "failed"
    told = site.stack.task_log(OFFSITE, run_id, "verify")
    assert "rude^[[31m::endgroup\\x3a:: FAILED" in told and "1 computed checksum did NOT match" in told, told
    assert "\x1b" not in told
    assert (copied(site) / RUDE).read_bytes() == b"good" and not (copied(site) / "wanted").exists()

    site.live("copied", RUDE).write_bytes(b"good")
    by_hand = site.stack.trigger(OFFSITE)
    assert site.stack.wait_for_run(OFFSITE, by_hand) == "success"
    assert (copied(site) / "wanted").read_bytes() == b"x"


def test_backup_goes_on_from_its_off_site_copy(site: Site) -> None:
    """The disk of the backup is lost, and the copy put in its place: nothing is transferred again."""
    (site.folder / "copied").rename(site.folder / "lost")
    shutil.copytree(site.folder / "vault", site.folder / "copied")
    run_id = site.start("copied")
    assert site.finish("copied", run_id) == "success"
    did = site.stack.xcom("mdbackup_copied", run_id, "commit_backup")
    assert did["outcomes"] == {} and did["files"] == 5


def copied(site: Site) -> Path:
    """Return where the off-site copy has the source of the provider."""
    return Path(f"{site.folder}/vault/files{site.server.prefix}/copied")


def test_tasks_link_to_what_the_run_did_also_when_it_failed(site: Site) -> None:
    """The report of a run with failures has their names."""
    site.put("failing", "fine", b"1")
    good = site.start("failing")
    assert site.finish("failing", good) == "success"
    site.put("failing", "secret", b"2")
    (site.source("failing") / "secret").chmod(0)
    failed = site.start("failing")
    assert site.finish("failing", failed) == "failed"
    for run_id in (good, failed):
        where = f"/dags/mdbackup_failing/dagRuns/{run_id}/taskInstances"
        for task, index in (("pull_changed", 0), ("commit_backup", -1)):
            links = site.stack.get(f"{where}/{task}/links", map_index=index)["extra_links"]
            report = f"/dags/mdbackup_failing/runs/{run_id}/tasks/commit_backup/xcom"
            assert links["Run report"] == report
        assert links["Last good backup"] == f"/dags/mdbackup_failing/runs/{good}"
    did = site.stack.xcom("mdbackup_failing", good, "commit_backup")
    assert did["added"] == 1 and "failures" not in did
    did = site.stack.xcom("mdbackup_failing", failed, "commit_backup")
    (failure,) = did["failures"]
    assert did["failed"] == 1 and "/failing/secret" in failure


def test_who_reads_lineage_learns_from_where_the_files_of_a_backup_come(
    site: Site, shared_airflow: SharedAirflow
) -> None:
    """With a reader that a plugin registers. A run that pulls nothing tells nothing."""
    site.put("failing", "new", b"3")
    (site.source("failing") / "secret").unlink(missing_ok=True)  # another test leaves it
    for _ in range(2):
        assert site.run("failing")[0] == "success"
    lines = (shared_airflow.folder / "lineage").read_text().splitlines()
    found = [each for each in map(json.loads, lines) if each[0] == "mdbackup_failing"]
    source = f"sftp://127.0.0.1:{site.server.port}{site.server.prefix}/failing"
    assert found[-1] == ["mdbackup_failing", "pull_changed", [source], ["mdbackup://failing/"]]
    assert len(found) <= 3
