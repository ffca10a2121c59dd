"""Joins the modules of the indexer into the one file that runs on a provider."""

from __future__ import annotations

import ast
from functools import cache
from importlib import resources

PACKAGE = "airflow_mdbackup.provider_side.indexer"
MODULES = (
    "common",
    "request",
    "config",
    "report",
    "watch",
    "exclude",
    "place",
    "lines",
    "cache",
    "hasher",
    "batch",
    "crew",
    "output",
    "walk",
    "build",
    "__main__",
)
"""The order in the joined file: each module imports only modules before it."""

_HEAD = "# airflow-mdbackup, Apache License 2.0: its package provider_side/indexer, joined into one file.\n"
_WIDTH = 110


@cache
def joined_indexer() -> bytes:
    """Return the indexer as one Python program: docstring, imports, and each module under a heading.

    Same source, same bytes. The modules import each other only by ``from <PACKAGE>.<module> import <names>``,
    at the top and without renaming; no name is defined in two of them.
    """
    folder = resources.files(PACKAGE)
    imports: set[tuple[str, str]] = set()
    sections = [_section(name, (folder / f"{name}.py").read_text("utf-8"), imports) for name in MODULES]
    docstring = (folder / "__init__.py").read_text("utf-8")
    return "\n\n".join([f"{_HEAD}{docstring}\n{_import_lines(imports)}", *sections]).encode()


def _section(name: str, text: str, imports: set[tuple[str, str]]) -> str:
    """Return a module under a heading, its docstring as a comment, without its imports.

    Those of other packages are added to ``imports``, as pairs of a module and a name, empty for the whole
    module.
    """
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, ast.Import):
            imports.update((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not (node.module or "").startswith(f"{PACKAGE}."):
                imports.update((node.module or "", alias.name) for alias in node.names)
        elif node is not tree.body[0]:
            continue
        end = node.end_lineno or node.lineno
        lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
    heading = f"# --- {name}.py ".ljust(_WIDTH, "-")
    comment = "\n".join(f"# {line}".rstrip() for line in (ast.get_docstring(tree) or "").splitlines())
    return f"{heading}\n{comment}\n\n{''.join(lines).strip()}\n"


def _import_lines(imports: set[tuple[str, str]]) -> str:
    lines = [f"import {module}" for module, name in sorted(imports) if not name]
    for module in sorted({module for module, name in imports if name}):
        names = sorted(name for one, name in imports if one == module and name)
        lines.append(f"from {module} import {', '.join(names)}")
    return "\n".join(lines) + "\n"
