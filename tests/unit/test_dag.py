"""From configuration to DAGs: their shape, and that nothing in the configuration stops the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
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
from airflow_mdbackup.dag import provider_dags

PROJECT = Path(__file__).parents[2]

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
        ("timetable: tests.unit.test_dag.Unregistered", "list it in the `timetables` of an Airflow plugin"),
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
    assert set(bag.dag_ids) == {"mdbackup_web", "mdbackup_full", "mdbackup_watchdog"}


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
    watchdog = "mdbackup_watchdog"  # in a file of its own
    everything = {"mdbackup_web", "mdbackup_full", "mdbackup_bad", watchdog}
    assert set(load_dags().dag_ids) == everything
    for dag_id in ("mdbackup_web", "mdbackup_bad"):
        monkeypatch.setenv(PARSED_FOR, dag_id)
        assert set(load_dags().dag_ids) == {dag_id, watchdog}
    # A task of another DAG may have started what parses here.
    monkeypatch.setenv(PARSED_FOR, "somebody_elses")
    assert set(load_dags().dag_ids) == everything


def test_parsing_the_dag_file_imports_neither_paramiko_nor_asyncssh(configured: Path) -> None:
    """The scheduler parses the file over and over: what only a running task needs is imported there."""
    configured.write_text("providers:" + (GOOD + FULL).format(folder=configured.parent))
    code = (
        "import runpy, sys, airflow.sdk; "
        "found = runpy.run_path('dags/mdbackup.py') | runpy.run_path('dags/mdbackup_watchdog.py'); "
        "assert {'mdbackup_full', 'mdbackup_watchdog'} <= set(found); "
        "print(sorted({'paramiko', 'asyncssh'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
