"""What runs leave behind, and when it is removed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import airflow_mdbackup.scheme.backup.cleanup as clean_module
import airflow_mdbackup.scheme.store.mirror as mirror_module
from airflow_mdbackup.scheme.backup.cleanup import clean
from airflow_mdbackup.scheme.errors import RunIncomplete
from airflow_mdbackup.scheme.recovery.rebuild_history import rebuild
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair


def test_old_run_directories_go_by_count_and_unfinished_ones_stay(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last few finished runs are kept; one that can still be committed is never removed."""
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 3)
    for number in range(6):
        pair.put("alpha", b"%d" % number)
        pair.backup()
    unfinished = pair.new_run()
    pair.put("alpha", b"last")
    pair.build_index()
    pair.fetch(unfinished)
    pair.diff(unfinished)
    with pair.mirror.lock("test"), pair.mirror.tree() as tree:
        clean(pair.mirror, tree)
    left = set((pair.mirror.dest / ".mdbackup/runs").iterdir())
    assert unfinished.folder in left and len(left) == 4
    assert pair.mirror.run("manual__6").folder in left and pair.mirror.run("manual__1").folder not in left


def test_runs_that_can_only_be_superseded_go_by_age(pair: Pair) -> None:
    """A run that failed on its way does not stay for ever; one whose tasks still run is left in peace."""
    pair.put("alpha", b"1")
    pair.build_index()
    failed = pair.new_run()
    pair.fetch(failed)
    for _ in range(15):
        pair.backup()
    assert failed.folder.exists()
    then = time.time() - 15 * 86400
    os.utime(failed.folder, (then, then))
    pair.backup()
    assert not failed.folder.exists()


def test_what_a_run_archived_in_vain_is_taken_back_with_it(pair: Pair) -> None:
    """No version stays behind that no history tells of."""
    forgotten = pair.planned(alpha=(b"1", b"2"))
    pair.archive(forgotten)
    assert len(pair.versions("alpha")) == 1
    pair.put("alpha", b"1")
    pair.backup()
    then = time.time() - 15 * 86400
    os.utime(forgotten.folder, (then, then))
    pair.backup()
    assert pair.versions("alpha") == [] and not forgotten.folder.exists()


def test_stray_things_among_the_runs_fail_no_commit(pair: Pair) -> None:
    """What cannot be read is left alone."""
    pair.put("alpha", b"1")
    pair.backup()
    runs = pair.mirror.run("x").folder.parent
    (runs / "a file").write_text("")
    (runs / "empty state").mkdir()
    (runs / "empty state" / "run.json").write_text("")
    (runs / "newer").mkdir()
    (runs / "newer" / "run.json").write_text('{"format": 99, "run_id": "x"}\n')
    pair.put("alpha", b"2")
    assert pair.backup().replaced == 1
    assert (runs / "newer").exists()


def test_old_run_directories_go_by_age(pair: Pair) -> None:
    """However few there are."""
    pair.put("alpha", b"1")
    pair.backup()
    folder = pair.mirror.run("manual__1").folder
    then = time.time() - 15 * 86400
    os.utime(folder, (then, then))
    pair.backup()
    assert not folder.exists()


def test_old_run_directories_go_by_size(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last finished one stays, however large, so that its tasks can be cleared."""
    monkeypatch.setattr(clean_module, "_MIN_SIZE", 0)
    for number in range(4):
        pair.put("alpha", b"%d" % number)
        run = pair.begin()
        (run.folder / "large").write_bytes(bytes(100_000))
        pair.finish(run)
        assert list(run.folder.parent.iterdir()) == [run.folder]
    assert pair.finish(run).failed == 0 and pair.commit(run).failed == 0


def test_staged_files_go_by_age_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any run may need them."""
    pair.mirror.claim()
    leftover = pair.staged(b"0" * 32)
    leftover.write_bytes(b"x")
    pair.put("alpha", b"1")
    pair.backup()
    assert leftover.exists()
    monkeypatch.setattr(clean_module, "_MAX_AGE", -1.0)
    with pair.mirror.lock("test"), pair.mirror.tree() as tree:
        clean(pair.mirror, tree)
    assert not leftover.exists()


def test_what_a_run_of_many_days_has_staged_stays(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another run, limited to some paths, is committed meanwhile, and clears away."""
    for name in ("one", "two", "side"):
        pair.put(name, name.encode())
    run = pair.begin()
    side = pair.prepare(only=[pair.path("side")])
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(clean_module.time, "time", lambda: now + 15 * 86400)
        pair.finish(side)
    assert pair.finish(run).outcomes == {"pulled": 2, "superseded": 1}


def test_a_staged_file_that_vanishes_meanwhile_stops_no_clearing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that pull rename their files without the lock."""
    pair.mirror.claim()
    for number in range(3):
        pair.part(b"%032d" % number).write_bytes(b"x")
    original = Path.iterdir

    def listed(path: Path) -> object:
        entries = list(original(path))
        if path == pair.mirror.staging:
            entries[0].unlink(missing_ok=True)
        return iter(entries)

    monkeypatch.setattr(Path, "iterdir", listed)
    monkeypatch.setattr(clean_module, "_MAX_AGE", -1.0)
    with pair.mirror.tree() as tree:
        clean(pair.mirror, tree)
    assert not list(original(pair.mirror.staging))


def test_run_whose_tasks_were_cleared_is_not_taken_away_under_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while one of them works, nor between two of them."""
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 0)
    pair.put("alpha", b"one")
    run = pair.begin()
    pair.finish(run)
    with run.lock("pull_changed", "srv1", shared=True):
        pair.backup()
        assert run.folder.exists()
    with run.lock("diff_indexes", "srv1"):
        pair.backup()
        assert run.folder.exists()
    pair.diff(run)
    pair.backup()
    assert run.folder.exists()
    pair.pull(run, pair.plan)
    pair.finish(run)
    pair.backup()
    assert not run.folder.exists()


def test_versions_stay_when_taking_a_run_away_was_cut_off(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill may leave what it archived, and not whose it was; history may tell of these versions."""
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 0)
    monkeypatch.setattr(clean_module, "_MAX_AGE", -1.0)
    run = pair.planned(alpha=(b"one", b"two"))
    pair.finish(run)
    run.state.unlink()
    pair.put("alpha", b"one")
    pair.backup()
    assert pair.live("alpha").read_bytes() == b"one" and pair.versions("alpha") == [b"one", b"two"]
    assert not run.folder.exists()


@pytest.mark.parametrize("end", ["cleaned", "cleared"])
def test_a_version_that_two_runs_archived_under_one_stamp_stays(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """While the clock is behind the last stamp, all runs get the next one until a commit takes it."""
    pair.put("alpha", b"one")
    with monkeypatch.context() as ahead:
        ahead.setattr(mirror_module, "now_stamp", lambda: "20990101T000000.000000Z")
        pair.backup()
    pair.put("alpha", b"two")
    forgotten = pair.begin()
    pair.archive(forgotten)
    pair.put("alpha", b"three")
    pair.backup()
    pair.put("alpha", b"one")  # whose bytes are live then, and a version
    pair.backup()
    assert pair.versions("alpha") == [b"one", b"three"]
    if end == "cleaned":
        os.utime(forgotten.folder, (0, 0))
        pair.backup()
        assert not forgotten.folder.exists()
    else:
        pair.finish(forgotten)
    assert pair.versions("alpha") == [b"one", b"three"]
    check_sound(pair)


def test_versions_of_runs_that_say_not_what_they_used_stay_where_history_has_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such runs are those of earlier versions of this program; their history may be told anew."""
    for content in (b"one", b"two", b"one"):
        pair.put("alpha", content)
        pair.backup()
    for used in pair.mirror.dest.glob(".mdbackup/runs/*/used.json"):
        used.unlink()
    for file in pair.mirror.history.iterdir():
        file.unlink()
    rebuild(pair.mirror)
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 0)
    pair.put("bravo", b"1")
    pair.backup()
    assert pair.versions("alpha") == [b"one", b"two"]
    check_sound(pair)


def test_run_that_resists_is_left_and_the_others_go(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records are damaged, say; no commit fails for it."""
    pair.put("alpha", b"one")
    pair.build_index()
    first, second = pair.prepare(), pair.prepare()
    pair.finish(first)
    pair.finish(second)
    second.archived.write_bytes(b"no record\n")
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 0)
    assert pair.backup().failed == 0
    assert second.folder.exists() and not first.folder.exists()


def test_task_that_waits_for_a_run_while_it_is_taken_away_is_told_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds all of the run's files, or none."""
    run = pair.planned(alpha=(None, b"one"))
    pair.finish(run)
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 0)
    seen: list[object] = []

    def remove_tree(folder: Path) -> None:
        if run.folder.name in folder.name:
            try:
                pair.archive(run)
            except RunIncomplete as error:
                seen.append(error)
        really(folder)

    really = clean_module.remove_tree
    monkeypatch.setattr(clean_module, "remove_tree", remove_tree)
    assert pair.backup().failed == 0
    assert len(seen) == 1 and "clear its task fetch_index" in str(seen[0])
    assert not run.folder.exists()


def test_what_is_left_of_a_run_that_was_being_taken_away_goes(pair: Pair) -> None:
    """A kill may come at any time."""
    run = pair.planned(alpha=(None, b"one"))
    pair.finish(run)
    run.remove()
    runs = run.folder.parent
    assert len(list(runs.iterdir())) == 1
    pair.backup()
    assert [path.name for path in runs.iterdir()] == [pair.mirror.run("manual__2").folder.name]


def test_one_thing_that_resists_keeps_no_other_from_going(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair.mirror.claim()
    for number in range(3):
        pair.staged(b"%032d" % number).write_bytes(b"x")
    (pair.mirror.staging / "odd").mkdir()
    (pair.mirror.history / "odd.tmp").mkdir()
    (pair.mirror.history / "other.tmp").write_bytes(b"x")
    monkeypatch.setattr(clean_module, "_MAX_AGE", -1.0)
    with pair.mirror.tree() as tree:
        clean(pair.mirror, tree)
    assert [path.name for path in pair.mirror.staging.iterdir()] == ["odd"]
    assert [path.name for path in pair.mirror.history.iterdir()] == ["odd.tmp"]
    assert "odd, staged long ago:" in caplog.text and "Could not remove" in caplog.text
