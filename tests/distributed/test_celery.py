"""Backups on several workers: who does what, and what follows when one is lost or is the wrong one."""

from __future__ import annotations

import os
from typing import Any

import pytest

from demo.sshd import _namespaces_allowed
from tests.distributed.conftest import Machines
from tests.locks import pulling
from tests.waiting import until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root can play several machines"
)


def test_each_queue_has_its_workers_and_its_disk(machines: Machines) -> None:
    """One folder of DAGs, two disks: the tasks of each provider run where its dest is."""
    far, near = machines.site("west"), machines.site("east")
    far.put("far", "file", b"1")
    near.put("near", "file", b"2")
    runs = {"far": far.start("far"), "near": near.start("near")}
    assert far.finish("far", runs["far"]) == near.finish("near", runs["near"]) == "success"
    assert far.live("far", "file").read_bytes() == b"1"
    assert near.live("near", "file").read_bytes() == b"2"
    assert hosts(machines, "far", runs["far"]) == {"west-1"}
    assert hosts(machines, "near", runs["near"]) <= {"east-1", "east-2"}
    assert [list(machines.mount(queue).iterdir()) for queue in ("east", "west")] == [[], []]


def instances(machines: Machines, provider: str, run_id: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what Airflow knows of each task instance that some worker did, by task and map index."""
    tasks = machines.stack.task_instances(f"mdbackup_{provider}", run_id)
    return {(task["task_id"], task["map_index"]): task for task in tasks if task["hostname"]}


def hosts(machines: Machines, provider: str, run_id: str) -> set[str]:
    return {task["hostname"] for task in instances(machines, provider, run_id).values()}


def test_shards_of_one_provider_are_pulled_by_two_workers_at_once(machines: Machines) -> None:
    """Two slots each, four shards: no worker has them all. What they staged is committed as one."""
    site = machines.site("east")
    contents = {f"dir{number % 3}/file{number}": os.urandom(600_000) for number in range(16)}
    for name, content in contents.items():
        site.put("shared", name, content)
    run_id = site.start("shared")
    assert site.finish("shared", run_id) == "success"
    pulls = [instances(machines, "shared", run_id)["pull_changed", shard] for shard in range(4)]
    assert len({pull["pid"] for pull in pulls}) == 4
    assert {pull["hostname"] for pull in pulls} == {"east-1", "east-2"}
    east_1, east_2 = ([pull for pull in pulls if pull["hostname"] == host] for host in ("east-1", "east-2"))
    assert any(overlap(one, other) for one in east_1 for other in east_2), pulls
    outcomes = site.stack.xcom("mdbackup_shared", run_id, "commit_backup")["outcomes"]
    assert outcomes == {"pulled": len(contents)}
    for name, content in contents.items():
        assert site.live("shared", name).read_bytes() == content


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two task instances ran at the same time, for a while."""
    return bool(one["start_date"] < other["end_date"] and other["start_date"] < one["end_date"])


def test_task_on_the_wrong_worker_fails_and_names_host_and_queue(machines: Machines) -> None:
    """A mistaken queue: no new backup is begun there, because Airflow knows of the one elsewhere."""
    site = machines.site("east")
    site.put("misled", "file", b"2")
    assert site.run("misled")[0] == "success"
    move(machines, "west")
    run_id = site.start("misled")
    assert site.finish("misled", run_id) == "failed"
    log = site.stack.task_log("mdbackup_misled", run_id, "fetch_index")
    assert f"misled: {machines.mount('east')}/misled on west-1 (queue 'west') has no backup" in log, log
    assert list(machines.mount("east").iterdir()) == []
    move(machines, "east")
    site.put("misled", "file", b"3")
    assert site.run("misled")[0] == "success"
    assert site.live("misled", "file").read_bytes() == b"3"


def move(machines: Machines, queue: str) -> None:
    """Configure another queue for the tasks of `misled`, and wait until Airflow knows of it."""
    machines.configure("misled", "east", queue=queue)
    machines.stack.read_again("mdbackup_misled")
    until(lambda: machines.stack.get("/dags/mdbackup_misled/tasks/fetch_index")["queue"] == queue)


def test_worker_that_is_lost_in_mid_pull_is_replaced_by_another(machines: Machines) -> None:
    """A power cut, as it were: by itself the run ends well, and goes on where the lost task was."""
    site = machines.site("east")
    contents = {f"file{number}": os.urandom(4_000_000) for number in range(2)}
    for name, content in contents.items():
        site.put("lost", name, content)
    run_id = site.start("lost")
    staging = machines.disk("east") / "lost" / ".mdbackup" / "staging"
    until(lambda: (parts := [*staging.glob("*.part")]) and all(p.stat().st_size > 500_000 for p in parts))
    holders = pulling(staging)
    tasks = instances(machines, "lost", run_id).items()
    (shard, lost), *_ = [(index, task) for (_, index), task in tasks if task["pid"] in holders]
    machines.stack.kill(lost["hostname"])
    assert site.finish("lost", run_id) == "success"
    again = instances(machines, "lost", run_id)["pull_changed", shard]
    assert (again["try_number"], again["state"]) == (2, "success")
    assert {lost["hostname"], again["hostname"]} == {"east-1", "east-2"}
    log = site.stack.task_log("mdbackup_lost", run_id, "pull_changed", 2, shard)
    assert "resuming at" in log, log
    for name, content in contents.items():
        assert site.live("lost", name).read_bytes() == content
