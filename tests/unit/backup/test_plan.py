"""What the next run would do, as `plan` tells it."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from functools import partial

import pytest

from airflow_mdbackup.scheme.history.changes import pending
from tests.guarantees.crash.crash import crash_at
from tests.guarantees.whatever_happens.soundness import digest
from tests.pair import Pair
from tests.unit.cli.terminal import REFUSED, WRONG, Terminal, on_disk


def test_plan_of_a_backup_that_is_not_there_yet_is_everything(pair: Pair, terminal: Terminal) -> None:
    """And is no beginning of one."""
    pair.put("a", b"1")
    pair.put("sub/b", b"2")
    pair.build_index()
    assert terminal.plan() == ["+ a", "+ sub/b"]
    assert "2 files, 2 B" in terminal.told
    assert not pair.mirror.dest.exists()


def changed_in_each_way(pair: Pair) -> None:
    for name in ("same", "changed", "gone", "moves", "sub/x", "returns"):
        pair.put(name, name.encode() * 100)
    pair.backup()
    os.unlink(pair.path("returns"))
    pair.backup()
    pair.put("returns", b"returns" * 100)
    pair.put("changed", b"other")
    os.rename(pair.path("moves"), pair.path("moved"))
    os.unlink(pair.path("gone"))
    pair.put("new", b"new")
    pair.build_index()


def test_plan_tells_what_the_next_run_does_and_changes_nothing(pair: Pair, terminal: Terminal) -> None:
    """A line for each path, in rclone's marks; what is on this side already, in files and bytes."""
    changed_in_each_way(pair)
    before = on_disk(pair.mirror.dest)
    told = ["* changed", "- gone", "+ moved", "- moves", "+ new", "+ returns"]
    assert terminal.plan() == told
    assert "2 same, 3 new, 1 changed, 2 gone" in terminal.told
    assert "Of the new ones, already here: 1 (700 B)" in terminal.told
    assert "Duplicates that would be copied locally: 1 (500 B)" in terminal.told
    assert terminal.plan("--all") == [*told, "= same", "= sub/x"]
    assert terminal.plan(f"{pair.a}/sub", "--all") == ["= sub/x"]
    terminal.configure(exclude=["gone", "new", "sub/"])
    assert terminal.plan("--all") == [told[0], *told[2:4], told[5], "= same"]
    assert on_disk(pair.mirror.dest) == before

    run = pair.new_run()
    pair.fetch(run)
    plan = pair.diff(run, exclude=["gone", "new", "sub/"])
    *lines, summary = map(json.loads, terminal.run("plan", "--format", "json").splitlines())
    facts = summary["summary"]
    counts = ("same", "new", "changed", "gone", "adopt", "copy")
    assert {name: facts[name] for name in counts} == {name: getattr(plan, name) for name in counts}
    assert (facts["adopt_bytes"], facts["copy_bytes"], facts["guard"]) == (700, 500, [])
    assert [line["mark"] for line in lines] == ["*", "+", "-", "+"]
    assert lines[1]["copied_from"] == os.fsdecode(pair.path("moves"))
    assert [line["here"] for line in lines if line["mark"] == "+"] == [False, True]


def test_plan_says_that_a_commit_is_not_finished_and_leaves_it(pair: Pair, terminal: Terminal) -> None:
    """It compares with what was there before that."""
    run = pair.planned(a=(b"1", b"2"))
    pair.archive(run)
    number = 1
    while not any(pending(pair.mirror)) or pair.index_b():  # until the index lacks what is being replaced
        assert crash_at(number, partial(pair.commit, run))
        number += 1
    before = on_disk(pair.mirror.dest)
    assert terminal.plan() == ["* a"]
    assert "A commit is not finished" in terminal.told
    assert on_disk(pair.mirror.dest) == before


def test_plan_ends_with_1_where_a_run_would_stop(pair: Pair, terminal: Terminal) -> None:
    """By the guard, for the provider's index, or for the consumer's."""
    for name in "abcd":
        pair.put(name, b"1")
    pair.backup()
    for name in "abc":
        os.unlink(pair.path(name))
    pair.build_index()
    terminal.configure(guard={"above": 2})
    assert terminal.plan(status=WRONG) == ["- a", "- b", "- c"]
    assert "the run would stop: 3 gone and 0 changed of 4 entries" in terminal.told
    terminal.configure(guard={"above": 2}, on_guard="approve")
    terminal.plan(status=WRONG)
    assert "the run would wait for approval: 3 gone" in terminal.told
    pair.put(".old/x", b"1")
    pair.build_index()
    terminal.plan(status=WRONG)
    assert "the next run would stop" in terminal.told and "reserved" in terminal.told
    shutil.rmtree(pair.a / ".old")
    pair.build_index()
    pair.mirror.index.write_text("damaged\n")
    terminal.plan(status=WRONG)
    assert "delete it: then all files are copied again" in terminal.told
    pair.mirror.index.unlink()
    assert terminal.plan() == ["+ d"], "the next run copies all again"


def test_plan_takes_an_index_from_standard_input(
    pair: Pair, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ssh A cat index | mdbackup plan` gives it; also one of an md5sum job, without an end line."""
    content = f"{digest(b'1').decode()}  /a\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert terminal.run("plan", "--index", "-", index=False) == "+ /a\n"
    terminal.run("plan", "--index", "nowhere.md5", index=False, status=REFUSED)
    assert terminal.told == "mdbackup plan: --index nowhere.md5: No such file or directory\n"


def test_plan_of_a_dest_that_holds_something_else_is_refused(pair: Pair, terminal: Terminal) -> None:
    """As the run would be, with a word on how to take it over."""
    pair.put("a", b"1")
    pair.build_index()
    (pair.mirror.dest / "other").mkdir(parents=True)
    assert terminal.plan(status=REFUSED) == []
    assert "mdbackup adopt" in terminal.told
    assert os.listdir(pair.mirror.dest) == ["other"]
