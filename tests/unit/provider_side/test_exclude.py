"""What the Python indexer leaves out on its own account, against what the consumer leaves out."""

from __future__ import annotations

import os

import pathspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest
from tests.torture import scaled
from tests.unit.provider_side.indexing import (
    INDEX,
    indexer,
    read_index,
    wanted,
    without_root_power,
    write,
)

WORDS = "a b ab . * ** ? / ! # \\ \\* [ab] [!a] [^b] [.-0] [a-c] [!.-0] [ ] []a] [b-a] [!] - ä \udcff $ ( + {"
pieces = st.sampled_from([*WORDS.split(" "), " ", "\\ ", "\n", "\t"])
patterns = st.lists(pieces, max_size=7).map("".join)
components = st.lists(
    st.sampled_from(
        ["a", "b", "ab", ".", "*", " ", "#", "!", "\\", "-", "0", "ä", "\udcff", "\n", "$", "(", "+"]
    ),
    min_size=1,
    max_size=4,
).map("".join)
paths = st.lists(components.filter(lambda name: name not in (".", "..")), min_size=1, max_size=4)


def as_bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def consumer(lines: list[str]) -> pathspec.GitIgnoreSpec | None:
    """Give what the consumer excludes by, None for patterns that its configuration would refuse."""
    try:
        return pathspec.GitIgnoreSpec.from_lines(lines)
    except Exception:
        return None


@pytest.mark.guarantee("7. Hostile provider")
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@settings(max_examples=scaled(1000, 20_000), deadline=None)
@given(lines=st.lists(patterns, min_size=1, max_size=4), names=paths)
@example(lines=["*.log", "!x[^a]y.log"], names=["x", "y.log"])
@example(lines=["a[.-0]"], names=["a", "b"])
@example(lines=["a/", "!a/b"], names=["a", "b"])
@example(lines=["!a/**", "a"], names=["a", "b"])
@example(lines=["*"], names=["\n"])
def test_provider_never_leaves_out_what_the_consumer_would_keep(lines, names):
    """It may leave out less, which costs time only; leaving out more would lose data."""
    spec = consumer(lines)
    if spec is None:
        return
    excluded = indexer.Excluded(tuple(lines))
    path = "/".join(names)
    if excluded.has(as_bytes("/" + path)):
        assert spec.match_file(path)
    for depth in range(1, len(names)):
        directory = "/".join(names[:depth])
        if excluded.has_all_below(as_bytes(f"/{directory}/")):
            for below in (path, directory + "/\n", directory + "/x/y", directory + "/a\nb/c"):
                assert spec.match_file(below)


@pytest.mark.parametrize(
    "lines",
    [
        ["*.tmp"],
        ["cache/"],
        ["/top"],
        ["/top/"],
        ["a/b"],
        ["**/deep"],
        ["a/**/z"],
        ["logs/**"],
        ["*.log", "!keep.log"],
        ["[Tt]humbs.db"],
        ["file?.txt"],
        ["\\#odd", "\\!odd", "blank\\ "],
        ["# comment", "", "  ", "*~"],
        ["node_modules", "*.py[co]", ".Trash-*/", "~$*"],
        ["ä*"],
        ["*"],
        ["!only.this"],
    ],
    ids=" ".join,
)
def test_usual_patterns_are_understood_exactly(lines):
    """For these, both sides leave out the same."""
    spec, excluded = pathspec.GitIgnoreSpec.from_lines(lines), indexer.Excluded(tuple(lines))
    names = "a b z top cache deep logs x.tmp keep.log y.log Thumbs.db thumbs.db file1.txt #odd !odd n~ ~$w ä1"
    names += " node_modules m.pyc .Trash-0 blank"
    every = [*names.split(), "blank "]
    for first in every:
        for second in every:
            for path in (first, f"{first}/{second}", f"{first}/q/{second}", f"p/{first}/{second}/r"):
                assert excluded.has(as_bytes("/" + path)) == bool(spec.match_file(path)), path


def test_excluded_things_are_neither_indexed_nor_reported(chroot, python_program):
    """Also if they cannot be read; and the rest is."""
    for name in (b"file", b"x.tmp", b"cache/a/b", b"cache2/a", b"sub/cache/c", b"sub/secret", b"private/x"):
        write(chroot + b"/backups/" + name)
    for name in (b"sub/secret", b"private", b"cache"):
        os.chmod(chroot + b"/backups/" + name, 0)
    request = wanted(chroot, exclude=("*.tmp", "cache/", "/backups/sub/secret", "/backups/private/"))
    run = python_program.run(request, without_root_power())
    for name in (b"private", b"cache"):
        os.chmod(chroot + b"/backups/" + name, 0o700)
    assert (run.status, [type(report) for report in run.report]) == (0, [Done])
    assert list(read_index(chroot)[0]) == [b"/backups/cache2/a", b"/backups/file"]


def test_excluded_directory_is_not_walked_unless_something_below_may_be_kept(chroot, python_program):
    """Reading a directory without permission would be reported."""
    write(chroot + b"/backups/cache/private/x")
    os.chmod(chroot + b"/backups/cache/private", 0)
    for exclude, status in ((("cache/",), 0), (("cache/", "!kept"), 3), (("*.tmp",), 3)):
        run = python_program.run(wanted(chroot, exclude=exclude), without_root_power())
        assert run.status == status
    os.chmod(chroot + b"/backups/cache/private", 0o700)
    write(chroot + b"/backups/cache/kept")
    assert python_program.run(wanted(chroot, exclude=("cache/", "!kept"))).status == 0
    assert list(read_index(chroot)[0]) == [b"/backups/cache/kept"]


def test_unreadable_directory_is_named_if_a_pattern_takes_back_what_may_be_in_it(chroot, python_program):
    """Else the consumer would take it for empty, and forget what is to be kept of it."""
    write(chroot + b"/backups/dir/keep")
    os.chmod(chroot + b"/backups/dir", 0)
    patterns = ("/backups/dir/", "!/backups/dir/keep")
    run = python_program.run(wanted(chroot, exclude=patterns), without_root_power())
    os.chmod(chroot + b"/backups/dir", 0o700)
    assert run.status == 3
    assert read_index(chroot) == ({}, [b"/backups/dir"])


def test_patterns_are_anchored_where_the_backup_account_has_its_root(chroot, python_program):
    """As on the consumer: not at the chroot's real path, and not at the source."""
    for name in (b"/backups/a/x", b"/more/a/x"):
        write(chroot + name)
    request = IndexRequest(chroot, (b"/backups", b"/more"), INDEX, exclude=("/backups/a",))
    assert python_program.run(request).status == 0
    assert list(read_index(chroot)[0]) == [b"/more/a/x"]
