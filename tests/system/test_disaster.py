"""The drill of docs/disaster.md: both servers are gone, and all comes back from the disk of the backup."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from demo.sshd import ProviderServer
from tests.kept import Kept, files_in
from tests.system.conftest import PROJECT, SharedAirflow, Site, dag_files, provider_yaml

ODD = "odd\udcff\n'name'\t\x1b[31m"
# What a machine has on which Airflow never was.
RESCUE = """#!/bin/sh
exec env -i PATH="$PATH" PYTHONPATH={project} {python} -c '
import sys; sys.modules["airflow"] = None
from airflow_mdbackup.cli.main import main; sys.exit(main())' "$@"
"""


@pytest.fixture(scope="module")
def folder(shared_airflow: SharedAirflow) -> Path:
    return shared_airflow.folder / "drill"


@pytest.fixture(scope="module")
def kept(shared_airflow: SharedAirflow, folder: Path) -> list[tuple[datetime, dict[bytes, Kept]]]:
    """Two runs in a real Airflow. Of A, the DAG and its configuration nothing is left then, only `dest`.

    :return: A as it was at each, and when.
    """
    copies: list[tuple[datetime, dict[bytes, Kept]]] = []
    with ProviderServer(folder / "server") as server:
        for name, connection in {"a": server.sftp_connection(), "a_index": server.ssh_connection()}.items():
            extra = json.dumps(connection["extra"])
            shared_airflow.stack.post("/connections", {**connection, "connection_id": name, "extra": extra})
        keys = {"source": [f"{server.prefix}/backups"], "sftp_conn_id": "a", "ssh_conn_id": "a_index"}
        providers = {"burnt": provider_yaml(server, folder, "burnt", **keys)}
        added = shared_airflow.site("drill", providers=providers, dags=dag_files("mdbackup.py"))
        site = Site(added.stack, server, folder)
        for work in (first_day, second_day):
            work(site)
            state, tasks = site.run("burnt")
            assert state == "success", tasks
            here = files_in(server.tree / "backups")
            prefix = os.fsencode(f"{server.prefix}/backups")
            copies.append((datetime.now().astimezone(), {prefix + path: was for path, was in here.items()}))
    shutil.rmtree(folder / "server")
    shutil.rmtree(shared_airflow.dags / "drill")
    (folder / "providers.yaml").unlink()
    return copies


def first_day(site: Site) -> None:
    for name, content in {
        "etc/passwd": b"root:x:0:0",
        "etc/becomes/a/file": b"below",
        "etc/becomes-a-directory": b"file",
        "www/gone": b"gone on the second day",
        "www/moved": b"moved on the second day" * 100_000,
        "www/empty": b"",
        f"www/{ODD}": b"odd",
    }.items():
        site.put("backups", name, content)
    site.source("backups").joinpath("etc/passwd").chmod(0o604)
    os.utime(site.source("backups") / "www/empty", (1_000_000_000, 1_000_000_000))


def second_day(site: Site) -> None:
    source = site.source("backups")
    (source / "www/gone").unlink()
    (source / "www/moved").rename(source / "etc/here")
    shutil.rmtree(source / "etc/becomes")
    (source / "etc/becomes-a-directory").unlink()
    for name, content in {
        "etc/passwd": b"root:*:0:0",
        "etc/becomes": b"a file",
        "etc/becomes-a-directory/with": b"a file",
        f"www/{ODD}": b"odder",
    }.items():
        site.put("backups", name, content)
    (source / "etc/passwd").chmod(0o755)


def commands(heading: str) -> str:
    """Return what the page has people type in a section, without what installs programs."""
    page = (PROJECT / "docs" / "disaster.md").read_text()
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return "".join(block for block in blocks if "pip install" not in block)


@pytest.mark.guarantee("11. Getting it back")
def test_everything_comes_back_as_of_two_moments_when_both_servers_are_gone(
    folder: Path, kept: list[tuple[datetime, dict[bytes, Kept]]]
) -> None:
    """Bytes, times and modes, by the commands of the page, which md5sum then finds right."""
    (before, first), (_, second) = kept
    script = "set -eu\n" + "".join(
        commands(heading)
        for heading in ("1. Look, without touching anything", "2. Get everything back", "3. Prove it")
    )
    for written, here in {
        "rescue/bin/mdbackup": f"{folder}/rescue",
        "/srv/backups/web": f"{folder}/burnt",
        "/mnt/": f"{folder}/mnt/",
        "2026-11-26 12:00": before.isoformat(),
    }.items():
        assert written in script
        script = script.replace(written, here)
    rescue = folder / "rescue"
    rescue.write_text(RESCUE.format(python=sys.executable, project=PROJECT))
    rescue.chmod(0o755)
    disk = files_in(folder / "burnt")
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("manual_") == 2
    assert files_in(folder / "mnt" / "web-before") == first
    assert files_in(folder / "mnt" / "web") == second
    assert files_in(folder / "burnt") == disk
