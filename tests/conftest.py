"""What all tests share: where they write, an Airflow home, one real SSH server, and hypothesis within bounds.

Also how a run is shared out among worker processes (see `scheduling`), what it says at its end, and the count
of what the tests of the guarantees have tried (see `torture`).
"""

from __future__ import annotations

import base64
import gc
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.isolation import Scratch, isolate_process, may_isolate, remove

pytest_plugins = ["tests.pair"]
# Helpers beside the tests tell of what they compared too, when that fails.
pytest.register_assert_rewrite("tests.guarantees", "tests.integration", "tests.unit")

_scratch = Scratch()
_exit_status: int = pytest.ExitCode.OK
# Airflow makes its home when it is first imported: not in the home of whoever runs the tests.
for _name in [name for name in os.environ if name.startswith("AIRFLOW")]:
    del os.environ[_name]
os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-home-")
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
# Without a key, whichever test connects first gets a warning on standard error.
os.environ["AIRFLOW__CORE__FERNET_KEY"] = base64.urlsafe_b64encode(os.urandom(32)).decode()
# Tests start hundreds of Python processes: modules are compiled once, not in each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from demo.sshd import ProviderServer  # noqa: E402
from tests import scheduling  # noqa: E402
from tests.torture import LONG, Cases, Report  # noqa: E402

# The time of an example depends on what else the machine does; their number bounds the whole.
hypothesis.settings.register_profile("bounded", deadline=None, max_examples=150)
hypothesis.settings.load_profile("bounded")


@pytest.fixture(scope="session")
def scratch() -> Scratch:
    """Where this run of the tests writes."""
    return _scratch


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The test's own directory: in memory where there is room, on the disk if it is marked `real_disk`."""
    if request.node.get_closest_marker("real_disk") is None:
        yield tmp_path
        return
    failed_before = request.session.testsfailed
    on_disk = Path(tempfile.mkdtemp(prefix=f"{tmp_path.name}-", dir=_scratch.disk))
    yield on_disk
    if request.session.testsfailed == failed_before:
        remove(on_disk)


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


# --- worker processes -------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes `-n auto` means: two for each core, because most tests wait for something.

    And one more, because two wait for their Airflows most of the time. Not more than eight: each takes a
    quarter of a gigabyte, and the Airflows are not faster with more. Root without mounts of its own, as in
    many containers, gets one: the accounts that tests make are then the same for all.
    """
    if os.geteuid() == 0 and not may_isolate():
        return 1
    return min(8, 2 * len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> scheduling.InGroups:
    return scheduling.InGroups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if _scratch.is_ours and not config.option.basetemp:
        config.option.basetemp = str(_scratch.quick / "tests")
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        isolate_process()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Mark before others select by marks; sort after others have shuffled."""
    _mark_guarantees(items)
    yield
    scheduling.sort(items, shuffled=config.pluginmanager.has_plugin("randomly"))


def pytest_collection_finish() -> None:
    """Leave what was imported to itself: else each child process copies it, by looking for garbage in it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Keep what failed tests have written for somebody to look at; the next run removes it."""
    if _exit_status == pytest.ExitCode.OK:
        _scratch.remove()


# --- the guarantees ---------------------------------------------------------------------------------

_report = Report()
_PAGE = Path(__file__).parents[1] / "docs" / "guarantees.md"


def _mark_guarantees(items: list[pytest.Item]) -> None:
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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Send what this worker process has tried to the process that prints it."""
    global _exit_status
    _exit_status = exitstatus
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["guarantees"] = _report.as_json()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take what a worker process has tried; of one that crashed there is nothing."""
    _report.add_json(getattr(node, "workeroutput", {}).get("guarantees", {}))


# --- the end of a run -------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print what was tried, what was lost, and how to run each test again that failed."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # pytest-xdist does not say why
        terminalreporter.write_line(f"ERROR: no test fits: {shlex.join(config.invocation_params.args)}")
    if _report.tried:
        terminalreporter.section("guarantees")
        for line in _report.lines():
            terminalreporter.write_line(line)
    failed = [*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]
    if failed:
        terminalreporter.section("run these again")
        python = ("MDBACKUP_TORTURE=long " if LONG else "") + os.path.relpath(sys.executable, config.rootpath)
        if Path.cwd() != config.rootpath:
            python = f"cd {shlex.quote(str(config.rootpath))} && {python}"
        for nodeid in dict.fromkeys(report.nodeid for report in failed):
            terminalreporter.write_line(f"{python} -m pytest {shlex.quote(nodeid)}")
        where = " and ".join(map(str, dict.fromkeys((_scratch.quick, _scratch.disk))))
        terminalreporter.write_line(f"What they wrote is in {where} until the next run on this machine.")
