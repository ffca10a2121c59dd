"""Room that the shards of one run, or runs side by side, share."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup import free_space as space
from airflow_mdbackup.scheme.backup import pull as pull_module
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import OPEN, STAT, CutChannel
from tests.pair import Pair, ServerProcess
from tests.unit.backup.small_disk import MB, RESERVE, Disk, Watched, content_needed, plan_run, put_all

# --- the shards of a run ----------------------------------------------------------------------------


def test_the_first_shard_judges_for_all(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """The second takes up the room that was found for both, though the first has filled a part of it."""
    put_all(pair, 8, MB)
    run = plan_run(pair, shards=2, with_end=False)
    disk.leave(RESERVE + 9 * MB)
    pull(pair.mirror, run, 0, pair.connect)
    assert asked[STAT] == 8 and content_needed(run) == 8 * MB
    disk.leave(RESERVE)
    pull(pair.mirror, run, 1, pair.connect)
    assert asked[STAT] == 8
    assert pair.finish(run).outcomes == {"pulled": 8}


def test_what_does_not_fit_is_the_same_for_all_shards(pair: Pair, disk: Disk, asked: Counter[int]) -> None:
    """Of the second one all would fit, if it were alone."""
    put_all(pair, 8, MB)
    run = plan_run(pair, shards=2)
    assert min(pair.plan.shards) > 0
    disk.leave(RESERVE + 7 * MB)
    outcomes = Counter[str]()
    for shard in range(2):
        outcomes.update(pull(pair.mirror, run, shard, pair.connect).outcomes)
    assert outcomes == {"pulled": 6, "failed": 2}
    assert asked[STAT] == 8 + 8 and asked[OPEN] == 6


def test_shards_that_begin_at_once_wait_for_one_judgement(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """It is made under a lock."""
    put_all(pair, 200, 100)
    run = plan_run(pair, shards=4, with_end=False)
    disk.leave(RESERVE + 5 * MB)
    begin = threading.Barrier(4)

    def connect() -> Reader:
        with suppress(threading.BrokenBarrierError):
            begin.wait(0.5)  # all come here, unless there is a lock
        return pair.connect()

    threads = [threading.Thread(target=pull, args=(pair.mirror, run, n, connect)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert asked[STAT] == 200
    assert pair.finish(run).outcomes == {"pulled": 200}


def test_a_retry_does_not_count_against_itself_what_it_has_staged(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """Half of it is there, and the room that is left is for the other half."""
    put_all(pair, 10, MB)
    run = plan_run(pair, with_end=False)
    disk.leave(RESERVE + 11 * MB)

    def cut() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(Watched(CutChannel(server.channel, 6 * MB), asked))

    with pytest.raises(ConnectionLost):
        pull(pair.mirror, run, 0, cut)
    assert sum(file.stat().st_size for file in pair.mirror.staging.iterdir()) > 4 * MB
    missing = 10 - sum(file.suffix != ".part" for file in pair.mirror.staging.iterdir())
    disk.leave(7 * MB)
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 10}
    assert asked[STAT] == 10 + missing  # once for the sizes, then whether those are regular files still


def test_a_connection_that_breaks_while_sizes_are_asked_for_leaves_no_judgement(
    pair: Pair, disk: Disk, asked: Counter[int]
) -> None:
    """The retry asks again."""
    put_all(pair, 50, 10)
    run = plan_run(pair, with_end=False)

    def cut() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(CutChannel(server.channel, 1000))

    with pytest.raises(ConnectionLost):
        pull(pair.mirror, run, 0, cut)
    assert not run.space.exists()
    assert pair.pull(run, pair.plan)[0].outcomes == {"pulled": 50}
    assert asked[STAT] == 50 + 50  # for the sizes, then whether those are regular files still


# --- runs side by side ------------------------------------------------------------------------------


@pytest.mark.parametrize("judged", [False, True])
def test_what_another_run_has_brought_needs_no_room(pair: Pair, disk: Disk, judged: bool) -> None:
    """In a backfill all runs may be planned before the first is committed; some have no room meanwhile."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = plan_run(pair), plan_run(pair)
    if judged:
        disk.leave(RESERVE + MB)
        assert pair.pull(second, pair.plan)[0].outcomes == {"failed": 4}
        disk.leave(RESERVE + 50 * MB)
    pair.pull(first, pair.plan)
    pair.finish(first)
    disk.leave(RESERVE + MB)
    pair.pull(second, pair.plan)
    assert pair.transferred == 0
    assert pair.finish(second).outcomes == {"superseded": 4}


def test_a_commit_while_room_is_judged_is_known_to_the_next_try(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else every retry would fail what another run has brought long since."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = plan_run(pair), plan_run(pair)
    pair.pull(first, pair.plan)
    judge = space.check_free_space

    def commit_and_judge(*args: Any) -> space.SkippedForSpace:
        pair.finish(first)
        disk.leave(RESERVE + MB)
        return judge(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "check_free_space", commit_and_judge)
        assert pair.pull(second, pair.plan)[0].outcomes == {"failed": 4}
    pair.pull(second, pair.plan)
    assert pair.finish(second).outcomes == {"superseded": 4}


def test_an_index_that_is_deleted_while_room_is_judged_stops_nothing(
    pair: Pair, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As errors.md advises for a damaged one; what this run knew of it, it goes on to know."""
    put_all(pair, 4, 5 * MB)
    disk.leave(RESERVE + 50 * MB)
    first, second = plan_run(pair), plan_run(pair)
    pair.pull(first, pair.plan)
    pair.finish(first)
    judge = space.check_free_space

    def delete_and_judge(*args: Any) -> space.SkippedForSpace:
        pair.mirror.index.unlink()
        disk.leave(RESERVE + MB)
        return judge(*args)

    monkeypatch.setattr(pull_module, "check_free_space", delete_and_judge)
    pair.pull(second, pair.plan)
    assert pair.transferred == 0
