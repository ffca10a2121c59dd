"""What a command is, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument: its flags, or the name of a positional one, and the options of `add_argument`."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    :param help: one line, for the list of commands.
    :param description: what it does, for its own help page.
    :param examples: command lines without the program's name, each after a line that explains it.
    :param function: dotted name of the function that runs it.
    :param changes: whether it changes anything; then it runs to its end even if output fails.
    """

    name: str
    help: str
    description: str
    examples: tuple[tuple[str, str], ...]
    arguments: tuple[Argument, ...]
    function: str
    changes: Callable[[argparse.Namespace], bool] = lambda arguments: False

    def usage(self, program: str) -> str:
        """Return the first line of its help."""
        positional = [a for a in self.arguments if not a.flags[0].startswith("-")]
        forms = {None: "{}", "?": "[{}]", "*": "[{} ...]"}
        names = [forms[a.options.get("nargs")].format(a.options["metavar"]) for a in positional]
        return " ".join([program, self.name, "[options]", *names])

    def epilog(self, program: str) -> str:
        """Return the examples as they appear below the help."""
        return "examples:\n" + "\n".join(f"  # {why}\n  {program} {line}" for why, line in self.examples)


class _OldFlag(argparse.Action):
    """A flag's former name: works as the flag ``new`` does, says so on standard error, and is hidden."""

    def __init__(self, option_strings: list[str], dest: str, *, new: str, **options: Any) -> None:
        dest = new.strip("-").replace("-", "_")
        super().__init__(option_strings, dest, nargs=0, default=False, help=argparse.SUPPRESS)
        self._new = new

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        print(f"{option} is now {self._new}; the old name still works", file=sys.stderr)
        setattr(namespace, self.dest, True)


def argument(*flags: str, **options: Any) -> Argument:
    return Argument(flags, options)


def old_flag(old: str, new: str) -> Argument:
    """Return a hidden argument that keeps the old name of a flag working."""
    return Argument((old,), {"action": partial(_OldFlag, new=new)})


def always(arguments: argparse.Namespace) -> bool:
    return True


def unless_dry_run(arguments: argparse.Namespace) -> bool:
    return not arguments.dry_run


def positive_int(text: str) -> int:
    """Parse a number of at least one.

    :raises ArgumentTypeError: it is not one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


PROVIDER = argument("provider", metavar="PROVIDER", help="name of the provider in providers_file")

WORDS = argument(
    "words",
    metavar="PROVIDER | PATH",
    nargs="*",
    help="a provider's name, unless --dest is given; then absolute paths inside the chroot (directories are"
    " recursive), or quoted gitignore patterns: one with a slash starts at the root",
)
DEST = argument("--dest", metavar="DIR", help="the backup itself: needs no configuration and no Airflow")
PROVIDERS_FILE = argument(
    "--providers-file", metavar="FILE", help="use FILE, not the one that Airflow's options name"
)
INDEX = argument(
    "--index", metavar="FILE", help="read the provider's index from FILE (-: stdin). Needs no Airflow"
)
FORMAT = argument(
    "--format",
    choices=("text", "json"),
    default="text",
    help="json: one object per line, with names escaped so that commands accept them (default: text)",
)

KEEP_EXTENSION = argument(
    "--suffix-keep-extension",
    action="store_true",
    help="the suffix is before the extension, as with rclone",
)
