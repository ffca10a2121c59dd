"""From another tool to this one: what a run would do, a tree that is taken over, old versions that are."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli import UsageError
from airflow_mdbackup.cli.commands import main
from airflow_mdbackup.cli.suffix import Suffix
from airflow_mdbackup.scheme import tree as tree_module
from airflow_mdbackup.scheme.adopt import Left, Source, Survey, adopt
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.history import What, commits, pending
from airflow_mdbackup.scheme.import_versions import _Importing
from airflow_mdbackup.scheme.index import read_entries
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.moments import moment_of
from airflow_mdbackup.scheme.past import Past
from airflow_mdbackup.scheme.status import look
from airflow_mdbackup.scheme.verify import Found, unknown, verify

from ..torture import LONG
from .conftest import Pair
from .crash import PowerCut, crash_at, mixed
from .soundness import check_sound, contents_of, digest

GOOD, WRONG, REFUSED, UNREACHED = range(4)


class Terminal:
    """Somebody who works on server B, which has a configuration of one provider."""

    def __init__(self, pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pair = pair
        self.file = folder / "providers.yaml"
        self.capsys = capsys
        self.configure()

    def configure(self, **keys: Any) -> None:
        keys = {"sftp_conn_id": "nowhere", "source": str(self.pair.a), **keys}
        keys["dest"] = str(self.pair.mirror.dest)
        self.file.write_text(json.dumps({"providers": {"srv1": keys}}))

    def run(self, command: str, *words: str | Path, status: int = GOOD, index: bool = True) -> str:
        """Give a command, which must end so, and return what it prints on standard output."""
        more = ["--index", os.fsdecode(self.pair.index)] if index else []
        where = ["--providers-file", str(self.file)]
        self.capsys.readouterr()
        found = main([command, "srv1", *map(str, words), *more, *where])
        told = self.capsys.readouterr()
        self.told = told.err
        assert found == status, told.err
        return told.out

    def cut_off(
        self, there: Callable[[], bool], *words: str | Path, first: int = 1, index: bool = True
    ) -> None:
        """Give a command until a kill leaves what is wanted, each time a few steps later."""
        for number in count(first, 3):
            if there():
                return
            assert crash_at(number, partial(self.run, *words, index=index))

    def plan(self, *words: str, status: int = GOOD) -> list[str]:
        """Return the plan, with names relative to A's tree."""
        lines = self.run("plan", *words, status=status).splitlines()
        return [line.replace(f"{self.pair.a}/", "").replace("'", "") for line in lines]


@pytest.fixture
def terminal(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(pair, tmp_path, capsys)


def on_disk(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return all that lies below a directory: inode, time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = status.st_ino, status.st_mtime_ns, content
    return found


# --- plan -------------------------------------------------------------------------------------------


def test_plan_of_a_backup_that_is_not_there_yet_is_everything(pair: Pair, terminal: Terminal) -> None:
    """And is no beginning of one."""
    pair.put("a", b"1")
    pair.put("sub/b", b"2")
    pair.build_index()
    assert terminal.plan() == ["+ a", "+ sub/b"]
    assert "2 files, 2.0 B" in terminal.told
    assert not pair.mirror.dest.exists()


def changed_in_each_way(pair: Pair) -> None:
    for name in ("same", "changed", "gone", "moves", "sub/x", "returns"):
        pair.put(name, name.encode() * 100)
    pair.backup()
    os.unlink(pair.path("returns"))
    pair.backup()
    pair.put("returns", b"returns" * 100)
    pair.put("changed", b"other")
    os.rename(pair.path("moves"), pair.path("moved"))
    os.unlink(pair.path("gone"))
    pair.put("new", b"new")
    pair.build_index()


def test_plan_tells_what_the_next_run_does_and_changes_nothing(pair: Pair, terminal: Terminal) -> None:
    """A line for each path, in rclone's marks; what is on this side already, in files and bytes."""
    changed_in_each_way(pair)
    before = on_disk(pair.mirror.dest)
    told = ["* changed", "- gone", "+ moved", "- moves", "+ new", "+ returns"]
    assert terminal.plan() == told
    assert "2 same, 3 new, 1 changed, 2 gone" in terminal.told
    assert "1 of the new ones are here already (700.0 B)" in terminal.told
    assert "1 of them would be copied from what is here (500.0 B)" in terminal.told
    assert terminal.plan("--all") == [*told, "= same", "= sub/x"]
    assert terminal.plan(f"{pair.a}/sub", "--all") == ["= sub/x"]
    terminal.configure(exclude=["gone", "new", "sub/"])
    assert terminal.plan("--all") == [told[0], *told[2:4], told[5], "= same"]
    assert on_disk(pair.mirror.dest) == before

    run = pair.new_run()
    pair.fetch(run)
    plan = pair.diff(run, exclude=["gone", "new", "sub/"])
    *lines, summary = map(json.loads, terminal.run("plan", "--format", "json").splitlines())
    facts = summary["summary"]
    counts = ("same", "new", "changed", "gone", "adopt", "copy")
    assert {name: facts[name] for name in counts} == {name: getattr(plan, name) for name in counts}
    assert (facts["adopt_bytes"], facts["copy_bytes"], facts["guard"]) == (700, 500, [])
    assert [line["mark"] for line in lines] == ["*", "+", "-", "+"]
    assert lines[1]["copied_from"] == os.fsdecode(pair.path("moves"))
    assert [line["here"] for line in lines if line["mark"] == "+"] == [False, True]


def test_plan_says_that_a_commit_is_not_finished_and_leaves_it(pair: Pair, terminal: Terminal) -> None:
    """It compares with what was there before that."""
    pair.put("a", b"1")
    pair.backup()
    pair.put("a", b"2")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    number = 1
    while not any(pending(pair.mirror)) or pair.index_b():  # until the index lacks what is being replaced
        assert crash_at(number, partial(pair.commit, run))
        number += 1
    before = on_disk(pair.mirror.dest)
    assert terminal.plan() == ["* a"]
    assert "A commit is not finished" in terminal.told
    assert on_disk(pair.mirror.dest) == before


def test_plan_ends_with_1_where_a_run_would_stop(pair: Pair, terminal: Terminal) -> None:
    """By the guard, for the provider's index, or for the consumer's."""
    for name in "abcd":
        pair.put(name, b"1")
    pair.backup()
    for name in "abc":
        os.unlink(pair.path(name))
    pair.build_index()
    terminal.configure(guard={"above": 2})
    assert terminal.plan(status=WRONG) == ["- a", "- b", "- c"]
    assert "the run would stop: 3 gone and 0 changed of 4 entries" in terminal.told
    terminal.configure(guard={"above": 2}, on_guard="approve")
    terminal.plan(status=WRONG)
    assert "a person would be asked: 3 gone" in terminal.told
    pair.put(".old/x", b"1")
    pair.build_index()
    terminal.plan(status=WRONG)
    assert "the next run would stop" in terminal.told and "reserved" in terminal.told
    shutil.rmtree(pair.a / ".old")
    pair.build_index()
    pair.mirror.index.write_text("damaged\n")
    terminal.plan(status=WRONG)
    assert "delete it: then all files are copied again" in terminal.told
    pair.mirror.index.unlink()
    assert terminal.plan() == ["+ d"], "the next run copies all again"


def test_plan_takes_an_index_from_standard_input(
    pair: Pair, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ssh A cat index | mdbackup plan` gives it; also one of an md5sum job, without an end line."""
    content = f"{digest(b'1').decode()}  /a\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert terminal.run("plan", "--index", "-", index=False) == "+ /a\n"
    terminal.run("plan", "--index", "nowhere.md5", index=False, status=REFUSED)
    assert terminal.told == "mdbackup plan: --index nowhere.md5: No such file or directory\n"


def test_plan_of_a_dest_that_holds_something_else_is_refused(pair: Pair, terminal: Terminal) -> None:
    """As the run would be, with a word on how to take it over."""
    pair.put("a", b"1")
    pair.build_index()
    (pair.mirror.dest / "other").mkdir(parents=True)
    assert terminal.plan(status=REFUSED) == []
    assert "mdbackup adopt" in terminal.told
    assert os.listdir(pair.mirror.dest) == ["other"]


# --- adopt ------------------------------------------------------------------------------------------


def rsynced(pair: Pair, folder: Path) -> Path:
    """Let rsync copy A's tree, as a script did for years, and return the copy."""
    copy = folder / "rsynced"
    folder.mkdir(exist_ok=True)
    subprocess.run(["rsync", "-a", f"{pair.a}/", f"{copy}/"], check=True)
    return copy


def differing(pair: Pair, folder: Path) -> Path:
    """Return a copy of A's tree that differs from it in each way."""
    for name in ("same", "sub/same", "sub-x/same", "different", "only here", "\\odd\nname"):
        pair.put(name, b"1" + name.encode())
    os.chmod(pair.path("same"), 0o640)
    os.utime(pair.path("same"), ns=(1, 1_600_000_000_123_456_789))
    copy = rsynced(pair, folder)
    pair.put("different", b"2")
    pair.put("only there", b"1")
    os.unlink(pair.path("only here"))
    pair.build_index()
    return copy


@pytest.mark.parametrize("moved", [True, False])
def test_first_run_after_an_adoption_transfers_only_what_differs(
    pair: Pair, terminal: Terminal, tmp_path: Path, moved: bool
) -> None:
    """Whether the tree is moved or lies there already; what A does not have is known as gone from there."""
    copy = differing(pair, tmp_path)
    words = ["--tree", str(copy), "--at", str(pair.a)]
    if not moved:
        pair.live("").parent.mkdir(parents=True)
        copy.rename(pair.live(""))
        words = []
    here = pair.live("") if not moved else copy
    inodes = {path.relative_to(here): path.stat().st_ino for path in here.rglob("*")}
    terminal.run("adopt", *words)
    assert "4 equal, 1 different, 1 only here, 1 only on the provider" in terminal.told
    assert {p.relative_to(pair.live("")): p.stat().st_ino for p in pair.live("").rglob("*")} == inodes
    assert not copy.exists() and not pair.mirror.adopting.exists()
    assert pair.live("same").stat().st_mtime_ns == 1_600_000_000_123_456_789
    check_sound(pair)
    assert len(pair.index_b()) == 5
    adopted = {change.path: change for change in pair.history()[0]}
    same = adopted[pair.path("same")]
    assert (same.what, same.size, same.mtime, same.mode) == (What.ADOPTED, 5, 1_600_000_000, 0o640)
    main(["status", "srv1", "--providers-file", str(terminal.file)])
    assert "there was no good run yet" in terminal.capsys.readouterr().out
    assert terminal.plan() == ["* different", "+ only there"]

    assert pair.backup().outcomes == {"pulled": 2}
    assert pair.transferred == 2
    assert pair.versions("different") == [b"1different"]
    check_sound(pair)
    main(["restore", "--dest", str(pair.mirror.dest), "--include-gone", "--to", str(tmp_path / "back")])
    assert Path(f"{tmp_path}/back{pair.a}/only here").read_bytes() == b"1only here"
    terminal.run("versions", f"{pair.a}/only here", index=False)
    with Past(pair.mirror) as past:
        assert {v.found for v in verify(pair.mirror, past, past.contents())} == {Found.SOUND}
        assert not list(unknown(pair.mirror, past))
    assert pair.backup().outcomes == {}


def test_equal_trees_make_the_first_run_a_no_op(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """Nothing is transferred, archived or replaced."""
    for number in range(50):
        pair.put(f"{number % 7}/{number}", str(number).encode())
    terminal_tree = rsynced(pair, tmp_path)
    pair.build_index()
    terminal.run("adopt", "--tree", terminal_tree, "--at", pair.a)
    before = on_disk(pair.mirror.files)
    assert disk_of(pair) == (50, 90, 0, 0)
    assert pair.backup().outcomes == {}
    assert (pair.transferred, on_disk(pair.mirror.files)) == (0, before)
    assert disk_of(pair) == (50, 90, 0, 0)


def test_a_dry_run_of_an_adoption_tells_all_and_changes_nothing(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    copy = differing(pair, tmp_path)
    before = on_disk(copy)
    words = ["adopt", "--tree", copy, "--at", pair.a, "--dry-run"]
    out = [json.loads(line) for line in terminal.run(*words, "--format", "json").splitlines()]
    compared = {"equal": 4, "different": 1, "only_here": 1, "only_there": 1, "excluded": 0, "guard": []}
    assert out[-1]["compared"] == compared
    assert "6 files, 55.0 B, would be adopted" in terminal.told
    assert on_disk(copy) == before and not pair.mirror.dest.exists()


def test_without_the_providers_index_all_that_is_here_is_adopted(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """And the first run, with its guard, sees to what the provider does not have."""
    copy = differing(pair, tmp_path)
    terminal.run("adopt", "--tree", copy, "--at", pair.a, "--offline", index=False)
    assert len(pair.index_b()) == 6
    assert terminal.plan() == ["* different", "- only here", "+ only there"]
    pair.backup()
    check_sound(pair)


def test_what_is_no_regular_file_is_told_and_not_adopted(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """Each kind is counted and named; the versions of others in `.old` stay where they are."""
    pair.put("good", b"1")
    pair.put("sub/good", b"2")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    (copy / "link").symlink_to("good")
    (copy / "sub/link").symlink_to("/etc", target_is_directory=True)
    os.mkfifo(copy / "fifo")
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(os.path.relpath(copy / "socket"))
    (copy / ".old").mkdir()
    (copy / ".old/good").write_bytes(b"another's version")
    (copy / "sub/.old").write_bytes(b"a file")
    (copy / "empty").mkdir()
    os.link(copy / "good", tmp_path / "second name")
    out = terminal.run("adopt", "--tree", copy, "--at", pair.a, "--format", "json", status=WRONG)
    facts = json.loads(out.splitlines()[0])
    left = {"symlink": 2, "special": 2, "reserved": 1, "in the place of versions": 1, "empty directory": 1}
    assert facts == {"left": left, "others": 0, "linked": 1}
    assert "Rename them: no file beside them can have versions" in terminal.told
    assert set(pair.index_b()) == {pair.path("good"), pair.path("sub/good")}
    assert pair.live(".old/good").read_bytes() == b"another's version"
    pair.put("good", b"3")
    assert pair.backup().outcomes == {"pulled": 1}
    assert sorted(path.read_bytes() for path in pair.live(".old").iterdir()) == [b"1", b"another's version"]


def test_files_that_cannot_be_read_or_are_another_users_are_told(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fail alone; the next run pulls them."""
    pair.put("good", b"1")
    pair.put("bad", b"2")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    really_open = os.open

    def open_(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if path == b"bad":
            raise PermissionError(13, "Permission denied", path)
        return really_open(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    out = terminal.run("adopt", "--tree", copy, "--at", pair.a, "--format", "json", status=WRONG)
    assert json.loads(out.splitlines()[0]) == {"left": {"unreadable": 1}, "others": 2, "linked": 0}
    assert "do not belong to 12345" in terminal.told
    monkeypatch.undo()
    assert set(pair.index_b()) == {pair.path("good")}
    assert terminal.plan() == ["+ bad"]


def test_an_adoption_that_cannot_be_meant_is_refused(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """And leaves the tree where it is."""
    copy = differing(pair, tmp_path)
    before = on_disk(copy)

    def refused(*words: str | Path) -> str:
        terminal.run("adopt", *words, status=REFUSED)
        assert on_disk(copy) == before
        assert not pair.mirror.index.exists()
        return terminal.told

    at = ("--at", pair.a)
    assert "needs an --at PATH" in refused("--tree", copy)
    told = refused("--tree", copy, "--at", "/elsewhere")
    assert "no path here is in the provider's index, which has 6: is /elsewhere right" in told
    assert ".old is for versions" in refused("--tree", copy, "--at", "/x/.old")
    assert "component '..'" in refused("--tree", copy, "--at", "/x/../y")
    nested = ("--tree", tmp_path / "x", "--at", pair.a / "below")
    assert "would come into" in refused("--tree", copy, *at, *nested)
    (tmp_path / "link").symlink_to(copy)
    assert "no directory of its own" in refused("--tree", tmp_path / "link", *at)
    assert "cannot be moved into itself" in refused("--tree", pair.mirror.dest.parent, *at)
    with tempfile.TemporaryDirectory(dir="/tmp") as elsewhere:
        if os.stat(elsewhere).st_dev != os.stat(tmp_path).st_dev:
            told = refused("--tree", elsewhere, *at)
            assert f"cp --reflink=auto -a {elsewhere}/. {pair.live('')}/" in told
    (pair.live("other")).parent.mkdir(parents=True)
    pair.live("other").write_bytes(b"")
    assert "something is already" in refused("--tree", copy, *at)
    shutil.rmtree(pair.mirror.files)
    (pair.mirror.dest / "other").mkdir()
    assert "has no place in a backup" in refused("--tree", copy, *at)
    os.rmdir(pair.mirror.dest / "other")
    assert "there is no file to adopt" in refused()
    Mirror(pair.mirror.dest, "srv2").claim()
    assert "belongs to the provider 'srv2'" in refused("--tree", copy, *at)


def test_a_tree_that_is_part_of_another_one_is_refused_before_anything_moves(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    pair.put("sub/a", b"1")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    trees = ["--tree", str(copy), "--at", str(pair.a), "--tree", str(copy / "sub"), "--at", "/other"]
    terminal.run("adopt", *trees, status=REFUSED)
    assert "is part of" in terminal.told
    assert (copy / "sub/a").exists() and not pair.mirror.files.exists()


def test_a_second_adoption_at_the_same_time_waits_for_the_end_of_the_first(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """And does not take what that has hashed for spoilt."""
    pair.put("a", b"1")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    pair.mirror.make_directories()
    trees = [Source(copy, os.fsencode(pair.a))]
    with Survey(trees, pair.mirror.adopting) as first:
        terminal.run("adopt", "--tree", copy, "--at", pair.a, status=REFUSED)
        assert "another `mdbackup adopt` is at work" in terminal.told
        first.walk()
        first.hash(1)
        adopt(pair.mirror, first, trees)
    assert pair.index_b() == pair.index_a()


def test_what_goes_while_a_tree_is_looked_at_is_told(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        pair.put(name, b"1")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    scandir = os.scandir

    def list_first(folder: bytes) -> Any:
        with scandir(folder) as found:
            entries = list(found)
        if folder == os.fsencode(copy):
            (copy / "b").unlink()
        return nullcontext(entries)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", list_first)
        terminal.run("adopt", "--tree", copy, "--at", pair.a, status=WRONG)
    assert "1 not adopted, moving" in terminal.told
    assert set(pair.index_b()) == {pair.path("a")}


def test_a_backup_is_not_adopted_again(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """Its index would claim what no history tells of."""
    copy = differing(pair, tmp_path)
    pair.backup()
    before = on_disk(pair.mirror.dest)
    for _ in range(2):
        terminal.run("adopt", "--tree", copy, "--at", pair.a, status=REFUSED)
        assert "has a backup already" in terminal.told
        after = on_disk(pair.mirror.dest)
        assert (
            after.keys() == before.keys() and after[f"{pair.mirror.index}"] == before[f"{pair.mirror.index}"]
        )
        pair.mirror.adopting.touch()  # as of one that was refused, before there was a backup
    assert copy.exists()


def test_a_tree_within_dest_and_one_for_the_root_can_be_adopted(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """As where a script has always copied to what is to be `dest` now."""
    pair.put("a", b"1")
    pair.build_index()
    rootlike = tmp_path / "root"
    shutil.copytree(pair.a, f"{rootlike}{pair.a}")
    pair.mirror.dest.mkdir()
    rootlike.rename(pair.mirror.dest / "tree")
    terminal.run("adopt", "--tree", pair.mirror.dest / "tree", "--at", "/")
    assert pair.backup().outcomes == {}
    assert pair.live("a").read_bytes() == b"1"


def test_what_is_excluded_stays_in_the_index_as_what_was_backed_up_before_does(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """And counts neither as equal nor as gone."""
    pair.put("a", b"1")
    pair.put("cache/b", b"1")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    terminal.configure(exclude=["cache/"])
    terminal.run("adopt", "--tree", copy, "--at", pair.a)
    assert "1 equal, 0 different, 0 only here, 0 only on the provider, 1 excluded" in terminal.told
    assert set(pair.index_b()) == {pair.path("a"), pair.path("cache/b")}
    assert pair.backup(exclude=["cache/"]).outcomes == {}


def test_several_trees_are_adopted_at_once(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    for name in ("one/a", "two/a"):
        pair.put(name, b"1")
    pair.build_index()
    copy = rsynced(pair, tmp_path)
    trees = [("--tree", copy / name, "--at", pair.a / name) for name in ("one", "two")]
    terminal.run("adopt", *trees[0], *trees[1])
    assert pair.backup().outcomes == {}


def test_what_was_hashed_is_not_hashed_again_unless_it_changed(tmp_path: Path) -> None:
    """After a crash, and wherever the tree is by then."""
    tree, moved = tmp_path / "tree", tmp_path / "moved"
    tree.mkdir()
    for name in ("a", "b", "c"):
        (tree / name).write_bytes(name.encode())

    def hashed(source: Path) -> list[int]:
        sizes: list[int] = []
        with Survey([Source(source, b"/at")], tmp_path / "table") as survey:
            survey.walk()
            survey.hash(2, sizes.append)
            survey.write_index(tmp_path / "index.md5")
        return sorted(sizes)

    assert hashed(tree) == [1, 1, 1]
    tree.rename(moved)
    (moved / "b").write_bytes(b"longer")
    (moved / "c").unlink()
    assert hashed(moved) == [6]
    assert dict(read_entries(tmp_path / "index.md5")) == {b"/at/a": digest(b"a"), b"/at/b": digest(b"longer")}
    (tmp_path / "table").write_bytes(b"spoilt by a power cut" * 1000)
    assert hashed(moved) == [1, 6]


def test_a_file_that_changes_while_it_is_adopted_is_left_to_the_next_run(pair: Pair, tmp_path: Path) -> None:
    """The index must not claim what was hashed before that."""
    pair.put("a", b"1")
    pair.put("b", b"1")
    trees = [Source(rsynced(pair, tmp_path), os.fsencode(pair.a))]
    with Survey(trees) as survey:
        survey.walk()
        survey.hash(1)
        (trees[0].directory / "a").write_bytes(b"2")
        adopt(pair.mirror, survey, trees)
    assert survey.told.left == {Left.MOVING: 1}
    assert set(pair.index_b()) == {pair.path("b")}
    check_sound(pair)


def test_an_adoption_that_is_killed_at_any_step_is_whole_or_none(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """Or the power is cut. No run begins on half of one; the same command again ends it, or the next run."""
    template = tmp_path / "x"
    differing(pair, template)
    seen = set()
    for number in count(1, 1 if LONG else 23):
        folder = tmp_path / f"killed-{number}"
        subprocess.run(["cp", "-a", template, folder], check=True)
        copy = folder / "rsynced"
        contents = {path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        pair.mirror = Mirror(folder / "b", "srv1")
        terminal.configure()
        words = ("adopt", "--tree", copy, "--at", pair.a)
        cut = PowerCut(folder, mixed(number)) if number % 4 == 3 else None
        killed = crash_at(number, partial(terminal.run, *words), cut)
        if not copy.exists():
            assert contents_of(pair) == contents
        if pair.mirror.is_marked():
            seen.add("whole")
        elif copy.exists():
            seen.add("none")
        else:
            seen.add("moved")
            with pytest.raises(DestinationRefused, match="holds no backup of ours"):
                pair.mirror.claim()
        if killed and (number % 2 or not pair.mirror.is_marked()):
            terminal.run(*words, status=GOOD if pair.mirror.adopting.exists() or copy.exists() else REFUSED)
            assert len(pair.index_b()) == 5
            assert not pair.mirror.adopting.exists()
        pair.backup()
        assert pair.transferred == 2
        check_sound(pair)
        assert pair.versions("different") == [b"1different"]
        if not killed:
            break
    assert seen == {"none", "moved", "whole"} if LONG else "whole" in seen


def test_a_history_that_an_adoption_wrote_before_it_was_one_is_no_ones(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """The next try writes its own, of what is there by then."""
    copy = differing(pair, tmp_path)
    words = ("adopt", "--tree", copy, "--at", pair.a)
    terminal.cut_off(lambda: any(pending(pair.mirror)), *words, first=70)
    assert not pair.mirror.is_marked()
    terminal.run(*words)
    assert not any(pending(pair.mirror)) and len(commits(pair.mirror)) == 2
    check_sound(pair)


# --- import -----------------------------------------------------------------------------------------


def with_backup_dir(pair: Pair, folder: Path) -> Path:
    """Have rsync keep what it displaced, adopt its tree, and return where the old files are."""
    for name in ("changed", "sub/changed", "deleted", "same"):
        pair.put(name, b"old " + name.encode())
    copy, kept = rsynced(pair, folder), folder / "kept"
    time.sleep(0.01)  # or else rsync takes a file of the same size for the same
    for name in ("changed", "sub/changed"):
        pair.put(name, b"newer " + name.encode())
    os.unlink(pair.path("deleted"))
    command = ["rsync", "-a", "--delete", "--backup", f"--backup-dir={kept}", f"{pair.a}/", f"{copy}/"]
    subprocess.run(command, check=True)
    pair.build_index()
    return kept


DISPLACED = ("--displaced", "2026-11-20T03:15:00Z")
STAMP = "20261120T031500.999999Z"


def adopted(terminal: Terminal, folder: Path, *words: str) -> None:
    terminal.run("adopt", "--tree", folder / "rsynced", "--at", terminal.pair.a, *words)


def disk_of(pair: Pair) -> tuple[int, ...]:
    """Return what the status tells: live files and their bytes, versions and theirs."""
    disk = look(pair.mirror, None, datetime.now(UTC)).disk
    assert disk is not None
    return disk[:4]


@pytest.mark.parametrize("copy", [False, True])
def test_what_rsync_kept_becomes_versions(pair: Pair, terminal: Terminal, tmp_path: Path, copy: bool) -> None:
    """Moved, or copied; also of a path that is there no more. All that reads history knows them."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    before, index = on_disk(kept), pair.index_b()
    words = ["import", kept, "--at", pair.a, *DISPLACED, *(["--copy"] if copy else [])]
    terminal.run(*words, "--dry-run", index=False)
    assert "3 versions, 37.0 B, would be imported" in terminal.told
    assert on_disk(kept) == before and len(commits(pair.mirror)) == 1
    terminal.run(*words, index=False)
    assert "3 versions, 37.0 B, imported" in terminal.told
    assert on_disk(kept) == before if copy else not [p for p in kept.rglob("*") if p.is_file()]
    for name in ("changed", "sub/changed", "deleted"):
        (version,) = (pair.live(name).parent / ".old").glob(f"{Path(name).name}.*")
        assert (version.name, version.read_bytes()) == (f"{Path(name).name}.{STAMP}", f"old {name}".encode())
        assert version.stat().st_mtime_ns == before[str(kept / name)][1]
    assert pair.index_b() == index
    check_sound(pair)
    assert disk_of(pair)[2:] == (3, 37)
    with Past(pair.mirror) as past:
        assert not past.problems
        assert {found.found for found in verify(pair.mirror, past, past.contents())} == {Found.SOUND}
        assert not list(unknown(pair.mirror, past))
    lines = terminal.run("versions", f"{pair.a}/changed", "--format", "json", index=False).splitlines()
    old, new = map(json.loads, lines)
    assert (old["until"], old["since"], old["md5"]) == (STAMP, None, digest(b"old changed").decode())
    assert (new["until"], new["size"]) == (None, 13)
    words_again = terminal.run(*words, index=False, status=GOOD if copy else WRONG)
    assert "3 were there already" in terminal.told if copy else "Nothing there" in terminal.told
    assert words_again == ""
    assert pair.backup().outcomes == {}
    pair.put("changed", b"newest")
    pair.backup()
    assert pair.versions("changed") == [b"old changed", b"newer changed"]
    check_sound(pair)


def test_a_moment_before_the_first_backup_has_no_state(
    pair: Pair, terminal: Terminal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which files there were then is not known, and nothing is made up; the present state is as it was."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    terminal.run("import", kept, "--at", pair.a, *DISPLACED, index=False)
    back = ("restore", "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "back"))
    assert main([*back, "--as-of", "2026-11-21T00:00Z"]) == REFUSED
    assert "of what was imported, only the versions are known" in capsys.readouterr().err
    assert main([*back, "--as-of", "now", "--include-gone"]) == GOOD
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert found == {"changed": b"newer sub/changed", "same": b"old same"} | {"changed": found["changed"]}
    assert found["changed"].startswith(b"newer")


def test_an_import_overwrites_no_version(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """Of the same moment, the next name is taken; the same bytes are not brought twice."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    there = pair.live(".old") / f"changed.{STAMP}"
    there.parent.mkdir()
    there.write_bytes(b"somebody's")
    again = tmp_path / "again"
    shutil.copytree(kept, again)
    for tree in (kept, again):
        terminal.run("import", tree, "--at", pair.a, *DISPLACED, index=False)
    assert "0 versions, 0.0 B, imported, 3 were there already" in terminal.told
    assert there.read_bytes() == b"somebody's"
    assert there.with_name(f"{there.name}.1").read_bytes() == b"old changed"
    check_sound(pair)


def test_two_equal_imports_at_once_tell_each_version_once(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins and ends while the first hashes."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    words = ["import", kept, "--at", pair.a, *DISPLACED, "--copy"]
    hashing = Survey.hash

    def hash_late(survey: Survey, *arguments: Any) -> None:
        monkeypatch.setattr(Survey, "hash", hashing)
        terminal.run(*words, index=False)
        hashing(survey, *arguments)

    monkeypatch.setattr(Survey, "hash", hash_late)
    terminal.run(*words, index=False)
    assert "0 versions, 0.0 B, imported, 3 were there already" in terminal.told
    assert len(commits(pair.mirror)) == 2 and disk_of(pair)[2:] == (3, 37)
    check_sound(pair)


def test_files_with_a_suffix_become_versions_of_those_without(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """As `rclone --suffix` leaves them beside the others; a file of A's with such a name stays one."""
    for name in ("a", "sub/b", "notes.2026-01-02", "other.2026-99-99"):
        pair.put(name, b"live")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    for name in ("a.2026-11-20", "a.2026-11-21", "sub/b.2026-11-20", "gone.2026-11-20"):
        (copy / name).write_bytes(name.encode())
    adopted(terminal, tmp_path, "--suffix", ".%Y-%m-%d")
    assert "4 not adopted, passed over" in terminal.told
    assert set(pair.index_b()) == set(pair.index_a())
    terminal.run("import", "--suffix", ".%Y-%m-%d", index=False)
    assert pair.versions("a") == [b"a.2026-11-20", b"a.2026-11-21"]
    assert pair.versions("sub/b") == [b"sub/b.2026-11-20"]
    assert pair.versions("gone") == [b"gone.2026-11-20"]
    check_sound(pair)
    with Past(pair.mirror) as past:
        assert not list(unknown(pair.mirror, past))
        a = [content.until[:8] for content in past.contents() if content.path == pair.path("a")]
    assert a[2] == "" and a == [*sorted(a[:2]), ""]
    assert pair.backup().outcomes == {}


def test_no_live_file_that_the_index_has_is_taken_for_a_version(
    pair: Pair, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its history is lost, or a run has brought it only since it was looked at."""
    pair.put("lost~", b"lost")
    pair.backup()
    commits(pair.mirror)[0].unlink()
    pair.live("new~").write_bytes(b"new")
    pair.live("old~").write_bytes(b"old")

    def after_a_run(importing: _Importing) -> None:
        pair.put("new~", b"new")
        os.utime(pair.path("new~"), (1_600_000_000, 1_600_000_000))
        assert pair.backup().outcomes == {"adopted": 1}
        commit(importing)

    commit = _Importing.commit
    os.utime(pair.live("new~"), (1_600_000_000, 1_600_000_000))
    words = ["import", "--suffix", "~", *DISPLACED]
    terminal.run(*words, "--dry-run", index=False)
    assert "2 versions" in terminal.told
    monkeypatch.setattr(_Importing, "commit", after_a_run)
    terminal.run(*words, index=False)
    assert "1 versions" in terminal.told
    assert pair.versions("old") == [b"old"]
    assert {name: pair.live(name).read_bytes() for name in ("lost~", "new~")} == {
        "lost~": b"lost",
        "new~": b"new",
    }
    assert set(pair.index_b()) == {pair.path("lost~"), pair.path("new~")}


def test_nothing_is_imported_into_the_place_of_versions(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    before = on_disk(kept)
    words = ["import", kept, "--at", f"{pair.a}/.old", *DISPLACED]
    terminal.run(*words, index=False, status=WRONG)
    assert "3 not imported, reserved" in terminal.told
    assert on_disk(kept) == before


def test_an_import_that_is_killed_at_any_step_loses_and_forgets_nothing(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the power is cut; also where a renaming always overwrites. The next run, or command, finishes it."""
    template = tmp_path / "x"
    with_backup_dir(pair, template)
    pair.mirror = Mirror(template / "b", "srv1")
    terminal.configure()
    adopted(terminal, template)
    for number in count(1, 1 if LONG else 17):
        folder = tmp_path / f"killed-{number}"
        subprocess.run(["cp", "-a", template, folder], check=True)
        kept = folder / "kept"
        contents = {path.read_bytes() for path in kept.rglob("*") if path.is_file()} | contents_of(pair)
        pair.mirror = Mirror(folder / "b", "srv1")
        terminal.configure()
        copy = ["--copy"] if number % 2 else []
        words = ("import", kept, "--at", pair.a, *DISPLACED, *copy)
        cut = PowerCut(folder, mixed(number)) if number % 4 > 1 else None
        with monkeypatch.context() as patched:
            if number % 5 < 2:
                patched.setattr(tree_module, "rename_if_free", lambda *names: False)
            killed = crash_at(number, partial(terminal.run, *words, index=False), cut)
        left = {path.read_bytes() for path in kept.rglob("*") if path.is_file()}
        assert left | contents_of(pair) >= contents
        if killed and number % 3:
            pair.backup()
        if killed and any(path.is_file() for path in kept.rglob("*")):
            terminal.run(*words, index=False)
        pair.backup()
        check_sound(pair)
        for name in ("changed", "sub/changed", "deleted"):
            assert pair.versions(name) == [f"old {name}".encode()]
        with Past(pair.mirror) as past:
            assert not list(unknown(pair.mirror, past))
        if not killed:
            break


@pytest.mark.parametrize("overwrites", [False, True])
def test_an_import_that_was_cut_off_in_its_commit_is_finished_by_the_next(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    """Before that looks for more; an empty file, which took a version's name first, counts for nothing."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    words = ("import", kept, "--at", pair.a, *DISPLACED)
    version = pair.live(".old") / f"changed.{STAMP}"
    terminal.cut_off(lambda: any(pending(pair.mirror)), *words, index=False)
    assert not version.exists()
    if overwrites:
        monkeypatch.setattr(tree_module, "rename_if_free", lambda *names: False)
        version.parent.mkdir()
        version.touch()
    terminal.run(*words, index=False)
    assert "A commit that was cut off has been finished first" in terminal.told
    assert pair.versions("changed") == [b"old changed"]
    check_sound(pair)


def test_what_changed_since_an_import_was_cut_off_is_not_taken_for_what_it_was(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """Nor is what has the version's name by then. Both stay where they are, until the next import."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    words = ("import", kept, "--at", pair.a, *DISPLACED)
    terminal.cut_off(lambda: any(pending(pair.mirror)), *words, index=False)
    (kept / "changed").write_bytes(b"other")
    somebodys = pair.live("sub/.old") / f"changed.{STAMP}"
    somebodys.parent.mkdir()
    somebodys.write_bytes(b"somebody's")
    assert pair.backup().outcomes == {}
    assert pair.versions("changed") == [] and (kept / "changed").read_bytes() == b"other"
    assert pair.versions("deleted") == [b"old deleted"]
    check_sound(pair)
    terminal.run(*words, index=False)
    assert pair.versions("changed") == [b"other"]
    assert pair.versions("sub/changed") == [b"somebody's", b"old sub/changed"]
    check_sound(pair)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "name the DIR"),
        (("DIR",), "--at PATH is missing"),
        (("DIR", "--at", "/x"), "say once when"),
        (("DIR", "--at", "/x", "--displaced", "today", "--suffix", ".%Y"), "say once when"),
        (("DIR", "--at", "/x", "--suffix", "~"), "say once when"),
        (("DIR", "--at", "/x", "--suffix", ".%B"), "only %Y, %m"),
        (("nowhere", "--at", "/x", "--displaced", "today"), "is no directory"),
        (("DIR", "--at", "/x", "--displaced", "today"), "has no index yet"),
    ],
)
def test_an_import_that_cannot_be_meant_is_refused(
    pair: Pair, terminal: Terminal, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    pair.mirror.claim()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/x~").write_bytes(b"")
    given = [word.replace("DIR", str(tmp_path / "tree")) for word in words]
    terminal.run("import", *given, index=False, status=REFUSED)
    assert told in terminal.told


@pytest.mark.parametrize(
    ("form", "path", "cut"),
    [
        (".%Y-%m-%d", b"/a/x.2026-11-20", (b"/a/x", "2026-11-20 00:00:00")),
        ("-%Y%m%d-%H%M%S", b"/x-20261120-031500", (b"/x", "2026-11-20 03:15:00")),
        ("%%.%j.%Y", b"/x%.001.2026", (b"/x", "2026-01-01 00:00:00")),
        ("~", b"/a/x~", (b"/a/x", None)),
        (".%Y-%m-%d", b"/a/x.2026-13-20", None),
        (".%Y-%m-%d", b"/a/.2026-11-20", None),
        (".%Y%m%d", b"/a/x.29990101", None),  # yet to come: a number of some other kind
        (".%Y-%m-%d", b"/a.2026-11-20/x", None),
    ],
)
def test_a_suffix_tells_of_what_and_when(
    form: str, path: bytes, cut: tuple[bytes, str | None] | None
) -> None:
    """In local time; a name that is nothing but the suffix has none."""
    found = Suffix(form).cut(path)
    if cut is None:
        assert found is None
        return
    assert found is not None and found[0] == cut[0]
    if cut[1] is None:
        assert found[1] == ""
    else:
        moment = moment_of(cut[1], datetime.now().astimezone())
        assert found[1][:15] == f"{moment.astimezone(UTC):%Y%m%dT%H%M%S}"


@pytest.mark.parametrize("form", ["", "a/b", ".%q", "%"])
def test_what_is_no_suffix_is_refused(form: str) -> None:
    with pytest.raises(UsageError):
        Suffix(form)
