"""A tree of another tool becomes a backup."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import chdir
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import ChangeKind, commits, pending
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.recovery.verify import VerifyOutcome, unknown_files, verify
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.adopt import adopt
from airflow_mdbackup.scheme.takeover.survey import (
    _UPSERT,
    SkipReason,
    SourceTree,
    Survey,
    SurveyedFile,
    _row,
)
from tests.guarantees.crash.crash import PowerCut, crash_at, mixed
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of, digest
from tests.pair import Pair
from tests.torture import LONG
from tests.unit.cli.terminal import GOOD, REFUSED, WRONG, Terminal, disk_of, on_disk, rsynced


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
    """Whether the tree is moved or already in place; what A does not have is recorded as deleted there."""
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
    assert (same.what, same.size, same.mtime, same.mode) == (ChangeKind.ADOPTED, 5, 1_600_000_000, 0o640)
    main(["status", "srv1", "--providers-file", str(terminal.file)])
    assert "there has been no good run yet" in terminal.capsys.readouterr().out
    assert terminal.plan() == ["* different", "+ only there"]

    assert pair.backup().outcomes == {"pulled": 2}
    assert pair.transferred == 2
    assert pair.versions("different") == [b"1different"]
    check_sound(pair)
    main(["restore", "--dest", str(pair.mirror.dest), "--include-gone", "--to", str(tmp_path / "back")])
    assert Path(f"{tmp_path}/back{pair.a}/only here").read_bytes() == b"1only here"
    terminal.run("versions", f"{pair.a}/only here", index=False)
    with Timeline(pair.mirror) as past:
        assert {v.outcome for v in verify(pair.mirror, past, past.contents())} == {VerifyOutcome.SOUND}
        assert not list(unknown_files(pair.mirror, past))
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


def test_a_dry_run_of_an_adoption_reports_everything_and_changes_nothing(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    copy = differing(pair, tmp_path)
    before = on_disk(copy)
    words = ["adopt", "--tree", copy, "--at", pair.a, "--dry-run"]
    out = [json.loads(line) for line in terminal.run(*words, "--format", "json").splitlines()]
    compared = {"equal": 4, "different": 1, "only_here": 1, "only_there": 1, "excluded": 0, "guard": []}
    assert out[-1]["compared"] == compared
    assert "6 files, 55 B, would be adopted" in terminal.told
    assert on_disk(copy) == before and not pair.mirror.dest.exists()


def test_without_the_providers_index_everything_here_is_adopted(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """And the first run, with its guard, sees to what the provider does not have."""
    copy = differing(pair, tmp_path)
    terminal.run("adopt", "--tree", copy, "--at", pair.a, "--offline", index=False)
    assert len(pair.index_b()) == 6
    assert terminal.plan() == ["* different", "- only here", "+ only there"]
    pair.backup()
    check_sound(pair)


def test_what_is_not_a_regular_file_is_reported_and_not_adopted(
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
    with chdir(copy), socket.socket(socket.AF_UNIX) as here:  # the whole path may be too long for a socket
        here.bind("socket")
    (copy / ".old").mkdir()
    (copy / ".old/good").write_bytes(b"another's version")
    (copy / "sub/.old").write_bytes(b"a file")
    (copy / "empty").mkdir()
    os.link(copy / "good", tmp_path / "second name")
    out = terminal.run("adopt", "--tree", copy, "--at", pair.a, "--format", "json", status=WRONG)
    facts = json.loads(out.splitlines()[0])
    left = {"symlink": 2, "special": 2, "reserved": 1, "in the place of versions": 1, "empty directory": 1}
    assert facts == {"left": left, "others": 0, "linked": 1}
    assert "Rename them: files beside them could not have versions" in terminal.told
    assert set(pair.index_b()) == {pair.path("good"), pair.path("sub/good")}
    assert pair.live(".old/good").read_bytes() == b"another's version"
    pair.put("good", b"3")
    assert pair.backup().outcomes == {"pulled": 1}
    assert sorted(path.read_bytes() for path in pair.live(".old").iterdir()) == [b"1", b"another's version"]


def test_unreadable_files_and_those_of_other_users_are_reported(
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


def test_an_adoption_that_makes_no_sense_is_refused(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """And leaves the tree where it is."""
    copy = differing(pair, tmp_path)
    before = on_disk(copy)

    def refused(*words: str | Path) -> str:
        terminal.run("adopt", *words, status=REFUSED)
        assert on_disk(copy) == before
        assert not pair.mirror.index.exists()
        return terminal.told

    at = ("--at", pair.a)
    assert "needs its --at PATH" in refused("--tree", copy)
    told = refused("--tree", copy, "--at", "/elsewhere")
    assert (
        "none of these paths is in the provider's index, which has 6 paths: is /elsewhere the right" in told
    )
    assert ".old is for versions" in refused("--tree", copy, "--at", "/x/.old")
    assert "component '..'" in refused("--tree", copy, "--at", "/x/../y")
    nested = ("--tree", tmp_path / "x", "--at", pair.a / "below")
    assert "would be moved into" in refused("--tree", copy, *at, *nested)
    (tmp_path / "link").symlink_to(copy)
    assert "is a symlink, missing, or not a directory" in refused("--tree", tmp_path / "link", *at)
    assert "cannot be moved into itself" in refused("--tree", pair.mirror.dest.parent, *at)
    with tempfile.TemporaryDirectory(dir="/tmp") as elsewhere:
        if os.stat(elsewhere).st_dev != os.stat(tmp_path).st_dev:
            told = refused("--tree", elsewhere, *at)
            assert f"cp --reflink=auto -a {elsewhere}/. {pair.live('')}/" in told
    (pair.live("other")).parent.mkdir(parents=True)
    pair.live("other").write_bytes(b"")
    assert "something already exists" in refused("--tree", copy, *at)
    shutil.rmtree(pair.mirror.files)
    (pair.mirror.dest / "other").mkdir()
    assert "is not part of a backup" in refused("--tree", copy, *at)
    os.rmdir(pair.mirror.dest / "other")
    assert "there are no files to adopt" in refused()
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
    """And does not mistake the first one's table for a corrupted one."""
    pair.put("a", b"1")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    pair.mirror.make_directories()
    trees = [SourceTree(copy, os.fsencode(pair.a))]
    with Survey(trees, pair.mirror.adopting) as first:
        terminal.run("adopt", "--tree", copy, "--at", pair.a, status=REFUSED)
        assert "another `mdbackup adopt` is running" in terminal.told
        first.walk()
        first.hash(1)
        adopt(pair.mirror, first, trees)
    assert pair.index_b() == pair.index_a()


def test_files_that_disappear_during_a_survey_are_reported(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        pair.put(name, b"1")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    names_in = Tree.names_in

    def list_first(tree: Tree, folder: bytes) -> list[bytes]:
        names = names_in(tree, folder)
        if b"b" in names:
            (copy / "b").unlink()
        return names

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "names_in", list_first)
        terminal.run("adopt", "--tree", copy, "--at", pair.a, status=WRONG)
    assert "1 not adopted, moving" in terminal.told
    assert set(pair.index_b()) == {pair.path("a")}


@pytest.mark.parametrize("year", [1902, 1969, 2263, 2446, 3000])
def test_files_of_any_date_are_adopted_and_backed_up_from_then_on(
    pair: Pair, terminal: Terminal, tmp_path: Path, year: int
) -> None:
    """In nanoseconds they need more than 63 bits from 2262 on, and are negative before 1970."""
    pair.put("kept", b"1")
    pair.put("changed", b"1")
    copy = rsynced(pair, tmp_path)
    seconds = int(datetime(year, 6, 1, tzinfo=UTC).timestamp())
    for name in ("kept", "changed"):
        os.utime(copy / name, ns=(0, seconds * 10**9 + 999_999_999))
    modified = (copy / "kept").stat().st_mtime_ns  # as the file system takes it
    pair.put("changed", b"2")
    pair.build_index()
    terminal.run("adopt", "--tree", copy, "--at", pair.a)
    (adopted,) = pair.history()
    assert {change.mtime for change in adopted} == {modified // 10**9}
    assert pair.backup().outcomes == {"pulled": 1}
    assert pair.live("kept").stat().st_mtime_ns == modified and pair.versions("changed") == [b"1"]
    check_sound(pair)
    with Timeline(pair.mirror) as past:
        pair.live("kept").write_bytes(b"?")
        os.utime(pair.live("kept"), ns=(0, modified))
        found = verify(pair.mirror, past, past.contents())
        assert [each.outcome for each in found if each.place == pair.path("kept")] == [VerifyOutcome.ROTTEN]


def test_no_number_of_a_file_is_too_large_for_the_table_of_a_survey() -> None:
    """Some network file systems have inodes that use all 64 bits."""
    file = SurveyedFile(b"/a", 0, 2**64 - 1, 2**63 - 1, -(2**70), 2**70, 0o644)
    with Survey([]) as survey:
        for path in (b"/a", b"/b"):
            survey._table.execute(_UPSERT, _row(file._replace(path=path)))
        assert list(survey.surveyed_files()) == [file, file._replace(path=b"/b")]
        assert survey.size == 2**64


def test_a_backup_is_not_adopted_again(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """Its index would list what no history knows."""
    copy = differing(pair, tmp_path)
    pair.backup()
    before = on_disk(pair.mirror.dest)
    for _ in range(2):
        terminal.run("adopt", "--tree", copy, "--at", pair.a, status=REFUSED)
        assert "already has a backup" in terminal.told
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
        with Survey([SourceTree(source, b"/at")], tmp_path / "table") as survey:
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
    trees = [SourceTree(rsynced(pair, tmp_path), os.fsencode(pair.a))]
    with Survey(trees) as survey:
        survey.walk()
        survey.hash(1)
        (trees[0].directory / "a").write_bytes(b"2")
        adopt(pair.mirror, survey, trees)
    assert survey.report.skipped == {SkipReason.MOVING: 1}
    assert set(pair.index_b()) == {pair.path("b")}
    check_sound(pair)


def test_an_adoption_that_is_killed_at_any_step_is_complete_or_did_not_happen(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """Or the power fails. No run starts on half of one; the same command finishes it, or the next run."""
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


def test_a_history_written_before_the_marker_of_an_adoption_is_discarded(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """The next attempt writes its own, of what is there by then."""
    copy = differing(pair, tmp_path)
    words = ("adopt", "--tree", copy, "--at", pair.a)
    terminal.cut_off(lambda: any(pending(pair.mirror)), *words, first=60)
    assert not pair.mirror.is_marked()
    terminal.run(*words)
    assert not any(pending(pair.mirror)) and len(commits(pair.mirror)) == 2
    check_sound(pair)
