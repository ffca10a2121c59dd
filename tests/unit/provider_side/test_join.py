"""The indexer's modules, and the one file that is made of them for a provider."""

from __future__ import annotations

import ast
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import airflow_mdbackup.provider_side.indexer as package
from airflow_mdbackup.account.provision import script
from airflow_mdbackup.provider_side.join import MODULES, PACKAGE, joined_indexer
from airflow_mdbackup.provider_side.programs import python_input, python_program
from tests.unit.account.test_provision import a_setup
from tests.unit.provider_side.indexing import INDEX, OLD_PYTHONS, md5, read_index, wanted, write

FOLDER = Path(package.__path__[0])


def tree_of(name: str) -> ast.Module:
    return ast.parse((FOLDER / f"{name}.py").read_text())


def defined(body: list[ast.stmt]) -> list[str]:
    """Return the names that statements define in the namespace of their module."""
    names = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            ]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            inner = [*node.body, *getattr(node, "orelse", [])]
            names += set(defined(inner + [x for h in getattr(node, "handlers", []) for x in h.body]))
    return names


def test_the_map_and_the_joined_file_have_every_module():
    there = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert set(MODULES) == there
    described = [line.split()[0] for line in package.__doc__.splitlines() if line.startswith("    ")]
    assert {name for name in described if name != "mdbackup"} == there


def test_no_name_is_defined_in_two_modules():
    """In the joined file they share one namespace, also with the standard library's modules."""
    counts = collections.Counter(name for module in MODULES for name in set(defined(tree_of(module).body)))
    assert [name for name, count in counts.items() if count > 1] == []
    assert set(counts) & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_the_standard_library_and_names_of_modules_before_it(module):
    """So that imports between modules can be dropped; at the top, where they are looked for."""
    tree = tree_of(module)
    before = {f"{PACKAGE}.{name}" for name in MODULES[: MODULES.index(module)]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= set(sys.stdlib_module_names)
            assert all(alias.asname is None for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module in before or node.module in sys.stdlib_module_names
            assert all(alias.asname is None and alias.name != "*" for alias in node.names)
            assert node in tree.body


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_module_has_the_grammar_of_python_3_6(module):
    """The provider's Python may be much older than the consumer's."""
    text = (FOLDER / f"{module}.py").read_text()
    ast.parse(text, feature_version=(3, 6))
    assert "from __future__" not in text


def test_joined_file_has_the_grammar_of_python_3_6_and_no_import_of_this_package():
    """And it is ASCII, whatever encoding a provider's Python assumes."""
    text = joined_indexer().decode("ascii")
    tree = ast.parse(text, feature_version=(3, 6))
    names = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert names <= set(sys.stdlib_module_names)
    assert ast.get_docstring(tree) == ast.get_docstring(tree_of("__init__"))


def test_joined_file_has_every_definition_once():
    joined = defined(ast.parse(joined_indexer()).body)
    assert joined == [name for module in MODULES for name in defined(tree_of(module).body)]


def test_joined_file_is_the_same_in_every_process():
    """Whoever compares what is installed with what would be installed sees a change only if there is one."""
    code = "import sys; from airflow_mdbackup.provider_side.programs import python_program as p;"
    code += "sys.stdout.buffer.write(p())"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.check_output([sys.executable, "-c", code], env=env) == joined_indexer()


def test_joined_file_is_what_is_sent_and_what_is_installed(chroot):
    assert python_program() == joined_indexer()
    sent = python_input(wanted(chroot))
    length, rest = sent.split(b"\n", 1)
    assert rest[: int(length)] == joined_indexer()
    assert json.loads(rest[int(length) :])["index"] == INDEX.decode()
    assert joined_indexer().decode() in script(a_setup())


@pytest.mark.parametrize("python", [Path(sys.executable), *OLD_PYTHONS], ids=lambda path: f"{path.parts[-3]}")
def test_joined_file_runs(chroot, tmp_path, python):
    """As it would on a provider: a file of that name, isolated from everything else."""
    write(chroot + b"/backups/file")
    path = tmp_path / "indexer.py"
    path.write_bytes(joined_indexer())
    command = [python, "-I", "-W", "error", path, "--chroot", chroot, "--source", b"/backups"]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"content")}
    again = subprocess.run(command, capture_output=True)
    assert again.stdout.startswith(b"mdbackup done files=1 bytes=7 ")
