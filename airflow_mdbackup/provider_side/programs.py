"""How to start an indexer over SSH, and what to send to it."""

from __future__ import annotations

import shlex
from importlib import resources

from airflow_mdbackup.provider_side.join import joined_indexer
from airflow_mdbackup.provider_side.request import IndexRequest, request_line

NO_PYTHON = 127
"""The exit status of `python_command` on a provider without Python 3.6 or newer."""

STOP = b"stop\n"
"""Stops a build, on its standard input after the request."""

# Without quotes, backslashes, dollars and exclamation marks, sh, bash, csh and fish all read the same.
# Without sys.path[0], no module in the account's home is imported. A buffer of one byte leaves what follows
# the program unread. The words to print are arguments, since quotes are not possible.
_BOOTSTRAP = (
    f"import sys,io;sys.version_info<(3,6) and sys.exit({NO_PYTHON});sys.path.pop(0);"
    "print(*sys.argv[2:],flush=True);del sys.argv[2:];"
    "read=io.BufferedReader(io.FileIO(0,closefd=False),1);"
    "exec(read.read(int(read.readline())),dict(__name__=__name__))"
)


def python_command() -> str:
    """Return the command line that starts the Python indexer, in any login shell.

    It prints that it is ready, and reads `python_input` from standard input without waiting for its end. Exit
    status: 0 complete, 3 something was unreadable or rotten, 1 failed, `NO_PYTHON` if `shell_command` must be
    used instead.
    """
    # By way of sh, because csh exits with 1 if a program is missing.
    arguments = "--request-from-stdin mdbackup ready program"
    return f"""exec /bin/sh -c 'exec python3 -E -s -u -c "{_BOOTSTRAP}" {arguments}'"""


def python_input(request: IndexRequest) -> bytes:
    """Return what `python_command` reads: the program after its length, and the request."""
    program = python_program()
    return b"%d\n%s%s" % (len(program), program, request_line(request))


def python_program() -> bytes:
    """Return the Python indexer, to be installed on a provider: one file without dependencies."""
    return joined_indexer()


def shell_command() -> str:
    """Return the command line that starts a shell for `shell_input`; exit status as of `python_command`."""
    return "exec /bin/sh -s"


def shell_input(request: IndexRequest) -> bytes:
    """Return what `shell_command` reads: the parameters, each quoted, and the program.

    Do not send a `STOP` before the first line of the report, since some shells read ahead.
    """
    return _parameters(request) + _shell_text() + b'\nmain "$@" 3<&0 </dev/null; exit\n'


def shell_program(request: IndexRequest) -> bytes:
    """Return the shell indexer with its parameters, to be installed on a provider without Python.

    As a forced command, ``sh FILE``, it prints that it is ready, and waits for a request, whose content does
    not matter. ``sh FILE --no-request``, for cron, builds at once.
    """
    return b"MDBACKUP_ASKED=${1-}\n" + _parameters(request) + _shell_text() + b'\nserve "$@"\n'


def _parameters(request: IndexRequest) -> bytes:
    ignored = [name for name in ("exclude", "limit") if getattr(request, name)]
    lines = [
        # First, so that no multibyte character set affects how the quotes are read.
        b"LC_ALL=C; export LC_ALL",
        b"MDBACKUP_CHROOT=" + _quoted(request.chroot),
        b"MDBACKUP_INDEX=" + _quoted(request.index),
        b"MDBACKUP_NICE=%d" % request.nice,
        b"MDBACKUP_XDEV=" + (b"-xdev" if request.one_file_system else b""),
        b"MDBACKUP_IGNORED=" + _quoted(" and no ".join(ignored).encode("ascii")),
        b" ".join([b"set --", *map(_quoted, request.source)]),
    ]
    return b"\n".join(lines) + b"\n"


def _shell_text() -> bytes:
    return resources.files("airflow_mdbackup.provider_side").joinpath("indexer.sh").read_bytes()


def _quoted(path: bytes) -> bytes:
    # latin-1 maps every byte to one character and back.
    return shlex.quote(path.decode("latin-1")).encode("latin-1")
