"""How to start an indexer over SSH, and what to send to it.

Nothing need be installed on the provider: the program itself goes over standard input, so that neither its
text nor any path is ever part of a command line.
"""

from __future__ import annotations

import json
import shlex
from importlib import resources

from airflow_mdbackup.provider_side.join import joined_indexer
from airflow_mdbackup.provider_side.request import IndexRequest, request_line

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


def python_program() -> bytes:
    """Return the Python indexer, to be installed on a provider: one file without dependencies."""
    return joined_indexer()


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


def _program(name: str) -> bytes:
    return resources.files("airflow_mdbackup.provider_side").joinpath(name).read_bytes()


def _quoted(path: bytes) -> bytes:
    # latin-1 maps every byte to one character and back.
    return shlex.quote(path.decode("latin-1")).encode("latin-1")
