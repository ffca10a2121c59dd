"""What a restore writes, compared with copies that were kept aside."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationFull, DestinationRefused
from airflow_mdbackup.scheme.files import folder as folder_module
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.content import copy_of
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery import restore as restore_module
from airflow_mdbackup.scheme.recovery import restore_target as target_module
from airflow_mdbackup.scheme.recovery.restore import Restored, RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.restore_target import OpenTarget, resolve_trusted
from airflow_mdbackup.scheme.recovery.selection import Selection
from tests.guarantees.crash.crash import crash_at, crashes, in_a_child
from tests.kept import Kept, files_in
from tests.pair import Pair, md5
from tests.torture import LONG, Cases, scaled

PROJECT = Path(__file__).parents[3]


def files_of_a(pair: Pair) -> dict[bytes, Kept]:
    """Return the files of A, under the paths by which the provider knows them."""
    return {os.fsencode(pair.a) + path: kept for path, kept in files_in(pair.a).items()}


class Random:
    """Somebody who works on server A."""

    NAMES = ("a", "b", "c", "d")

    def __init__(self, pair: Pair, seed: int) -> None:
        self._pair = pair
        self._choose = random.Random(seed)

    def work(self) -> None:
        for _ in range(self._choose.randint(1, 6)):
            self._choose.choice((self._write, self._write, self._write, self._remove, self._rename))()

    def _path(self) -> Path:
        return self._pair.a.joinpath(
            *(self._choose.choice(self.NAMES) for _ in range(self._choose.randint(1, 3)))
        )

    def _write(self) -> None:
        path = self._path()
        for parent in path.parents:
            if parent.is_file():
                parent.unlink()
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # New bytes each time: of a file that only gets other times or another mode, nothing is pulled.
        path.write_bytes(self._choose.randbytes(16))
        path.chmod(self._choose.choice((0o644, 0o600, 0o755, 0o444)))
        time = 1_600_000_000 + self._choose.randint(1, 10**6)
        os.utime(path, (time, time))

    def _remove(self) -> None:
        path = self._path()
        if path.is_dir():
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()

    def _rename(self) -> None:
        source, target = self._path(), self._path()
        if source.exists() and not target.exists() and not target.is_relative_to(source):
            for parent in target.parents:
                if parent.is_file():
                    return
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)


def back(pair: Pair, target: Path, stamp: str = "9", *, sound: bool = True, **options: Any) -> list[Restored]:
    """Restore everything as of a stamp.

    :param sound: whether nothing is wrong with the history.
    """
    with Timeline(pair.mirror) as past:
        assert bool(past.problems) != sound
        moment = past.moment_at(stamp)
        contents = past.state(moment) if moment is not None else iter(())
        return list(restore(pair.mirror, past, contents, target, **options))


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


def two_runs(pair: Pair) -> tuple[str, dict[bytes, Kept]]:
    """Back up twice, and return the stamp of the first run and what A had then."""
    for name in ("same", "changed", "gone", "flipped/below", "twin"):
        pair.put(name, name.encode())
    pair.put("twin of changed", b"changed")
    pair.backup()
    stamp, kept = pair.mirror.last_commit(), files_of_a(pair)
    pair.put("changed", b"newer")
    os.unlink(pair.path("gone"))
    shutil.rmtree(pair.path("flipped"))
    pair.put("flipped", b"a file")
    pair.put("new", b"new")
    pair.backup()
    return stamp, kept


def outcomes(came: list[Restored]) -> dict[str, int]:
    return dict(Counter(each.outcome.value for each in came))


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
    pair.build_index()
    run = pair.prepare()
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


# --- the commands -----------------------------------------------------------------------------------


def mdbackup(*words: str) -> tuple[int, str, str]:
    """Run a command in a process without Airflow and without the packages that only Airflow needs."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('airflow', 'pydantic', 'croniter', 'yaml', 'jinja2'))\n"
        "from airflow_mdbackup.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_restoring_nothing_makes_no_directory(pair: Pair, tmp_path: Path) -> None:
    two_runs(pair)
    target = tmp_path / "target"
    status, out, err = mdbackup("restore", "--dest", str(pair.mirror.dest), "/nowhere", "--to", str(target))
    assert (status, out, target.exists()) == (1, "", False)
    assert err.endswith("\nnothing restored\n")


def test_a_printed_name_can_be_given_again(pair: Pair, tmp_path: Path) -> None:
    """Whatever its bytes, by copy and paste into a shell; and no name has an effect on the terminal."""
    names = [b"odd\xff\n\x1b[31m", b"with 'quotes\" and\\", b"*", b"-rf", "ü".encode()]
    for name in names:
        pair.put(b"odd/" + name, name)
    pair.backup()
    dest = str(pair.mirror.dest)
    status, listed, _ = mdbackup("versions", "--dest", dest, "*")
    assert status == 0 and "\x1b" not in listed
    printed = [line for line in listed.splitlines() if not line.startswith(" ")]
    assert len(printed) == len(names)
    for number, line in enumerate(printed):
        (word,) = shlex.split(line)
        target = tmp_path / str(number)
        assert mdbackup("restore", "--dest", dest, "--to", str(target), "--", word)[0] == 0
        assert len(files_in(target)) == 1


def test_commands_print_history_and_restore_as_of_a_printed_time(pair: Pair, tmp_path: Path) -> None:
    stamp, kept = two_runs(pair)
    dest = str(pair.mirror.dest)
    status, runs, _ = mdbackup("log", "--dest", dest)
    assert status == 0 and "manual__1  6 added" in runs and "manual__2" in runs
    (first, _) = [
        json.loads(line) for line in mdbackup("log", "--dest", dest, "--format", "json")[1].splitlines()
    ]
    assert first["stamp"] == stamp and first["changes"] == {"added": 6}
    status, changes, _ = mdbackup("history", "--dest", dest, os.fsdecode(pair.path("changed")))
    assert status == 0 and [line.split()[3] for line in changes.splitlines()] == ["added", "replaced"]
    target = tmp_path / "target"
    command = ("restore", "--dest", dest, "--to", str(target))
    status, out, told = mdbackup(
        "restore", "--dest", dest, "--to", str(target), "--as-of", stamp, "--format", "json"
    )
    assert status == 0 and {json.loads(line)["came"] for line in out.splitlines()} == {"restored"}
    assert files_in(target) == kept
    pair.live("same").unlink()
    shutil.rmtree(target)
    status, out, told = mdbackup(*command)
    assert status == 1 and "lost" in out and "same" in out and "1 lost" in told
    assert mdbackup(*command, "--as-of", "1990-01-01")[0] == 2
    assert mdbackup(*command, "--jobs", "0")[0] == 2
    assert mdbackup("restore", "--dest", dest, "--to", "")[0] == 2
    assert "is a file: name a directory" in mdbackup("restore", "--dest", dest, "--to", "/etc/hostname")[2]
    assert mdbackup("restore", "--dest", str(tmp_path), "--to", str(target))[0] == 2
    assert mdbackup("versions", "--dest", dest, "nothing")[0] == 1


def test_paths_may_stand_before_and_behind_options_and_each_must_be_known(pair: Pair, tmp_path: Path) -> None:
    """A mistyped path is reported even if another one is right."""
    two_runs(pair)
    same, twin, gone = (os.fsdecode(pair.path(name)) for name in ("same", "twin", "gone"))
    command = ("restore", same, "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "target"))
    status, _, told = mdbackup(*command, twin)
    assert status == 0 and "2 restored" in told
    status, _, told = mdbackup(*command, twin, gone, "/nowhere")
    assert status == 1 and "2 there" in told
    assert f"nothing under {gone!r} at that time; --include-gone" in told
    assert "Nothing was ever backed up under '/nowhere'" in told
    for name in ("versions", "history", "verify"):
        status, _, told = mdbackup(name, same, "--dest", str(pair.mirror.dest), "/nowhere")
        assert status == 1 and "under '/nowhere'" in told
    assert mdbackup(*command, "--mistyped")[0] == 2


def test_the_packages_that_the_page_installs_are_enough_for_all_of_a_backup(
    pair: Pair, tmp_path: Path
) -> None:
    """With all their options, where Airflow and its packages cannot be imported."""
    two_runs(pair)
    page = (PROJECT / "docs" / "restore.md").read_text()
    (packages,) = re.findall(r"^rescue/bin/pip install (\w.*)$", page, re.MULTILINE)
    # What they bring, and names of modules that are not the packages'.
    named = {*packages.split(), "airflow_mdbackup", "dateutil", "six", "markdown_it", "mdurl", "pygments"}
    code = (
        "import json, sys\n"
        "class Rescue:\n"
        "    def find_spec(self, name, *rest):\n"
        "        module = name.partition('.')[0].partition('data__')[0]  # _sysconfigdata__...\n"
        f"        if module not in sys.stdlib_module_names | {{'_sysconfig', *{named!r}}}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Rescue())\n"
        "from airflow_mdbackup.cli.main import main\n"
        "statuses = [main(words) for words in json.load(sys.stdin)]\n"
        "print('statuses', *statuses)\n"
    )
    backup, changed = ("--dest", str(pair.mirror.dest)), os.fsdecode(pair.path("changed"))
    enough = [
        ["log", *backup],
        ["history", *backup, "*"],
        ["versions", *backup, "*"],
        ["diff", *backup, changed, "--to", "now"],
        ["restore", *backup, "--to", str(tmp_path / "all"), "--as-of", "now", "--jobs", "8"],
        ["verify", *backup, "--fraction", "1/30", "--limit", "50MB"],
        ["verify", *backup, "--bytes", "50GB", "--repair", "--missing"],
        ["rebuild", *backup, "--dry-run"],
        ["prune", *backup, "--keep-within", "90d", "--keep-last", "2", "--yes"],
        ["forget", *backup, changed],
    ]
    more = [["restore", "web", "--to", str(tmp_path / "web")], ["status", "web"], ["plan", "web"]]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([*enough, *more]),
        capture_output=True,
        text=True,
    )
    expected = [0] * len(enough) + [2] * len(more)
    assert done.stdout.splitlines()[-1:] == [" ".join(["statuses", *map(str, expected)])], done.stderr
    first, *others = done.stderr.splitlines()[-len(more) :]
    assert "is not installed here: run this in Airflow's environment" in first
    assert first.endswith("name the backup itself: --dest DIR")
    assert all("is not installed here" in line and "--dest" not in line for line in others)


@pytest.mark.parametrize(
    "command", [["log"], ["history"], ["versions", "*"], ["verify"], ["restore", "--to"]]
)
@pytest.mark.parametrize(
    "header", ['{"format":9}', '{"format":1}', '{"format":1,"stamp":"x","run_id":"r"}', None]
)
def test_no_odd_history_is_an_error_of_the_program(
    pair: Pair, tmp_path: Path, command: list[str], header: str | None
) -> None:
    """A newer format, a header that lacks something, no directory at all."""
    two_runs(pair)
    if header is None:
        shutil.rmtree(pair.mirror.history)
    else:
        file = commits(pair.mirror)[0]
        file.write_text("\n".join([header, *file.read_text().splitlines()[1:]]) + "\n")
    words = [*command, str(tmp_path / "target")] if command[-1] == "--to" else command
    status, _, told = mdbackup(words[0], "--dest", str(pair.mirror.dest), *words[1:])
    assert status in (0, 1, 2) and "Traceback" not in told


@pytest.mark.parametrize(
    "words",
    [
        ["restore", "", "--to", "T"],
        ["forget", ""],
        ["verify", ""],
        ["versions", "a\\"],
        ["verify", "--jobs", "0"],
    ],
)
def test_what_cannot_be_meant_is_refused(pair: Pair, tmp_path: Path, words: list[str]) -> None:
    """Such as an empty path, from a variable that is not set."""
    two_runs(pair)
    words = [str(tmp_path / "target") if word == "T" else word for word in words]
    index = pair.mirror.index.read_bytes()
    assert mdbackup(*words, "--dest", str(pair.mirror.dest))[0] == 2
    assert pair.mirror.index.read_bytes() == index and not (tmp_path / "target").exists()


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


def test_a_run_whose_id_looks_like_a_time_is_not_guessed(pair: Pair, tmp_path: Path) -> None:
    """It is not clear which one is meant, so both are named."""
    for run_id, content in (("2026-11-30", b"1"), ("now", b"2"), ("other", b"3")):
        pair.put("file", content)
        pair.build_index()
        run = pair.mirror.run(run_id)
        pair.fetch(run)
        pair.plan = pair.diff(run)
        pair.pull(run, pair.plan)
        pair.finish(run)
    stamp = commits(pair.mirror)[1].name[:23]
    command = ("restore", "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "target"), "--as-of")
    for word in ("2026-11-30", "now"):
        status, _, told = mdbackup(*command, word)
        assert status == 2 and f"'{word}' is both a time and the id of a run" in told
    assert stamp in told
    assert mdbackup(*command, stamp)[0] == 0
    assert (tmp_path / "target" / os.fsdecode(pair.path("file"))[1:]).read_bytes() == b"2"


def test_overwriting_is_not_suggested_where_it_would_not_help(pair: Pair, tmp_path: Path) -> None:
    """What is in the way is named; --overwrite is suggested where it helps."""
    pair.put("file", b"1")
    pair.backup()
    there = tmp_path / "target" / os.fsdecode(pair.path("file"))[1:]
    there.mkdir(parents=True)
    command = ("restore", "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "target"))
    status, out, told = mdbackup(*command)
    assert (
        status == 1 and "a directory with this name exists: move it away" in out and "--overwrite" not in told
    )
    there.rmdir()
    there.symlink_to("elsewhere")
    assert "a symlink with this name exists: move it away" in mdbackup(*command)[1]
    there.unlink()
    there.write_bytes(b"2")
    assert "--overwrite replaces different files" in mdbackup(*command)[2]


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


def test_each_key_that_programs_get_is_explained(pair: Pair, tmp_path: Path) -> None:
    """And each line is one object."""
    two_runs(pair)
    pair.live("same").write_bytes(b"other")
    backup = ("--dest", str(pair.mirror.dest), "--format", "json")
    page = (PROJECT / "docs" / "cli.md").read_text()
    for command, *words in (
        ("log",),
        ("history",),
        ("versions", "*"),
        ("restore", "--to", str(tmp_path / "target")),
        ("verify", "--repair"),
        ("forget", os.fsdecode(pair.path("twin"))),
        ("prune", "--keep-last", "1", "--yes"),
        ("rebuild",),
    ):
        (row,) = re.findall(rf"^\| `{command}` \| (`.*) \|$", page, re.MULTILINE)
        explained = set(re.findall(r"`(\w+)`", row))
        if command == "rebuild":
            commits(pair.mirror)[-1].unlink()
        _, told, _ = mdbackup(command, *words, *backup)
        objects = [json.loads(line) for line in told.splitlines()]
        keys = {key for each in objects for key in each}
        assert keys and keys <= explained, (command, keys - explained)
