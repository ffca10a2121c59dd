"""The dead man's watch, by a real scheduler: what it sees of backups that stay away, and whom it tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from demo.sshd import ProviderServer
from demo.stack import AirflowStack
from tests.system.conftest import PROJECT, READ_WHEN_CHANGED, Site, provider_yaml
from tests.waiting import until

DAG_ID = "mdbackup_watchdog"
TOLD = """
import os
from airflow_mdbackup.dags import watchdog

def _told_to_a_file(provider):
    def tell(context):
        with open({file!r}, "a") as file:
            print(provider.name, context["exception"], file=file)
        return not os.path.exists({file!r} + "-by-nobody")
    return {{"on_failure_callback": [tell]}}

watchdog.failure_callbacks = _told_to_a_file
"""
WITHOUT_ONE = """
from airflow_mdbackup import config
from airflow_mdbackup.dags import backup as dag

_load = dag.load

def _load_all_but_one(path):
    found = _load(path)
    known = tuple(provider for provider in found.providers if provider.name != "unknown")
    return config.Configuration(known, found.problems)

dag.load = _load_all_but_one
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An Airflow of its own, with SQLite, for a watchdog watches all that is configured there.

    It has the DAG files of the project: that of the watchdog tells people in a file, one provider has no DAG.
    """
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
            **READ_WHEN_CHANGED,
        }
        configure(server, folder, impatient="1h")
        with AirflowStack(folder / "airflow", dags_folder=dags, env=env) as stack:
            yield Site(stack, server, folder)


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


class Look(NamedTuple):
    """A run of the watchdog, and who has been told of what by then that was not before."""

    run_id: str
    told: list[str]


@pytest.fixture(scope="module")
def first(site: Site) -> Look:
    """The first look, with which the watch begins."""
    site.stack.wait_for_dag(DAG_ID)
    return look(site)


@pytest.fixture(scope="module")
def troubled(site: Site, first: Look) -> Look:
    """A look after two good runs, one that waits for approval, and a DAG that was then paused."""
    for provider in ("fresh", "old"):
        site.put(provider, "file", b"content")
    site.source("asking").mkdir(parents=True)
    runs = {provider: site.start(provider) for provider in ("fresh", "old", "asking", "pooled")}
    assert site.finish("fresh", runs["fresh"]) == site.finish("old", runs["old"]) == "success"
    until(lambda: asks(site, runs["asking"]))
    site.stack.patch("/dags/mdbackup_old", {"is_paused": True})
    return look(site, impatient="1s")


@pytest.fixture(scope="module")
def still_troubled(site: Site, troubled: Look) -> Look:
    """The next look, at the same."""
    return look(site, impatient="1s")


@pytest.fixture(scope="module")
def since(site: Site, still_troubled: Look) -> float:
    """Since when one provider is watched, as Airflow keeps it while there is trouble."""
    return state_of_watch(site, "never")["since"]


@pytest.fixture(scope="module")
def good(site: Site, since: float) -> Look:
    """A look at which nobody is late."""
    return look(site)


@pytest.fixture(scope="module")
def state_when_good(site: Site, good: Look) -> dict[str, Any]:
    """What Airflow keeps of the watch over a provider that is well again."""
    return state_of_watch(site, "never")


@pytest.fixture(scope="module")
def troubled_again(site: Site, state_when_good: dict[str, Any]) -> list[Look]:
    """Three looks at the same trouble: at the first one nobody can be told."""
    down = site.folder / "told-by-nobody"
    down.touch()
    unheard = look(site, impatient="1s")
    down.unlink()
    return [unheard, look(site, impatient="1s"), look(site, impatient="1s")]


def asks(site: Site, run_id: str) -> bool:
    return site.stack.task_states("mdbackup_asking", run_id)["approve"] == "awaiting_input"


def look(site: Site, impatient: str = "1h") -> Look:
    configure(site.server, site.folder, impatient)
    before = len(told(site))
    run_id = site.stack.trigger(DAG_ID)
    site.stack.wait_for_run(DAG_ID, run_id, timeout=120)
    return Look(run_id, told(site)[before:])


def state_of_watch(site: Site, provider: str) -> dict[str, Any]:
    (asset,) = site.stack.get("/assets", uri_pattern=f"mdbackup://{provider}")["assets"]
    return dict(site.stack.get(f"/assets/{asset['id']}/state-store/watch")["value"])


def names(told: list[str]) -> list[str]:
    return sorted(line.split()[0] for line in told)


def told(site: Site) -> list[str]:
    file = site.folder / "told"
    return file.read_text().splitlines() if file.exists() else []


def said(site: Site, run_id: str, task: str) -> str:
    return site.stack.task_log(DAG_ID, run_id, task)


def test_watch_begins_by_itself_and_gives_each_provider_its_time(site: Site, first: Look) -> None:
    """The DAG is not paused when it is new. At the first look only what is invalid is wrong."""
    assert site.stack.get(f"/dags/{DAG_ID}")["is_paused"] is False
    states = site.stack.task_states(DAG_ID, first.run_id)
    assert states["fresh"] == states["new"] == "success"
    assert states["invalid"] == states["Configuration"] == "failed"


def test_fresh_and_new_backups_are_good(site: Site, troubled: Look) -> None:
    """One with a good run, and one that still has time for its first one."""
    states = site.stack.task_states(DAG_ID, troubled.run_id)
    assert states["fresh"] == states["new"] == "success"
    assert site.stack.xcom(DAG_ID, troubled.run_id, "fresh").startswith("the last good run was")


def test_stale_backup_fails_and_says_that_its_dag_is_paused(site: Site, troubled: Look) -> None:
    """It says how old the backup is, and why nothing comes."""
    assert site.stack.task_states(DAG_ID, troubled.run_id)["old"] == "failed"
    log = said(site, troubled.run_id, "old")
    assert "old: the last good run was" in log and "ago, more than 1 s" in log
    assert "the DAG mdbackup_old is paused" in log


def test_provider_without_a_good_run_fails_after_its_time(site: Site, troubled: Look) -> None:
    """Also when nobody ever unpaused its DAG, or there is none."""
    assert site.stack.task_states(DAG_ID, troubled.run_id)["never"] == "failed"
    assert "never: there has been no good run yet, in the" in said(site, troubled.run_id, "never")
    assert "the DAG mdbackup_never is paused" in said(site, troubled.run_id, "never")
    assert "Airflow has no DAG mdbackup_unknown" in said(site, troubled.run_id, "unknown")


def test_run_that_waits_for_a_person_or_for_a_slot_is_told(site: Site, troubled: Look) -> None:
    """A question that nobody answers, or a pool that does not exist, is why there is no backup."""
    assert site.stack.task_states(DAG_ID, troubled.run_id)["asking"] == "failed"
    assert "a run is waiting for approval" in said(site, troubled.run_id, "asking")
    assert "tasks waiting for a worker of their queue, or a slot of their pool: 1 " in said(
        site, troubled.run_id, "pooled"
    )


def test_invalid_provider_fails_with_what_is_wrong(site: Site, troubled: Look) -> None:
    """Under its own name, and with all other problems of the configuration."""
    for task in ("invalid", "Configuration"):
        assert site.stack.task_states(DAG_ID, troubled.run_id)[task] == "failed"
        assert "`nonsense`: is not a key" in said(site, troubled.run_id, task)


def test_people_are_told_once_while_the_task_keeps_failing(
    site: Site, first: Look, troubled: Look, still_troubled: Look
) -> None:
    """24 mails a day are read by nobody; a red task in each run is still to be seen."""
    assert first.told == []
    assert names(troubled.told) == ["asking", "never", "old", "pooled", "unknown"]
    states = site.stack.task_states(DAG_ID, still_troubled.run_id)
    assert states["old"] == states["never"] == states["asking"] == "failed"
    assert still_troubled.told == []


def test_trouble_that_comes_back_is_told_again(
    site: Site,
    troubled: Look,
    since: float,
    good: Look,
    state_when_good: dict[str, Any],
    troubled_again: list[Look],
) -> None:
    """A good look in between forgets that people were told, but not since when this is watched."""
    assert site.stack.task_states(DAG_ID, good.run_id)["never"] == "success"
    assert state_when_good == {"since": since}
    assert names(troubled_again[0].told) == names(troubled.told)


def test_what_nobody_was_told_is_told_the_next_time(troubled: Look, troubled_again: list[Look]) -> None:
    """A mail server that is down for an hour does not make a day of it."""
    unheard, heard, after = troubled_again
    assert names(unheard.told) == names(heard.told) == names(troubled.told)
    assert after.told == []
