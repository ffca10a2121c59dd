"""The lines that an indexer prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from airflow_mdbackup.scheme.common.paths import from_text, unfolded


@dataclass(frozen=True, slots=True)
class Ready:
    """The provider waits for input: the program and then the request, or only the request."""

    program: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """Another build of the same index is running; this one is next."""

    text: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A build of the same request is running; what follows is its report."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Useful to know, not a failure; printable ASCII from the provider."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Files and bytes processed, how many of the files were hashed, and seconds since the start."""

    files: int
    bytes: int
    hashed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A path that the provider could not read, and why; only the first 20 are reported."""

    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Rotten:
    """A file with bit rot: its content changed, its size, times and inode did not; only the first 20."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """The index is in place.

    :ivar files: in the index; ``bytes``: their size; ``hashed``: files that were read.
    :ivar unreadable: files and directories that could not be read; ``rotten``: see `Rotten`.
    """

    files: int
    bytes: int
    hashed: int
    unreadable: int
    rotten: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no new index; the message, printable ASCII from the provider, says why."""

    message: str


Report = Ready | Waiting | Joined | Note | Progress | Unreadable | Rotten | Done | Failed

_NUMBER = "([0-9]{1,19})"
_SECONDS = r"([0-9]{1,10}(?:\.[0-9])?)"
_READY = re.compile("mdbackup ready (program|request)")
_TEXT = re.compile("mdbackup (waiting|joined|note|error) ([ -~]+)")
_PROGRESS = re.compile(
    f"mdbackup progress files={_NUMBER} bytes={_NUMBER} hashed={_NUMBER} seconds={_SECONDS}"
)
_DONE = re.compile(
    f"mdbackup done files={_NUMBER} bytes={_NUMBER} hashed={_NUMBER} unreadable={_NUMBER} rotten={_NUMBER}"
    f" seconds={_SECONDS}"
)
_UNREADABLE = re.compile(r"mdbackup unreadable (/[ -~]*): ([ -9;-~]+)")
_ROTTEN = re.compile("mdbackup rotten (/[ -~]*)")
_TEXTS: dict[str, Callable[[str], Report]] = {
    "waiting": Waiting,
    "joined": Joined,
    "note": Note,
    "error": Failed,
}


def parse_report(line: str) -> Report | None:
    """Read one line of an indexer's standard output, without its line end.

    :returns: None for anything that is not exactly such a line, such as a greeting of the login shell.
    """
    line = unfolded(line)
    if match := _PROGRESS.fullmatch(line):
        return Progress(int(match[1]), int(match[2]), int(match[3]), float(match[4]))
    if match := _DONE.fullmatch(line):
        files, size, hashed, unreadable, rotten = (int(match[number]) for number in range(1, 6))
        return Done(files, size, hashed, unreadable, rotten, float(match[6]))
    if match := _TEXT.fullmatch(line):
        return _TEXTS[match[1]](match[2])
    if match := _READY.fullmatch(line):
        return Ready(match[1] == "program")
    try:
        if match := _UNREADABLE.fullmatch(line):
            return Unreadable(from_text(match[1]), match[2])
        if match := _ROTTEN.fullmatch(line):
            return Rotten(from_text(match[1]))
    except ValueError:
        pass
    return None
