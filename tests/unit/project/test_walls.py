"""Who may import whom, and that the maps in the packages' docstrings are whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "airflow_mdbackup"
SCHEME = PACKAGE / "scheme"
WINGS = ("backup", "recovery", "takeover")
# Each may import those behind it.
FLOORS = (*WINGS, "history", "store", "transfer", "index", "files", "common", "errors")
LINES = 600


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names of what a module imports, but for its type annotations only."""
    tree = ast.parse(path.read_text())
    annotations = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(node) for block in annotations for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the whole name of what you import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(dotted: str) -> str:
    return dotted.removeprefix("airflow_mdbackup.scheme.").partition(".")[0]


@pytest.mark.parametrize("path", sorted(SCHEME.rglob("*.py")), ids=lambda path: str(path.relative_to(SCHEME)))
def test_the_scheme_imports_only_what_is_below(path: Path) -> None:
    """No Airflow, nothing else of this project, and no floor above; the wings do not know each other."""
    mine = floor_of(".".join(("airflow_mdbackup.scheme", *path.relative_to(SCHEME).with_suffix("").parts)))
    for name in imported(path):
        root = name.partition(".")[0]
        assert root != "airflow", f"{path.name} imports {name}: the scheme is to work without Airflow"
        if root != "airflow_mdbackup":
            continue
        assert name.startswith("airflow_mdbackup.scheme."), (
            f"{path.name} imports {name}: the scheme is to work without the rest of the project"
        )
        theirs = floor_of(name)
        if mine == theirs or mine == "__init__":
            continue
        assert not (mine in WINGS and theirs in WINGS), (
            f"{mine}/{path.name} imports {name}: {', '.join(WINGS)} do not know each other; what two of"
            " them need belongs below them, mostly in history/"
        )
        assert FLOORS.index(mine) < FLOORS.index(theirs), (
            f"{mine}/{path.name} imports {name}: {mine} lies below {theirs}; see scheme/__init__.py"
        )


def test_only_the_store_builds_paths_below_dest() -> None:
    """Whoever looks for the layout on the disk finds it in one place."""
    private = re.compile(r"\b\w*mirror\._\w|\brun\._\w")
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "store":
            assert not private.search(path.read_text()), f"{path} reaches into the store's paths"


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in SCHEME.glob("*/__init__.py")),
    ids=lambda folder: folder.name,
)
def test_each_package_has_a_map_of_its_modules(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    listed = set(re.findall(r"^ {4,}(\w+) {2,}\S|^ {4,}(\w+) \S", text, re.MULTILINE))
    names = {one or other for one, other in listed}
    there = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert there == names, "the docstring of the package lists other modules than there are"


def test_no_module_is_two_things() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LINES
    }
    assert not long, f"over {LINES} lines: split them, or say here why not"
