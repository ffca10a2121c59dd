"""The drill of docs/disaster.md: both servers are gone, and all comes back from the disk of the backup."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from demo.sshd import ProviderServer
from demo.stack import AirflowStack

from ..kept import Kept, files_in
from .conftest import PROJECT, Site, provider_yaml

ODD = "odd\udcff\n'name'\t\x1b[31m"
# What a machine has on which Airflow never was.
RESCUE = """#!/bin/sh
exec env -i PATH="$PATH" PYTHONPATH={project} {python} -c '
import sys; sys.modules["airflow"] = None
from airflow_mdbackup.cli.commands import main; sys.exit(main())' "$@"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def kept(folder: Path) -> Iterator[list[tuple[datetime, dict[bytes, Kept]]]]:
    """Two runs in a real Airflow, after which nothing is left but `dest`: A as it was at each, and when."""
    copies: list[tuple[datetime, dict[bytes, Kept]]] = []
    with ProviderServer(folder / "server") as server:
        (folder / "dags").mkdir()
        shutil.copy(PROJECT / "dags" / "mdbackup.py", folder / "dags")
        providers = {"web": provider_yaml(server, folder, "web", source=[f"{server.prefix}/backups"])}
        (folder / "providers.yaml").write_text(json.dumps({"providers": providers}))
        env = {
            "AIRFLOW_CONN_BACKUPOP": json.dumps(server.sftp_connection()),
            "AIRFLOW_CONN_INDEX": json.dumps(server.ssh_connection()),
            "AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(folder / "providers.yaml"),
        }
        with AirflowStack(folder / "airflow", dags_folder=folder / "dags", env=env) as stack:
            site = Site(stack, server, folder)
            for work in (first_day, second_day):
                work(site)
                state, tasks = site.run("web")
                assert state == "success", tasks
                here = files_in(server.tree / "backups")
                prefix = os.fsencode(f"{server.prefix}/backups")
                copies.append(
                    (datetime.now().astimezone(), {prefix + path: was for path, was in here.items()})
                )
    for burnt in ("server", "airflow", "dags", "providers.yaml"):
        path = folder / burnt
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    yield copies


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
        "/srv/backups/web": f"{folder}/web",
        "/mnt/": f"{folder}/mnt/",
        "2026-11-26 12:00": before.isoformat(),
    }.items():
        assert written in script
        script = script.replace(written, here)
    rescue = folder / "rescue"
    rescue.write_text(RESCUE.format(python=sys.executable, project=PROJECT))
    rescue.chmod(0o755)
    disk = files_in(folder / "web")
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("manual_") == 2
    assert files_in(folder / "mnt" / "web-before") == first
    assert files_in(folder / "mnt" / "web") == second
    assert files_in(folder / "web") == disk
