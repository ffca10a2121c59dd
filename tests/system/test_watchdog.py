"""The dead man's watch, by a real scheduler: what it sees of backups that stay away, and whom it tells."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.sshd import ProviderServer
from demo.stack import AirflowStack

from .conftest import PROJECT, Site, provider_yaml

DAG_ID = "mdbackup_watchdog"
TOLD = """
import os
from airflow_mdbackup import alerts

def _told_to_a_file(provider):
    def tell(context):
        with open({file!r}, "a") as file:
            print(provider.name, context["exception"], file=file)
        return not os.path.exists({file!r} + "-by-nobody")
    return {{"on_failure_callback": [tell]}}

alerts.callbacks = _told_to_a_file
"""
WITHOUT_ONE = """
from airflow_mdbackup import config, dag

_load = dag.load

def _load_all_but_one(path):
    found = _load(path)
    known = tuple(provider for provider in found.providers if provider.name != "unknown")
    return config.Configuration(known, found.problems)

dag.load = _load_all_but_one
"""


@pytest.fixture(scope="module")
def site(
    airflow_stack: Callable[..., AirflowStack], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The DAG files of the project: that of the watchdog tells people in a file, one provider has no DAG."""
    folder = tmp_path_factory.mktemp("watched")
    dags = folder / "dags"
    dags.mkdir()
    for file in (PROJECT / "dags").glob("*.py"):
        text = file.read_text()
        if file.name == "mdbackup_watchdog.py":
            text = TOLD.format(file=str(folder / "told")) + text
        elif file.name == "mdbackup.py":
            text = WITHOUT_ONE + text
        (dags / file.name).write_text(text)
    with ProviderServer(folder / "server") as server:
        env = {
            "AIRFLOW_CONN_BACKUPOP": json.dumps(server.sftp_connection()),
            "AIRFLOW_CONN_INDEX": json.dumps(server.ssh_connection()),
            "AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(folder / "providers.yaml"),
        }
        configure(server, folder, impatient="1h")
        yield Site(airflow_stack(dags, env), server, folder)


def configure(server: ProviderServer, folder: Path, impatient: str) -> None:
    """Write the configuration, with ``impatient`` as the ``max_age`` of some."""
    providers = {
        "fresh": provider_yaml(server, folder, "fresh", max_age="1h"),
        "new": provider_yaml(server, folder, "new", max_age="1h"),
        "old": provider_yaml(server, folder, "old", max_age=impatient),
        "never": provider_yaml(server, folder, "never", max_age=impatient),
        "asking": provider_yaml(server, folder, "asking", max_age=impatient, on_guard="approve"),
        "unknown": provider_yaml(server, folder, "unknown", max_age=impatient),
        "pooled": provider_yaml(server, folder, "pooled", max_age=impatient, pool="missing"),
        "invalid": {"nonsense": 1},
    }
    (folder / "providers.yaml").write_text(json.dumps({"providers": providers}))


@pytest.fixture(scope="module")
def first(site: Site) -> str:
    """The first look, with which the watch begins; its run's id."""
    site.stack.wait_for_dag(DAG_ID)
    return look(site)


@pytest.fixture(scope="module")
def second(site: Site, first: str) -> str:
    """A look after two good runs, one that waits for approval, and a DAG that was then paused."""
    for provider in ("fresh", "old"):
        site.put(provider, "file", b"content")
    site.source("asking").mkdir(parents=True)
    runs = {provider: site.start(provider) for provider in ("fresh", "old", "asking", "pooled")}
    assert site.finish("fresh", runs["fresh"]) == site.finish("old", runs["old"]) == "success"
    wait_until(lambda: asks(site, runs["asking"]))
    site.stack.patch("/dags/mdbackup_old", {"is_paused": True})
    return look(site, impatient="1s")


def asks(site: Site, run_id: str) -> bool:
    return site.stack.task_states("mdbackup_asking", run_id)["approve"] == "awaiting_input"


def look(site: Site, impatient: str = "1h") -> str:
    configure(site.server, site.folder, impatient)
    run_id = site.stack.trigger(DAG_ID)
    site.stack.wait_for_run(DAG_ID, run_id, timeout=120)
    return run_id


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert condition()


def told(site: Site) -> list[str]:
    file = site.folder / "told"
    return file.read_text().splitlines() if file.exists() else []


def said(site: Site, run_id: str, task: str) -> str:
    return site.stack.task_log(DAG_ID, run_id, task)


def test_watch_begins_by_itself_and_gives_each_provider_its_time(site: Site, first: str) -> None:
    """The DAG is not paused when it is new. At the first look only what is invalid is wrong."""
    assert site.stack.get(f"/dags/{DAG_ID}")["is_paused"] is False
    states = site.stack.task_states(DAG_ID, first)
    assert states["fresh"] == states["new"] == "success"
    assert states["invalid"] == states["Configuration"] == "failed"


def test_fresh_and_new_backups_are_good(site: Site, second: str) -> None:
    """One with a good run, and one that still has time for its first one."""
    states = site.stack.task_states(DAG_ID, second)
    assert states["fresh"] == states["new"] == "success"
    assert site.stack.xcom(DAG_ID, second, "fresh").startswith("the last good run was")


def test_stale_backup_fails_and_says_that_its_dag_is_paused(site: Site, second: str) -> None:
    """It says how old the backup is, and why nothing comes."""
    assert site.stack.task_states(DAG_ID, second)["old"] == "failed"
    log = said(site, second, "old")
    assert "old: the last good run was" in log and "ago, more than 1 s" in log
    assert "the DAG mdbackup_old is paused" in log


def test_provider_without_a_good_run_fails_after_its_time(site: Site, second: str) -> None:
    """Also when nobody ever unpaused its DAG, or there is none."""
    assert site.stack.task_states(DAG_ID, second)["never"] == "failed"
    assert "never: there was no good run yet, in the" in said(site, second, "never")
    assert "the DAG mdbackup_never is paused" in said(site, second, "never")
    assert "Airflow knows no DAG mdbackup_unknown" in said(site, second, "unknown")


def test_run_that_waits_for_a_person_or_for_a_slot_is_told(site: Site, second: str) -> None:
    """A question that nobody answers, or a pool that does not exist, is why there is no backup."""
    assert site.stack.task_states(DAG_ID, second)["asking"] == "failed"
    assert "a run waits for a person's approval" in said(site, second, "asking")
    assert "1 of its tasks wait: for a worker of their queue, or a slot of" in said(site, second, "pooled")


def test_invalid_provider_fails_with_what_is_wrong(site: Site, second: str) -> None:
    """Under its own name, and with all other problems of the configuration."""
    for task in ("invalid", "Configuration"):
        assert site.stack.task_states(DAG_ID, second)[task] == "failed"
        assert "`nonsense`: is not a key" in said(site, second, task)


def test_people_are_told_once_while_the_task_keeps_failing(site: Site, second: str) -> None:
    """24 mails a day are read by nobody; a red task in each run is still to be seen."""
    before = told(site)
    assert {line.split()[0] for line in before} == {"old", "never", "asking", "unknown", "pooled"}
    third = look(site, impatient="1s")
    states = site.stack.task_states(DAG_ID, third)
    assert states["old"] == states["never"] == states["asking"] == "failed"
    assert sorted(told(site)) == sorted(before)
    assert len(before) == len({line.split()[0] for line in before})


def test_trouble_that_comes_back_is_told_again(site: Site, second: str) -> None:
    """A good look in between forgets that people were told, but not since when this is watched."""
    (asset,) = site.stack.get("/assets", uri_pattern="mdbackup://never")["assets"]
    where = f"/assets/{asset['id']}/state-store/watch"
    since = site.stack.get(where)["value"]["since"]
    before = len(told(site))
    good = look(site)
    assert site.stack.task_states(DAG_ID, good)["never"] == "success"
    assert site.stack.get(where)["value"] == {"since": since}
    look(site, impatient="1s")
    names = sorted(line.split()[0] for line in told(site)[before:])
    assert names == ["asking", "never", "old", "pooled", "unknown"]


def test_what_nobody_was_told_is_told_the_next_time(site: Site, second: str) -> None:
    """A mail server that is down for an hour does not make a day of it."""
    look(site)
    down = site.folder / "told-by-nobody"
    down.touch()
    before = len(told(site))
    look(site, impatient="1s")
    down.unlink()
    assert len(told(site)) == before + 5
    look(site, impatient="1s")
    assert len(told(site)) == before + 10
    look(site, impatient="1s")
    assert len(told(site)) == before + 10
