"""What all tests share: an Airflow home of their own, hypothesis within bounds, and one real SSH server.

Also the count of what the tests of the guarantees have tried (see `tests/torture.py`).
"""

from __future__ import annotations

import atexit
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from demo.sshd import ProviderServer

from .torture import Cases, Report

# Airflow makes its home when it is first imported: not in the home of whoever runs the tests.
_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
atexit.register(_airflow_home.cleanup)
for _name in [name for name in os.environ if name.startswith("AIRFLOW")]:
    del os.environ[_name]
os.environ["AIRFLOW_HOME"] = _airflow_home.name
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"

# The time of an example depends on what else the machine does; their number bounds the whole.
hypothesis.settings.register_profile("bounded", deadline=None, max_examples=150)
hypothesis.settings.load_profile("bounded")


@pytest.fixture(scope="session")
def provider_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderServer]:
    """A running SSH server with the strict `backupop` account and an index account, shared by all tests.

    As root `backupop` is chrooted; else see `ProviderServer.prefix`. Most tests want `provider`, whose
    tree is empty at first.
    """
    with ProviderServer(tmp_path_factory.mktemp("provider-server")) as server:
        yield server


@pytest.fixture
def provider(provider_server: ProviderServer) -> ProviderServer:
    """The shared SSH server with nothing in its tree but an empty /.mdbackup."""
    provider_server.empty_tree()
    return provider_server


# --- the guarantees ---------------------------------------------------------------------------------

_report = Report()
_PAGE = Path(__file__).parents[1] / "docs" / "guarantees.md"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that the page of guarantees names with the section that names it first."""
    sections: dict[str, str] = {}
    for title, text in re.findall(r"^## (\d+\. .+)\n((?:(?!## ).*\n)*)", _PAGE.read_text(), re.MULTILINE):
        for name in re.findall(r"`(test_\w+)`", text):
            sections.setdefault(name, title)
    for item in items:
        name = getattr(item, "originalname", item.name)
        if name in sections and item.get_closest_marker("guarantee") is None:
            item.add_marker(pytest.mark.guarantee(sections[name]))


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Count a test of a guarantee as one case, if it does not tell of its cases itself."""
    marker = request.node.get_closest_marker("guarantee")
    counted = Cases()
    failed_before = request.session.testsfailed
    yield
    if marker is not None and "cases" not in request.fixturenames:
        passed = request.session.testsfailed == failed_before
        counted.add(1) if passed else None
        _report.add(marker.args[0], counted, passed=passed)


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Iterator[Cases]:
    """Where a test of a guarantee, marked with its section, tells of the cases that it has tried."""
    marker = request.node.get_closest_marker("guarantee")
    counted = Cases()
    failed_before = request.session.testsfailed
    yield counted
    _report.add(marker.args[0], counted, passed=request.session.testsfailed == failed_before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried, and what was lost."""
    if _report.tried:
        terminalreporter.section("guarantees")
        for line in _report.lines():
            terminalreporter.write_line(line)
