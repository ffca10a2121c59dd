"""The wheel as people install it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(PROJECT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_all_modules_programs_and_templates_and_nothing_else(wheel: Path) -> None:
    """What is missing in the wheel is missing on the user's machine."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = (PROJECT / "airflow_mdbackup").rglob("*")
    wanted = {str(p.relative_to(PROJECT)) for p in source if p.suffix in (".py", ".sh", ".j2", ".typed")}
    assert packed == wanted


def test_wheel_in_an_empty_environment_is_found_by_airflow(wheel: Path, tmp_path: Path) -> None:
    """`airflow providers list` and `get` show it, with nothing installed by hand."""
    home = tmp_path / "venv"
    venv.create(home)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
    constraints = str(PROJECT / "constraints.txt")
    subprocess.run([*pip, "install", "-q", "--no-compile", "-c", constraints, wheel], check=True)
    airflow_program = home / "bin" / "airflow"
    listed = subprocess.run(
        [airflow_program, "providers", "list"], capture_output=True, text=True, check=True
    )
    assert "airflow-mdbackup" in listed.stdout
    got = subprocess.run(
        [airflow_program, "providers", "get", "airflow-mdbackup"], capture_output=True, text=True, check=True
    )
    assert "mdbackup" in got.stdout
    (tmp_path / "providers.yaml").write_text(
        f"providers: {{web: {{sftp_conn_id: web, source: /b, dest: {tmp_path}/dest}}}}"
    )
    options = ["mdbackup", "provision", "web", "--bind", "/srv/www:/b", "--keys", str(tmp_path / "keys")]
    environment = os.environ | {"AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(tmp_path / "providers.yaml")}
    printed = subprocess.run(
        [airflow_program, *options], capture_output=True, text=True, check=True, env=environment
    )
    assert printed.stdout.startswith("#!/bin/sh\n")
