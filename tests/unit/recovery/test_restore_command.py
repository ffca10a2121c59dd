"""The commands that restore: what they take, print and refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.history.changes import commits
from tests.kept import files_in
from tests.pair import Pair
from tests.unit.recovery.somebody import mdbackup, two_runs

PROJECT = Path(__file__).parents[3]


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
