"""The paths that an operator asked for, in a command or a form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from pathspec import GitIgnoreSpec

from airflow_mdbackup.scheme.common.paths import from_text


class Selection:
    """The paths that some words select: files, directories with everything below, and gitignore patterns.

    A word that is a path in the history means exactly that path, whatever characters it contains; call
    :meth:`resolve` once the history has been read. No words select everything.

    :param words: as an operator types them: escaped (see :mod:`.paths`) or not, with or without a leading
        slash.
    :raises ValueError: a word is empty, or not a valid pattern.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._words = {word: as_path(word) for word in words}
        if "" in self._words:
            raise ValueError("a path is empty")
        self._matched: set[str] = set()
        self._paths = dict(self._words)
        self._patterns = {word: GitIgnoreSpec.from_lines([_as_pattern(word)]) for word in self._words}

    def __call__(self, path: bytes) -> bool:
        return not self._words or any(self._matching_words(path))

    def take(self, path: bytes) -> bool:
        """Whether ``path`` is selected; if so, remember the words that matched, for :attr:`not_found`."""
        matching = list(self._matching_words(path))
        self._matched.update(matching)
        return bool(matching) or not self._words

    @property
    def is_everything(self) -> bool:
        """Whether there are no words."""
        return not self._words

    @property
    def not_found(self) -> list[str]:
        """The words that matched no path passed to :meth:`take`."""
        return [word for word in self._words if word not in self._matched]

    def resolve(self, knows: Callable[[bytes], bool]) -> None:
        """Decide for each word whether it is a path or a pattern.

        :param knows: whether a path, or anything below it, was ever backed up. Then the word is a path.
        """
        for word, path in self._words.items():
            del (self._patterns if knows(path) else self._paths)[word]

    def _matching_words(self, path: bytes) -> Iterator[str]:
        for word, wanted in self._paths.items():
            if path == wanted or path.startswith(wanted.rstrip(b"/") + b"/"):
                yield word
        for word, spec in self._patterns.items():
            if spec.match_file(os.fsdecode(path[1:])):
                yield word


def as_path(word: str) -> bytes:
    """Return the path that an operator means by a word, escaped or not, with or without a leading slash."""
    try:
        path = from_text(word)
    except ValueError:
        path = os.fsencode(word)
    return b"/" + path.strip(b"/")


def _as_pattern(word: str) -> str:
    """Return a gitignore pattern in which a leading ``!`` or ``#`` has no special meaning."""
    return "\\" + word if word.startswith(("!", "#")) else word
