"""Runs that are limited to some paths."""

from __future__ import annotations

import os

import pytest

from airflow_mdbackup.scheme.backup.diff import format_changes
from airflow_mdbackup.scheme.errors import IndexRefused
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair


def test_a_run_of_some_paths_touches_and_forgets_nothing_else(pair: Pair) -> None:
    """Both indexes are limited, so that what is outside is neither new nor gone; a file is a path, too."""
    for name in ("in/one", "in/two", "in-between", "out/three", "out/four", "single"):
        pair.put(name, name.encode())
    pair.backup()
    for name in ("in/one", "in-between", "out/three", "single"):
        pair.put(name, f"{name}, changed".encode())
    for name in ("in/two", "out/four"):
        os.unlink(pair.path(name))
    summary = pair.backup(only=[pair.path("in") + b"/", pair.path("single")])
    assert summary.outcomes == {"pulled": 2} and summary.forgotten == 1
    assert pair.live("in/one").read_bytes() == b"in/one, changed"
    assert pair.live("single").read_bytes() == b"single, changed"
    assert pair.live("in-between").read_bytes() == b"in-between"
    assert set(pair.index_b()) == set(
        map(pair.path, ("in/one", "in-between", "out/three", "out/four", "single"))
    )
    assert pair.backup().outcomes == {"pulled": 2}
    assert pair.index_b() == pair.index_a()
    check_sound(pair)


def test_a_plan_is_formatted_up_to_a_number_of_lines_of_each_kind(pair: Pair) -> None:
    """With rclone's marks, and names that act on nothing."""
    for name in ("changed", "gone"):
        pair.put(name, b"1")
    pair.backup()
    pair.put("changed", b"2")
    os.unlink(pair.path("gone"))
    for number in range(4):
        pair.put(f"new\x1b{number}", b"%d" % number)
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    a = os.fsdecode(pair.path(""))
    told = list(format_changes(run, pair.diff(run), most=3))
    new = [f"+ {a}new\\x1b{number}" for number in range(3)]
    assert told == [f"* {a}changed", *new, f"- {a}gone", "+ and 1 more"]


def test_a_run_of_some_paths_is_no_good_backup(pair: Pair) -> None:
    """Whoever watches must not take it for one."""
    pair.put("in/one", b"1")
    pair.put("out/two", b"2")
    pair.backup()
    good = pair.mirror.read_status()["last_good"]
    assert pair.backup(only=[pair.path("in")]).partial
    status = pair.mirror.read_status()
    assert status["last_good"] == good and status["last_commit"]["run_id"] != good["run_id"]


def test_a_run_of_some_paths_fails_only_for_what_is_unreadable_there(pair: Pair) -> None:
    """Or around it."""
    pair.put("in/one", b"1")
    pair.put("out/two", b"2")
    assert pair.backup(unreadable=[pair.path("out")], only=[pair.path("in")]).failed == 0
    assert pair.backup(unreadable=[pair.path("in/x")], only=[pair.path("in")]).failed == 1
    assert pair.backup(unreadable=[os.fsencode(pair.a)], only=[pair.path("in")]).failed == 1


def test_paths_of_which_nothing_is_anywhere_are_refused(pair: Pair) -> None:
    """A typing error must not look like a backup; while what is gone on A only is forgotten."""
    pair.put("in/one", b"1")
    pair.put("out/two", b"2")
    pair.backup()
    with pytest.raises(IndexRefused, match=r"neither index has anything at .*/inn"):
        pair.backup(only=[pair.path("inn")])
    os.unlink(pair.path("in/one"))
    assert pair.backup(only=[pair.path("in")]).forgotten == 1


def test_a_run_of_some_paths_supersedes_none_of_all(pair: Pair) -> None:
    """One that had begun before, and goes on later, brings the rest; what is newer here stays."""
    for name in ("in/one", "out/two"):
        pair.put(name, name.encode())
    pair.backup()
    for name in ("in/one", "out/two"):
        pair.put(name, f"{name}, changed".encode())
    whole = pair.begin()
    pair.put("in/one", b"changed again")
    pair.backup(only=[pair.path("in")])
    assert not pair.finish(whole).superseded
    assert pair.live("in/one").read_bytes() == b"changed again"
    assert pair.index_b() == pair.index_a()
    check_sound(pair)
