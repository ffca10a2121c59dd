"""Directories as deep as a path of an index allows, and deeper: nothing recurses, or opens one for each."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.files.tree import Tree, remove_tree
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.history.usage import recount, stored_totals
from airflow_mdbackup.scheme.index.canonical import IndexWriter
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PruneOutcome, pruning
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.verify import unknown_files
from airflow_mdbackup.scheme.takeover.survey import SkipReason, SourceTree, Survey
from tests.pair import Pair
from tests.torture import Cases
from tests.unit.cli.terminal import GOOD

LEVELS = 1_900  # of one letter: a path has 4,096 bytes at most
FILES = 200  # that may be open at once, beside those of the tests; a tree keeps 64


@contextmanager
def few_files() -> Iterator[None]:
    """Let this process, and those that it starts, open few more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + FILES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def nest(directory: Path, levels: int, name: bytes = b"f", content: bytes = b"deep") -> bytes:
    """Make a file so deep below a directory, and return its path from there. No single path leads to it."""
    path = b"/a" * levels + b"/" + name
    directory.mkdir(parents=True, exist_ok=True)
    with Tree(directory) as tree:
        descriptor = tree.create(path)
        os.write(descriptor, content)
        os.close(descriptor)
    return path


@pytest.fixture
def deep_pair(pair: Pair) -> Iterator[Pair]:
    """A pair whose trees pytest, and the next run of the tests, need not take away: they recurse."""
    yield pair
    subprocess.run(["rm", "-rf", pair.a, pair.mirror.dest], check=True)


def index(pair: Pair, *names: str | bytes) -> None:
    """Write A's index of some files."""
    with IndexWriter(Path(os.fsdecode(pair.index))) as writer:
        for path in sorted(map(pair.path, names)):
            with open(path, "rb") as file:
                writer.add(path, md5(file.read(), usedforsecurity=False).hexdigest().encode())


def backup(pair: Pair, *names: str | bytes) -> dict[str, int]:
    index(pair, *names)
    with few_files():
        return pair.finish(pair.prepare()).outcomes


@pytest.mark.guarantee("7. Hostile provider")
@pytest.mark.parametrize("levels", [1_100, LEVELS])
def test_no_depth_of_a_tree_that_makes_way_for_a_file_stops_a_run(
    deep_pair: Pair, levels: int, cases: Cases
) -> None:
    """All of it goes to `.old`, is counted there, verified, pruned, and told anew when history is lost."""
    pair = deep_pair
    pair.put("important", b"1")
    deep = b"bob" + nest(pair.a / "bob", levels)
    with cases.one():
        assert backup(pair, "important", deep) == {"pulled": 2}
        remove_tree(pair.a / "bob" / "a")
        pair.put("bob/a", b"a file")
        pair.put("important", b"2")
        assert backup(pair, "important", "bob/a") == {"pulled": 2}
        pair.put("important", b"3")
        assert backup(pair, "important", "bob/a") == {"pulled": 1}
        stored = stored_totals(pair.mirror.read_status())
        assert stored is not None and stored.disk == recount(pair.mirror).disk
        assert stored.disk.versions == 3 and stored.disk.version_bytes == len(b"deep12")
    dest = ["--dest", str(pair.mirror.dest)]
    with cases.one(), few_files():
        assert main(["verify", *dest]) == GOOD
    with cases.one(), few_files():
        sorted(pair.mirror.history.iterdir())[1].unlink()
        assert main(["rebuild", *dest]) == GOOD
        assert main(["verify", *dest]) == GOOD
    with cases.one(), few_files():
        with pruning(pair.mirror, Selection(), KeepRules(), carry_out=True) as (_, versions):
            assert [version.outcome for version in versions] == [PruneOutcome.PRUNED] * 3
        with Timeline(pair.mirror) as past:
            assert not [content for content in past.contents() if content.until and content.places]
        assert os.listdir(pair.live("bob")) == ["a"]  # and no empty directory is left in .old


def test_what_lies_deeper_than_a_path_can_say_is_told_as_unknown(deep_pair: Pair) -> None:
    """Hands have put it there, or a directory that moved has made a path too long for the kernel."""
    deep_pair.put("file", b"1")
    assert backup(deep_pair, "file") == {"pulled": 1}
    deep = nest(deep_pair.mirror.files, 3_000)
    with Timeline(deep_pair.mirror) as past, few_files():
        assert [found.place for found in unknown_files(deep_pair.mirror, past)] == [deep]


def test_a_tree_of_any_depth_is_surveyed(deep_pair: Pair) -> None:
    """What has a path that an index can hold is taken, wherever its directory is; the rest is told."""
    tree = deep_pair.a / ("long name" * 20)
    taken = nest(tree, 2_040)
    left = nest(tree / "b", 3_000)
    with few_files(), Survey([SourceTree(tree)]) as survey:
        survey.walk()
        survey.hash(2)
        assert [(file.path, file.md5 is None) for file in survey.surveyed_files()] == [(taken, False)]
        assert survey.report.examples == {SkipReason.BAD_NAME: [b"/b" + left]}


def leftover(pair: Pair) -> Path:
    return pair.mirror.run("manual__1").folder.with_name(".removed-x") / "names"


def copies(pair: Pair) -> Path:
    return pair.mirror.run("manual__2").copies


@pytest.mark.parametrize("place", [leftover, copies])
def test_what_earlier_runs_left_is_taken_away_whatever_its_depth(
    deep_pair: Pair, place: Callable[[Pair], Path]
) -> None:
    deep_pair.put("file", b"1")
    assert backup(deep_pair, "file") == {"pulled": 1}
    nest(place(deep_pair), LEVELS)
    nest(place(deep_pair) / "b", 1, b"g")
    deep_pair.put("file", b"2")
    assert backup(deep_pair, "file") == {"pulled": 1}
    assert not place(deep_pair).exists()
    assert place(deep_pair).name != "names" or not place(deep_pair).parent.exists()


def test_a_symlink_in_the_place_of_what_is_taken_away_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    (tmp_path / "link").symlink_to("victim")
    remove_tree(tmp_path / "link")
    assert (tmp_path / "victim" / "file").exists()


def test_a_symlink_in_what_is_taken_away_leads_nowhere(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    nest(kept, 2)
    gone = tmp_path / "gone"
    nest(gone, 2)
    (gone / "a" / "link").symlink_to(kept)
    (gone / "link").symlink_to(kept / "a" / "a" / "f")
    remove_tree(gone)
    assert not gone.exists() and (kept / "a" / "a" / "f").read_bytes() == b"deep"
