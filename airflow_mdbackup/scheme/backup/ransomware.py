"""Warns of what looks like ransomware on the provider.

::

    names      many files are gone, and as many are new, under the old names with an extension appended
    contents   many changed files of known types no longer begin as their type does, but with random bytes

There is a warning if there are at least :data:`MANY` such files, and if they are the majority of those that
could be. It stops nothing, which is the guard's job, and nothing is lost: versions keep the old contents.

Limitations: it is easily deceived, for example by encrypting only the ends of files.
"""

from __future__ import annotations

import math
from collections import Counter

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import Prefixes

MANY = 20
HEAD = 4096  # bytes to inspect of each file
_MIN_SIZE = 512  # fewer bytes prove nothing
_RANDOM = 7.0  # bits per byte; 512 random bytes have about 7.6
_EXAMPLES = 3  # paths that a warning names
_MAX_EXTENSIONS = 1000  # different ones to count

_ZIP = b"PK"
_OLE = b"\xd0\xcf\x11\xe0"
# The first bytes of a file, by the extension of its name.
_BEGINNINGS: dict[bytes, bytes] = {
    **dict.fromkeys(b"docx xlsx pptx odt ods odp zip jar epub".split(), _ZIP),
    **dict.fromkeys(b"doc xls ppt msg".split(), _OLE),
    **dict.fromkeys(b"jpg jpeg".split(), b"\xff\xd8\xff"),
    b"pdf": b"%PDF",
    b"png": b"\x89PNG",
    b"gif": b"GIF8",
    b"gz": b"\x1f\x8b",
    b"xz": b"\xfd7zXZ",
    b"bz2": b"BZh",
    b"7z": b"7z\xbc\xaf",
    b"rtf": b"{\\rt",
    b"sqlite": b"SQLite format 3",
}
_TEXTS = frozenset(b"txt csv json xml html md sql log py php js css yml yaml ini conf".split())


class SuspectNames:
    """Looks for added extensions among the entries that are gone and new, given in path order."""

    def __init__(self) -> None:
        self._gone = 0
        self._prefixes = Prefixes()
        self._extensions: Counter[bytes] = Counter()

    def add_gone(self, path: bytes) -> None:
        """Count an entry that is gone."""
        self._gone += 1
        self._prefixes.advance(path)
        self._prefixes.push(path)

    def add_new(self, path: bytes) -> None:
        """Count an entry that is new."""
        self._prefixes.advance(path)
        gone = self._prefixes.last()
        extension = path[len(gone) :] if gone else b""
        if (
            extension.startswith(b".")
            and b"/" not in extension
            and (extension in self._extensions or len(self._extensions) < _MAX_EXTENSIONS)
        ):
            self._extensions[extension] += 1

    def warning(self) -> str | None:
        """Return the warning, or None."""
        ((extension, number),) = self._extensions.most_common(1) or [(b"", 0)]
        if number < MANY or number * 2 < self._gone:
            return None
        added = to_text(extension)
        return f"{number} of {self._gone} files that are gone came back with {added} added to their names"


class SuspectContents:
    """Inspects the beginnings of changed files."""

    def __init__(self) -> None:
        self._inspected = 0
        self._suspect = 0
        self._examples: list[bytes] = []

    def inspect(self, path: bytes, head: bytes) -> None:
        """Inspect a changed file, given its first :data:`HEAD` bytes."""
        extension = path.rpartition(b"/")[2].rpartition(b".")[2].lower()
        beginning = _BEGINNINGS.get(extension)
        if len(head) < _MIN_SIZE or (beginning is None and extension not in _TEXTS):
            return
        self._inspected += 1
        is_of_its_type = _is_text(head) if beginning is None else head.startswith(beginning)
        if not is_of_its_type and _entropy(head) > _RANDOM:
            self._suspect += 1
            if len(self._examples) < _EXAMPLES:
                self._examples.append(path)

    def warning(self) -> str | None:
        """Return the warning, or None."""
        if self._suspect < MANY or self._suspect * 2 < self._inspected:
            return None
        examples = ", ".join(map(to_text, self._examples))
        counts = f"{self._suspect} of {self._inspected} changed files of known types"
        return f"{counts} look encrypted (such as {examples})"


def _is_text(head: bytes) -> bool:
    """Whether it may be ASCII or UTF-8 text, possibly cut off within a character."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and error.reason == "unexpected end of data"
    return True


def _entropy(head: bytes) -> float:
    """Return the entropy of the bytes, in bits per byte (Shannon 1948)."""
    size = len(head)
    return -sum(number / size * math.log2(number / size) for number in Counter(head).values())
