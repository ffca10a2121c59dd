"""How the indexers are started, and how their answers are read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from airflow_mdbackup.provider_side.programs import NO_PYTHON, python_command, python_input, shell_command
from airflow_mdbackup.provider_side.report import (
    Done,
    Failed,
    Joined,
    Note,
    Progress,
    Ready,
    Rotten,
    Unreadable,
    Waiting,
    parse_report,
)
from airflow_mdbackup.provider_side.request import IndexRequest
from tests.unit.provider_side.indexing import (
    md5,
    read_index,
    wanted,
    write,
)


def test_commands_mean_the_same_to_every_login_shell():
    """Nothing in them is special within single quotes to sh, csh or fish, and there is one such pair."""
    for command in (python_command(), shell_command()):
        assert not set(command) & set("!\\\n$`")
        assert command.count("'") in (0, 2)


@pytest.mark.parametrize("shell", ["dash", "bash", "csh", "fish"])
def test_python_command_runs_in_a_login_shell(chroot, shell, programs):
    """The account may have any of them, and they quote differently."""
    program = shutil.which(shell)
    assert program is not None, f"{shell} is missing: make system-packages"
    write(chroot + b"/backups/file")
    done = subprocess.run(
        [program, "-c", python_command()],
        input=python_input(wanted(chroot)),
        env={"PATH": programs["python"], "HOME": "/"},
        capture_output=True,
    )
    assert done.returncode == 0
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"content")}


def test_python_command_without_python_ends_with_the_status_to_fall_back(tmp_path):
    """Neither a missing python3 nor one older than 3.6 is mistaken for a failed build."""
    request = wanted(os.fsencode(tmp_path))
    for shell in filter(None, map(shutil.which, ["sh", "csh", "fish"])):
        missing = subprocess.run(
            [shell, "-c", python_command()],
            env={"PATH": str(tmp_path), "HOME": "/"},
            capture_output=True,
        )
        assert missing.returncode == NO_PYTHON
    old = tmp_path / "python3"
    pretend = "import sys; sys.version_info = (3, 5, 9); exec(sys.argv[1])"
    old.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -c ]; do shift; done\nexec {sys.executable} -c \'{pretend}\' "$2"\n'
    )
    old.chmod(0o755)
    too_old = subprocess.run(
        ["/bin/sh", "-c", python_command()],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        input=python_input(request),
        capture_output=True,
    )
    assert too_old.returncode == NO_PYTHON


def test_modules_in_the_home_of_the_index_account_are_not_imported(chroot, tmp_path, python_program):
    """A json.py that lies there for some other purpose does not become part of the indexer."""
    (tmp_path / "json.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        ["/bin/sh", "-c", python_command()],
        input=python_input(wanted(chroot)),
        env={"PATH": python_program.path, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("path", [b"relative", b"", b"/nul\0"])
def test_request_of_an_impossible_path_is_refused(path):
    """Such a path can be neither sent nor meant."""
    for chroot, source, index in [(path, b"/a", b"/i"), (b"/", path, b"/i"), (b"/", b"/a", path)]:
        with pytest.raises(ValueError, match="absolute path"):
            IndexRequest(chroot, (source,), index)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mdbackup progress files=1 bytes=22 hashed=3 seconds=5", Progress(1, 22, 3, 5.0)),
        ("mdbackup unreadable /a: b\\x0a\\\\: does not exist", Unreadable(b"/a: b\n\\", "does not exist")),
        (
            "mdbackup done files=1 bytes=2 hashed=3 unreadable=4 rotten=5 seconds=6.7",
            Done(1, 2, 3, 4, 5, 6.7),
        ),
        ("mdbackup rotten /a: b\\x0a\\\\", Rotten(b"/a: b\n\\")),
        ("mdbackup ready program", Ready(program=True)),
        ("mdbackup ready request", Ready(program=False)),
        ("mdbackup waiting for x", Waiting("for x")),
        ("mdbackup joined y", Joined("y")),
        ("mdbackup note z", Note("z")),
        ("mdbackup error no room: try later", Failed("no room: try later")),
        ("Welcome to the provider", None),
        ("", None),
        ("mdbackup done files=1 bytes=2 hashed=3 unreadable=4 rotten=5 seconds=6.7\n", None),
        ("mdbackup ready", None),
        ("mdbackup ready nothing", None),
        ("mdbackup rotten relative", None),
        ("mdbackup note \x1b[31m", None),
        (" mdbackup progress files=1 bytes=22 hashed=3 seconds=5", None),
        ("mdbackup progress files=-1 bytes=22 hashed=3 seconds=5", None),
        ("mdbackup progress files=\u0661 bytes=22 hashed=3 seconds=5", None),
        ("mdbackup progress files=" + "9" * 20 + " bytes=22 hashed=3 seconds=5", None),
        ("mdbackup unreadable relative: reason", None),
        ("mdbackup unreadable /a\\q: reason", None),
        ("mdbackup error \x1b[31m", None),
        ("mdbackup error ", None),
    ],
)
def test_parse_report_reads_exactly_the_lines_of_the_protocol(line, expected):
    """The provider's output is hostile input: whatever is not such a line is None."""
    assert parse_report(line) == expected
