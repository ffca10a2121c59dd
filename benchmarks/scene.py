"""Where it is measured: server A on 127.0.0.1, what it offers, and a directory for each client's copy.

Our operators use the strict account, which may not list; all others the index account, which may, and which
sees the same files through the same sshd.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import Data, build
from demo.sshd import ProviderServer

DATA = "/backups/data"
"""What is backed up, as the backup account sees it."""
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Scene:
    """Server A, running.

    :ivar folder: where the server, Airflow's home and lists lie.
    :ivar dest: where clients write to, each to a new directory below.
    """

    server: ProviderServer
    folder: Path
    dest: Path

    @property
    def root(self) -> str:
        """What comes before ``/backups`` in the eyes of the index account."""
        return self.server.chroot.rstrip("/") + self.server.prefix

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def environment(self, port: int) -> dict[str, str]:
        """Return the environment of a process that uses Airflow, with the server's connections."""
        fast = {"disabled_algorithms": {"ciphers": ["aes128-ctr", "aes192-ctr", "aes256-ctr"]}}
        connections: dict[str, dict[str, Any]] = {
            "backupop": self.server.sftp_connection(),
            "index": self.server.ssh_connection(),
            "listing": self.server.ssh_connection(compress=False, **fast) | {"conn_type": "sftp"},
        }
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
            **{
                f"AIRFLOW_CONN_{name.upper()}": json.dumps(connection | {"port": port})
                for name, connection in connections.items()
            },
            "AIRFLOW_HOME": str(self.folder / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        }

    @property
    def data(self) -> Path:
        """Where that lies which the server offers as /backups/data."""
        return self.server.tree / DATA.lstrip("/")

    @contextmanager
    def offering(self, data: Data) -> Iterator[None]:
        """Have the server offer ``data``."""
        build(self.data, data)
        try:
            yield
        finally:
            shutil.rmtree(self.data)

    def trust(self, port: int) -> None:
        """Have `known_hosts` say that the server is behind ``port``."""
        key = self.server.host_key
        self.known_hosts.write_text(f"provider {key}\n[127.0.0.1]:{port} {key}\n")

    @contextmanager
    def new_dest(self, who: str) -> Iterator[Path]:
        """Give the name of a directory that does not exist, with nothing left to write to its disk."""
        dest = self.dest / who
        os.sync()
        try:
            yield dest
        finally:
            shutil.rmtree(dest, ignore_errors=True)


@contextmanager
def scene(room: int, dest: Path | None) -> Iterator[Scene]:
    """Start server A in memory if that has ``room`` bytes, else below build/.

    :param dest: an existing directory where clients write to; default: beside the server.
    """
    os.umask(0o022)
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and free(memory) > room else REPOSITORY / "build"
    place.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="mdbackup-bench-", dir=place) as name,
        tempfile.TemporaryDirectory(prefix="mdbackup-bench-", dir=dest or name) as below,
        ProviderServer(Path(name, "server")) as server,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        (server.tree / "backups").mkdir()
        yield Scene(server, folder, Path(below))


def free(folder: Path) -> int:
    """Return how many bytes can be written to ``folder``, at most as many as there is memory free."""
    status = os.statvfs(folder)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(status.f_bavail * status.f_frsize, int(lines["MemAvailable"].split()[0]) * 1024)


def filesystem(folder: Path) -> str:
    """Return the type of the filesystem that ``folder`` is on."""
    command = ["df", "--output=fstype", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
