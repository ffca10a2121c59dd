"""What ransomware on the provider looks like is told, and nothing else is."""

from __future__ import annotations

import io
import os
import zipfile

import pytest

from airflow_mdbackup.scheme.backup.plan import Limits
from airflow_mdbackup.scheme.backup.ransomware import MANY, SuspectContents, SuspectNames
from tests.pair import Pair


def told_of_names(gone: list[bytes], new: list[bytes]) -> str | None:
    names = SuspectNames()
    for path in sorted({*gone, *new}):
        (names.add_gone if path in gone else names.add_new)(path)
    return names.warning()


GONE = [b"/d/report %d.docx" % number for number in range(MANY)]


def test_files_that_came_back_with_an_ending_added_are_told() -> None:
    """Also when other names that begin alike lie between."""
    locked = [path + b".locked" for path in GONE]
    assert told_of_names(GONE, locked) == (
        "20 of 20 files that are gone came back with .locked added to their names"
    )
    assert told_of_names(GONE, [*locked, *(path + b"-copy" for path in GONE), b"/d/report 1.docx.doc"])


@pytest.mark.parametrize(
    ("gone", "new"),
    [
        (GONE, []),
        ([], [path + b".locked" for path in GONE]),
        (GONE, [path + b".%d" % number for number, path in enumerate(GONE)]),
        (GONE, [path + b"/.locked" for path in GONE]),
        (GONE[1:], [path + b".locked" for path in GONE]),
        ([*GONE, *(b"/gone/%d" % number for number in range(MANY + 1))], [p + b".locked" for p in GONE]),
    ],
    ids=["only gone", "only new", "log rotation", "directories", "few", "a small part"],
)
def test_names_that_change_in_other_ways_are_not_told(gone: list[bytes], new: list[bytes]) -> None:
    """Each of them happens on a healthy server."""
    assert told_of_names(gone, new) is None


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("content", content)
    return file.getvalue()


def told_of_contents(files: dict[bytes, bytes]) -> str | None:
    contents = SuspectContents()
    for path, content in files.items():
        contents.inspect(path, content[:4096])
    return contents.warning()


@pytest.mark.parametrize("ending", [b"docx", b"PDF", b"jpg", b"txt", b"sql", b"sqlite"])
def test_known_types_that_turned_into_random_bytes_are_told(ending: bytes) -> None:
    """With the first of them named."""
    told = told_of_contents({b"/d/%d.%s" % (number, ending): os.urandom(5000) for number in range(MANY)})
    assert told is not None
    assert told.startswith("20 of 20 changed files of known types look encrypted (such as /d/0.")


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (b"docx", zipped(os.urandom(5000))),
        (b"pdf", b"%PDF-1.7\n" + os.urandom(5000)),
        (b"txt", b"plain text \n" * 400),
        (b"txt", "naïve café \u2603 ".encode() * 300),
        (b"txt", "Grüße aus Köln\r\n".encode("latin-1") * 300),
        (b"txt", "UTF-16 it is, and no UTF-8 at all".encode("utf-16") * 100),
        (b"csv", b"\0" * 5000),
        (b"pdf", b"<html>404 Not Found</html>" * 100),
        (b"bin", os.urandom(5000)),
        (b"", os.urandom(5000)),
        (b"txt", os.urandom(300)),
    ],
)
def test_what_is_as_its_name_says_or_cannot_be_judged_is_not_told(ending: bytes, content: bytes) -> None:
    """However random the bytes behind the beginning are."""
    assert told_of_contents({b"/d/%d.%s" % (number, ending): content for number in range(50)}) is None


def test_a_few_odd_files_among_many_are_not_told() -> None:
    """Some programs write what their files' names do not say."""
    files = {b"/d/%d.txt" % number: b"text" * 1000 for number in range(100)}
    files |= {b"/d/odd%d.txt" % number: os.urandom(5000) for number in range(50)}
    assert told_of_contents(files) is None


def test_a_plan_tells_and_the_guard_repeats_it(pair: Pair) -> None:
    """A warning by itself; one more reason for a person who is asked."""
    for number in range(30):
        pair.put(f"f{number}.docx", b"%d" % number)
    for number in range(80):
        pair.put(f"other{number}", b"x%d" % number)
    pair.backup()
    for number in range(30):
        (pair.a / f"f{number}.docx").rename(pair.a / f"f{number}.docx.crypt")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    plan = pair.diff(run)
    assert plan.telltale == "30 of 30 files that are gone came back with .crypt added to their names"
    assert plan.guard == []
    guard = pair.diff(run, limits=Limits(share=0.1), may_trip=True).guard
    assert len(guard) == 2 and guard[1] == f"{plan.telltale}, as ransomware does"


def test_a_pull_tells_of_small_and_large_files(pair: Pair) -> None:
    """By what has come, of changed files only."""
    for number in range(MANY):
        pair.put(f"{number}.txt", b"text %d" % number)
        pair.put(f"large{number}.sql", b"select %d;\n" % number * 30_000)
    pair.backup()
    for number in range(MANY):
        pair.put(f"{number}.txt", os.urandom(2000))
        pair.put(f"large{number}.sql", os.urandom(300_000))
        pair.put(f"new{number}.txt", os.urandom(2000))
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    (summary,) = pair.pull(run, pair.diff(run))
    assert summary.telltale is not None
    assert summary.telltale.startswith("40 of 40 changed files of known types look encrypted")
