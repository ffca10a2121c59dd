"""DAG runs of a real scheduler, in the states that a person would expect."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.index.canonical import read_entries
from tests.locks import holders, pulling
from tests.system.conftest import SharedAirflow, Site, dag_files, provider_yaml
from tests.waiting import until


@pytest.fixture(scope="module")
def site(shared_airflow: SharedAirflow) -> Site:
    server, folder = shared_airflow.server, shared_airflow.folder / "scheduled"
    slow = {"indexer": {"limit": "500KB"}}
    providers = {
        name: provider_yaml(server, folder, name, **keys)
        for name, keys in {
            "good": {"shards": 2},
            "planned": {},
            "measured": {},
            "followed": {},
            "broken": {"shards": 2},
            "noindex": {"ssh_conn_id": None, "max_index_age": None},
            "killed": {"bandwidth_limit": "2MB"},
            "asking": {"on_guard": "approve", "retries": 1},
            "guarded": {},
            "deferred": {"deferrable": True, "retries": 1, **slow},
            "building": {"retries": 1, **slow},
            "pulling": {"sftp_conn_id": "asyncssh", "bandwidth_limit": "500KB", "retries": 1},
            "refused": {"ssh_conn_id": "imposter", "retries": 2, "retry_delay": "1s"},
            "unreached": {"ssh_conn_id": "nowhere", "retries": 2, "retry_delay": "1s"},
            "pooled": {"pool": "disks"},
            "follower": {"schedule": {"assets": ["mdbackup://pooled"]}},
        }.items()
    }
    dags = dag_files("mdbackup.py", "mdbackup_config.py", "mdbackup_verify.py")
    return shared_airflow.site("scheduled", providers={**providers, "invalid": {"nonsense": 1}}, dags=dags)


def test_first_run_second_run_and_a_run_with_nothing_to_do(site: Site) -> None:
    """The main job, through the scheduler, with two shards."""
    for number in range(60):
        site.put("good", f"dir{number % 7}/file{number}", b"%d" % number * number)
    state, tasks = site.run("good")
    assert state == "success" and set(tasks.values()) == {"success"}, tasks
    assert {"pull_changed[0]", "pull_changed[1]"} <= set(tasks)
    (run,) = site.stack.get("/dags/mdbackup_good/dagRuns")["dag_runs"]
    shards = [
        task["rendered_map_index"]
        for task in site.stack.task_instances("mdbackup_good", run["dag_run_id"])
        if task["task_id"] == "pull_changed"
    ]
    assert all(re.fullmatch(r"shard [01]: \d+ files, \d\.\d kB", shard) for shard in shards), shards
    site.put("good", "dir1/file1", b"changed")
    (site.source("good") / "dir2" / "file2").unlink()
    run_id = site.start("good")
    assert site.finish("good", run_id) == "success"
    summary = site.stack.xcom("mdbackup_good", run_id, "commit_backup")
    assert (summary["replaced"], summary["forgotten"], summary["files"]) == (1, 1, 59)
    assert site.live("good", "dir1/file1").read_bytes() == b"changed"
    assert site.live("good", "dir2/file2").read_bytes() == b"22"
    run_id = site.start("good")
    assert site.finish("good", run_id) == "success"
    assert "nothing to do" in site.stack.task_log("mdbackup_good", run_id, "commit_backup")
    assert site.stack.xcom("mdbackup_good", run_id, "commit_backup")["outcomes"] == {}


def test_person_can_look_at_the_plan_first_and_back_up_some_paths_only(site: Site) -> None:
    """Neither is taken for a good backup."""
    site.put("planned", "first", b"first")
    assert site.run("planned")[0] == "success"
    site.put("planned", "wanted/file", b"wanted")
    site.put("planned", "other", b"other")
    good = last_good(site, "planned")
    run_id = site.start("planned", dry_run=True)
    assert site.finish("planned", run_id) == "success"
    tasks = site.stack.task_states("mdbackup_planned", run_id)
    assert tasks["diff_indexes"] == tasks["archive_old"] == tasks["commit_backup"] == "skipped", tasks
    told = site.stack.task_log("mdbackup_planned", run_id, "diff_indexes")
    plan = told.partition("::group::The plan: 2 to pull, 0 to forget\n")[2].partition("::endgroup::")[0]
    assert "2 new" in told and f"+ {site.server.prefix}/planned/other\n" in plan and "new" not in plan
    run_id = site.start("planned", dryrun=True)
    assert site.finish("planned", run_id) == "failed"
    assert "did you mean dry_run?" in site.stack.task_log("mdbackup_planned", run_id, "diff_indexes")
    assert not site.live("planned", "other").exists()
    run_id = site.start("planned", only=[f"{site.server.prefix}/planned/wanted"])
    assert site.finish("planned", run_id) == "success"
    assert site.live("planned", "wanted/file").exists() and not site.live("planned", "other").exists()
    assert last_good(site, "planned") == good
    assert site.run("planned")[0] == "success"
    assert site.live("planned", "other").exists() and last_good(site, "planned") != good


def last_good(site: Site, provider: str) -> object:
    """Return the last good run as the state of the provider's asset has it."""
    (asset,) = site.stack.get("/assets", uri_pattern=f"mdbackup://{provider}")["assets"]
    return site.stack.get(f"/assets/{asset['id']}/state-store/last_good")["value"]


@pytest.mark.parametrize(("provider", "tries"), [("refused", 1), ("unreached", 3)])
def test_only_what_may_heal_is_tried_again(site: Site, provider: str, tries: int) -> None:
    """A wrong host key fails at once; of a server that does not answer, each wait is longer than the last."""
    run_id = site.start(provider)
    assert site.finish(provider, run_id) == "failed"
    (task,) = [
        task
        for task in site.stack.task_instances(f"mdbackup_{provider}", run_id)
        if task["task_id"] == "build_provider_index"
    ]
    assert (task["state"], task["try_number"]) == ("failed", tries)


def test_metrics_tell_of_each_run(site: Site, shared_airflow: SharedAirflow) -> None:
    """By the names that the documentation has."""
    site.put("measured", "old", b"old")
    assert site.run("measured")[0] == "success"
    site.put("measured", "new", b"x" * 100)
    before = int(time.time())
    assert site.run("measured")[0] == "success"
    told = shared_airflow.statsd.told("mdbackup.measured.")
    assert told["entries.pulled"] == "1|c" and told["placed"] == "100|c"
    assert told["files"] == "2|g" and told["failed"] == "0|g"
    assert int(told["last_good"].removesuffix("|g")) >= before
    assert {"commit", "pull", "transferred"} <= set(told)


def test_good_commit_updates_the_asset_and_its_state(site: Site) -> None:
    """Other DAGs can follow a backup, and Airflow remembers it when the disk is lost."""
    site.put("followed", "asset", b"x")
    run_id = site.start("followed")
    assert site.finish("followed", run_id) == "success"
    (asset,) = site.stack.get("/assets", uri_pattern="mdbackup://followed")["assets"]
    events = site.stack.get("/assets/events", asset_id=asset["id"])["asset_events"]
    assert any(event["extra"].get("files") == len(index_of(site, "followed")) for event in events)
    state = site.stack.get(f"/assets/{asset['id']}/state-store/last_good")
    assert state["value"]["run_id"] == run_id
    link = site.stack.xcom("mdbackup_followed", run_id, "commit_backup", key="_link_LastGoodRunLink")
    assert link == f"/dags/mdbackup_followed/runs/{run_id}"
    (site.folder / "followed").rename(site.folder / "aside")
    run_id = site.start("followed")
    assert site.finish("followed", run_id) == "failed"
    assert "not mounted" in site.stack.task_log("mdbackup_followed", run_id, "fetch_index")


def index_of(site: Site, provider: str) -> list[Any]:
    return list(read_entries(site.folder / provider / "index.md5"))


def test_init_makes_the_pool_without_which_no_task_runs_and_one_backup_follows_another(site: Site) -> None:
    """Of what is missing, it makes what it can, and tells of what it cannot."""
    site.put("pooled", "file", b"one")
    site.put("follower", "file", b"two")
    site.stack.wait_for_dag("mdbackup_follower")
    site.stack.unpause("mdbackup_follower")
    for line in ("pool disks: created with 3 slots", "pool disks: exists, with 3 slots"):
        status, made = site.command("init", "--slots", "3")
        assert status == 1, made
        assert line in made and "INVALID configuration" in made
        assert "provider `invalid`: `nonsense`" in made
    state, tasks = site.run("pooled")
    assert state == "success", tasks
    runs = until(lambda: site.stack.get("/dags/mdbackup_follower/dagRuns")["dag_runs"], every=0.5)
    assert runs[0]["run_type"] == "asset_triggered" and runs[0]["logical_date"] is None
    assert site.finish("follower", runs[0]["dag_run_id"]) == "success"
    assert site.live("follower", "file").read_bytes() == b"two"


def test_without_an_index_the_run_fails_and_later_tasks_do_not_run(site: Site) -> None:
    """A failed fetch leaves archive and commit alone."""
    state, tasks = site.run("noindex")
    assert state == "failed"
    assert tasks["fetch_index"] == "failed"
    assert tasks["archive_old"] == tasks["commit_backup"] == "upstream_failed"


def test_failed_entry_fails_the_run_after_the_others_are_committed(site: Site) -> None:
    """An unreadable file on A: all tasks green but the last, which names it."""
    site.put("broken", "fine", b"1")
    site.put("broken", "secret", b"2")
    (site.source("broken") / "secret").chmod(0)
    run_id = site.start("broken")
    assert site.finish("broken", run_id) == "failed"
    tasks = site.stack.task_states("mdbackup_broken", run_id)
    assert [task for task, state in tasks.items() if state != "success"] == ["commit_backup"]
    assert "/broken/secret" in site.stack.task_log("mdbackup_broken", run_id, "commit_backup")
    assert site.live("broken", "fine").read_bytes() == b"1"


def test_killed_pull_goes_on_after_it_is_cleared(site: Site) -> None:
    """SIGKILL in the middle of a transfer, then `Clear` in the UI: the run ends well, nothing is lost."""
    for number in range(4):
        site.put("killed", f"big{number}", os.urandom(3_000_000))
    run_id = site.start("killed")
    staging = site.folder / "killed" / ".mdbackup" / "staging"
    for pid in until(lambda: pulling(staging), every=0.02):
        os.kill(pid, 9)
    assert site.finish("killed", run_id, timeout=240) == "failed"
    site.stack.clear("mdbackup_killed", run_id, ["pull_changed"], include_downstream=True)
    assert site.finish("killed", run_id, timeout=240) == "success"
    for number in range(4):
        big = f"big{number}"
        assert site.live("killed", big).read_bytes() == (site.source("killed") / big).read_bytes()


def building(site: Site, provider: str) -> set[int]:
    """Return the processes that build a provider's index."""
    return holders((site.server.tree / ".mdbackup").glob(f".{provider}.md5.lock"))


@contextmanager
def frozen(processes: set[int]) -> Iterator[None]:
    """Have processes stand still, lest they end before what is to happen meanwhile."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def test_deferred_build_outlives_its_triggerer_and_ends_with_its_task(site: Site) -> None:
    """No worker waits for it; a new triggerer joins the build on A; a person who fails the task stops it."""
    site.put("deferred", "big", os.urandom(13_000_000))
    run_id = site.start("deferred")
    report = site.server.tree / ".mdbackup" / ".deferred.md5.report"
    until(lambda: report.exists() and state_of(site, "deferred", run_id) == "deferred")
    task = ("mdbackup_deferred", run_id, "build_provider_index")
    with frozen(building(site, "deferred")):
        site.stack.restart("triggerer")
        until(lambda: "Joined on the provider" in site.stack.task_log(*task), 120)
    assert site.finish("deferred", run_id) == "success"
    told = site.stack.xcom("mdbackup_deferred", run_id, "build_provider_index")
    assert (told["files"], told["hashed"], told["unreadable"]) == (1, 1, 0)

    site.put("deferred", "big2", os.urandom(20_000_000))
    before = (site.server.tree / ".mdbackup" / "deferred.md5").read_bytes()
    run_id = site.start("deferred")
    until(lambda: state_of(site, "deferred", run_id) == "deferred" and building(site, "deferred"))
    where = f"/dags/mdbackup_deferred/dagRuns/{run_id}/taskInstances/build_provider_index"
    site.stack.patch(where, {"new_state": "failed"})
    assert site.finish("deferred", run_id) == "failed"
    until(lambda: not building(site, "deferred"), 30)
    assert (site.server.tree / ".mdbackup" / "deferred.md5").read_bytes() == before


@pytest.mark.parametrize(
    ("provider", "task_id", "ended"),
    [
        ("building", "build_provider_index", {"state": "failed"}),
        ("pulling", "pull_changed", {"new_state": "failed"}),
    ],
)
def test_run_or_task_that_a_person_ends_stops_within_five_seconds_on_the_provider_too(
    site: Site, provider: str, task_id: str, ended: dict[str, str]
) -> None:
    """Five from when its worker hears of it, at the next heartbeat. Cleared, the run ends well."""
    site.put(provider, "big", os.urandom(7_000_000))
    run_id = site.start(provider)
    staging = site.folder / provider / ".mdbackup" / "staging"
    until(lambda: building(site, provider) if provider == "building" else pulling(staging))
    run = f"/dags/mdbackup_{provider}/dagRuns/{run_id}"
    site.stack.patch(run if "state" in ended else f"{run}/taskInstances/{task_id}", ended)
    until(lambda: not connections(site) and not building(site, provider), 30)
    stopped = datetime.now(UTC)
    assert site.finish(provider, run_id) == "failed"
    log = site.stack.task_log(
        f"mdbackup_{provider}", run_id, task_id, map_index=0 if provider == "pulling" else -1
    )
    (heard,) = [line.split()[0] for line in log.splitlines() if "Terminating process" in line]
    assert stopped - datetime.fromisoformat(heard) < timedelta(seconds=5), log
    site.stack.clear(f"mdbackup_{provider}", run_id, [task_id])
    assert site.finish(provider, run_id) == "success"
    assert site.live(provider, "big").read_bytes() == (site.source(provider) / "big").read_bytes()


def connections(site: Site) -> list[str]:
    """Return the connections to the SSH server that are open."""
    remote = f":{site.server.port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [line[1] for line in lines if line[2].endswith(remote) and line[3] == "01"]


def state_of(site: Site, provider: str, run_id: str) -> str | None:
    return site.stack.task_states(f"mdbackup_{provider}", run_id).get("build_provider_index")


def test_guard_stops_the_run_before_anything_changes_unless_a_person_overrides_it(site: Site) -> None:
    """Everything gone on A: the run fails, and the index on B still has it all; until somebody has looked."""
    site.put("guarded", "only", b"1")
    assert site.run("guarded")[0] == "success"
    (site.source("guarded") / "only").unlink()
    run_id = site.start("guarded")
    assert site.finish("guarded", run_id) == "failed"
    tasks = site.stack.task_states("mdbackup_guarded", run_id)
    assert tasks["diff_indexes"] == "failed" and tasks["commit_backup"] == "upstream_failed"
    assert "guard" in site.stack.task_log("mdbackup_guarded", run_id, "diff_indexes")
    assert len(index_of(site, "guarded")) == 1
    run_id = site.start("guarded", override_guard=True)
    assert site.finish("guarded", run_id) == "success"
    assert index_of(site, "guarded") == []
    assert "override_guard" in site.stack.task_log("mdbackup_guarded", run_id, "diff_indexes")


@pytest.mark.parametrize(("answer", "state", "left"), [("Reject", "failed", 1), ("Approve", "success", 0)])
def test_person_decides_when_the_guard_asks(site: Site, answer: str, state: str, left: int) -> None:
    """Refused: failed, nothing changed. Approved: the same plan goes on."""
    site.put("asking", "only", b"1")
    assert site.run("asking")[0] == "success"
    (site.source("asking") / "only").unlink()
    run_id = site.start("asking")
    where = f"/dags/mdbackup_asking/dagRuns/{run_id}/taskInstances/approve/-1"
    until(lambda: site.stack.task_states("mdbackup_asking", run_id).get("approve") == "awaiting_input", 90)
    # An answer that comes before the scheduler has seen the task park fails it.
    time.sleep(10)
    site.stack.patch(f"{where}/hitlDetails", {"chosen_options": [answer], "params_input": {}})
    assert site.finish("asking", run_id) == state
    assert len(index_of(site, "asking")) == left


def test_invalid_provider_fails_and_is_an_import_error_and_stops_nobody(site: Site) -> None:
    """Loud in both places where people look, while the other DAGs run on."""
    run_id = site.start("invalid")
    assert site.finish("invalid", run_id) == "failed"
    assert "nonsense" in site.stack.task_log("mdbackup_invalid", run_id, "invalid_configuration")
    (error,) = site.import_errors()
    assert error["filename"].endswith("mdbackup_config.py") and "nonsense" in error["stack_trace"]
    assert site.stack.get("/dags/mdbackup_good")["is_stale"] is False
