"""What a command is, and the arguments that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument: its flags, or the name of a positional one, and what `add_argument` of argparse takes."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    :param help: one line, for the list of commands.
    :param description: what it does, for its own page of help.
    :param examples: command lines without the name of the program, each after a line that says what for.
    :param function: dotted name of what runs it.
    :param changes: whether it changes anything, so that it is to come to its end without output, too.
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
        """Return the examples as they are shown below the help."""
        return "examples:\n" + "\n".join(f"  # {why}\n  {program} {line}" for why, line in self.examples)


def argument(*flags: str, **options: Any) -> Argument:
    return Argument(flags, options)


def always(arguments: argparse.Namespace) -> bool:
    return True


def unless_dry(arguments: argparse.Namespace) -> bool:
    return not arguments.dry_run


def count(text: str) -> int:
    """Return a number of at least one.

    :raises ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


PROVIDER = argument("provider", metavar="PROVIDER", help="name of the provider in providers_file")

WORDS = argument(
    "words",
    metavar="PROVIDER | PATH",
    nargs="*",
    help="a provider's name, unless --dest is given, and paths: as backupop sees them, a directory means all"
    " below; or gitignore patterns, in quotes: one with a slash begins at the root",
)
DEST = argument("--dest", metavar="DIR", help="the backup itself: needs no configuration and no Airflow")
PROVIDERS_FILE = argument(
    "--providers-file", metavar="FILE", help="in place of the one that Airflow's options name"
)
INDEX = argument(
    "--index", metavar="FILE", help="the provider's index, not fetched; - is stdin. Needs no Airflow"
)
FORMAT = argument(
    "--format",
    choices=("text", "json"),
    default="text",
    help="json: one object a line, names escaped so that they can be given again (default: text)",
)

KEEP_EXTENSION = argument(
    "--suffix-keep-extension", action="store_true", help="it stands before the extension, as rclone has it"
)
