"""What the other modules share: errors, printable text, paths and descriptors."""

import errno
import os
import time
from typing import Iterator

MAX_PATH_BYTES = 4096
MAX_NAME_BYTES = 255
MAX_LOGGED = 20  # lines of each kind
POLL_SECONDS = 0.2
BLOCK_BYTES = 1 << 20
SLASH = 0x2F

# How open fails if a file was deleted, or has become a symlink.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
# A directory that is only passed through need not be readable, on systems that can open it that way.
OPEN_PASSAGE = OPEN_DIRECTORY | getattr(os, "O_PATH", 0)


class Failure(Exception):
    """No index can be written; the message, printable ASCII, says why and what to do."""


def as_failure(error: Exception) -> Failure:
    """Return any error as a `Failure`, so that there is always a last line: unexpected ones are bugs."""
    if isinstance(error, Failure):
        return error
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    line = at.tb_lineno if at is not None else 0
    what = f"{type(error).__name__} in line {line}, {error}"
    return Failure(f"unexpected: {printable_text(what)[:1000]} (a bug in the indexer, please report it)")


def printable(text: bytes) -> str:
    """Return printable ASCII for any bytes: ``\\\\`` for a backslash, ``\\xNN`` for unprintable bytes."""
    return "".join(
        "\\\\" if byte == 0x5C else chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in text
    )


def printable_text(text: str) -> str:
    """Return the same for text."""
    return printable(text.encode("utf-8", "surrogatepass"))


def reason_of(error: OSError) -> str:
    """Return the system's message, without colons: a colon ends the path in the report."""
    return printable((error.strerror or str(error)).replace(":", ",").encode("utf-8", "replace"))


def is_too_long(path: bytes) -> bool:
    """Whether a path is longer than an index may hold: 4096 bytes, and 255 in each component."""
    return len(path) > MAX_PATH_BYTES or max(map(len, path.split(b"/"))) > MAX_NAME_BYTES


def prefixes(path: bytes) -> Iterator[bytes]:
    """Yield ``/a``, ``/a/b``, ``/a/b/c`` for ``/a/b/c``, nothing for an empty path."""
    for position in range(1, len(path) + 1):
        if path[position : position + 1] in (b"/", b""):
            yield path[:position]


def open_below(root: int, path: bytes) -> int:
    """Open a directory below another for chdir, component by component, without following symlinks."""
    descriptor = os.dup(root)
    for component in path.strip(b"/").split(b"/"):
        if component:
            try:
                below = os.open(component, OPEN_PASSAGE, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = below
    return descriptor


def open_root(chroot: bytes) -> int:
    """Open the chroot, whose own path may contain symlinks."""
    try:
        return os.open(chroot + b"/.", OPEN_PASSAGE)
    except OSError as error:
        raise Failure(
            f"chroot {printable(chroot) or '/'} is not a directory on the provider that can be entered:"
            f" {reason_of(error)}"
        ) from error


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it; a single write may be cut short by a signal."""
    while data:
        data = data[os.write(descriptor, data) :]


def time_ns() -> int:
    """Return Unix nanoseconds; time.time_ns needs Python 3.7."""
    return int(time.time() * 1e9)
