"""The guard against runs that would replace or forget too much (row 16 of the policy table)."""

from __future__ import annotations

import os
import shutil

import pytest

from airflow_mdbackup.scheme.backup.plan import Limits
from airflow_mdbackup.scheme.errors import GuardTripped, RunIncomplete
from tests.pair import Pair


def guarded(pair: Pair, **options: object) -> list[str]:
    """Return why the guard stops a run with A as it is now, making sure that it changes nothing."""
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    before = pair.mirror.index.read_bytes() if pair.mirror.index.exists() else b""
    try:
        pair.diff(run, **options)
    except GuardTripped as error:
        assert not run.plan.exists()
        with pytest.raises(RunIncomplete):
            pair.commit(run)
        assert (pair.mirror.index.read_bytes() if pair.mirror.index.exists() else b"") == before
        assert "nothing was changed" in str(error)
        plan = pair.diff(run, may_trip=True, **options)
        assert plan.guard and all(reason in str(error) for reason in plan.guard)
        return plan.guard
    return []


def test_an_empty_provider_index_trips_the_guard_on_a_first_run_too(pair: Pair) -> None:
    """Row 16: unless that is allowed."""
    assert guarded(pair) == ["the provider's index is empty"]
    assert guarded(pair, allow_empty=True) == []
    assert pair.backup(allow_empty=True).files == 0
    assert pair.mirror.index.read_bytes() == b"# mdbackup end format=1 files=0 unreadable=0\n"


def test_an_index_whose_entries_are_all_excluded_is_empty(pair: Pair) -> None:
    """Row 16: the guard judges after exclude."""
    pair.put("a.log", b"1")
    assert guarded(pair, exclude=["*.log"]) == ["the provider's index is empty"]


def test_a_source_that_has_lost_all_its_entries_trips_the_guard(pair: Pair) -> None:
    """Row 16: however few they are; a source that never had any does not."""
    path = pair.put("one/file", b"1")
    pair.put("two/file", b"2")
    sources = {"source": [pair.path("one"), pair.path("two/"), pair.path("new")]}
    pair.backup(**sources)
    os.unlink(path)
    (reason,) = guarded(pair, **sources)
    assert reason == f"nothing is left of 1 entries in {pair.a}/one"
    assert guarded(pair, allow_empty=True, **sources) == []


def test_a_source_that_a_cannot_read_has_not_lost_its_entries(pair: Pair) -> None:
    """Rows 4 and 16: nothing of it would be forgotten, so that the rest can be backed up."""
    path = pair.put("one/file", b"1")
    pair.put("two/file", b"2")
    sources = {"source": [pair.path("one"), pair.path("two")]}
    pair.backup(**sources)
    os.unlink(path)
    pair.put("two/new", b"3")
    summary = pair.backup(unreadable=[pair.path("one")], **sources)
    assert summary.outcomes["pulled"] == 1 and summary.failed == 1
    assert path in pair.index_b()


def fill(pair: Pair, content: bytes, numbers: range) -> None:
    for number in numbers:
        pair.put(f"{number:03}", b"%d %s" % (number, content))


def test_a_source_that_could_not_be_read_is_named_when_nothing_is_left(pair: Pair) -> None:
    """Row 16: a source that is misspelt must not look like one that is empty."""
    pair.build_index(unreadable=[pair.path("misspelt")])
    run = pair.new_run()
    pair.fetch(run)
    with pytest.raises(GuardTripped, match=r"empty, because it could not read .*/misspelt\. .* allow_empty"):
        pair.diff(run)


def test_too_many_changed_entries_trip_the_guard(pair: Pair) -> None:
    """Row 16: over half of more than a hundred."""
    fill(pair, b"one", range(102))
    pair.backup()
    fill(pair, b"two", range(51))
    assert guarded(pair) == []
    fill(pair, b"two", range(52))
    told = "0 gone and 52 changed of 102 entries"
    first = ", ".join(pair.path(f"{number:03}").decode() for number in range(3))
    assert guarded(pair) == [f"{told}, over 50% (such as {first})"]
    assert guarded(pair, limits=Limits(share=1.0, number=51)) == [f"{told}, over 51 (such as {first})"]
    assert guarded(pair, limits=Limits(share=1.0, number=52)) == []
    assert guarded(pair, limits=Limits(above=102)) == []


def test_too_many_gone_entries_trip_the_guard_and_kept_ones_are_not_gone(pair: Pair) -> None:
    """Row 16, with row 4."""
    fill(pair, b"one", range(102))
    pair.backup()
    for number in range(52):
        os.unlink(pair.path(f"{number:03}"))
    (reason,) = guarded(pair)
    assert reason.startswith("52 gone and 0 changed of 102 entries, over 50% (such as ")
    assert pair.backup(unreadable=[pair.path("000")]).forgotten == 51


def test_gone_and_changed_entries_trip_the_guard_together(pair: Pair) -> None:
    """Row 16: who renames a third and spoils a third has spoiled two thirds."""
    fill(pair, b"one", range(102))
    pair.backup()
    for number in range(34):
        os.unlink(pair.path(f"{number:03}"))
    fill(pair, b"two", range(34, 68))
    (reason,) = guarded(pair)
    assert reason.startswith("34 gone and 34 changed of 102 entries, over 50% (such as ")


def test_a_source_that_is_one_file_trips_the_guard_when_it_is_gone(pair: Pair) -> None:
    """Row 16: a configured source that had entries has none."""
    pair.put("kept", b"1")
    path = pair.put("single", b"2")
    pair.backup()
    os.unlink(path)
    assert guarded(pair, source=[path]) == [f"nothing is left of 1 entries in {path.decode()}"]


def test_an_override_of_the_guard_is_for_one_index(pair: Pair) -> None:
    """For a retry too, but not for another index that the run gets when its tasks are cleared."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"1")
    pair.backup()
    os.unlink(pair.path("alpha"))
    pair.build_index()
    limits = Limits(share=0.1, above=0)
    run = pair.new_run()
    pair.fetch(run)
    for _ in range(2):
        plan = pair.diff(run, limits=limits, override=True)
        assert plan.guard and plan.overridden and plan.gone == 1
    with pytest.raises(GuardTripped):
        pair.diff(run, limits=limits)
    before = pair.index.decode() + ".before"
    os.rename(pair.index, before)
    os.unlink(pair.path("bravo"))
    pair.put("charlie", b"3")
    pair.build_index()
    pair.fetch(run)
    with pytest.raises(GuardTripped):
        pair.diff(run, limits=limits, override=True)
    plan = pair.diff(run, limits=limits, override=True, may_trip=True)
    assert plan.guard and not plan.overridden
    os.rename(before, pair.index)
    pair.fetch(run)
    pair.pull(run, pair.diff(run, limits=limits, override=True))
    assert pair.finish(run).forgotten == 1


def test_an_override_of_the_guard_is_used_up_though_the_runs_directory_is_gone(pair: Pair) -> None:
    """The run is cleared long after it was committed."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"1")
    pair.backup()
    limits = Limits(share=0.1, above=0)
    run = pair.new_run()
    for name in ("alpha", "bravo"):
        os.unlink(pair.path(name))
        pair.put("charlie", name.encode())
        pair.build_index()
        pair.fetch(run)
        if name == "alpha":
            pair.pull(run, pair.diff(run, limits=limits, override=True))
            pair.finish(run)
            shutil.rmtree(run.folder)
    with pytest.raises(GuardTripped):
        pair.diff(run, limits=limits, override=True)


def test_an_approved_plan_is_carried_out(pair: Pair) -> None:
    """Row 16: a plan that tripped the guard is there for a person to approve."""
    fill(pair, b"one", range(102))
    pair.backup()
    fill(pair, b"two", range(102))
    assert pair.backup(may_trip=True).replaced == 102
