"""Hands on the index and the history while a commit is cut off."""

from __future__ import annotations

import os
import random
import shutil
from functools import partial
from itertools import count

import pytest

from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged
from airflow_mdbackup.scheme.files.jsonl import CorruptFile
from airflow_mdbackup.scheme.history.changes import commits, pending
from tests.guarantees.crash.crash import crash_at, crashes
from tests.guarantees.crash.cut_off import cut_off_commits, drop_entries, settle
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.torture import LONG, Cases


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("became", ["directory", "file"])
def test_index_claims_nothing_that_settling_moves_out_of_the_way(
    pair: Pair, cases: Cases, became: str
) -> None:
    """Also where the commit that moves it is killed, and then the one that finishes it, at any step."""
    old, new = ("d", "d/a") if became == "directory" else ("d/a", "d")
    pair.put(old, b"old")
    pair.put("other", b"other")
    pair.backup()
    old_path = pair.path("d")
    shutil.rmtree(old_path) if os.path.isdir(old_path) else os.unlink(old_path)
    pair.put(new, b"new")
    run = pair.begin()
    pair.archive(run)
    sample = random.Random(1)
    for _ in cut_off_commits(pair, run):
        for _ in crashes(pair, lambda: pair.commit(pair.mirror.run(run.run_id)), sample=sample):
            with cases.one():
                check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("edit", ["drop", "restore", "delete"])
def test_hands_on_the_index_count_also_while_a_commit_is_cut_off(pair: Pair, cases: Cases, edit: str) -> None:
    """An edit is kept, and history tells of it; for a deleted index everything comes again."""
    for name in ("a", "b", "c", "d", "gone"):
        pair.put(name, name.encode())
    pair.backup()
    drop_entries(pair, "b")
    pair.put("a", b"new")
    pair.put("e", b"e")
    os.unlink(pair.path("gone"))
    run = pair.begin()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if edit == "drop":
            drop_entries(pair, "c")
        elif edit == "restore":
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
        else:
            pair.mirror.index.unlink()
        ended = len(commits(pair.mirror)) == 2  # what is edited now, the next commit tells of
        for again in count(1 if LONG else 1000):
            with cases.one():
                killed = crash_at(again, partial(settle, pair.mirror))
                if not (killed or ended or edit == "delete"):
                    check_sound(pair)
            if not killed:
                break
        index = pair.index_b() if pair.mirror.index.exists() else {}
        assert (pair.path("c") in index) == (edit == "restore")
        assert bool(index) == (edit != "delete")
        pair.backup()
        check_sound(pair)
        assert set(pair.index_b()) == {pair.path(name) for name in "abcde"}
        if edit == "delete":
            assert pair.outcome.outcomes == {"pulled": 5}


@pytest.mark.guarantee("1. Crash at every step")
def test_an_index_that_is_restored_claims_nothing_that_the_cut_off_commit_moves(pair: Pair) -> None:
    """Its entry had been dropped before, so that the commit knows nothing of it."""
    for name in ("d/a", "b", "c"):
        pair.put(name, name.encode())
    pair.backup()
    drop_entries(pair, "d/a")
    os.unlink(pair.path("d/a"))
    pair.put("d/a/x", b"below now")
    run = pair.begin()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if len(commits(pair.mirror)) == 1:
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
            settle(pair.mirror)
            check_sound(pair)
            drop_entries(pair, "b")
            pair.backup()
            check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
def test_an_index_that_is_restored_while_a_full_copy_is_cut_off_is_told_of(pair: Pair) -> None:
    for name in ("a", "b", "gone", "excluded"):
        pair.put(name, name.encode())
    pair.backup()
    pair.mirror.index.unlink()
    os.unlink(pair.path("gone"))
    pair.put("a", b"new")
    run = pair.begin(exclude=["excluded"])
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if len(commits(pair.mirror)) == 1:
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
            settle(pair.mirror)
            check_sound(pair)
            pair.backup(exclude=["excluded"])
            check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
def test_a_spoilt_index_is_restored_from_the_last_commit_that_came_to_its_end(pair: Pair) -> None:
    """Though that was cut off before the copy of its index had its name."""
    run = pair.planned(a=(b"1", b"2"))
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if len(commits(pair.mirror)) == 2:
            pair.mirror.index.write_bytes(b"spoilt")
            with pytest.raises(ConsumerIndexDamaged, match="is what the last commit wrote"):
                pair.prepare()
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
            settle(pair.mirror)
            check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
def test_a_spoilt_history_says_what_to_move_away_and_backups_go_on(pair: Pair) -> None:
    """Of the last commit, or of one that was cut off."""
    pair.put("alpha", b"1")
    pair.backup()
    commits(pair.mirror)[-1].write_bytes(bytes(50))
    with pytest.raises(CorruptFile, match="Move that file away: what was committed then"):
        pair.backup()
    commits(pair.mirror)[-1].unlink()
    pair.put("alpha", b"2")
    assert pair.backup().replaced == 1
    pair.put("alpha", b"3")
    run = pair.begin()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        (path,) = pending(pair.mirror)
        path.write_bytes(bytes(50))
        if len(commits(pair.mirror)) == 1:
            with pytest.raises(CorruptFile, match="Move that file away: the next run"):
                pair.prepare()
            path.unlink()
        pair.backup()
        assert pair.index_b() == pair.index_a()
        assert pair.live("alpha").read_bytes() == b"3"
