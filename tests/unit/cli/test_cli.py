"""The command line: one table, two front ends, clear words for what a user does wrong."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_mdbackup import __version__
from airflow_mdbackup.cli import main as commands
from airflow_mdbackup.cli.main import COMMANDS, get_airflow_commands, main
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.cli.tables.command import Command
from airflow_mdbackup.get_provider_info import get_provider_info

A_SCREEN = 50
KEY_TEXT = "-----BEGIN OPENSSH PRIVATE KEY-----"


def command_that(function: str) -> Command:
    """Return a command without arguments that runs a function of this module."""
    return Command("try", "help", "description", (), (), f"{__name__}.{function}")


def fails(arguments: argparse.Namespace) -> int:
    raise UsageError("write this instead")


def quotes_a_server(arguments: argparse.Namespace) -> int:
    raise UsageError("it says \x1b[31mred\x9b0m\nand ü")


def breaks(arguments: argparse.Namespace) -> int:
    raise AttributeError("nobody thought of that")


def prints_a_name(arguments: argparse.Namespace) -> int:
    print("/srv/ü")
    return 0


def finds_something(arguments: argparse.Namespace) -> int:
    print("something is wrong")
    return 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_fits_a_screen_and_has_examples(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a narrow terminal; and each example begins with the words that are to be typed."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([command.name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert len(lines) <= A_SCREEN
    providers, paths = " [PROVIDER ...]", " [PROVIDER | PATH ...]"
    takes = {"init": "", "status": providers, "log": providers, "rebuild": providers, "clock": providers}
    takes |= dict.fromkeys(("restore", "versions", "diff", "history", "verify", "forget", "prune"), paths)
    takes |= {"plan": " PROVIDER [PATH ...]", "import": " PROVIDER [DIR]"}
    provider = takes.get(command.name, " PROVIDER")
    assert lines[0] == f"usage: mdbackup {command.name} [options]{provider}"
    assert any(line.startswith(f"  mdbackup {command.name} ") for line in lines)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_are_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the help shows is what the parser takes."""
    asked = []
    monkeypatch.setattr(commands, "run", lambda command, arguments: asked.append(vars(arguments)) or 0)
    for _, line in command.examples:
        main(shlex.split(line.partition(" > ")[0]))
    assert len(asked) == len(command.examples)
    assert all(arguments.get("provider", "web") == "web" for arguments in asked)


def test_airflow_shows_the_same_commands_with_the_same_arguments() -> None:
    """`airflow mdbackup ...` is made from the same table, by the name that the provider info has."""
    assert get_provider_info()["cli"] == [f"{commands.__name__}.{get_airflow_commands.__name__}"]
    (group,) = get_airflow_commands()
    assert group.name == "mdbackup"
    for command, shown in zip(COMMANDS, group.subcommands, strict=True):
        assert (shown.name, shown.help) == (command.name, command.help)
        parser = argparse.ArgumentParser()
        for argument in shown.args:
            argument.add_to_parser(parser)
        assert [action.option_strings or [action.dest] for action in parser._actions[1:]] == [
            list(argument.flags) for argument in command.arguments
        ]
        assert "airflow mdbackup" in shown.epilog


def test_help_needs_no_airflow_and_the_table_little_else() -> None:
    """Every `airflow` command imports the table; and `mdbackup --help` answers at once."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import airflow_mdbackup.cli.main as commands\n"
        "try: commands.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'airflow', 'airflow.configuration', 'pydantic', 'yaml', 'jinja2', 'paramiko'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "provision" in done.stdout


def test_words_that_are_no_command_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """As argparse does it; standard output stays free for results."""
    for words in ([], ["nonsense"], ["provision"], ["provision", "web", "--port", "ssh"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        told = capsys.readouterr()
        assert (told.out, "usage: mdbackup" in told.err) == ("", True)


def test_usage_error_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback for what a user did wrong; it says which command says so."""
    assert commands.run(command_that("fails"), argparse.Namespace()) == 2
    assert capsys.readouterr() == ("", "mdbackup try: write this instead\n")


def test_nothing_that_is_quoted_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it comes from; what can be printed stays as it is."""
    commands.run(command_that("quotes_a_server"), argparse.Namespace())
    assert capsys.readouterr().err == "mdbackup try: it says \\x1b[31mred\\x9b0m\nand ü\n"


def test_error_of_the_program_is_not_taken_for_what_a_command_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 1 of `audit` means that an account is looser than it should be."""
    assert commands.run(command_that("breaks"), argparse.Namespace()) == 4
    told = capsys.readouterr().err
    assert told.startswith("Traceback ")
    assert told.endswith("mdbackup try: this is a bug in mdbackup: please report it\n")


def test_name_that_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in standard error."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert commands.run(command_that("prints_a_name"), argparse.Namespace()) == 0
    assert output.buffer.getvalue() == b"/srv/\\xfc\n"


@pytest.mark.parametrize(
    ("connection", "status", "because"),
    [
        (None, 2, "there is no connection web: run the `airflow connections add ...` lines"),
        ({"extra": [1, 2]}, 2, "EnvironmentVariablesBackend: "),
        (
            {"extra": {"key_file": "/missing/key"}},
            2,
            "names the key /missing/key, which is not on this machine",
        ),
        (
            {"extra": {"key_file": f"{KEY_TEXT}\n"}},
            2,
            "key_file, which is for the name of a file: move it to private_key",
        ),
        (
            {"extra": {"key_file": "~nobody-of-this-name/x"}},
            2,
            "an extra key_file that is not the name of a file",
        ),
        ({"host": "127.0.0.1"}, 3, "web: the connection web has no login"),
        (
            {"host": "127.0.0.1\x1b[31m", "login": "x\x1b[31m"},
            3,
            "has an invalid host ('127.0.0.1\\\\x1b[31m')",
        ),
    ],
    ids=["missing", "extra", "key", "key text", "no name", "login", "escapes"],
)
def test_audit_tells_what_is_wrong_with_a_connection(
    connection: dict[str, object] | None,
    status: int,
    because: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With status 2 what can be told without the server; also in JSON. Escapes do not act on the terminal."""
    (tmp_path / "providers.yaml").write_text(
        f"providers: {{web: {{sftp_conn_id: web, source: /backups, dest: {tmp_path}/dest}}}}\n"
    )
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))
    if connection is not None:
        monkeypatch.setenv("AIRFLOW_CONN_WEB", json.dumps({"conn_type": "sftp"} | connection))
    assert main(["audit", "web"]) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert because in told.err and KEY_TEXT not in told.err
    assert "\nmdbackup audit: " in "\n" + told.err
    assert main(["audit", "web", "--format", "json"]) == status
    again = capsys.readouterr()
    document = json.loads(again.out)
    assert (document["provider"], sorted(document)) == ("web", ["error", "provider"])
    assert printable(document["error"]) in told.err
    assert "\x1b[31m" not in told.err + again.out + again.err


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """For a report of what went wrong."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"mdbackup {__version__}\n")


def test_status_of_a_command_is_that_of_the_process() -> None:
    """Airflow ignores what a command returns, so there the process is ended with it."""
    command = command_that("finds_something")
    assert commands.run(command, argparse.Namespace()) == 1
    with pytest.raises(SystemExit) as end:
        commands._exiting(command)(argparse.Namespace())
    assert end.value.code == 1


def test_reader_who_has_seen_enough_gets_no_traceback(tmp_path: Path) -> None:
    """As in `mdbackup provision web | head -1`."""
    code = (
        "import sys; from airflow_mdbackup.cli import main as commands\n"
        "import types; many = types.ModuleType('many'); sys.modules['many'] = many\n"
        "many.run = lambda arguments: print('line\\n' * 200_000) or 0\n"
        "sys.exit(commands.run(commands.Command('many', '', '', (), (), 'many.run'), None))"
    )
    command = f"{sys.executable} -c \"$CODE\" 2>'{tmp_path}/said' | head -1"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        env={"CODE": code, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
    )
    assert (done.stdout, (tmp_path / "said").read_text()) == ("line\n", "")


def test_main_module_is_the_same_command_line() -> None:
    """`python -m airflow_mdbackup` where the console script is not on the path."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow_mdbackup", "provision", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mdbackup provision")


def test_the_page_of_the_command_line_has_each_command_and_no_other() -> None:
    """And each option that it shows in the table of commands exists."""
    page = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    rows = [line.split(" | ", 1) for line in page.partition("| exit status")[0].splitlines()]
    rows = [row for row in rows if row[0].startswith("| `")]
    by_name = {command.name: command for command in COMMANDS}
    shown = set()
    for usage, text in rows:
        for form in re.findall(r"`([^`]+)`", usage):
            name = form.split()[0]
            shown.add(name if not name.startswith("-") else "")
            known = {
                flag
                for argument in by_name[usage[3:].split()[0].strip("`")].arguments
                for flag in argument.flags
            }
            assert set(re.findall(r"(?:^| )(--[a-z-]+)", f"{form} {text.replace('`', ' ')}")) <= known | {
                "--backup-dir"  # of rsync
            }, usage
    assert shown - {""} == by_name.keys()


def test_the_old_name_of_an_option_works_and_is_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both command lines; it says on standard error how the option is called now."""
    asked = []
    monkeypatch.setattr(commands, "run", lambda command, arguments: asked.append(arguments) or 0)
    main(["verify", "web", "--let-go"])
    assert capsys.readouterr() == ("", "--let-go is now --acknowledge-missing; the old name still works\n")
    main(["verify", "web", "--acknowledge-missing"])
    main(["verify", "web"])
    assert [arguments.acknowledge_missing for arguments in asked] == [True, True, False]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "--let-go" not in capsys.readouterr().out
