"""Walks in path order, which need not hold what they walk over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class HasPath(Protocol):
    """Anything that is about one path."""

    @property
    def path(self) -> bytes: ...


P = TypeVar("P", bound=HasPath)


def _length(thing: HasPath) -> int:
    return len(thing.path)


def batches(
    things: Iterable[P], most: int, size: int = 16 << 20, weight: Callable[[P], int] = _length
) -> Iterator[list[P]]:
    """Yield ``things`` in lists, each of at most ``most`` of them, ended by the one that fills ``size``.

    :param weight: how many bytes a thing counts; default: those of its path.
    """
    batch: list[P] = []
    held = 0
    for thing in things:
        batch.append(thing)
        held += weight(thing)
        if len(batch) >= most or held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class SortedLookup(Generic[P]):
    """A stream of things in path order, in which paths are looked up that come in the same order."""

    def __init__(self, things: Iterable[P]) -> None:
        self._things = iter(things)
        self._next = next(self._things, None)

    def find(self, path: bytes) -> P | None:
        """Return the thing that is about ``path``, if there is one."""
        while self._next is not None and self._next.path < path:
            self._next = next(self._things, None)
        return self._next if self._next is not None and self._next.path == path else None


class PathsBelow:
    """Which paths lie at or below one of some others. Both come in path order."""

    def __init__(self, others: Iterator[bytes]) -> None:
        self._others = others
        self._next = next(others, None)
        self._prefixes = Prefixes()

    def covers(self, path: bytes) -> bool:
        """Whether ``path`` lies at or below one of them."""
        while self._next is not None and self._next <= path:
            self._prefixes.advance(self._next)
            self._prefixes.push(self._next)
            self._next = next(self._others, None)
        self._prefixes.advance(path)
        return self._prefixes.above(path) is not None


class Prefixes:
    """Those of the paths met so far that the current one begins with, in a walk in path order.

    Paths that share a prefix follow one another in raw byte order, though not at once (``/x``, ``/x-1``,
    ``/x/y``), so that a stack holds all that can still matter.
    """

    def __init__(self) -> None:
        self._stack: list[bytes] = []

    def advance(self, path: bytes) -> None:
        """Move on to ``path``, which must not sort before the last one."""
        while self._stack and not path.startswith(self._stack[-1]):
            self._stack.pop()

    def push(self, path: bytes) -> None:
        """Remember ``path``, which was just advanced to."""
        self._stack.append(path)

    def last(self) -> bytes | None:
        """Return the longest remembered path that the current one begins with, or None."""
        return self._stack[-1] if self._stack else None

    def above(self, path: bytes) -> bytes | None:
        """Return a remembered path that is ``path`` itself or a directory above it, or None."""
        for prefix in self._stack:
            if len(prefix) == len(path) or path[len(prefix)] == 0x2F or prefix.endswith(b"/"):
                return prefix
        return None
