"""What the pages for people name is there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import asyncssh
import pytest

from airflow_mdbackup.hooks.provider import account
from airflow_mdbackup.scheme import errors
from airflow_mdbackup.scheme.history.outcomes import Outcome

PROJECT = Path(__file__).parents[3]
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def names_and_sections() -> tuple[set[str], set[str]]:
    """Return the names of all tests, and the sections that they are marked with."""
    tests, sections = set(), set()
    for path in (PROJECT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr == "guarantee":
                sections |= set(re.findall(r"guarantee\(\s*\"([^\"]+)\"", path.read_text()))
    return tests, sections


def test_each_guarantee_names_tests_that_exist_and_each_section_has_its_heading() -> None:
    """A guarantee whose test is gone is none."""
    page = (PROJECT / "docs" / "guarantees.md").read_text()
    tests, sections = names_and_sections()
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 30 and named <= tests, named - tests
    assert sections
    for section in sections:
        number = section.partition(".")[0]
        assert re.search(rf"^## {number}\. ", page, re.MULTILINE), section


def test_each_outcome_and_each_error_is_explained() -> None:
    """With what it means and what to do."""
    page = (PROJECT / "docs" / "errors.md").read_text()
    kinds = [
        kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.BackupError)
    ]
    assert len(kinds) > 10
    for name in [*kinds, *(outcome.value for outcome in Outcome)]:
        assert name == "BackupError" or f"`{name}`" in page, name


# Parts that are not ours, or have something filled in that people look for.
OTHERS = {
    "Unable to connect",
    "Connection refused",
    "Connect call failed",
    "timed out",
    "connect to host",
} | {
    "is a symlink in the mirror",
    "is not a directory in the mirror",
    "not a regular file but a directory",
    "the name .old is reserved",
    "files could not be backed up, all others are committed",
}


def test_each_message_that_is_explained_can_come() -> None:
    """A message that was reworded is explained nowhere any more."""
    words = told_by_the_code()
    page = (PROJECT / "docs" / "errors.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row)]
    assert len(messages) > 60
    for message in messages:
        parts = re.split(r"\.\.\.|\b[NM]\b|KEY=VALUE|\.xyz|3600|180|50%|, over", message)
        for part in (part.strip(" :,(") for part in parts):
            assert len(part) < 3 or part in words or part in OTHERS, (message, part)


def told_by_the_code() -> str:
    """Return all texts in our code, what is filled in left out."""
    texts = []
    for path in (PROJECT / "airflow_mdbackup").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    texts += [path.read_text() for path in (PROJECT / "airflow_mdbackup").rglob("*.j2")]
    return "\n".join(texts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_within_the_pages_lead_somewhere(page: Path) -> None:
    """To files that exist, and to headings that do."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in {_anchor(line) for line in linked.read_text().splitlines()}, target


def _anchor(line: str) -> str:
    """Return what a heading is linked by."""
    if not line.startswith("#"):
        return ""
    return re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")


def test_each_connection_that_the_page_shows_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key in the place of the dots, and of the folder of keys."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    public = key.export_public_key().decode().strip()
    for name in ("web_backupop", "web_index"):
        key.write_private_key(tmp_path / name)
    page = (PROJECT / "docs" / "connections.md").read_text()
    for shown, real in (("ssh-ed25519 AAAA...", public), ("/home/airflow/mdbackup-keys", str(tmp_path))):
        page = page.replace(shown, real).replace(quote(shown, safe="."), quote(real, safe=""))
    shown = re.findall(r"export AIRFLOW_CONN_(\w+)='(.*?)'", page, re.DOTALL)
    added = (
        r"connections add (\w+) --conn-type (\w+) --conn-host (\S+) --conn-login (\S+).*?--conn-extra '(.*?)'"
    )
    for name, kind, host, login, extra in re.findall(added, page, re.DOTALL):
        fields = {"conn_type": kind, "host": host, "login": login, "extra": json.loads(extra)}
        shown.append((name, json.dumps(fields)))
    (script,) = re.findall(r"python3 - > web.json <<'END'\n(.*?)\nEND", page, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    shown += [(name, json.dumps(fields)) for name, fields in json.loads(printed).items()]
    assert len(shown) == 5
    for name, value in shown:
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", value)
        found = account(name.lower())
        assert found.address == "www.example.org" and found.pinned
        assert found.user == ("backupop" if "backupop" in name.lower() else "mdbackup-index")
