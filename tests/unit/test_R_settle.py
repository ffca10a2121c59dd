"""Reviewer: what somebody does to the consumer index while a commit is cut off."""

from __future__ import annotations

import pytest

import airflow_mdbackup.scheme.commit as C
import airflow_mdbackup.scheme.settle as S
from airflow_mdbackup.scheme.history import pending
from airflow_mdbackup.scheme.index import IndexWriter, read_entries

from .conftest import Pair
from .soundness import check_sound


def cut_off(pair, run, where, monkeypatch):
    """Let the commit stop behind its history ahead."""
    pair.archive(run)
    with monkeypatch.context() as patch:

        def stop(*a, **k):
            raise KeyboardInterrupt

        patch.setattr(S if where != "finish" else C, where, stop)
        with pytest.raises(KeyboardInterrupt):
            pair.commit(run)
    assert pending(pair.mirror)


@pytest.mark.parametrize("where", ["finish", "_placed", "_keep_committed"])
@pytest.mark.parametrize("edit", ["delete", "drop", "restore"])
def test_index_edited_while_a_commit_is_cut_off_is_told_of_in_history(pair: Pair, monkeypatch, where, edit):
    for n in "abcd":
        pair.put(n, n.encode())
    pair.backup()
    pair.put("a", b"new")
    pair.put("e", b"e")
    pair.build_index()
    run = pair.prepare()
    cut_off(pair, run, where, monkeypatch)
    index = pair.mirror.index
    if edit == "delete":
        index.unlink()
    elif edit == "restore":  # what the message about a damaged one advises
        index.write_bytes(pair.mirror.committed.read_bytes())
    else:
        entries = [e for e in read_entries(index) if not e.path.endswith(b"/c")]
        with IndexWriter(index) as w:
            for e in entries:
                w.add(e.path, e.md5)
    pair.backup()
    check_sound(pair)
