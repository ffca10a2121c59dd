"""Standard output that is full, broken or closed: told as that, and what changes things comes to its end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import COMMANDS
from airflow_mdbackup.scheme.backup.plan import Limits
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PruneOutcome, pruning
from airflow_mdbackup.scheme.recovery.selection import Selection
from tests.pair import Pair
from tests.unit.recovery.damage import rot

FULL = "standard output cannot be written: No space left on device"
MANY = 3000  # paths whose listing is more than a pipe holds


def mdbackup(pair: Pair, words: str, redirected: str) -> tuple[int, str]:
    """Run a command of a backup in a shell, and return its exit status and what it told on standard error."""
    command, _, more = words.partition(" ")
    line = (
        f"exec {shlex.quote(sys.executable)} -m airflow_mdbackup {command} --dest {pair.mirror.dest} {more}"
    )
    done = subprocess.run(["sh", "-c", f"{line} {redirected}"], stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr


def with_versions(pair: Pair) -> None:
    for number in range(3):
        for name in ("a", "b"):
            pair.put(name, b"%d" % number)
        pair.backup()


def versions_to_prune(pair: Pair) -> int:
    with pruning(pair.mirror, Selection(), KeepRules(last=1), carry_out=False) as (_, versions):
        return sum(version.outcome == PruneOutcome.GOES for version in versions)


@pytest.mark.parametrize(
    "words", ["versions /", "history /", "log", "prune --keep-last 1", "restore --to {new} --dry-run"]
)
def test_full_disk_under_the_output_of_what_only_reads_is_told_as_that(
    pair: Pair, tmp_path: Path, words: str
) -> None:
    with_versions(pair)
    before = versions_to_prune(pair)
    words += " --format json" * words.startswith(("prune", "restore"))
    status, told = mdbackup(pair, words.format(new=tmp_path / "new"), ">/dev/full")
    assert status == 5 and told.splitlines()[-1].endswith(f"{FULL}; its output is incomplete")
    assert "Traceback" not in told and str(pair.mirror.dest) not in told.splitlines()[-1]
    assert versions_to_prune(pair) == before > 0


@pytest.mark.parametrize("redirected", [">/dev/full", ">&-", "2>/dev/full", ">&- 2>&-", ">/dev/full 2>&1"])
def test_prune_comes_to_its_end_whatever_its_output_does(pair: Pair, redirected: str) -> None:
    with_versions(pair)
    status, told = mdbackup(pair, "prune --keep-last 1 --yes", redirected)
    assert status == 5
    assert versions_to_prune(pair) == 0
    with Timeline(pair.mirror) as past:
        assert sum(bool(content.pruned) for content in past.contents()) == 2
    if "2>" not in redirected:
        assert "2 versions of 2 paths pruned" in told
        assert "standard output cannot be written" in told and "ran to its end" in told
        assert "no room" not in told


def test_each_change_is_summed_up_where_it_can_be_read(pair: Pair, tmp_path: Path) -> None:
    """On standard error, when standard output is full."""
    with_versions(pair)
    rot(pair.live("a"))
    status, told = mdbackup(pair, "verify --repair", ">/dev/full")
    assert status == 5 and "1 entry has left the index" in told and FULL in told
    status, told = mdbackup(pair, f"forget {os.fsdecode(pair.path('b'))}", ">/dev/full")
    assert status == 5 and "1 entry removed from the index" in told and FULL in told
    pair.backup()
    status, told = mdbackup(pair, f"restore --to {tmp_path}/new --format json", ">/dev/full")
    assert status == 5 and "2 restored" in told and FULL in told
    assert (tmp_path / "new" / os.fsdecode(pair.path("b"))[1:]).read_bytes() == b"2"
    os.unlink(sorted((pair.mirror.dest / ".mdbackup" / "history").glob("*.jsonl"))[1])
    status, told = mdbackup(pair, "rebuild", ">/dev/full")
    assert status == 5 and "History was rebuilt" in told and FULL in told


def test_missing_files_that_are_let_go_are_counted_where_it_can_be_read(pair: Pair) -> None:
    with_versions(pair)
    with Timeline(pair.mirror) as past:
        place = next(content.places[0] for content in past.contents() if content.until)
    os.unlink(os.fsencode(pair.mirror.files) + place)
    status, told = mdbackup(pair, "verify --let-go", ">/dev/full")
    assert status == 5 and "1 missing file acknowledged" in told


def test_what_was_not_done_keeps_its_exit_status(pair: Pair, tmp_path: Path) -> None:
    with_versions(pair)
    assert mdbackup(pair, "prune --yes", ">/dev/full")[0] == 2
    (tmp_path / "none").mkdir()
    assert mdbackup(pair, f"forget --dest {tmp_path}/none x", ">/dev/full")[0] == 2
    assert mdbackup(pair, "prune --yes", "2>/dev/full")[0] == 2


def test_the_sum_comes_behind_the_list_also_in_a_file(pair: Pair, tmp_path: Path) -> None:
    """Where both outputs go to one."""
    with_versions(pair)
    mdbackup(pair, "prune --keep-last 1", f">{tmp_path}/both 2>&1")
    *listed, summed, _ = (tmp_path / "both").read_text().splitlines()
    assert len(listed) == 2 and "2 versions of 2 paths would be pruned" in summed


def test_help_on_a_full_disk_is_told_too() -> None:
    for words in ("--help", "prune --help", "--version"):
        line = f"exec {shlex.quote(sys.executable)} -m airflow_mdbackup {words} >/dev/full"
        done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (5, f"mdbackup: {FULL}; its output is incomplete\n")


@pytest.mark.parametrize("words", ["versions '*'", "history", "forget '*'", "prune --keep-last 1 --yes"])
def test_reader_that_has_seen_enough_is_no_error(pair: Pair, words: str) -> None:
    """What only reads ends, as by SIGPIPE; what changes things goes on. Neither says a word of it."""
    for content in (b"1", b"2", b"3"):
        for number in range(MANY):
            pair.put(f"{'long name' * 10}{number}", content)
        pair.backup(limits=Limits(share=1.0))
    changes = words.startswith(("forget", "prune"))
    status, told = piped(pair, words)
    assert status == (0 if changes else 141)
    summaries = ("entries removed from the index", "paths pruned")
    assert [line for line in told if not any(part in line for part in summaries)] == []
    assert len(told) == changes


def piped(pair: Pair, words: str) -> tuple[int, list[str]]:
    """Run a command into a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    command, *more = shlex.split(words)
    program = [sys.executable, "-m", "airflow_mdbackup", command, "--dest", str(pair.mirror.dest), *more]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(write)
    return done.returncode, done.stderr.splitlines()


def test_a_broken_pipe_of_something_else_is_not_taken_for_that_of_the_output(tmp_path: Path) -> None:
    """Such as that of the ssh program."""
    code = (
        "import sys, types; from airflow_mdbackup.cli import main as commands\n"
        "def run(arguments): raise BrokenPipeError(32, 'Broken pipe')\n"
        "sys.modules['broken'] = types.SimpleNamespace(run=run)\n"
        "sys.exit(commands.run(commands.Command('try', '', '', (), (), 'broken.run'), None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4 and "BrokenPipeError" in done.stderr


def test_output_that_somebody_made_non_blocking_is_waited_for(pair: Pair) -> None:
    """As a terminal that is shared with another program; it is no error of a disk."""
    for number in range(MANY):
        pair.put(f"{'long name' * 10}{number}", b"1")
    pair.backup()
    read, write = os.pipe()
    os.set_blocking(write, False)
    program = [sys.executable, "-m", "airflow_mdbackup", "versions", "--dest", str(pair.mirror.dest), "*"]
    with subprocess.Popen([*program, "--format", "json"], stdout=write) as process, open(read) as output:
        os.close(write)
        assert sum(1 for line in output if json.loads(line)["file"]) == MANY
    assert process.returncode == 0


def test_each_command_that_changes_something_goes_on_without_output() -> None:
    """And no dry run does."""
    asked = Namespace(
        dry_run=False, yes=True, repair=True, acknowledge_missing=False, set=None, unset="a run"
    )
    looks = Namespace(dry_run=True, yes=False, repair=False, acknowledge_missing=False, set=None, unset=None)
    always = {"init", "test-alert", "forget"}
    changing = {command.name for command in COMMANDS if command.changes(asked)}
    assert changing == always | {"adopt", "import", "restore", "rebuild", "verify", "prune", "clock"}
    assert {command.name for command in COMMANDS if command.changes(looks)} == always
