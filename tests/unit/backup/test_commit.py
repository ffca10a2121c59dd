"""A commit for which something is missing or fails: one entry's trouble is that entry's alone."""

from __future__ import annotations

import errno
import os

import pytest

from airflow_mdbackup.scheme.errors import RunIncomplete
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import ChangeKind, commits, pending
from airflow_mdbackup.scheme.history.journal import recover
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair, md5


def test_a_run_without_a_plan_commits_and_archives_nothing(pair: Pair) -> None:
    """The message names the step to clear."""
    pair.put("alpha", b"one")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    for step in (pair.archive, pair.commit):
        with pytest.raises(RunIncomplete, match="diff_indexes"):
            step(run)


def test_a_shard_that_left_no_results_fails_the_run_and_all_else_is_committed(pair: Pair) -> None:
    """The message names the shard."""
    for number in range(20):
        pair.put(f"{number:02}", b"%d" % number)
    run = pair.begin(shards=3)
    run.results(1).unlink()
    summary = pair.finish(run)
    lost = pair.plan.shards[1]
    assert summary.outcomes == {"pulled": 20 - lost, "failed": lost} and summary.failed == lost
    assert "shard 1" in summary.failures[0]
    assert len(pair.index_b()) == 20 - lost
    assert pair.backup().outcomes == {"pulled": lost} and pair.transferred == 0


def test_a_name_that_the_disk_refuses_fails_alone_and_the_next_run_is_free(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some filesystems forbid names that others have; no pending commit may stay behind for that."""
    pair.put("alpha", b"1")
    pair.put("bad:name", b"2")
    put = Tree.put

    def picky(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
        if b":" in path:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        put(tree, source, file, path)

    monkeypatch.setattr(Tree, "put", picky)
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 1, "failed": 1} and summary.added == 1 and summary.failed == 1
    assert "bad:name (Invalid argument on this side)" in summary.failures[0]
    assert list(pair.index_b()) == [pair.path("alpha")]
    assert [change.path for change in pair.history()[-1]] == [pair.path("alpha")]
    os.unlink(pair.path("bad:name"))
    assert pair.backup().outcomes == {}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("meanwhile", ["nothing", "kill", "hands"])
def test_a_file_that_could_not_be_replaced_stays_in_the_index_if_it_is_what_that_said(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, alone: bool, meanwhile: str
) -> None:
    """So that a restore has it, though the entry is out of the index while files are replaced."""
    pair.put("alpha", b"1")
    pair.put("bravo", b"1")
    pair.backup()
    before, histories = pair.index_b(), len(commits(pair.mirror))
    pair.put("alpha", b"2")
    if not alone:
        pair.put("bravo", b"3")
    put = Tree.put

    def refuses(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
        if path.endswith(b"/alpha"):
            if meanwhile == "hands":
                pair.live("alpha").write_bytes(b"by hand")
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        put(tree, source, file, path)

    run = pair.begin()
    pair.archive(run)
    monkeypatch.setattr(Tree, "put", refuses)
    if meanwhile == "kill":
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(Tree, "sync", interrupted)
            pair.commit(run)
        recover(pair.mirror, run.folder / "consumer.md5")
        assert not any(pending(pair.mirror))
    else:
        assert pair.commit(run).outcomes == {"failed": 1} | ({} if alone else {"pulled": 1})
    is_there = meanwhile != "hands"
    expected = before | ({} if alone else {pair.path("bravo"): md5(b"3")})
    if not is_there:
        del expected[pair.path("alpha")]
    assert pair.index_b() == expected
    assert len(commits(pair.mirror)) == histories + (not alone or not is_there)
    if not alone:
        told = [(change.what, change.path) for change in pair.history()[-1]]
        gone = [] if is_there else [(ChangeKind.FORGOTTEN, pair.path("alpha"))]
        assert told == [*gone, (ChangeKind.REPLACED, pair.path("bravo"))]
    monkeypatch.undo()
    assert not pair.backup().failed and pair.live("alpha").read_bytes() == b"2"
    check_sound(pair)


def interrupted(_: object) -> None:
    raise KeyboardInterrupt


def test_a_live_file_that_cannot_be_read_fails_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector under one old file does not keep the others from being backed up."""
    for name in ("alpha", "bravo"):
        pair.put(name, b"1")
    pair.backup()
    for name in ("alpha", "bravo"):
        pair.put(name, b"2 " + name.encode())
    opened = Tree.open

    def broken(tree: Tree, path: bytes) -> int:
        if path.endswith(b"/alpha"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return opened(tree, path)

    monkeypatch.setattr(Tree, "open", broken)
    summary = pair.backup()
    assert summary.replaced == 1 and summary.failed == 1
    assert "alpha (Input/output error on this side)" in summary.failures[0]
    assert pair.live("bravo").read_bytes() == b"2 bravo" and pair.live("alpha").read_bytes() == b"1"
