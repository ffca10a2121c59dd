"""Where a restore may write, and what it does to what is there."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationFull, DestinationRefused
from airflow_mdbackup.scheme.files.content import copy_of
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery import restore as restore_module
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.restore_target import OpenTarget, resolve_trusted
from tests.guarantees.crash.crash import in_a_child
from tests.kept import files_in
from tests.pair import Pair, md5
from tests.unit.recovery.somebody import back, files_of_a, mdbackup, two_runs


def test_no_symlink_in_the_target_is_followed(pair: Pair, tmp_path: Path) -> None:
    two_runs(pair)
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / os.fsdecode(pair.path("x")).split("/")[1]).symlink_to(outside)
    came = back(pair, target)
    assert {each.outcome for each in came} == {RestoreOutcome.KEPT} and "is a symlink in the target" in came[
        0
    ].detail
    assert not any(outside.iterdir())


def test_a_target_within_the_backup_is_refused(pair: Pair) -> None:
    two_runs(pair)
    with pytest.raises(DestinationRefused, match="is within the backup"):
        back(pair, pair.mirror.files / "x")


def test_restoring_nothing_makes_no_directory(pair: Pair, tmp_path: Path) -> None:
    two_runs(pair)
    target = tmp_path / "target"
    status, out, err = mdbackup("restore", "--dest", str(pair.mirror.dest), "/nowhere", "--to", str(target))
    assert (status, out, target.exists()) == (1, "", False)
    assert err.endswith("\nnothing restored\n")


def test_a_target_above_the_backup_is_refused(pair: Pair) -> None:
    """A path of the provider's could lead back into it."""
    two_runs(pair)
    with pytest.raises(DestinationRefused, match="is above the backup"):
        back(pair, pair.mirror.dest.parent, overwrite=True)


def test_a_file_with_the_name_of_the_work_directory_is_not_restored(pair: Pair, tmp_path: Path) -> None:
    """Neither restored nor existing files may have it; and one restore at a time writes to a target."""
    two_runs(pair)
    target = tmp_path / "target"
    mine = target / ".mdbackup-restoring" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"somebody's")
    with pytest.raises(DestinationRefused, match="is not ours alone: move it away"):
        back(pair, target)
    assert mine.read_bytes() == b"somebody's"
    mine.unlink()
    mine.parent.rmdir()
    reserved = FileVersion(b"/.mdbackup-restoring/x", md5(b"same"), places=[pair.path("same")])
    many = [FileVersion(b"/%d" % number, md5(b"same"), places=[pair.path("same")]) for number in range(100)]
    with Timeline(pair.mirror) as past:
        coming = restore(pair.mirror, past, [reserved, *many], target, threads=1)
        assert next(coming).outcome == RestoreOutcome.FAILED
        with pytest.raises(DestinationBusy):
            next(restore(pair.mirror, past, many, target))
        assert {each.outcome for each in coming} == {RestoreOutcome.RESTORED}
    assert len(list(target.iterdir())) == 100


@pytest.mark.parametrize("kind", ["symlink", "file", "open to others", "of somebody else"])
def test_a_work_directory_that_is_not_ours_alone_is_refused(pair: Pair, tmp_path: Path, kind: str) -> None:
    """As if whoever owns the target had put it there, and waited for root to write to it."""
    two_runs(pair)
    elsewhere, work = tmp_path / "elsewhere", tmp_path / "target" / ".mdbackup-restoring"
    elsewhere.mkdir(mode=0o700)
    work.parent.mkdir()
    if kind == "symlink":
        work.symlink_to(elsewhere)
    elif kind == "file":
        work.touch()
    else:
        work.mkdir(mode=0o700)
        work.chmod(0o755 if kind == "open to others" else 0o700)
    if kind == "of somebody else":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(work, 54321, 54321)
    with pytest.raises(DestinationRefused, match="is not ours alone: move it away"):
        back(pair, work.parent)
    assert os.listdir(work.parent) == [work.name] and not os.listdir(elsewhere)


@pytest.mark.parametrize("swapped", ["", ".mdbackup-restoring"], ids=["the target", "where restoring works"])
def test_nothing_is_written_into_what_replaces_a_directory_meanwhile(
    pair: Pair, tmp_path: Path, swapped: str
) -> None:
    """Whoever owns the target, or what lies above it, may rename it; root must not follow."""
    two_runs(pair)
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "home" / "target"
    elsewhere.mkdir()
    with Timeline(pair.mirror) as past:
        moment = past.moment_at("9")
        assert moment is not None

        def contents() -> Iterator[FileVersion]:
            os.rename(target / swapped, tmp_path / "aside")
            (target / swapped).symlink_to(elsewhere)
            yield from past.state(moment)

        came = Counter(
            each.outcome for each in restore(pair.mirror, past, contents(), target, overwrite=True)
        )
    assert set(came) == {RestoreOutcome.RESTORED} and not os.listdir(elsewhere)
    real = (target if swapped else tmp_path / "aside") / os.fsdecode(pair.path("same"))[1:]
    assert real.read_bytes() == Path(os.fsdecode(pair.path("same"))).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a symlink away")
@pytest.mark.parametrize("below", ["", "further/down"])
def test_another_users_symlink_on_the_way_to_the_target_is_refused(
    pair: Pair, tmp_path: Path, below: str
) -> None:
    """It leads wherever its owner wants. One of our own is followed."""
    two_runs(pair)
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    elsewhere.mkdir()
    link.symlink_to("elsewhere")
    os.lchown(link, 54321, 54321)
    with pytest.raises(DestinationRefused, match="is a symlink of another user"):
        back(pair, link / below)
    assert not os.listdir(elsewhere)
    os.lchown(link, 0, 0)
    back(pair, link / below)
    assert os.listdir(elsewhere)


def test_a_directory_on_the_way_to_the_target_need_not_be_readable(pair: Pair, tmp_path: Path) -> None:
    """As /home often is not."""
    two_runs(pair)
    home = tmp_path / "home"
    (home / "ours").mkdir(parents=True)
    home.chmod(0o711)

    def restored() -> None:
        if os.geteuid() == 0:
            os.chown(home / "ours", 65534, 65534)
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        with OpenTarget(resolve_trusted(home / "ours" / "target")) as target:
            os.close(os.open("1", os.O_WRONLY | os.O_CREAT, dir_fd=target.work.descriptor))

    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 3:
            folder.chmod(folder.stat().st_mode | 0o011)
    in_a_child(restored)


def test_all_names_of_a_restore_are_on_the_disk_when_it_ends(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(pair)
    steps: list[str] = []
    sync, put_new = Folder.sync, Tree.put_new

    def noted_sync(folder: Folder) -> None:
        steps.append("sync")
        sync(folder)

    def noted_put(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
        steps.append("name")
        put_new(tree, source, file, path)

    monkeypatch.setattr(Folder, "sync", noted_sync)
    monkeypatch.setattr(Tree, "put_new", noted_put)
    back(pair, tmp_path / "target")
    assert steps[0] == steps[-1] == "sync" and set(steps[1:-1]) == {"name"}


def test_a_new_target_is_closed_to_others(pair: Pair, tmp_path: Path) -> None:
    """A file that everybody may read may have been in a directory that only its owner could enter."""
    two_runs(pair)
    back(pair, tmp_path / "new" / "target")
    assert stat.S_IMODE((tmp_path / "new" / "target").stat().st_mode) == 0o700
    (tmp_path / "there").mkdir(mode=0o755)
    back(pair, tmp_path / "there")
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_target_of_another_user_is_warned_about(pair: Pair, tmp_path: Path) -> None:
    two_runs(pair)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 54321, 54321)
    command = ("restore", "--dest", str(pair.mirror.dest), "--to")
    status, _, told = mdbackup(*command, str(home / "target"))
    assert status == 0 and f"{home} belongs to the user 54321, who can replace everything" in told
    assert "belongs to" not in mdbackup(*command, str(tmp_path / "ours"))[2]
    assert f"{home / 'there'} belongs" not in mdbackup(*command, str(home))[2]
    (tmp_path / "open").mkdir()
    for mode, warned in (
        (0o777, "writable by everybody"),
        (0o775, "by the group"),
        (0o1777, None),
        (0o755, None),
    ):
        (tmp_path / "open").chmod(mode)
        told = mdbackup(*command, str(tmp_path / "open"))[2]
        assert (f"{warned}" in told) is (warned is not None) and ("WARNING" in told) is (warned is not None)


@pytest.mark.parametrize("target", ["file/below", "/proc/here", "x" * 300])
def test_a_target_that_cannot_be_created_is_a_usage_error(pair: Pair, tmp_path: Path, target: str) -> None:
    pair.put("file", b"1")
    pair.backup()
    (tmp_path / "file").touch()
    to = str(tmp_path / target)
    status, _, told = mdbackup("restore", "--dest", str(pair.mirror.dest), "--to", to)
    assert status == 2 and "choose another" in told.lower() and "stopped" not in told


def test_a_full_target_is_named_and_keeps_what_was_restored(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(pair)
    target = tmp_path / "target"
    with monkeypatch.context() as patched:
        patched.setattr(restore_module, "_BATCH", 1)
        patched.setattr(restore_module, "copy_of", full_after(2))
        with pytest.raises(DestinationFull) as told:
            back(pair, target)
    assert f"the disk of {target} is full" in str(told.value) and os.fsdecode(pair.path("")) in str(
        told.value
    )
    assert len(files_in(target)) == 2
    assert Counter(each.outcome for each in back(pair, target))[RestoreOutcome.THERE] == 2
    assert files_in(target) == files_of_a(pair)


def full_after(files: int) -> Callable[[int, int], bytes]:
    """Return a copier for which there is room for so many files."""
    left = iter(range(files))

    def copy(source: int, target: int) -> bytes:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy_of(source, target)

    return copy
