"""What runs on the provider: the two indexers, how to start them over SSH, and what they answer.

    command = python_command()              # or shell_command(), if that one ended with status 127
    ... run it over SSH, write python_input(request) to its standard input, leave that open ...
    for line in ...: parse_report(line)     # Progress and Unreadable, at the end Done or Failed

Nothing here does any work on a connection. Nothing need be installed on the provider: the program itself goes
over standard input, so that neither its text nor any path is ever part of a command line.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from importlib import resources

from airflow_mdbackup.scheme.names import from_text

NO_PYTHON = 127
"""Exit status of `python_command` on a provider without Python 3.6 or newer."""

# No quote, backslash, dollar or exclamation mark may be in here: so sh, bash, csh and fish all read the same.
# Leaving out sys.path[0] keeps modules in the account's home from being imported.
_BOOTSTRAP = (
    f"import sys;sys.version_info<(3,6) and sys.exit({NO_PYTHON});sys.path.pop(0);read=sys.stdin.buffer;"
    "exec(read.read(int(read.readline())),dict(__name__=__name__))"
)


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """What to index on a provider.

    :param chroot: directory that the backup account sees as ``/``.
    :param source: absolute paths as the backup account sees them.
    :param index: absolute path of the index to write, as the backup account sees it.
    :raises ValueError: a path is not absolute or holds a NUL byte.
    """

    chroot: bytes
    source: tuple[bytes, ...]
    index: bytes

    def __post_init__(self) -> None:
        for path in (self.chroot, *self.source, self.index):
            if not path.startswith(b"/") or b"\0" in path:
                raise ValueError(f"{path!r} must be an absolute path without NUL bytes")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the build is: files and bytes hashed, after so many seconds."""

    files: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A path that the provider could not read, and why; only the first 20 are told this way."""

    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """The index is in place: files and bytes in it, files hashed anew, things unreadable, seconds it took."""

    files: int
    bytes: int
    hashed: int
    unreadable: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no new index; the message, printable ASCII from the provider, says why."""

    message: str


_NUMBER = "([0-9]{1,19})"
_SECONDS = r"([0-9]{1,10}(?:\.[0-9])?)"
_PROGRESS = re.compile(f"mdbackup progress files={_NUMBER} bytes={_NUMBER} seconds={_SECONDS}")
_DONE = re.compile(
    f"mdbackup done files={_NUMBER} bytes={_NUMBER} hashed={_NUMBER} unreadable={_NUMBER} seconds={_SECONDS}"
)
_UNREADABLE = re.compile(r"mdbackup unreadable (/[ -~]*): ([ -9;-~]+)")
_FAILED = re.compile("mdbackup error ([ -~]+)")


def python_command() -> str:
    """Return the command line that starts the Python indexer, in any login shell.

    It takes `python_input` on standard input and does not wait for that to end. Exit status: 0 complete, 3
    something was unreadable, 1 failed, `NO_PYTHON` where `shell_command` has to be used instead.
    """
    # By way of sh, because csh ends with 1 where a program is missing.
    return f"""exec /bin/sh -c 'exec python3 -E -s -u -c "{_BOOTSTRAP}" --request-from-stdin'"""


def python_input(request: IndexRequest) -> bytes:
    """Return what `python_command` reads: the program after its length, the request as a line of JSON."""
    program = _program("indexer.py")
    wanted = {
        "chroot": _text(request.chroot),
        "source": [_text(path) for path in request.source],
        "index": _text(request.index),
    }
    return b"%d\n%s%s\n" % (len(program), program, json.dumps(wanted).encode("ascii"))


def shell_command() -> str:
    """Return the command line that starts a shell for `shell_input`; exit status as of `python_command`."""
    return "exec /bin/sh -s"


def shell_input(request: IndexRequest) -> bytes:
    """Return what `shell_command` reads: the parameters, each quoted, and the program."""
    lines = [
        # First of all, so that no multibyte character set takes part in how the quotes are read.
        b"LC_ALL=C; export LC_ALL",
        b"MDBACKUP_CHROOT=" + _quoted(request.chroot),
        b"MDBACKUP_INDEX=" + _quoted(request.index),
        b" ".join([b"set --", *map(_quoted, request.source)]),
        _program("indexer.sh"),
    ]
    return b"\n".join(lines)


def parse_report(line: str) -> Progress | Unreadable | Done | Failed | None:
    """Read one line of an indexer's standard output, without its line end.

    :returns: None for anything that is not exactly such a line, like a greeting of the login shell.
    """
    if match := _PROGRESS.fullmatch(line):
        return Progress(int(match[1]), int(match[2]), float(match[3]))
    if match := _UNREADABLE.fullmatch(line):
        try:
            return Unreadable(from_text(match[1]), match[2])
        except ValueError:
            return None
    if match := _DONE.fullmatch(line):
        return Done(int(match[1]), int(match[2]), int(match[3]), int(match[4]), float(match[5]))
    if match := _FAILED.fullmatch(line):
        return Failed(match[1])
    return None


def _program(name: str) -> bytes:
    return resources.files(__name__).joinpath(name).read_bytes()


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _quoted(path: bytes) -> bytes:
    # latin-1 maps every byte to one character and back.
    return shlex.quote(path.decode("latin-1")).encode("latin-1")
