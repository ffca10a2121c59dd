"""What runs on the provider: the two indexers, how to start them over SSH, and what they answer.

    command = python_command()              # or shell_command(), if that one ended with status 127
    ... run it over SSH ...
    for line in ...: parse_report(line)     # greetings of a login shell are None
        Ready(program=True)                 write python_input(request) to its standard input, leave that open
        Ready(program=False)                a forced command runs: write request_line(request)
        Waiting, Joined, Note, Progress, Unreadable, Rotten
        Done or Failed                      the last one
    ... write STOP, should nobody want the index any more ...

The shell of `shell_command` asks for nothing: it takes `shell_input` as it is. Where a forced command is set,
neither command matters, since the provider starts what is installed there.

Nothing here does any work on a connection. Nothing need be installed on the provider: the program itself goes
over standard input, so that neither its text nor any path is ever part of a command line.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from airflow_mdbackup.scheme.names import from_text, unfolded

NO_PYTHON = 127
"""Exit status of `python_command` on a provider without Python 3.6 or newer."""

STOP = b"stop\n"
"""What stops a build, on its standard input after the request."""

# No quote, backslash, dollar or exclamation mark may be in here: so sh, bash, csh and fish all read the same.
# Leaving out sys.path[0] keeps modules in the account's home from being imported. A buffer of one byte reads
# nothing of what comes after the program. The words to print are arguments, since they could not be quoted.
_BOOTSTRAP = (
    f"import sys,io;sys.version_info<(3,6) and sys.exit({NO_PYTHON});sys.path.pop(0);"
    "print(*sys.argv[2:],flush=True);del sys.argv[2:];"
    "read=io.BufferedReader(io.FileIO(0,closefd=False),1);"
    "exec(read.read(int(read.readline())),dict(__name__=__name__))"
)


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """What to index on a provider, and how.

    :param chroot: directory that the backup account sees as ``/``.
    :param source: absolute paths as the backup account sees them.
    :param index: absolute path of the index to write, as the backup account sees it.
    :param id: 1 to 200 printable ASCII characters. If a build of this very request is running already (the
        same but for jobs, nice and limit), it is joined; None: never.
    :param exclude: gitignore patterns of what need not be indexed, anchored at the backup account's ``/``.
    :param jobs: processes that hash; None: one for each core.
    :param nice: how much to lower the priority, 0 to 19.
    :param limit: bytes per second to read at most.
    :param rehash: ``"changed"``, ``"all"``, or the percent of all files, over 0 and at most 100, that each
        build hashes whether they changed or not, taking turns.
    :param one_file_system: leave out what is mounted below a source, unless that is a source itself.
    :raises ValueError: a path is not absolute or holds a NUL byte, or another value is none of these.
    """

    chroot: bytes
    source: tuple[bytes, ...]
    index: bytes
    id: str | None = None
    exclude: tuple[str, ...] = ()
    jobs: int | None = None
    nice: int = 0
    limit: int | None = None
    rehash: str | float = "changed"
    one_file_system: bool = False

    def __post_init__(self) -> None:
        for path in (self.chroot, *self.source, self.index):
            if not path.startswith(b"/") or b"\0" in path:
                raise ValueError(f"{path!r} must be an absolute path without NUL bytes")
        if self.id is not None and not re.fullmatch("[ -~]{1,200}", self.id):
            raise ValueError(f"id {self.id!r} must be 1 to 200 printable ASCII characters")
        if self.jobs is not None and not 1 <= self.jobs <= 1024:
            raise ValueError(f"jobs {self.jobs!r} must be from 1 to 1024")
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice {self.nice!r} must be from 0 to 19")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit!r} must be a number of bytes per second")
        percent = 0 if isinstance(self.rehash, str) else self.rehash
        if self.rehash not in ("changed", "all") and not 0 < percent <= 100:
            raise ValueError(
                f"rehash {self.rehash!r} must be changed, all, or percent over 0 and at most 100"
            )


@dataclass(frozen=True, slots=True)
class Ready:
    """The provider waits for input: the program and then the request, or the request only."""

    program: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """Another build of the same index is running; this one begins after it."""

    text: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A build of this very request is running; what follows is its report."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing, no failure; printable ASCII from the provider."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the build is: files and bytes passed by, and files hashed of these, after so many seconds."""

    files: int
    bytes: int
    hashed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A path that the provider could not read, and why; only the first 20 are told this way."""

    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Rotten:
    """A file whose content changed though its size, times and inode did not; only the first 20 are told."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """The index is in place.

    :ivar files: and ``bytes``: in the index; ``hashed``: files that were read for it.
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


def python_command() -> str:
    """Return the command line that starts the Python indexer, in any login shell.

    It says that it is ready, takes `python_input` on standard input and does not wait for that to end. Exit
    status: 0 complete, 3 something was unreadable or rotten, 1 failed, `NO_PYTHON` where `shell_command` has
    to be used instead.
    """
    # By way of sh, because csh ends with 1 where a program is missing.
    arguments = "--request-from-stdin mdbackup ready program"
    return f"""exec /bin/sh -c 'exec python3 -E -s -u -c "{_BOOTSTRAP}" {arguments}'"""


def python_input(request: IndexRequest) -> bytes:
    """Return what `python_command` reads: the program after its length, and the request."""
    program = python_program()
    return b"%d\n%s%s" % (len(program), program, request_line(request))


def request_line(request: IndexRequest) -> bytes:
    """Return the request as a line of JSON, which is all that a forced command reads."""
    wanted: dict[str, Any] = {
        "id": request.id,
        "chroot": _text(request.chroot),
        "source": [_text(path) for path in request.source],
        "index": _text(request.index),
        "exclude": list(request.exclude),
        "jobs": request.jobs,
        "nice": request.nice,
        "limit": request.limit,
        "rehash": request.rehash,
        "one_file_system": request.one_file_system,
    }
    return json.dumps(wanted).encode("ascii") + b"\n"


def read_request(line: str) -> IndexRequest:
    """Return the request that `request_line` made ``line`` of.

    :raises ValueError: it was made of something else.
    """
    values = json.loads(line)
    for key in ("chroot", "index"):
        values[key] = _bytes(values[key])
    values["source"] = tuple(map(_bytes, values["source"]))
    values["exclude"] = tuple(values["exclude"])
    return IndexRequest(**values)


def python_program() -> bytes:
    """Return the Python indexer, to be installed on a provider: one file without dependencies."""
    return _program("indexer.py")


def shell_command() -> str:
    """Return the command line that starts a shell for `shell_input`; exit status as of `python_command`."""
    return "exec /bin/sh -s"


def shell_input(request: IndexRequest) -> bytes:
    """Return what `shell_command` reads: the parameters, each quoted, and the program.

    A `STOP` must not follow at once, since some shells read ahead: not before the first line of the report.
    """
    return _parameters(request) + _program("indexer.sh") + b'\nmain "$@" 3<&0 </dev/null; exit\n'


def shell_program(request: IndexRequest) -> bytes:
    """Return the shell indexer with its parameters, to be installed on a provider that has no Python.

    As a forced command, ``sh FILE``, it says that it is ready, and takes nothing from the request but its id.
    ``sh FILE --no-request`` builds at once, which is for cron.
    """
    return b"MDBACKUP_ASKED=${1-}\n" + _parameters(request) + _program("indexer.sh") + b'\nserve "$@"\n'


def _parameters(request: IndexRequest) -> bytes:
    ignored = [name for name in ("exclude", "limit") if getattr(request, name)]
    lines = [
        # First of all, so that no multibyte character set takes part in how the quotes are read.
        b"LC_ALL=C; export LC_ALL",
        b"MDBACKUP_CHROOT=" + _quoted(request.chroot),
        b"MDBACKUP_INDEX=" + _quoted(request.index),
        # As it stands in JSON, which is what a forced command finds.
        b"MDBACKUP_ID=" + _quoted(json.dumps(request.id or "")[1:-1].encode("ascii")),
        b"MDBACKUP_NICE=%d" % request.nice,
        b"MDBACKUP_XDEV=" + (b"-xdev" if request.one_file_system else b""),
        b"MDBACKUP_IGNORED=" + _quoted(" and no ".join(ignored).encode("ascii")),
        b" ".join([b"set --", *map(_quoted, request.source)]),
    ]
    return b"\n".join(lines) + b"\n"


def parse_report(line: str) -> Report | None:
    """Read one line of an indexer's standard output, without its line end.

    :returns: None for anything that is not exactly such a line, like a greeting of the login shell.
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


def _program(name: str) -> bytes:
    return resources.files(__name__).joinpath(name).read_bytes()


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _quoted(path: bytes) -> bytes:
    # latin-1 maps every byte to one character and back.
    return shlex.quote(path.decode("latin-1")).encode("latin-1")
