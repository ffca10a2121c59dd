"""Many runs, tasks and installations at one backup at once, each a process of its own."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup.plan import Limits, read_plan
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.crash.crash import stop_at
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of, files_of
from tests.isolation import end_with_parent
from tests.pair import STEPS, Pair
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("5. Races")

ANYTHING = Limits(share=1.0)
GOOD, BAD, TOLD = range(3)


class Task:
    """A process that does something. It ends with GOOD, TOLD after an error that is told in words, or BAD."""

    def __init__(self, act: Callable[[], object], log: Path | None = None) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = BAD
            try:
                end_with_parent()
                if log is not None:
                    logging.basicConfig(filename=log, level=logging.INFO, force=True)
                act()
                status = GOOD
            except BackupError:
                status = TOLD
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def is_stopped(self) -> bool:
        """Wait until it is stopped, or has ended; then :meth:`wait` must not be called."""
        return os.WIFSTOPPED(os.waitpid(self.pid, os.WUNTRACED)[1])

    def waits(self, log: Path) -> bool:
        """Wait until its log tells that it waits for a lock, or it has ended; return whether it waits."""
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if log.exists() and "Waiting for the lock" in log.read_text():
                return True
            time.sleep(0.02)
        return False

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def whole_run(pair: Pair, run: Run) -> None:
    """Do all steps of a run with A's index as it is. Nothing but changes on A may go wrong."""
    pair.fetch(run)
    pair.pull(run, pair.diff(run, shards=2, allow_empty=True, limits=ANYTHING))
    pair.archive(run)
    outcomes = {Outcome(outcome) for outcome in pair.commit(run).outcomes}
    assert all(o.good or o in (Outcome.CHANGED, Outcome.VANISHED) for o in outcomes), outcomes


def check_end(pair: Pair) -> None:
    """The next run must bring everything, and the one after it nothing."""
    assert pair.backup(allow_empty=True, limits=ANYTHING).failed == 0
    assert pair.index_b() == pair.index_a()
    check_sound(pair)
    pair.backup(allow_empty=True)
    assert pair.outcome.outcomes == {} and not pair.transferred
    left = [path.name for path in pair.mirror.history.iterdir() if path.suffix != ".jsonl"]
    assert left == []


@pytest.mark.parametrize("number", [scaled(11, 40)])
def test_runs_at_once_bring_what_one_of_them_brings(pair: Pair, cases: Cases, number: int) -> None:
    """A backfill of ten days beside a scheduled run: all are green, and the mirror is that of one run."""
    for name in range(60):
        pair.put(f"d{name % 5}/f{name}", b"%d" % (name % 40) * name)
    pair.put("large1", b"1" * 500_000)
    pair.put("large2", b"2" * 500_000)
    pair.build_index()
    pair.mirror.claim()
    runs = [pair.new_run() for _ in range(number)]
    tasks = [Task(partial(whole_run, pair, run)) for run in runs]
    assert [task.wait() for task in tasks] == [GOOD] * number
    assert pair.index_b() == pair.index_a()
    assert len(files_of(pair)) == 62, "there are versions, though nothing changed"
    check_end(pair)
    cases.add(number)


@pytest.mark.parametrize("installations", [1, 2])
def test_runs_race_while_the_provider_changes(
    pair: Pair, tmp_path: Path, cases: Cases, installations: int
) -> None:
    """Nothing is lost at any moment, and no run makes another one fail.

    Two Airflow installations with one ``dest`` may give their runs the same ids; then a run may be told to
    clear its tasks, and still nothing is lost.
    """
    chance = random.Random(installations)
    names = ("a", "b", "d/a", "d/b", "e/f/a", "large")
    end = tmp_path / "end"
    pair.put("a", b"0")
    pair.backup()

    def work(worker: int) -> None:
        number = 0
        while not end.exists():
            number += 1
            whole_run(pair, pair.mirror.run(f"scheduled__{worker}_{number}"))

    def work_in_pairs(worker: int) -> None:
        number = 0
        while not end.exists():
            number += 1
            time.sleep(0.01 * (worker + number) % 0.03)
            try:
                whole_run(pair, pair.mirror.run(f"scheduled__{number}"))
            except BackupError as error:
                assert type(error).__name__ in ("RunIncomplete", "IndexRefused"), error

    act = work if installations == 1 else work_in_pairs
    tasks = [Task(partial(act, worker)) for worker in range(3)]
    known: set[bytes] = set()
    try:
        for change in range(scaled(60, 600)):
            name = chance.choice(names)
            if chance.random() < 0.8:
                pair.put(name, b"%d " % change * (100_000 if name == "large" else 1))
            elif (pair.a / name).exists():
                (pair.a / name).unlink()
            pair.build_index()
            time.sleep(0.05)
            with cases.one(), pair.mirror.lock("test"):
                check_sound(pair)
                contents = contents_of(pair)
                assert known <= contents, "bytes are lost"
                known |= contents
    finally:
        end.touch()
        statuses = [task.wait() for task in tasks]
    assert statuses == [GOOD] * 3
    check_end(pair)
    assert known <= contents_of(pair)


@pytest.mark.parametrize("step", STEPS)
def test_task_that_was_thought_dead_goes_on_beside_its_retry(tmp_path: Path, step: str, cases: Cases) -> None:
    """Stopped at one step after the other, it goes on when its retry has waited for it, or has ended."""
    number = 1
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        pair = Pair(folder)
        for name in ("a", "b", "d/c", "d/e"):
            pair.put(name, name.encode())
        pair.backup()
        pair.put("a", b"new")
        pair.put("large", b"large" * 100_000)
        pair.put("d/f", b"d/e")
        (pair.a / "d/c").unlink()
        pair.build_index()
        run = pair.new_run()
        for before in list(STEPS)[: list(STEPS).index(step)]:
            STEPS[before](pair, run)
        with cases.one():
            zombie = Task(partial(stop_at, number, partial(STEPS[step], pair, run)))
            stopped = zombie.is_stopped()
            if stopped:
                retry = Task(partial(STEPS[step], pair, run))
                time.sleep(0.1)
                zombie.go_on()
                assert zombie.wait() == GOOD and retry.wait() == GOOD
            for after in list(STEPS)[list(STEPS).index(step) + 1 :]:
                STEPS[after](pair, run)
            assert pair.index_b() == pair.index_a() and pair.versions("a") == [b"a"]
            check_end(pair)
        if not stopped:
            break
        number += scaled(7, 1)


def test_run_whose_directory_goes_while_a_task_waits_for_it_begins_anew(
    pair: Pair, tmp_path: Path, cases: Cases
) -> None:
    """Where there is nothing to begin with, the task says what to clear."""
    run = pair.planned(a=(None, b"1"))

    def take_away(held: Path) -> None:
        with run.lock("test", "srv1"):
            held.touch()
            time.sleep(0.5)
            shutil.rmtree(run.folder)

    for step, status in (("fetch_index", GOOD), ("commit_backup", TOLD)):
        with cases.one():
            held = tmp_path / step
            holder = Task(partial(take_away, held))
            while not held.exists():
                time.sleep(0.01)
            waiting = Task(partial(STEPS[step], pair, run))
            assert holder.wait() == GOOD and waiting.wait() == status
    assert not run.folder.exists()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("step", STEPS)
def test_no_step_of_a_run_begins_while_another_one_of_it_is_at_work(
    pair: Pair, tmp_path: Path, cases: Cases, step: str
) -> None:
    """As when tasks are cleared that still run: it would read what is about to change."""
    pair.put("a", b"1")
    pair.build_index()
    pair.mirror.claim()
    run = pair.new_run()
    for before in list(STEPS)[: list(STEPS).index(step)]:
        STEPS[before](pair, run)
    held, end, log = (tmp_path / name for name in ("held", "end", "log"))

    def hold() -> None:
        with run.lock("test", "srv1", make=True):
            held.touch()
            wait_for(end)

    with cases.one():
        holder = Task(hold)
        wait_for(held)
        task = Task(partial(STEPS[step], pair, run), log)
        waited = task.waits(log)
        end.touch()
        assert waited and "the run manual__1, held by test" in log.read_text()
        assert holder.wait() == task.wait() == GOOD


def test_shards_of_one_run_pull_at_the_same_time(pair: Pair, tmp_path: Path, cases: Cases) -> None:
    """One is held up at its connection, and the other one ends meanwhile."""
    for number in range(20):
        pair.put(f"f{number}", b"%d" % number)
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    assert all(pair.diff(run, shards=2).shards)
    held, end, log = (tmp_path / name for name in ("held", "end", "log"))

    def connect_late() -> Reader:
        held.touch()
        wait_for(end)
        return pair.connect()

    with cases.one():
        first = Task(lambda: pull(pair.mirror, run, 0, connect_late))
        wait_for(held)
        second = Task(lambda: pull(pair.mirror, run, 1, pair.connect), log)
        waited = second.waits(log)
        end.touch()
        assert first.wait() == second.wait() == GOOD and not waited
        assert pair.finish(run).outcomes == {"pulled": 20}


def test_waiting_task_says_for_whom_it_waits(pair: Pair, tmp_path: Path, cases: Cases) -> None:
    """By step, run, process and host, in its own log."""
    pair.put("a", b"1")
    pair.build_index()
    first, second = pair.prepare(), pair.prepare()
    pair.archive(first)
    pair.archive(second)
    holder = Task(lambda: stop_at(10, lambda: pair.commit(first)))
    assert holder.is_stopped()
    log = tmp_path / "log"
    waiting = Task(lambda: pair.commit(second), log)
    deadline = time.monotonic() + 20
    while "Waiting for the lock" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert f"held by commit_backup of manual__1 (process {holder.pid} on " in log.read_text()
    holder.go_on()
    assert holder.wait() == waiting.wait() == GOOD
    cases.add(1)


def test_a_thousand_changes_are_a_thousand_versions(pair: Pair, cases: Cases) -> None:
    """In quick succession, with the clock standing still every now and then: each with its right bytes.

    Short form: two hundred.
    """
    number = scaled(200, 3000)
    for change in range(number + 1):
        pair.put("a", b"content %d" % change)
        pair.backup()
    assert pair.versions("a") == [b"content %d" % change for change in range(number)]
    assert pair.live("a").read_bytes() == b"content %d" % number
    check_end(pair)
    cases.add(number)


def test_runs_planned_before_the_first_was_committed_transfer_nothing_again(pair: Pair, cases: Cases) -> None:
    """As in a backfill, whose runs go through the steps one behind the other."""
    for number in range(50):
        pair.put(f"d{number % 5}/f{number}", b"%d" % number * number)
    pair.put("large", b"large" * 100_000)
    pair.build_index()
    runs = [pair.new_run() for _ in range(4)]
    plans = []
    for run in runs:
        pair.fetch(run)
        plans.append(pair.diff(run, shards=3))
    for run, plan in zip(runs, plans, strict=True):
        pair.pull(run, plan)
        assert (pair.transferred > 0) == (run is runs[0])
        summary = pair.finish(run)
        assert summary.outcomes == ({"pulled": 51} if run is runs[0] else {"superseded": 51})
        assert len(pair.history()) == 1
    check_end(pair)
    cases.add(len(runs))


def test_run_whose_predecessor_is_superseded_leaves_it_to_the_next(pair: Pair, cases: Cases) -> None:
    """It found its file committed, and another run put an older one back before its own commit."""
    pair.put("a", b"old")
    pair.backup()
    runs = []
    for content in (b"new", b"old", b"new"):
        pair.put("a", content)
        pair.build_index()
        runs.append(pair.new_run())
        pair.fetch(runs[-1])
        if content == b"new":
            pair.diff(runs[-1])
    first, second, third = runs
    pair.pull(first, read_plan(first))
    pair.finish(first)
    pair.pull(third, read_plan(third))
    pair.put("a", b"old")
    pair.pull(second, pair.diff(second))
    assert pair.finish(second).replaced == 1
    pair.put("a", b"new")
    assert pair.finish(third).outcomes == {"superseded": 1}
    check_end(pair)
    cases.add(1)
