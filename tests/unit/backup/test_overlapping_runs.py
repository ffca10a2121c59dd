"""Runs that overlap: which of them is superseded, and what becomes of its versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import airflow_mdbackup.scheme.backup.commit as commit_module
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crash_at
from tests.pair import Pair


def test_a_run_with_an_older_index_is_superseded_and_changes_nothing(pair: Pair) -> None:
    """Its index was fetched before that of one committed since; what it archived is taken back."""
    old = pair.planned(alpha=(b"one", b"two"))
    pair.archive(old)
    pair.put("alpha", b"three")
    assert pair.backup().outcomes == {"pulled": 1}
    before = pair.mirror.index.read_bytes()
    assert pair.versions("alpha") == [b"one", b"one"]
    summary = pair.commit(old)
    assert summary.superseded and summary.files == 1
    assert summary.outcomes == {"superseded": 1} and summary.failed == 0
    assert pair.mirror.index.read_bytes() == before
    assert pair.live("alpha").read_bytes() == b"three" and pair.versions("alpha") == [b"one"]
    (change,) = pair.history()[-1]
    assert change.version is not None and change.version.endswith(b"Z")
    assert os.path.exists(os.fsencode(pair.mirror.files) + change.version)


def test_what_was_committed_last_is_known_without_the_status(pair: Pair) -> None:
    """A kill may come between the history and the status."""
    pair.put("alpha", b"one")
    pair.backup()
    status = pair.mirror.status.read_bytes()
    pair.put("bravo", b"two")
    old = pair.begin()
    os.unlink(pair.path("bravo"))
    pair.put("alpha", b"three")
    pair.backup()
    pair.mirror.status.write_bytes(status)
    assert pair.finish(old).outcomes == {"superseded": 1}
    assert pair.index_b() == pair.index_a()


def test_a_version_that_was_archived_for_a_superseded_run_is_withdrawn(pair: Pair) -> None:
    """A version is what was displaced; a file that is still live is none."""
    old = pair.planned(alpha=(b"one", b"two"), bravo=b"1")
    pair.archive(old)
    assert pair.versions("alpha") == [b"one"]
    pair.put("alpha", b"one")
    pair.put("bravo", b"2")
    pair.backup()
    assert pair.commit(old).outcomes == {"superseded": 1}
    assert pair.versions("alpha") == [] and pair.live("alpha").read_bytes() == b"one"


@pytest.mark.parametrize("links", ["links", "no links"])
def test_a_version_whose_bytes_are_nowhere_else_is_never_taken_back(
    pair: Pair, links: str, request: pytest.FixtureRequest
) -> None:
    """Its run is superseded, but somebody has replaced the live file on B meanwhile, by one of its size."""
    if links == "no links":
        request.getfixturevalue("no_links")
    old = pair.planned(alpha=(b"one", b"two"))
    pair.archive(old)
    pair.live("alpha").unlink()
    pair.live("alpha").write_bytes(b"own")
    pair.put("bravo", b"1")
    pair.put("alpha", b"one")
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.commit(old).superseded
    assert pair.versions("alpha") == [b"one"]


def test_an_entry_that_a_run_in_between_has_changed_is_judged_again(pair: Pair) -> None:
    """The run with the older index commits first; the newer one finds another predecessor than planned."""
    first = pair.planned(alpha=(b"one", b"two"), bravo=b"1")
    pair.put("bravo", b"2")
    second = pair.begin()
    pair.archive(second)
    assert pair.finish(first).outcomes == {"pulled": 1}
    assert pair.commit(second).outcomes == {"superseded": 1, "pulled": 1}
    assert pair.live("alpha").read_bytes() == b"two" and pair.live("bravo").read_bytes() == b"2"
    # Both runs archived it; what is not known to be live is not taken back.
    assert set(pair.versions("alpha")) == {b"one"} and pair.versions("bravo") == [b"1"]
    assert pair.index_b() == pair.index_a()


def test_versions_get_the_stamp_of_the_commit_that_displaced_them(pair: Pair) -> None:
    """Also when another run was committed between archive and commit; and no stamp is used twice."""
    first = pair.planned(alpha=b"one", bravo=(b"1", b"2"))
    pair.put("bravo", b"1")
    pair.put("alpha", b"two")
    second = pair.begin()
    pair.archive(second)
    pair.finish(first)
    pair.commit(second)
    stamps = [path.name[:23] for path in commits(pair.mirror)]
    assert stamps == sorted(set(stamps))
    for path, changes in zip(commits(pair.mirror), pair.history(), strict=True):
        for change in changes:
            if change.version is not None:
                assert change.version.endswith(b"." + path.name[:23].encode())
                assert Path(os.fsdecode(os.fsencode(pair.mirror.files) + change.version)).exists()
    assert pair.versions("alpha") == [b"one"]


def test_a_retried_commit_finds_versions_that_it_had_given_another_stamp(pair: Pair) -> None:
    """A crash after the versions of an overlapped run were renamed does not stop its retry."""
    first = pair.planned(alpha=b"one", bravo=(b"1", b"2"))
    pair.put("alpha", b"two")
    second = pair.begin()
    pair.archive(second)
    pair.finish(first)
    planned = pair.versions("alpha")
    number = 0
    while crash_at(number := number + 1, lambda: commit(pair.mirror, second)):
        assert pair.versions("alpha") == planned
    assert pair.commit(second).failed == 0
    assert pair.live("alpha").read_bytes() == b"two" and pair.versions("alpha") == [b"one"]
    assert pair.index_b() == pair.index_a()


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[]\n", b'{"format": 1}\n'])
def test_a_spoilt_status_is_as_if_it_were_not_there(pair: Pair, content: bytes) -> None:
    """The next good run writes it anew; which run is newer than which, history tells as well."""
    late = pair.planned(alpha=(None, b"1"))
    pair.put("alpha", b"2")
    pair.backup()
    pair.mirror.status.write_bytes(content)
    assert pair.finish(late).superseded
    pair.put("alpha", b"3")
    assert pair.backup().replaced == 1
    status = pair.mirror.read_status()
    assert status["last_good"] == status["last_commit"]
    assert pair.versions("alpha") == [b"2"]


def without_status(pair: Pair, run: Run, monkeypatch: pytest.MonkeyPatch, *, spoilt: bool) -> None:
    """Commit, but lose the status: by a kill before it is written, or by a bad disk."""
    if spoilt:
        pair.finish(run)
        pair.mirror.status.write_bytes(b"")
        return

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    pair.archive(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(commit_module, "write_status", die)
        pair.commit(run)


@pytest.mark.parametrize("spoilt", [False, True])
def test_an_older_run_is_superseded_also_where_the_status_knows_less_than_history(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    """A limited run in between takes the place of the newest full one, whatever tells of that."""
    old = pair.planned(alpha=b"1", side=b"1", temporary=(None, b"soon gone from A"))
    os.unlink(pair.path("temporary"))
    pair.put("alpha", b"2")
    pair.build_index()
    without_status(pair, pair.prepare(), monkeypatch, spoilt=spoilt)
    pair.put("side", b"2")
    pair.build_index()
    pair.finish(pair.prepare(only=[pair.path("side")]))
    assert pair.finish(old).superseded


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_superseded_run_is_doubtful_where_the_status_knows_less_than_history(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    """The run that superseded it may not have been good."""
    late = pair.planned(alpha=(b"1", b"2"))
    pair.put("beta", b"1")
    pair.build_index(unreadable=[pair.path("hidden")])
    without_status(pair, pair.prepare(), monkeypatch, spoilt=spoilt)
    summary = pair.finish(late)
    assert summary.superseded and summary.doubtful


def test_a_superseded_run_is_doubtful_if_the_newer_one_was_not_good(pair: Pair) -> None:
    """So that nobody is told of a good backup."""
    for good in (True, False):
        pair.put("a", b"new, %d" % good)
        pair.build_index()
        older, newer = pair.prepare(), pair.new_run()
        pair.fetch(newer)
        plan = pair.diff(newer)
        if good:
            pair.pull(newer, plan)
        assert (pair.finish(newer).failed == 0) is good
        summary = pair.finish(older)
        assert summary.superseded and summary.doubtful is not good
