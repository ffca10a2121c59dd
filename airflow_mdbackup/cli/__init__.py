"""The command line: `airflow mdbackup`, `mdbackup` and `python -m airflow_mdbackup` are the same."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with all but line ends escaped that could act on a terminal, wherever it comes from."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )


class UsageError(Exception):
    """What was asked for cannot be done like this; the message says what to write instead. Exit status 2."""
