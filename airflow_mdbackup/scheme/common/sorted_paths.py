"""Work on streams in path order, without holding them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class HasPath(Protocol):
    """Anything with a path."""

    @property
    def path(self) -> bytes: ...


P = TypeVar("P", bound=HasPath)


def _length(thing: HasPath) -> int:
    return len(thing.path)


def batches(
    things: Iterable[P], most: int, size: int = 16 << 20, weight: Callable[[P], int] = _length
) -> Iterator[list[P]]:
    """Yield ``things`` in lists, each of at most ``most``, and ended by the one that reaches ``size``.

    :param weight: bytes that a thing counts; by default, those of its path.
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
    """Looks up paths in a stream of things; both are in path order."""

    def __init__(self, things: Iterable[P]) -> None:
        self._things = iter(things)
        self._next = next(self._things, None)

    def find(self, path: bytes) -> P | None:
        """Return the thing with this path, or None."""
        while self._next is not None and self._next.path < path:
            self._next = next(self._things, None)
        return self._next if self._next is not None and self._next.path == path else None


class PathsBelow:
    """Which paths are at or below one of some others; both are in path order."""

    def __init__(self, others: Iterator[bytes]) -> None:
        self._others = others
        self._next = next(others, None)
        self._prefixes = Prefixes()

    def covers(self, path: bytes) -> bool:
        """Whether ``path`` is at or below one of them."""
        while self._next is not None and self._next <= path:
            self._prefixes.advance(self._next)
            self._prefixes.push(self._next)
            self._next = next(self._others, None)
        self._prefixes.advance(path)
        return self._prefixes.above(path) is not None


class Prefixes:
    """Which of the remembered paths are prefixes of the current one, when walking in path order.

    In raw byte order, paths with a common prefix follow one another, if not immediately (``/x``, ``/x-1``,
    ``/x/y``), so a stack holds all that still matter.
    """

    def __init__(self) -> None:
        self._stack: list[bytes] = []

    def advance(self, path: bytes) -> None:
        """Continue with ``path``, which must not sort before the previous one."""
        while self._stack and not path.startswith(self._stack[-1]):
            self._stack.pop()

    def push(self, path: bytes) -> None:
        """Remember ``path``, the current one."""
        self._stack.append(path)

    def last(self) -> bytes | None:
        """Return the longest remembered prefix of the current path, or None."""
        return self._stack[-1] if self._stack else None

    def above(self, path: bytes) -> bytes | None:
        """Return a remembered path that is ``path`` or a directory above it, or None."""
        for prefix in self._stack:
            if len(prefix) == len(path) or path[len(prefix)] == 0x2F or prefix.endswith(b"/"):
                return prefix
        return None
