"""The consumer index: edited, deleted or damaged by hand, and how history leads to it."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest

from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.history.changes import ChangeKind, commits
from tests.pair import Pair, md5
from tests.unit.backup.eventful import files_of


def test_an_index_deleted_by_hand_is_told_of_in_history(pair: Pair) -> None:
    """The difference is recorded first, so that history still leads to the index."""
    pair.put("alpha", b"one")
    pair.backup()
    pair.mirror.index.unlink()
    pair.backup()
    edited, adopted = pair.history()[-1]
    assert (edited.what, edited.old_md5, edited.md5) == (ChangeKind.EDITED, md5(b"one"), None)
    assert (adopted.what, adopted.md5) == (ChangeKind.ADOPTED, md5(b"one"))


def test_an_index_edited_by_hand_is_believed_and_told_of(pair: Pair) -> None:
    """A line taken out, one put in, one changed."""
    for name in ("a", "b", "c"):
        pair.put(name, name.encode())
    pair.backup()
    lines = pair.mirror.index.read_text().splitlines(keepends=True)
    del lines[0]
    lines[1] = "0" * 32 + lines[1][32:]
    lines[2] = "# mdbackup end format=1 files=2 unreadable=0\n"
    pair.mirror.index.write_text("".join(lines))
    assert pair.backup().outcomes == {"adopted": 1, "pulled": 1}
    edited = [change for change in pair.history()[-1] if change.what == ChangeKind.EDITED]
    assert [(change.path, change.old_md5, change.md5) for change in edited] == [
        (pair.path("a"), md5(b"a"), None),
        (pair.path("c"), md5(b"c"), b"0" * 32),
    ]
    assert pair.index_b() == pair.index_a()


@pytest.mark.parametrize("damage", ["cut", "line", "end", "binary"])
def test_a_damaged_consumer_index_stops_the_run_and_names_both_ways_out(pair: Pair, damage: str) -> None:
    """Nothing is changed; restoring what the last commit wrote, or deleting it, goes on."""
    pair.put("alpha", b"one")
    pair.put("bravo", b"two")
    pair.backup()
    whole = pair.mirror.index.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = {
        "cut": whole[:50],
        "line": lines[0].upper() + b"".join(lines[1:]),
        "end": b"".join(lines[:-1]),
        "binary": os.urandom(100),
    }
    pair.put("alpha", b"three")
    prepared = pair.begin()
    pair.mirror.index.write_bytes(damaged[damage])
    before = files_of(pair.mirror)
    run = pair.new_run()
    pair.fetch(run)
    for step in (pair.diff, pair.commit):
        with pytest.raises(ConsumerIndexDamaged) as caught:
            step(run if step == pair.diff else prepared)
        assert "restore it" in str(caught.value) and "delete it" in str(caught.value)
        assert str(pair.mirror.committed) in str(caught.value)
    assert files_of(pair.mirror) == before and pair.mirror.index.read_bytes() == damaged[damage]
    shutil.copy(pair.mirror.committed, pair.mirror.index)
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.index_b() == pair.index_a()


def test_history_is_a_chain_from_commit_to_commit(pair: Pair) -> None:
    """Each header says by digest which index it found and which it left; the last is the one on disk."""
    for number in range(3):
        pair.put("alpha", b"%d" % number)
        pair.put(f"new{number}", b"x")
        pair.backup()
    headers = [read_header(path) for path in commits(pair.mirror)]
    assert headers[0]["before"] == ""
    assert [header["before"] for header in headers[1:]] == [header["after"] for header in headers[:-1]]
    assert headers[-1]["after"] == hashlib.sha256(pair.mirror.index.read_bytes()).hexdigest()
    assert pair.mirror.committed.read_bytes() == pair.mirror.index.read_bytes()
    assert [header["run_id"] for header in headers] == ["manual__1", "manual__2", "manual__3"]
