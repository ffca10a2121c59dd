"""TODO"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from pathspec import GitIgnoreSpec

from airflow_mdbackup.scheme.common.paths import from_text


class Selection:
    """Paths that somebody asked for: files, directories with all below, and gitignore patterns.

    A word that is a path of the past means just that one, whatever characters are in it; call :meth:`settle`
    once the past is read. No words mean everything.

    :param words: as people write them: escaped (see :mod:`.paths`) or not, with or without a leading slash.
    :raises ValueError: one is empty, or no pattern.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._words = {word: as_path(word) for word in words}
        if "" in self._words:
            raise ValueError("a path is empty")
        self._found: set[str] = set()
        self._paths = dict(self._words)
        self._patterns = {word: GitIgnoreSpec.from_lines([_pattern(word)]) for word in self._words}

    def __call__(self, path: bytes) -> bool:
        return not self._words or any(self._matching(path))

    def take(self, path: bytes) -> bool:
        """Whether ``path`` is chosen; noting for which words."""
        found = list(self._matching(path))
        self._found.update(found)
        return bool(found) or not self._words

    @property
    def is_everything(self) -> bool:
        """Whether there are no words."""
        return not self._words

    @property
    def not_found(self) -> list[str]:
        """Words for which no path was taken."""
        return [word for word in self._words if word not in self._found]

    def settle(self, knows: Callable[[bytes], bool]) -> None:
        """Take each word for a path, if there ever was one, or anything below it, and else for a pattern."""
        for word, path in self._words.items():
            del (self._patterns if knows(path) else self._paths)[word]

    def _matching(self, path: bytes) -> Iterator[str]:
        for word, wanted in self._paths.items():
            if path == wanted or path.startswith(wanted.rstrip(b"/") + b"/"):
                yield word
        for word, spec in self._patterns.items():
            if spec.match_file(os.fsdecode(path[1:])):
                yield word


def as_path(word: str) -> bytes:
    """Return the path that somebody means who writes it escaped or not, with or without a leading slash."""
    try:
        path = from_text(word)
    except ValueError:
        path = os.fsencode(word)
    return b"/" + path.strip(b"/")


def _pattern(word: str) -> str:
    """Return a gitignore pattern in which nothing at the beginning has another meaning than elsewhere."""
    return "\\" + word if word.startswith(("!", "#")) else word
