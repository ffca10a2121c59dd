"""What the demo plays in: server A with a real tree, server B with a real Airflow, one provider."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo.sshd import ProviderServer
from demo.stack import AirflowStack

REPOSITORY = Path(__file__).resolve().parent.parent
PROVIDER = "demo"
DAG_ID = f"mdbackup_{PROVIDER}"


class SceneTaken(RuntimeError):
    """Another process plays in the same folder."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Both servers, running.

    :ivar server: server A.
    :ivar airflow: Airflow on server B.
    :ivar source: what is backed up, on A. A file of it goes by its name, relative to here.
    :ivar dest: the backup, on B.
    :ivar mirror: where `source` is backed up to, below `dest`.
    """

    server: ProviderServer
    airflow: AirflowStack
    source: Path
    dest: Path
    mirror: Path

    def name(self, path: Path) -> str:
        """Return the name below `source` of one of its files, by which the others take it."""
        return str(path.relative_to(self.source))

    def seen(self, name: str) -> bytes:
        """Return the path by which the indexes know a file."""
        return os.fsencode(f"{self.server.prefix}/backups/{name}")

    def on_mirror(self, name: str) -> Path:
        """Return where a file is backed up to."""
        return self.mirror / name


@contextmanager
def empty_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, or empty it, and keep other processes from doing so.

    :raises SceneTaken: another process keeps it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SceneTaken(f"{folder} is in use: stop the other demo first.") from None
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        yield
    finally:
        os.close(descriptor)


def offer_standard_library(source: Path) -> int:
    """Copy this Python's standard library to `source`, readable by all, and return its number of files.

    Left out are compiled files, and what else is installed there.
    """
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages")
    shutil.copytree(sysconfig.get_path("stdlib"), source, symlinks=True, ignore=ignored)
    subprocess.run(["chmod", "-R", "a+rX", source], check=True)
    return sum(path.is_file() and not path.is_symlink() for path in source.rglob("*"))


@contextmanager
def scene(
    folder: Path,
    server: ProviderServer,
    *,
    keys: Mapping[str, Any] | None = None,
    dags_folder: Path = REPOSITORY / "dags",
    env: Mapping[str, str] | None = None,
) -> Iterator[Scene]:
    """Start Airflow below `folder`, with `server` as its only provider, and stop it at the end.

    :param server: running; what it offers lies in its tree, below /backups.
    :param keys: of the provider's configuration, beside those that the demo has.
    :param env: further environment variables of Airflow.
    """
    dest = folder / "b"
    provider = {
        "sftp_conn_id": "demo_backupop",
        "ssh_conn_id": "demo_index",
        "chroot": server.chroot,
        "source": [f"{server.prefix}/backups"],
        "index": f"{server.prefix}/.mdbackup/index.md5",
        "dest": str(dest),
        "schedule": None,
        "shards": 2,
        "retries": 1,
        "retry_delay": "5s",
        **(keys or {}),
    }
    configuration = folder / "providers.yaml"
    configuration.write_text(yaml.safe_dump({"providers": {PROVIDER: provider}}, sort_keys=False))
    environment = {
        "AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(configuration),
        "AIRFLOW_CONN_DEMO_BACKUPOP": json.dumps(server.sftp_connection()),
        "AIRFLOW_CONN_DEMO_INDEX": json.dumps(server.ssh_connection()),
        **(env or {}),
    }
    with AirflowStack(folder / "airflow", dags_folder=dags_folder, env=environment) as airflow:
        airflow.wait_for_dag(DAG_ID)
        airflow.unpause(DAG_ID)
        mirror = dest / "files" / server.prefix.lstrip("/") / "backups"
        yield Scene(server, airflow, server.tree / "backups", dest, mirror)
