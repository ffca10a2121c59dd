"""What a restore writes, compared with copies that were kept aside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome
from airflow_mdbackup.scheme.recovery.selection import Selection
from tests.kept import Kept, files_in
from tests.pair import Pair
from tests.torture import LONG, Cases, scaled
from tests.unit.recovery.somebody import Random, back, files_of_a, mdbackup, outcomes, two_runs


@pytest.mark.guarantee("11. Getting it back")
@pytest.mark.parametrize("seed", range(3 if not LONG else 20))
def test_each_state_of_a_random_history_is_restored_exactly(
    pair: Pair, cases: Cases, tmp_path: Path, seed: int
) -> None:
    """Bytes, times and modes, compared with a copy of A kept at each run."""
    somebody = Random(pair, seed)
    snapshots: list[tuple[str, dict[bytes, Kept]]] = []
    for _ in range(scaled(100, 300)):
        somebody.work()
        pair.backup(allow_empty=True)
        snapshots.append((pair.mirror.last_commit(), files_of_a(pair)))
    for number, (stamp, kept) in enumerate(snapshots):
        target = tmp_path / str(number)
        with cases.one():
            came = back(pair, target, stamp)
            assert {each.outcome for each in came} <= {RestoreOutcome.RESTORED}
            assert files_in(target) == kept
        shutil.rmtree(target, ignore_errors=True)


def test_missing_content_is_restored_from_another_copy(pair: Pair, tmp_path: Path) -> None:
    """A file with other content is never written; lost files are named, and the rest is restored."""
    stamp, kept = two_runs(pair)
    for name in ("same", "twin"):
        pair.live(name).write_bytes(b"rotten")
    (old,) = (pair.live("changed").parent / ".old").glob("changed.*")
    old.unlink()
    came = back(pair, tmp_path / "target", stamp)
    assert outcomes(came) == {"restored": 4, "lost": 2}
    assert {each.content.path for each in came if each.outcome == RestoreOutcome.LOST} == {
        pair.path("same"),
        pair.path("twin"),
    }
    lost = {pair.path("same"), pair.path("twin")}
    assert files_in(tmp_path / "target") == {path: file for path, file in kept.items() if path not in lost}


def test_content_of_a_lost_history_is_found_by_version_names(pair: Pair, tmp_path: Path) -> None:
    """The gap is noticed."""
    stamp, kept = two_runs(pair)
    commits(pair.mirror)[-1].unlink()
    came = back(pair, tmp_path / "target", stamp, sound=False)
    moved = {path for path in kept if b"/flipped/" in path}  # a directory that was moved has another name
    assert {each.content.path for each in came if each.outcome != RestoreOutcome.RESTORED} == moved
    assert files_in(tmp_path / "target") == {path: file for path, file in kept.items() if path not in moved}


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b'{"format":1,"stamp":"x","run_id":"y"}\n{"path":1}\n'])
def test_a_damaged_history_is_reported(pair: Pair, content: bytes) -> None:
    two_runs(pair)
    commits(pair.mirror)[0].write_bytes(content)
    with Timeline(pair.mirror) as past:
        assert any("damaged" in problem for problem in past.problems)


def test_existing_files_are_not_touched_unless_asked(pair: Pair, tmp_path: Path) -> None:
    stamp, kept = two_runs(pair)
    target = tmp_path / "target"
    there = target / os.fsdecode(pair.path("changed"))[1:]
    there.parent.mkdir(parents=True)
    there.write_bytes(b"somebody's work")
    in_the_way = there.with_name("twin")
    in_the_way.symlink_to("/etc/passwd")
    assert outcomes(back(pair, target, stamp, dry_run=True)) == {"restored": 4, "kept": 2}
    assert {path.name for path in target.rglob("*") if not path.is_dir()} == {"twin", "changed"}
    assert outcomes(back(pair, target, stamp)) == {"restored": 4, "kept": 2}
    assert there.read_bytes() == b"somebody's work"
    assert outcomes(back(pair, target, stamp, dry_run=True, overwrite=True)) == {
        "there": 4,
        "restored": 1,
        "kept": 1,
    }
    assert there.read_bytes() == b"somebody's work"
    command = (
        "restore",
        "--dest",
        str(pair.mirror.dest),
        "--to",
        str(target),
        "--as-of",
        stamp,
        "--overwrite",
    )
    _, told, said = mdbackup(*command, "--dry-run")
    assert f"would replace a different file  {os.fsdecode(pair.path('changed'))}\n" in told
    assert "1 would replace a different file" in said
    assert outcomes(back(pair, target, stamp, overwrite=True)) == {"there": 4, "restored": 1, "kept": 1}
    assert there.read_bytes() == b"changed" and in_the_way.is_symlink()
    assert Path("/etc/passwd").read_bytes() != kept[pair.path("twin")].content


def test_deleted_files_are_restored_only_on_request(pair: Pair) -> None:
    two_runs(pair)
    with Timeline(pair.mirror) as past:
        moment = past.moment_at("9")
        assert moment is not None
        assert pair.path("gone") not in {content.path for content in past.state(moment)}
        (gone,) = [content for content in past.state(moment, gone=True) if content.path == pair.path("gone")]
        assert gone.places == [pair.path("gone")] and gone.left == moment.stamp


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["same"], ["same"]),
        (["/A/same", "/A/twin"], ["same", "twin"]),
        (["/A/flipped"], ["flipped/below"]),
        (["/A/flipped/"], ["flipped/below"]),
        (["tw*"], ["twin", "twin of changed"]),
        (["/A/*/below"], ["flipped/below"]),
        (["/A/a[1]"], ["a[1]"]),
        (["a?1?"], ["a[1]"]),
        (["/A/!neg"], ["!neg"]),
        (["nothing"], []),
        ([], ["!neg", "a[1]", "changed", "flipped/below", "same", "twin", "twin of changed"]),
    ],
)
def test_paths_and_patterns_select_files(pair: Pair, words: list[str], names: list[str]) -> None:
    """A word that is a path means exactly that path, whatever characters it contains."""
    for name in ("same", "changed", "flipped/below", "twin", "twin of changed", "a[1]", "a1", "!neg"):
        pair.put(name, name.encode())
    os.unlink(pair.path("a1"))
    pair.backup()
    wanted = Selection(word.replace("/A", str(pair.a)) for word in words)
    with Timeline(pair.mirror, wanted) as past:
        wanted.resolve(past.knows)
        moment = past.moment_at("9")
        assert moment is not None
        found = [content.path for content in past.state(moment) if wanted(content.path)]
    assert found == sorted(map(pair.path, names))


def test_holes_are_restored_as_holes(pair: Pair, tmp_path: Path) -> None:
    """From A into the mirror, into a copy of it, and from there."""
    content = b"begin" + bytes(20_000_000) + b"amid" + bytes(20_000_000)
    for name in ("image", "twin"):
        pair.put(name, content)
    pair.backup()
    back(pair, tmp_path / "target")
    for root in (pair.mirror.files, tmp_path / "target"):
        for name in ("image", "twin"):
            file = Path(f"{root}{os.fsdecode(pair.path(name))}")
            assert file.read_bytes() == content
            assert file.stat().st_blocks * 512 < 3_000_000, file


def test_existing_files_keep_time_and_mode_unless_they_may_be_overwritten(pair: Pair, tmp_path: Path) -> None:
    """Then a new file is written, so that other names of the old one are unchanged."""
    two_runs(pair)
    target = tmp_path / "target"
    back(pair, target)
    for number, file in enumerate([file for file in target.rglob("*") if file.is_file()]):
        file.chmod(0o777)
        os.utime(file, (1, 1))
        os.link(file, tmp_path / f"{number}")
    before = files_in(target)
    assert {each.outcome for each in back(pair, target)} == {RestoreOutcome.THERE}
    assert files_in(target) == before
    again = back(pair, target, overwrite=True)
    assert {(each.outcome, each.replaced) for each in again} == {(RestoreOutcome.RESTORED, True)}
    assert files_in(target) == files_of_a(pair)
    assert {(tmp_path / f"{number}").stat().st_mtime for number in range(len(before))} == {1}
    assert {each.outcome for each in back(pair, target, overwrite=True)} == {RestoreOutcome.THERE}


@pytest.mark.parametrize("lost", ["first", "last", "all"])
def test_the_present_state_needs_no_history(pair: Pair, tmp_path: Path, lost: str) -> None:
    """Missing history is reported; the index has what is there now."""
    two_runs(pair)
    pair.put("same", b"newest")
    pair.backup()
    files = commits(pair.mirror)
    for file in {"first": files[:1], "last": files[-1:], "all": files}[lost]:
        file.unlink()
    target = tmp_path / "target"
    status, _, told = mdbackup("restore", "--dest", str(pair.mirror.dest), "--to", str(target))
    assert status == 0 and "WARNING: " in told
    found = {path: file.content for path, file in files_in(target).items()}
    assert found == {path: file.content for path, file in files_of_a(pair).items()}
    if lost != "last":
        earlier = ("--to", str(target), "--as-of", "1 hour ago")
        status, _, told = mdbackup("restore", "--dest", str(pair.mirror.dest), *earlier)
        assert status == 2 and "`mdbackup rebuild`" in told
