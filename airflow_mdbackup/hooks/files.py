"""Files that a connection names: their paths and contents."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

# A key's text, or a line of it, in place of a file name. An absolute path never matches.
_KEY_TEXT = re.compile(r"-----BEGIN|[\r\n]|(?<!\S)(?![/~])[A-Za-z0-9+/=]{64}")


def is_key_text(name: str) -> bool:
    """Return whether this is the text of a key instead of a file name, so that no message may quote it."""
    return _KEY_TEXT.search(name.strip()) is not None


def path_of(name: str) -> Path:
    """Return the path that a name stands for, with ``~`` expanded.

    :raises ValueError: it cannot be a path, or its ``~user`` is unknown.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} names a user that does not exist on this machine") from error
    if "\0" in name:
        raise ValueError("it contains a NUL character")
    os.fsencode(path)
    return path


def read(path: Path) -> bytes:
    """Return the content of a file.

    :raises OSError: it cannot be read, or is something that could block, such as a FIFO.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) and str(path) != os.devnull:
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.read_bytes()
