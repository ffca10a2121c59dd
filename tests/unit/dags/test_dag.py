"""From configuration to DAGs: their shape, and that nothing in the configuration stops the others."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, CronTriggerTimetable, TriggerRule
from airflow.sdk.definitions._internal.dag_parsing_context import (
    _AIRFLOW_PARSING_CONTEXT_DAG_ID as PARSED_FOR,
)
from airflow.serialization.serialized_objects import DagSerialization

from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import load
from airflow_mdbackup.config.foreign import unusable
from airflow_mdbackup.dags.backup import provider_dags
from airflow_mdbackup.dags.restore import restore_dags
from airflow_mdbackup.dags.verify import verify_dags
from airflow_mdbackup.links import LastGoodRunLink, RunReportLink
from airflow_mdbackup.operators import VerifyMirror
from airflow_mdbackup.scheme.files.jsonl import write_state
from airflow_mdbackup.scheme.store.mirror import Mirror

PROJECT = Path(__file__).parents[3]

GOOD = """
  web:
    sftp_conn_id: web_backupop
    source: /backups
    dest: {folder}/web
"""
FULL = """
  full:
    sftp_conn_id: full_backupop
    ssh_conn_id: full_index
    chroot: /home/backupop
    source: [/backups, /etc]
    dest: {folder}/full
    shards: 4
    on_guard: approve
    queue: b
    pool: disks
    pod_template_file: /opt/pod.yaml
    tags: [production]
    retries: 7
    schedule: 0 3 * * *
    exclude: ["*.tmp"]
    deferrable: true
    indexer: {{jobs: 2, rehash: 1%}}
"""


def dags(folder: Path, providers: str) -> dict[str, DAG]:
    path = folder / "providers.yaml"
    path.write_text("providers:" + providers.format(folder=folder))
    return provider_dags(path)


def downstream(dag: DAG) -> dict[str, set[str]]:
    return {task.task_id: task.downstream_task_ids for task in dag.tasks}


def test_fetch_is_given_when_the_index_of_its_run_was_built(tmp_path: Path) -> None:
    """So it knows how old the index may be; one that somebody else builds may be of any age."""
    built: Any = dags(tmp_path, FULL)["mdbackup_full"].get_task("fetch_index")
    assert built.built.operator.task_id in built.upstream_task_ids == {"build_provider_index"}
    alone: Any = dags(tmp_path, GOOD)["mdbackup_web"].get_task("fetch_index")
    assert alone.built is None


def test_dag_of_a_provider_that_builds_its_index_itself_begins_with_fetch_index(tmp_path: Path) -> None:
    """Without ssh_conn_id there is no build task; archive and commit follow diff and the finished shards."""
    dag = dags(tmp_path, GOOD)["mdbackup_web"]
    assert downstream(dag) == {
        "fetch_index": {"diff_indexes"},
        "diff_indexes": {"pull_changed", "archive_old"},
        "pull_changed": {"shards_finished"},
        "shards_finished": {"archive_old"},
        "archive_old": {"commit_backup"},
        "commit_backup": set(),
    }


def test_dag_with_everything_has_build_and_approval_and_the_settings_of_its_provider(tmp_path: Path) -> None:
    """Approval stands between the plan and everything that changes the mirror."""
    dag = dags(tmp_path, FULL)["mdbackup_full"]
    edges = downstream(dag)
    assert edges["build_provider_index"] == {"fetch_index"}
    assert edges["diff_indexes"] == {"approve", "pull_changed"}
    assert edges["approve"] == {"pull_changed", "archive_old"}
    assert dag.tags == {"mdbackup", "production"}
    for task in dag.tasks:
        retries = 0 if task.task_id == "approve" else 7
        assert (task.queue, task.pool, task.retries) == ("b", "disks", retries), task.task_id
        assert task.executor_config == {"pod_template_file": "/opt/pod.yaml"}, task.task_id
        assert task.max_active_tis_per_dag == (4 if task.task_id == "pull_changed" else 1)


def test_build_task_asks_for_what_the_configuration_says(tmp_path: Path) -> None:
    """Also for what need not be hashed, and where it is waited for."""
    build = dags(tmp_path, FULL)["mdbackup_full"].get_task("build_provider_index")
    assert (build.exclude, build.deferrable) == (["*.tmp"], True)
    assert (build.indexer["jobs"], build.indexer["rehash"], build.indexer["nice"]) == (2, 1.0, 10)
    other = dags(tmp_path, FULL.replace("    deferrable: true\n", ""))["mdbackup_full"]
    assert other.get_task("build_provider_index").deferrable is False


def test_links_of_a_mapped_task_that_could_not_be_expanded_are_made(tmp_path: Path) -> None:
    """Airflow asks for them all the same; an error of ours would be one more traceback in the log."""
    dag = dags(tmp_path, FULL)["mdbackup_full"]
    task, run = dag.get_task("pull_changed"), SimpleNamespace(dag_id="mdbackup_full", run_id="today")
    page = "/dags/mdbackup_full/runs/today/tasks/commit_backup/xcom"
    last_good, report = LastGoodRunLink(), RunReportLink()
    assert report.get_link(task, ti_key=run).endswith(page)
    assert last_good.get_link(task, ti_key=run) == ""
    mirror = Mirror(tmp_path / "full", "full")
    mirror.make_directories()
    write_state(mirror.status, {"last_good": {"run_id": "yesterday"}})
    assert last_good.get_link(task, ti_key=run).endswith("/dags/mdbackup_full/runs/yesterday")
    mirror.status.write_text("{")
    assert last_good.get_link(task, ti_key=run) == ""


def test_only_the_join_after_the_shards_has_a_trigger_rule_of_its_own(tmp_path: Path) -> None:
    """Whatever fails before the plan is accepted keeps archive and commit from running."""
    dag = dags(tmp_path, FULL)["mdbackup_full"]
    rules = {task.task_id: task.trigger_rule for task in dag.tasks}
    assert rules.pop("shards_finished") == TriggerRule.ALL_DONE
    assert set(rules.values()) == {TriggerRule.ALL_SUCCESS}


def test_invalid_provider_becomes_a_dag_that_fails_with_the_reason_and_others_stay(tmp_path: Path) -> None:
    """A provider without backups must be a failing DAG, not a missing one."""
    found = dags(tmp_path, GOOD + "  bad:\n    sftp_con_id: x\n")
    assert set(found) == {"mdbackup_web", "mdbackup_bad"}
    (task,) = found["mdbackup_bad"].tasks
    with pytest.raises(Exception, match="sftp_conn_id"):
        task.execute({})


@pytest.mark.parametrize(
    ("schedule", "summary"),
    [
        ("{{assets: ['mdbackup://web', name]}}", "Asset"),
        (
            "{{timetable: airflow.sdk.CronTriggerTimetable, "
            "arguments: {{expression: 0 3 * * *, timezone: Europe/Vienna}}}}",
            "0 3 * * *",
        ),
    ],
)
def test_schedule_by_assets_or_timetable_reaches_airflows_own_copy_of_the_dag(
    tmp_path: Path, schedule: str, summary: str
) -> None:
    dag = dags(tmp_path, GOOD + f"    schedule: {schedule}\n")["mdbackup_web"]
    stored: Any = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert stored.timetable.summary == summary


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("assets: ['airflow://reserved']", "an asset cannot be used"),
        ("timetable: missing.module.Class", "cannot be imported"),
        ("timetable: airflow.sdk.Missing", "cannot be used"),
        ("timetable: airflow.sdk.CronTriggerTimetable", "cannot be used"),  # it needs arguments
        (
            "timetable: tests.unit.dags.test_dag.Unregistered",
            "list it in the `timetables` of an Airflow plugin",
        ),
    ],
)
def test_schedule_that_cannot_be_used_fails_its_provider_alone(
    tmp_path: Path, schedule: str, said: str
) -> None:
    """Its DAG fails with the reason, and the file without DAGs shows it as an import error."""
    other = GOOD.replace("web", "other") + f"    schedule: {{{{{schedule}}}}}\n"
    made = dags(tmp_path, GOOD + other)
    assert made["mdbackup_other"].task_ids == ["invalid_configuration"]
    assert said in (made["mdbackup_other"].doc_md or "")
    assert len(made["mdbackup_web"].tasks) > 1
    path = tmp_path / "providers.yaml"
    (problem,) = unusable(load(path), path)
    assert problem.provider == "other" and said in problem.message


class Unregistered(CronTriggerTimetable):
    """A timetable that no plugin lists."""

    def __init__(self) -> None:
        super().__init__("0 3 * * *", timezone="UTC")


def test_tasks_have_time_limits_and_wait_longer_before_each_further_try(tmp_path: Path) -> None:
    """An hour at most, unless the configuration says more."""
    dag = dags(tmp_path, FULL)["mdbackup_full"]
    limits = {task.task_id: task.execution_timeout for task in dag.tasks}
    assert limits["pull_changed"] == timedelta(hours=24) and limits["build_provider_index"]
    assert {task_id for task_id, limit in limits.items() if limit is None} == {"approve", "shards_finished"}
    pull = dag.get_task("pull_changed").partial_kwargs
    assert pull["retry_exponential_backoff"] == 2.0
    assert pull["max_retry_delay"] == timedelta(hours=1)


def test_bandwidth_limit_reaches_the_pulling_tasks_and_airflows_own_copy_of_the_dag(tmp_path: Path) -> None:
    """There as a text, and the same each time, so that the DAG gets no new version whenever it is parsed."""
    limit = '    bandwidth_limit: [{{rate: 5MB, from: "08:00", to: "18:00"}}, 50MB]\n'
    said = "5MB/s from 08:00 to 18:00, else 50MB/s"
    dag = dags(tmp_path, GOOD + limit)["mdbackup_web"]
    pull: Any = dag.task_dict["pull_changed"]
    assert str(pull.unmap({"shard": {"shard": 0, "files": 1}}).bandwidth_limit) == said
    stored = json.dumps(DagSerialization.to_dict(dag))
    assert f'"bandwidth_limit": "{said}"' in stored and said in str(dag.doc_md)
    assert json.dumps(DagSerialization.to_dict(dags(tmp_path, GOOD + limit)["mdbackup_web"])) == stored


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "providers.yaml"
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(path))
    return path


def load_dags() -> DagBag:
    return DagBag(dag_folder=str(PROJECT / "dags"), bundle_path=PROJECT / "dags", bundle_name="dags")


def test_dag_files_import_without_errors_and_with_one_dag_per_provider(configured: Path) -> None:
    """All files of dags/ load as Airflow loads them."""
    configured.write_text("providers:" + (GOOD + FULL).format(folder=configured.parent))
    bag = load_dags()
    assert bag.import_errors == {}
    backups = {"mdbackup_web", "mdbackup_full"}
    verified = {"mdbackup_verify_web", "mdbackup_verify_full"}
    assert set(bag.dag_ids) == backups | verified | {"mdbackup_watchdog", "mdbackup_restore"}


@pytest.mark.parametrize("text", ["providers:\n  web: {", "", "- 1\n", "providers:\n  bad: {nonsense: 1}\n"])
def test_broken_configuration_shows_only_on_the_file_without_dags(configured: Path, text: str) -> None:
    """An import error would stop all DAGs of its file, so that dags/mdbackup.py never has one."""
    configured.write_text(text)
    (path,) = load_dags().import_errors
    assert Path(path).name == "mdbackup_config.py"


def test_watchdog_has_a_task_for_each_provider_that_could_be_one_whatever_the_configuration_says(
    configured: Path,
) -> None:
    """By name, so that each keeps its history; one that is refused is watched too. None is worth a DAG."""
    text = "providers:" + GOOD.format(folder=configured.parent)
    configured.write_text(text + "  bad: {nonsense: 1}\n  Configuration: {nonsense: 1}\n")
    dag = load_dags().dags["mdbackup_watchdog"]
    assert set(dag.task_ids) == {"Configuration", "web", "bad"}
    assert dag.is_paused_upon_creation is False
    for task_id in ("web", "bad"):
        task = dag.get_task(task_id)
        assert task.inlets == [provider_asset(task_id)]
        assert (task.queue, task.pool) == ("default", "default_pool")
    configured.unlink()
    assert load_dags().dags["mdbackup_watchdog"].task_ids == ["Configuration"]


def test_verification_has_the_place_and_tags_of_its_provider_and_lets_backups_go_first(
    tmp_path: Path,
) -> None:
    """One task at a time, of the lowest priority; the form shows what the configuration says."""
    path = tmp_path / "providers.yaml"
    verify = "    verify: {schedule: 30 6 * * *, part: 1/7, limit: 50MB, repair: true}\n"
    none = GOOD.replace("web", "none").format(folder=tmp_path) + "    verify: null\n"
    path.write_text("providers:" + FULL.format(folder=tmp_path) + verify + none + "  bad: {nonsense: 1}\n")
    found = verify_dags(path)
    assert set(found) == {"mdbackup_verify_full"}  # that of `bad` fails in mdbackup.py
    dag = found["mdbackup_verify_full"]
    (task,) = dag.tasks
    assert isinstance(task, VerifyMirror)
    assert (task.queue, task.pool, task.executor_config) == (
        "b",
        "disks",
        {"pod_template_file": "/opt/pod.yaml"},
    )
    assert (task.part, task.limit, task.repair, task.missing) == ("1/7", "50MB", True, False)
    assert (task.max_active_tis_per_dag, dag.max_active_runs, dag.tags) == (1, 1, {"mdbackup", "production"})
    assert task.inlets == [provider_asset("full")]
    assert (dag.params["part"], dag.params["repair"], dag.schedule) == ("1/7", True, "30 6 * * *")
    backup = provider_dags(path)["mdbackup_full"]
    assert task.priority_weight < min(each.priority_weight for each in backup.tasks)
    DagSerialization.from_dict(DagSerialization.to_dict(dag))


def test_verification_whose_schedule_cannot_be_used_fails_alone(tmp_path: Path) -> None:
    """And it is among the import errors, by the key that says it."""
    path = tmp_path / "providers.yaml"
    verify = "    verify: {schedule: {timetable: missing.module.Class}}\n"
    path.write_text("providers:" + GOOD.format(folder=tmp_path) + verify)
    dag = verify_dags(path)["mdbackup_verify_web"]
    assert dag.task_ids == ["invalid_configuration"] and "cannot be imported" in (dag.doc_md or "")
    assert len(provider_dags(path)["mdbackup_web"].tasks) > 1
    (problem,) = unusable(load(path), path)
    assert problem.key == "verify.schedule"


def test_restore_is_one_task_where_all_providers_have_the_same_place(tmp_path: Path) -> None:
    """The form takes names that there are only, and who restores goes before all backups."""
    path = tmp_path / "providers.yaml"
    text = "providers:" + GOOD.format(folder=tmp_path)
    path.write_text(text)
    assert restore_dags(path)["mdbackup_restore"].params["provider"] == "web"
    path.write_text(text + GOOD.replace("web", "other").format(folder=tmp_path))
    dag = restore_dags(path)["mdbackup_restore"]
    (task,) = dag.tasks
    assert (task.task_id, task.queue, task.retries) == ("restore_files", "default", 0)
    assert dag.schedule is None and dag.is_paused_upon_creation is False
    assert dag.params.get_param("provider").schema["enum"] == ["web", "other"]
    assert task.keep_out == [f"{tmp_path}/web", f"{tmp_path}/other"]
    backup = provider_dags(path)["mdbackup_web"]
    assert task.priority_weight > max(each.priority_weight for each in backup.tasks)
    DagSerialization.from_dict(DagSerialization.to_dict(dag))
    path.write_text("providers: {bad: {nonsense: 1}}\n")
    assert restore_dags(path) == {}


def test_restore_chooses_among_one_task_for_each_place_that_providers_have(tmp_path: Path) -> None:
    """A name of a queue that is no task's name is made one, and two that become the same stay two."""
    path = tmp_path / "providers.yaml"
    places = [
        "queue: b/1",
        "queue: b/1",
        "queue: b!1",
        "pool: p",
        "pod_template_file: /opt/pod.yaml",
        "retries: 1",
    ]
    text = "providers:"
    for number, keys in enumerate(places):
        text += GOOD.replace("web", f"web{number}").format(folder=tmp_path) + f"    {keys}\n"
    path.write_text(text)
    dag = restore_dags(path)["mdbackup_restore"]
    names = ["b_1", "b_1_2", "p", "pod", "default"]
    tasks = [f"restore_files_on_{name}" for name in names]
    assert downstream(dag) == {"choose_worker": set(tasks)} | {task: set() for task in tasks}
    assert [dag.get_task(task).queue for task in tasks] == ["b/1", "b!1", "default", "default", "default"]
    assert [dag.get_task(task).pool for task in tasks][2:] == ["p", "default_pool", "default_pool"]
    assert dag.get_task(tasks[3]).executor_config == {"pod_template_file": "/opt/pod.yaml"}
    choose: Any = dag.get_task("choose_worker")
    chosen = [
        choose.python_callable(**choose.op_kwargs, params={"provider": f"web{number}"})
        for number in range(len(places))
    ]
    assert chosen == [tasks[0], *tasks]
    assert choose.queue == "b/1"  # where there is a worker


def test_example_dags_of_the_documentation_import_and_have_their_shape() -> None:
    """What people copy must work."""
    bag = DagBag(dag_folder=str(PROJECT / "docs"), bundle_path=PROJECT / "docs", bundle_name="docs")
    assert bag.import_errors == {}
    edges = downstream(bag.dags["backup_srv1_by_hand"])
    assert edges["diff_indexes"] == {"pull_changed", "archive_old"}
    assert edges["shards_finished"] == {"archive_old"}
    offsite = bag.dags["offsite_srv1"]
    assert downstream(offsite) == {"whole_backup": {"verify"}, "verify": {"copy"}, "copy": set()}


def test_worker_that_parses_for_one_task_makes_only_the_dag_of_that_task(
    configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hundred providers it would make a hundred DAGs before each task. So it is with a failing one."""
    configured.write_text("providers:" + (GOOD + FULL).format(folder=configured.parent) + "  bad: {x: 1}\n")
    others = {"mdbackup_watchdog", "mdbackup_restore"}  # in files of their own
    verified = {"mdbackup_verify_web", "mdbackup_verify_full"}  # and these are in another one
    backups = {"mdbackup_web", "mdbackup_full", "mdbackup_bad"}
    everything = backups | verified | others
    assert set(load_dags().dag_ids) == everything
    for dag_id in ("mdbackup_web", "mdbackup_bad"):
        monkeypatch.setenv(PARSED_FOR, dag_id)
        assert set(load_dags().dag_ids) == {dag_id} | verified | others
    monkeypatch.setenv(PARSED_FOR, "mdbackup_verify_web")
    assert set(load_dags().dag_ids) == {"mdbackup_verify_web"} | backups | others
    # A task of another DAG may have started what parses here.
    monkeypatch.setenv(PARSED_FOR, "somebody_elses")
    assert set(load_dags().dag_ids) == everything


def test_parsing_the_dag_file_imports_neither_paramiko_nor_asyncssh(configured: Path) -> None:
    """The scheduler parses the file over and over: what only a running task needs is imported there."""
    configured.write_text("providers:" + (GOOD + FULL).format(folder=configured.parent))
    code = (
        "import runpy, sys, airflow.sdk; "
        "names = ('mdbackup', 'mdbackup_watchdog', 'mdbackup_verify', 'mdbackup_restore'); "
        "found = {dag for name in names for dag in runpy.run_path(f'dags/{name}.py')}; "
        "assert {'mdbackup_full', 'mdbackup_watchdog', 'mdbackup_verify_full', 'mdbackup_restore'} <= found; "
        "print(sorted({'paramiko', 'asyncssh'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("dag", "backup", "provider_dags"),
        ("restoration", "restore", "restore_dags"),
        ("verification", "verify", "verify_dags"),
        ("watchdog", "watchdog", "watchdog_dag"),
    ],
)
def test_dag_files_that_were_copied_before_still_work_and_say_so(old: str, new: str, name: str) -> None:
    """People have copies of dags/*.py in their dags folder."""
    sys.modules.pop(f"airflow_mdbackup.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"moved to airflow_mdbackup.dags.{new}:"):
        module = importlib.import_module(f"airflow_mdbackup.{old}")
    assert getattr(module, name) is getattr(importlib.import_module(f"airflow_mdbackup.dags.{new}"), name)
