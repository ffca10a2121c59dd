"""Connections of every kind, against real servers: each works over all ways, or is refused with the cure."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from asyncssh.mac import get_mac_algs

from tests.integration.connections.ways import Place, all_ways, as_nobody, set_up, ssh_works, tried
from tests.integration.connections_table import CASES, COMMAND, REFUSED, in_page, table


@pytest.mark.parametrize("group", CASES)
def test_each_case_works_or_is_refused_with_words_that_name_the_cure(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    """As the table says; and all ways agree, but for what takes another one."""
    wrong = []
    for case in CASES[group]:
        if case.server == "of umac" and b"umac-128@openssh.com" not in get_mac_algs():
            continue  # asyncssh has found no libnettle
        server = place.server(case.server)
        set_up(case, place, server, tmp_path / "home", monkeypatch)
        unreadable = "may not be read" in case.what
        for expected, way in zip(case.ways, all_ways(server), strict=True):
            with as_nobody() if unreadable else nullcontext():
                came, words = tried(way)
            if came != expected or (came == REFUSED and case.says not in words) or not words.isprintable():
                wrong.append(f"{case.what}: {expected} {case.says!r} was expected, and not {came}: {words}")
            if case.server == "nobody" and server.was_asked():
                wrong.append(f"{case.what}: something was sent to the server")
        assert not (tmp_path / "home" / "touched").exists(), "a LocalCommand was run"
        if group == "known_hosts" and "known_hosts" not in case.extra:
            agrees = ssh_works(place, server, tmp_path / "home") == (case.ways[0] != REFUSED)
            wrong += [] if agrees else [f"{case.what}: ssh itself does not agree"]
    assert not wrong, "\n".join(wrong)


def test_the_page_has_the_table() -> None:
    assert in_page() == table(), f"docs/connections.md is out of date: run `{COMMAND}`"
