"""The package as Airflow finds it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import airflow
import jsonschema
import pytest

from airflow_mdbackup.get_provider_info import get_provider_info


def test_provider_info_is_of_airflows_schema_and_names_this_distribution() -> None:
    """A package-name that is not the distribution's breaks the discovery of all provider packages."""
    info = get_provider_info()
    assert info["package-name"] == distribution("airflow-mdbackup").metadata["Name"]
    schema = Path(airflow.__file__).with_name("provider_info.schema.json")
    jsonschema.validate(info, json.loads(schema.read_text()))


def test_everything_that_provider_info_names_can_be_imported() -> None:
    """Airflow shows these names, and imports some of them only when they are needed."""
    info = get_provider_info()
    modules = [
        module for kind in ("operators", "hooks") for part in info[kind] for module in part["python-modules"]
    ]
    names = info["extra-links"] + [
        part[key] for part in info["asset-uris"] for key in ("handler", "to_openlineage_converter")
    ]
    modules += [name.rpartition(".")[0] for name in names]
    for module in modules:
        importlib.import_module(module)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


def test_both_entry_points_load() -> None:
    """Airflow finds metadata and plugin by them."""
    (provider,) = (
        e for e in entry_points(group="apache_airflow_provider") if e.value.startswith("airflow_mdbackup")
    )
    (plugin,) = (e for e in entry_points(group="airflow.plugins") if e.value.startswith("airflow_mdbackup"))
    assert provider.load()() == get_provider_info()
    assert plugin.load().name == "mdbackup"


@pytest.mark.parametrize(
    "module",
    ["airflow_mdbackup", "airflow_mdbackup.get_provider_info", "airflow_mdbackup.scheme.backup.commit"],
)
def test_face_and_scheme_import_no_airflow(module: str) -> None:
    """Airflow reads the metadata while it starts; and the scheme is of use without Airflow."""
    code = (
        f"import sys, {module}; print([m for m in sys.modules if m == 'airflow' or m.startswith('airflow.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
