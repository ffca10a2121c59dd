"""The policy table, row by row, with real files and OpenSSH's sftp-server."""

from __future__ import annotations

from .conftest import Pair


def test_new_files_are_pulled_and_an_unchanged_provider_costs_nothing(pair: Pair) -> None:
    """Rows 1, 2 and 5."""
    pair.put("alpha", b"1")
    pair.put("deep/er/bravo", b"22")
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 2}
    assert pair.live("alpha").read_bytes() == b"1"
    assert pair.live("deep/er/bravo").read_bytes() == b"22"
    assert summary.files == 2 and len(pair.index_b()) == 2
    again = pair.backup()
    assert again.outcomes == {} and again.files == 2
    assert len(pair.history()) == 1
