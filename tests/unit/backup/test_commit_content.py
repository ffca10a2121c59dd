"""The content that a commit puts in place: staged, copied, adopted, or gone meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import airflow_mdbackup.scheme.backup.commit as commit_module
from airflow_mdbackup.scheme.backup import commit_content
from tests.pair import Pair, md5


def test_content_that_left_staging_is_found_elsewhere_or_fails(pair: Pair) -> None:
    """Another live file with these bytes will do; else the entry fails, and the next run pulls it."""
    run = pair.planned(here=b"content", there=(None, b"content"), nowhere=(None, b"lost"))
    for path in pair.mirror.staging.iterdir():
        path.unlink()
    summary = pair.finish(run)
    assert summary.outcomes == {"copied": 1, "failed": 1} and "nowhere" in summary.failures[0]
    assert pair.live("there").read_bytes() == b"content" and not pair.live("nowhere").exists()
    assert pair.backup().outcomes == {"pulled": 1}


def test_results_do_not_vouch_for_what_was_staged_after_them(pair: Pair) -> None:
    """Another run may have staged the same bytes anew, and a power cut torn them since."""
    run = pair.planned(alpha=(b"one", b"the new content"))
    staged = pair.staged(md5(b"the new content"))
    staged.unlink()
    staged.write_bytes(b"the new")
    pair.archive(run)
    assert pair.commit(run).outcomes == {"failed": 1}
    assert pair.live("alpha").read_bytes() == b"one" and pair.versions("alpha") == []
    pair.pull(run, pair.plan)
    assert pair.finish(run).outcomes == {"pulled": 1}
    assert pair.live("alpha").read_bytes() == b"the new content"


def test_content_for_which_no_result_vouches_is_hashed_and_taken_all_the_same(pair: Pair) -> None:
    """Some filesystems give a file another inode now and then. Nothing is left of it then, and not copied."""
    run = pair.planned(alpha=(None, b"one"), bravo=(None, b"two" * 100_000))
    inodes = set()
    for staged in pair.mirror.staging.iterdir():
        os.chmod(staged, 0o640)  # it has another change time since
        inodes.add(staged.stat().st_ino)
    assert pair.finish(run).outcomes == {"pulled": 2}
    assert {pair.live(name).stat().st_ino for name in ("alpha", "bravo")} == inodes
    assert not list(pair.mirror.staging.iterdir())


def test_an_adopted_file_that_is_edited_before_the_commit_is_not_claimed(pair: Pair) -> None:
    """Of the same size, in place: only its time tells."""
    pair.put("alpha", b"1")
    pair.put("bravo", b"x")
    pair.backup()
    os.unlink(pair.path("alpha"))
    pair.backup()
    pair.put("alpha", b"1")
    run = pair.begin()
    pair.archive(run)
    pair.live("alpha").write_bytes(b"!")
    os.utime(pair.live("alpha"), (1, 1))
    assert pair.commit(run).failed == 1
    assert list(pair.index_b()) == [pair.path("bravo")]


def test_content_missing_in_staging_is_looked_up_once_for_all(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look costs a walk through the whole consumer index."""
    for number in range(5):
        pair.put(f"old{number}", b"%d" % number)
    pair.backup()
    for number in range(5):
        pair.put(f"new{number}", b"%d" % number)
    run = pair.begin()
    pair.archive(run)
    for staged in pair.mirror.staging.iterdir():
        staged.unlink()
    walks = 0
    entries = commit_module.read_entries

    def counted(path: Path) -> object:
        nonlocal walks
        walks += 1
        return entries(path)

    for module in (commit_module, commit_content):
        monkeypatch.setattr(module, "read_entries", counted)
    assert pair.commit(run).outcomes == {"copied": 5}
    assert walks <= 4
    assert pair.live("new3").read_bytes() == b"3"
