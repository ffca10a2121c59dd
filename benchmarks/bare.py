"""Files of a list opened, read, hashed and compared by two processes of Python, and nothing else.

``python -m benchmarks.bare LIST``, with a list for ``md5sum -c``, in the directory that it is about: what is
left when a verification on two cores knows and tells nothing.

What this does not give: what can be trusted. It follows symlinks, and looks for nothing that is not listed.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PROCESSES = 2


def _differ(lines: Iterable[bytes]) -> int:
    """Return how many files are not as their lines say."""
    differ = 0
    for line in lines:
        md5, _, path = line.partition(b"  ")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        known = hashlib.md5(usedforsecurity=False)
        while block := os.read(descriptor, 1 << 20):
            known.update(block)
        os.close(descriptor)
        differ += known.hexdigest().encode() != md5
    return differ


def main() -> int:
    """Return 1 if a file differs from the list."""
    lines = Path(sys.argv[1]).read_bytes().splitlines()
    children = []
    for number in range(PROCESSES):
        if (child := os.fork()) == 0:
            os._exit(_differ(lines[number::PROCESSES]) > 0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
