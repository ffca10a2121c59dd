"""Steps of a run that are done again: retried, or cleared after its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.pair import Pair
from tests.unit.backup.eventful import OUTCOMES, check_end, eventful, files_of


def test_a_run_with_every_kind_of_change_ends_as_it_should(pair: Pair) -> None:
    """The scenario that the tests below repeat and crash."""
    eventful(pair)
    assert pair.finish(pair.prepare()).outcomes == OUTCOMES
    check_end(pair)


def test_each_step_done_twice_ends_the_same(pair: Pair) -> None:
    """A task may be retried, or cleared, at any time."""
    eventful(pair)
    run = pair.new_run()
    for _ in range(2):
        pair.fetch(run)
    for _ in range(2):
        plan = pair.diff(run)
    for _ in range(2):
        pair.pull(run, plan)
    assert pair.transferred == 0
    for _ in range(2):
        pair.archive(run)
    for _ in range(2):
        assert pair.commit(run).outcomes == OUTCOMES
    check_end(pair)
    assert len(pair.history()) == 3


@pytest.mark.parametrize("start", ["fetch", "diff", "pull", "archive", "commit"])
def test_a_finished_run_cleared_from_any_step_on_ends_the_same(pair: Pair, start: str) -> None:
    """Without a transfer, and without another version."""
    eventful(pair)
    run = pair.prepare()
    pair.finish(run)
    before = files_of(pair.mirror), pair.mirror.index.read_bytes()
    pair.transferred = 0
    steps: dict[str, Callable[[], object]] = {
        "fetch": lambda: pair.fetch(run),
        "diff": lambda: pair.diff(run),
        "pull": lambda: pair.pull(run, pair.diff(run) if start in ("fetch", "diff") else pair.plan),
        "archive": lambda: pair.archive(run),
        "commit": lambda: pair.commit(run),
    }
    names = list(steps)
    for name in names[names.index(start) :]:
        steps[name]()
    assert pair.transferred == 0 and pair.outcome.failed == 0
    assert (files_of(pair.mirror), pair.mirror.index.read_bytes()) == before
    assert len(pair.history()) == 3
    check_end(pair)


def test_a_commit_killed_before_its_last_word_counts_its_own_changes_on_retry(pair: Pair) -> None:
    """What a run brought in itself is not taken for the work of a newer one."""
    eventful(pair)
    run = pair.prepare()
    pair.finish(run)
    run.done.unlink()
    outcomes = pair.commit(run).outcomes
    assert "superseded" not in outcomes and sum(outcomes.values()) == sum(OUTCOMES.values())


@pytest.mark.usefixtures("no_links")
def test_where_there_are_no_hard_links_versions_are_copies(pair: Pair) -> None:
    """All ends the same; an existing version is not overwritten there either."""
    eventful(pair)
    assert pair.finish(pair.prepare()).outcomes == OUTCOMES
    check_end(pair)
    for content in (b"again", b"and again"):
        pair.put("changed", content)
        pair.backup()
    assert pair.versions("changed") == [b"changed, old", b"changed, new", b"again"]


@pytest.mark.usefixtures("no_links")
def test_archiving_twice_without_hard_links_makes_one_copy(pair: Pair) -> None:
    """A retry finds the copies of the try before."""
    eventful(pair)
    run = pair.prepare()
    for _ in range(3):
        pair.archive(run)
    pair.commit(run)
    check_end(pair)


def test_a_run_whose_content_was_gone_archives_anew_when_it_is_cleared(pair: Pair) -> None:
    """Its first commit took the version back; the second must not believe the old record."""
    run = pair.planned(alpha=(b"1", b"2"))
    pair.archive(run)
    staged = pair.staged(b"c81e728d9d4c2f636f067f89cc14862c")
    staged.unlink()
    summary = pair.commit(run)
    assert summary.failed == 1 and "no longer in staging" in summary.failures[0]
    assert pair.versions("alpha") == []
    staged.write_bytes(b"2")
    assert pair.commit(run).replaced == 1
    assert pair.versions("alpha") == [b"1"] and pair.live("alpha").read_bytes() == b"2"
