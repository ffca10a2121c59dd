"""Audits of servers that are set up in a certain way."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_mdbackup.cli.audit import run
from tests.integration.audit.loose_server import Audited, SetConnection, SetUp, serving


@pytest.fixture
def audited(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[SetUp], Audited]:
    """A function that audits a server which is set up in a certain way."""

    def audited(set_up: SetUp) -> Audited:
        with serving(set_up, tmp_path, set_connection, monkeypatch) as server:
            before, connections, began = server.state(), server.connections(), time.monotonic()
            status = run(argparse.Namespace(provider="web", format="json"))
            seconds = time.monotonic() - began
            document = json.loads(capsys.readouterr().out)
            left = [path for path, _ in set(server.state()) - set(before)]
            left += map(str, server.tmp.glob(".mdbackup-audit-*"))
            assert not set(before) - set(server.state())
            return Audited(status, document, server.connections() - connections, seconds, left)

    return audited
