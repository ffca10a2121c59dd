"""Files that a connection names: whether it is the name of one, and what is in it."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

# The text of a key, or a line of one, where the name of a file belongs. No absolute path is taken for it.
_KEY_TEXT = re.compile(r"-----BEGIN|[\r\n]|(?<!\S)(?![/~])[A-Za-z0-9+/=]{64}")


def is_key_text(name: str) -> bool:
    """Return whether somebody wrote a key itself in place of its file's name. It must not be quoted then."""
    return _KEY_TEXT.search(name.strip()) is not None


def path_of(name: str) -> Path:
    """Return the path that a name stands for.

    :raises ValueError: it can be none, or its ``~user`` is unknown.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} names a user that this machine does not know") from error
    if "\0" in name:
        raise ValueError("no name has a NUL in it")
    os.fsencode(path)
    return path


def read(path: Path) -> bytes:
    """Return what is in a file.

    :raises OSError: it cannot be read; or it is something that has its reader wait, such as a FIFO.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) and str(path) != os.devnull:
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.read_bytes()
