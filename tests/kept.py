"""Files as they were, to be compared with what comes back of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Kept(NamedTuple):
    """A file as it was on A: what a backup keeps of it."""

    content: bytes
    mtime: int
    mode: int


def files_in(root: Path) -> dict[bytes, Kept]:
    """Return all files below a directory, by their path from there."""
    found = {}
    for folder, _, names in os.walk(os.fsencode(root)):
        for name in names:
            path = folder + b"/" + name
            status = os.stat(path)
            with open(path, "rb") as file:
                found[path[len(os.fsencode(root)) :]] = Kept(
                    file.read(), int(status.st_mtime), status.st_mode & 0o777
                )
    return found
