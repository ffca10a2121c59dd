"""What ransomware on the provider would look like from here, for a warning to a person.

::

    names      many files are gone, and as many are new, under the old names with one ending added
    contents   many changed files of known types no longer begin as their type does, but like random bytes

One such file is nothing; from :data:`MANY` on, and if they are most of what could be, it is told. Nothing is
stopped by it (that is the guard's), and nothing is lost: versions keep what was there before.

What this does not give: it is easily deceived, by whoever encrypts only the ends of files.
"""

from __future__ import annotations

import math
from collections import Counter

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.sorted_paths import Prefixes

MANY = 20
HEAD = 4096  # bytes of a file that are looked at
_ENOUGH = 512  # of fewer bytes nothing can be said
_RANDOM = 7.0  # bits per byte; 512 random bytes have about 7.6
_SHOWN = 3
_ENDINGS = 1000  # that are counted

_ZIP = b"PK"
_OLE = b"\xd0\xcf\x11\xe0"
# How files of a type begin, by the ending of the name.
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
    """Looks at what is gone and what is new, in path order."""

    def __init__(self) -> None:
        self._gone = 0
        self._prefixes = Prefixes()
        self._endings: Counter[bytes] = Counter()

    def gone(self, path: bytes) -> None:
        """Note that an entry is gone."""
        self._gone += 1
        self._prefixes.advance(path)
        self._prefixes.push(path)

    def new(self, path: bytes) -> None:
        """Note that an entry is new."""
        self._prefixes.advance(path)
        before = self._prefixes.last()
        ending = path[len(before) :] if before else b""
        if (
            ending.startswith(b".")
            and b"/" not in ending
            and (ending in self._endings or len(self._endings) < _ENDINGS)
        ):
            self._endings[ending] += 1

    def told(self) -> str | None:
        """Return what a person should know, if it is anything."""
        ((ending, number),) = self._endings.most_common(1) or [(b"", 0)]
        if number < MANY or number * 2 < self._gone:
            return None
        added = to_text(ending)
        return f"{number} of {self._gone} files that are gone came back with {added} added to their names"


class SuspectContents:
    """Looks at how changed files begin."""

    def __init__(self) -> None:
        self._known = 0
        self._found = 0
        self._examples: list[bytes] = []

    def look(self, path: bytes, head: bytes) -> None:
        """Look at a changed file, given its first :data:`HEAD` bytes."""
        ending = path.rpartition(b"/")[2].rpartition(b".")[2].lower()
        beginning = _BEGINNINGS.get(ending)
        if len(head) < _ENOUGH or (beginning is None and ending not in _TEXTS):
            return
        self._known += 1
        is_as_it_should = _is_text(head) if beginning is None else head.startswith(beginning)
        if not is_as_it_should and _bits(head) > _RANDOM:
            self._found += 1
            if len(self._examples) < _SHOWN:
                self._examples.append(path)

    def told(self) -> str | None:
        """Return what a person should know, if it is anything."""
        if self._found < MANY or self._found * 2 < self._known:
            return None
        examples = ", ".join(map(to_text, self._examples))
        return (
            f"{self._found} of {self._known} changed files of known types look encrypted (such as {examples})"
        )


def _is_text(head: bytes) -> bool:
    """Whether it may be text in ASCII or UTF-8, possibly cut in the middle of a character."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and error.reason == "unexpected end of data"
    return True


def _bits(head: bytes) -> float:
    """Return the entropy of single bytes, in bits per byte (Shannon 1948)."""
    size = len(head)
    return -sum(number / size * math.log2(number / size) for number in Counter(head).values())
