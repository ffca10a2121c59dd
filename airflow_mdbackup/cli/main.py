"""The table of commands, from which both command lines are made.

Every `airflow` command imports this module, so it imports nothing that takes time; a command's code is
imported when the command runs. It is a function that takes the parsed arguments and returns the exit status:

    0  done          1  done, and something is wrong (each command says what)
    2  usage error   3  the provider cannot be reached
    4  a bug in this program, with its traceback
    5  standard output or standard error cannot be written: see `output`
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from airflow_mdbackup import __version__
from airflow_mdbackup.cli.output import Output, OutputFailed, UsageError, printable
from airflow_mdbackup.cli.tables import backup, recovery, setup, upkeep
from airflow_mdbackup.cli.tables.command import Command
from airflow_mdbackup.scheme.errors import BackupError

COMMANDS = (*setup.COMMANDS, *backup.COMMANDS, *recovery.COMMANDS, *upkeep.COMMANDS)


def get_airflow_commands() -> list[Any]:
    """Return the commands for Airflow's command line, which finds this through `get_provider_info`."""
    from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand

    commands = [
        ActionCommand(
            name=command.name,
            help=command.help,
            func=_exiting(command),
            args=[Arg(argument.flags, **argument.options) for argument in command.arguments],
            description=command.description,
            epilog=command.epilog("airflow mdbackup"),
        )
        for command in COMMANDS
    ]
    return [GroupCommand(name="mdbackup", help="Pull backups over read-only SFTP", subcommands=commands)]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `mdbackup`, and return its exit status."""
    output, arguments, status = Output(runs_to_end=False), None, 0
    try:
        with output:
            arguments = _parse(words)
    except SystemExit as end:  # it has printed help or an error
        status = end.code if isinstance(end.code, int) else 0
    if arguments is None:
        raise SystemExit(output.status("mdbackup", status))
    return run(arguments.command, arguments)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mdbackup", description="Pull backups over read-only SFTP.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            usage=command.usage("mdbackup"),
            description=command.description,
            epilog=command.epilog("mdbackup"),
            formatter_class=_Formatter,
        )
        for argument in command.arguments:
            subparser.add_argument(*argument.flags, **argument.options)
        subparser.set_defaults(command=command)
    arguments, more = parser.parse_known_args(_with_suffix_joined(sys.argv[1:] if words is None else words))
    if len(more) == 1 and not more[0].startswith("-") and getattr(arguments, "directory", "") is None:
        arguments.directory = more.pop()  # it came after the options
    if more:
        # argparse takes paths in one place only; people write some before the options, and some after.
        if not hasattr(arguments, "words") or any(word.startswith("-") for word in more):
            commands.choices[arguments.command.name].error(f"unrecognized arguments: {' '.join(more)}")
        arguments.words += more
    return arguments


def _with_suffix_joined(words: Sequence[str]) -> list[str]:
    """Join ``--suffix -bak`` to ``--suffix=-bak``, since argparse would take -bak for an option."""
    flags = {flag for command in COMMANDS for argument in command.arguments for flag in argument.flags}
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--suffix"] and word.startswith("-") and word not in flags:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def run(command: Command, arguments: argparse.Namespace) -> int:
    """Run one command, print errors on stderr, and return the exit status."""
    status = 0
    output = Output(runs_to_end=command.changes(arguments))
    with output:
        status = _run(command, arguments)
    return output.status(f"mdbackup {command.name}", status)


def _run(command: Command, arguments: argparse.Namespace) -> int:
    module, _, name = command.function.rpartition(".")
    try:
        status: int = getattr(importlib.import_module(module), name)(arguments)
    except OutputFailed:
        raise
    except (UsageError, BackupError) as error:
        print(printable(f"mdbackup {command.name}: {error}"), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "airflow_mdbackup").startswith("airflow_mdbackup"):
            return _report_bug(command)
        # Such as a rescue installation, with only what reads a backup: see docs/restore.md.
        dest = getattr(arguments, "dest", "")
        instead = " If Airflow is gone, name the backup itself: --dest DIR" if dest is None else ""
        print(
            f"mdbackup {command.name}: {error.name} is not installed here: run this in Airflow's environment."
            f"{instead}",
            file=sys.stderr,
        )
        return 2
    except Exception:
        return _report_bug(command)
    return status


def _report_bug(command: Command) -> int:
    """Print the traceback of an unexpected error, and return its exit status."""
    traceback.print_exc()
    print(f"mdbackup {command.name}: this is a bug in mdbackup: please report it", file=sys.stderr)
    return 4


def _exiting(command: Command) -> Callable[[argparse.Namespace], NoReturn]:
    """Return a function that runs the command and exits: Airflow ignores a command's return value."""

    def run_and_exit(arguments: argparse.Namespace) -> NoReturn:
        raise SystemExit(run(command, arguments))

    return run_and_exit


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the description, keeps the examples as they are, and leaves more room for the flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
