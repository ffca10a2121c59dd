"""What the tests of the indexers share: how to run them as SSH would, trees to index, and what came of it.

(Debian packages: busybox, dash.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import airflow_mdbackup.provider_side.indexer as package
from airflow_mdbackup.provider_side.join import MODULES, PACKAGE
from airflow_mdbackup.provider_side.programs import python_command, python_input, shell_command, shell_input
from airflow_mdbackup.provider_side.report import Ready, Report, parse_report
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.index.canonical import Remark, read_entries, read_remarks
from airflow_mdbackup.scheme.index.received import canonicalise

INDEX = b"/.mdbackup/index.md5"
FOLDER = b"/.mdbackup"

# The indexer as a file: all its modules in one namespace, as joined, but each compiled under its own name, so
# that coverage counts their lines.
_LAUNCHER = f"""
import ast
for _path in {[f"{package.__path__[0]}/{name}.py" for name in MODULES]!r}:
    with open(_path, "rb") as _stream:
        _tree = ast.parse(_stream.read())
    _own = [node for node in _tree.body if getattr(node, "module", "").startswith({PACKAGE + "."!r})]
    _tree.body = [node for node in _tree.body if node not in _own]
    exec(compile(_tree, _path, "exec"))
"""
_FILE = Path(tempfile.mkdtemp()) / "indexer.py"  # the temporary files of all tests are removed together
_FILE.write_text(_LAUNCHER)
_LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("indexer", {str(_FILE)!r})
indexer = sys.modules["indexer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(indexer)
"""


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("indexer", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


indexer = _loaded()
OLD_PYTHONS = sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python3"))


@dataclass
class Run:
    """What a program did: its exit status and every line it wrote, as text and as read by parse_report."""

    status: int
    lines: list[str]

    @property
    def report(self) -> list[Report | None]:
        """Without that it was ready."""
        return [report for report in map(parse_report, self.lines) if not isinstance(report, Ready)]


@dataclass
class Indexer:
    """One of the programs, and the environment in which to run it."""

    name: str
    path: str

    def start(self, request: IndexRequest, prefix: tuple[str, ...] = (), **options) -> subprocess.Popen:
        """Start it as sshd would, by a login shell; standard input stays open."""
        python = self.name == "python"
        command = [*prefix, shutil.which("sh", path=self.path), "-c"]
        command.append(python_command() if python else shell_command())
        process = spawn(command, self.path, **options)
        process.stdin.write(python_input(request) if python else shell_input(request))
        process.stdin.flush()
        return process

    def run(self, request: IndexRequest, prefix: tuple[str, ...] = (), **options) -> Run:
        return finish(self.start(request, prefix, **options))


def spawn(command: list, path: str = "/usr/bin:/bin", **options) -> subprocess.Popen:
    """Start a command in a process group of its own, which is ended after a minute."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.DEVNULL),
        env={"PATH": path},
        cwd="/",
        start_new_session=True,
        **options,
    )

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    # So that a program that hangs fails its test.
    watchdog = threading.Timer(60, end)
    watchdog.daemon = True
    watchdog.start()
    return process


def finish(process: subprocess.Popen) -> Run:
    """Wait for the end of all output, and give it; standard input stays open until then."""
    output = process.stdout.read().decode("ascii")
    status = process.wait()
    process.stdin.close()
    process.stdout.close()
    return Run(status, output.splitlines())


def read_until(process: subprocess.Popen, kind: type | tuple[type, ...]) -> list[Report | None]:
    """Give the reports up to the first of a kind."""
    found: list[Report | None] = []
    while not found or not isinstance(found[-1], kind):
        line = process.stdout.readline()
        assert line, found
        found.append(parse_report(line.decode("ascii").rstrip("\n")))
    return found


def run_patched(patch: str, *arguments: bytes) -> Run:
    """Run the indexer from its command line, after some code that can change `indexer`."""
    program = f"{_LOAD}\nimport os\n{textwrap.dedent(patch)}\nsys.exit(indexer.main(sys.argv[1:]))"
    return finish(spawn([sys.executable, "-c", program, *arguments]))


def write(path: bytes, content: bytes = b"content") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def wanted(chroot: bytes, *source: bytes, **options) -> IndexRequest:
    return IndexRequest(chroot, source or (b"/backups",), INDEX, **options)


def beside_index(chroot: bytes) -> list[bytes]:
    """Give what lies in the index's directory but for lock, report and cache, which stay."""
    lasting = {b".index.md5.lock", b".index.md5.report", b".index.md5.cache"}
    return sorted(set(os.listdir(chroot + FOLDER)) - lasting)


def read_index(chroot: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Give the index as the consumer's strict reader takes it: md5 by path, and the unreadable paths."""
    canonical = Path(os.fsdecode(chroot) + ".canonical")
    summary = canonicalise(Path(os.fsdecode(chroot + INDEX)), canonical, name="index")
    assert summary.complete
    assert abs(summary.started - time.time()) < 400  # some tests change the clock
    return {entry.path: entry.md5 for entry in read_entries(canonical)}, list(
        read_remarks(canonical, Remark.UNREADABLE)
    )


def md5(content: bytes) -> bytes:
    return hashlib.md5(content).hexdigest().encode()


def without_root_power() -> tuple[str, ...]:
    """Give a command prefix after which root, too, is bound by file modes."""
    capabilities = "-dac_override,-dac_read_search"
    return ("/usr/bin/setpriv", f"--bounding-set={capabilities}") if os.geteuid() == 0 else ()


def make_large(path: bytes, size: int = 1 << 40) -> None:
    """Make a file that takes for ever to hash and no room on the disk."""
    write(path, b"")
    os.truncate(path, size)


def wait_for_temporary(chroot: bytes) -> None:
    directory = chroot + os.path.dirname(INDEX)
    deadline = time.monotonic() + 20
    while not (os.path.isdir(directory) and any(name.endswith(b".tmp") for name in os.listdir(directory))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
