"""A restore that is killed at any step, or that meets a commit that is cut off."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.files import folder as folder_module
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.recovery import restore_target as target_module
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome
from airflow_mdbackup.scheme.recovery.restore_target import OpenTarget, resolve_trusted
from tests.guarantees.crash.crash import crash_at, crashes
from tests.kept import files_in
from tests.pair import Pair
from tests.torture import Cases
from tests.unit.recovery.somebody import back, files_of_a, two_runs


@pytest.mark.guarantee("11. Getting it back")
def test_restore_works_while_a_commit_is_cut_off_at_any_step(
    pair: Pair, cases: Cases, tmp_path: Path
) -> None:
    """What that commit displaced is found where it went; no repair of the backup is needed first."""
    stamp, kept = two_runs(pair)
    after = files_of_a(pair)
    pair.put("changed", b"newest")
    pair.put("flipped", b"another file")
    shutil.rmtree(os.path.dirname(pair.path("x/y")), ignore_errors=True)
    os.unlink(pair.path("new"))
    pair.put("new/is a directory", b"now")
    run = pair.begin()
    target = tmp_path / "target"
    for _ in crashes(pair, lambda: pair.finish(pair.mirror.run(run.run_id))):
        if len(commits(pair.mirror)) == 2:
            with cases.one():
                back(pair, target)
                assert files_in(target) == after
            shutil.rmtree(target)
        with cases.one():
            back(pair, target, stamp)
            assert files_in(target) == kept
        shutil.rmtree(target)


@pytest.mark.guarantee("11. Getting it back")
def test_a_restore_that_is_killed_at_any_step_resumes(pair: Pair, cases: Cases, tmp_path: Path) -> None:
    """Files with their final names are complete; the same command does the rest, and leaves nothing else."""
    two_runs(pair)
    for number in count(1):
        target = tmp_path / str(number)
        with cases.one():
            killed = crash_at(number, partial(back, pair, target, threads=1))
            found = {path: file for path, file in files_in(target).items() if b"/.mdbackup-" not in path}
            assert found.items() <= files_of_a(pair).items()
            came = back(pair, target)
            assert {each.outcome for each in came} <= {RestoreOutcome.RESTORED, RestoreOutcome.THERE}
            assert sum(each.outcome == RestoreOutcome.THERE for each in came) == len(found)
            assert files_in(target) == files_of_a(pair)
        if not killed:
            break


@pytest.fixture
def placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that cannot rename only where a name is free, as NFS and many of FUSE."""
    for module in (folder_module, syscalls_module):
        monkeypatch.setattr(module, "rename_if_free", lambda *names: False)


@pytest.mark.guarantee("11. Getting it back")
def test_a_restore_that_is_killed_where_names_take_placeholders_resumes(
    pair: Pair, cases: Cases, tmp_path: Path, placeholders: None
) -> None:
    """The placeholder that the kill leaves is not mistaken for somebody's file."""
    two_runs(pair)
    pair.put("empty")
    pair.put("odd\nname", b"odd")
    pair.backup()
    left = 0
    for number in count(1):
        target = tmp_path / str(number)
        with cases.one():
            killed = crash_at(number, partial(back, pair, target, threads=1))
            found = {path: file for path, file in files_in(target).items() if b"/.mdbackup-" not in path}
            left += len(found.items() - files_of_a(pair).items())
            assert {each.outcome for each in back(pair, target)} <= {
                RestoreOutcome.RESTORED,
                RestoreOutcome.THERE,
            }
            assert files_in(target) == files_of_a(pair)
        if not killed:
            break
    assert left, "no kill left a placeholder"


@pytest.mark.usefixtures("placeholders")
def test_a_placeholder_is_removed_later_if_renaming_fails_and_so_does_removing_it(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a disk is away for a short time."""
    two_runs(pair)
    with monkeypatch.context() as patched:

        def refuse(*names: object, **options: object) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

        patched.setattr(os, "rename", refuse)
        patched.setattr(syscalls_module, "_PLACEHOLDERS", {False: (syscalls_module._make_file, refuse)})
        with pytest.raises(OSError, match="not connected"):
            back(pair, tmp_path / "target")
    assert not files_in(tmp_path / "target")
    back(pair, tmp_path / "target")
    assert files_in(tmp_path / "target") == files_of_a(pair)


@pytest.mark.usefixtures("placeholders")
def test_only_placeholders_are_removed_as_such(pair: Pair, tmp_path: Path) -> None:
    """Not a file with content or another mode, nor one whose name was cut off in the note."""
    two_runs(pair)
    work = tmp_path / ".mdbackup-restoring"
    work.mkdir(mode=0o700)
    (work / "naming").write_bytes(b"/held\0/bytes\0/mode\0/directory\0/not/there\0\0/cut off")
    (work / "7").write_bytes(b"not named")
    (tmp_path / "directory").mkdir()
    for name, content, mode in (("held", b"", 0o600), ("bytes", b"1", 0o600), ("mode", b"", 0o640)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(mode)
    (tmp_path / "cut off").touch(mode=0o600)
    (work / "naming").chmod(0o600)
    with OpenTarget(resolve_trusted(tmp_path)) as target:
        assert os.listdir(target.work.descriptor) == []
    assert {path.name for path in tmp_path.iterdir()} >= {"bytes", "mode", "directory", "cut off"}
    assert not (tmp_path / "held").exists() and not work.exists()


def test_nothing_is_noted_where_names_take_no_placeholders(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(pair)
    noted: list[bytes] = []
    monkeypatch.setattr(target_module, "write_all", lambda descriptor, data: noted.append(data))
    back(pair, tmp_path / "target")
    assert files_in(tmp_path / "target") == files_of_a(pair) and not noted
