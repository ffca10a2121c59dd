"""Many things are worked on in some threads at a time, and what becomes of each comes in their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from airflow_mdbackup.scheme.ordered import HasPath, batches
from airflow_mdbackup.scheme.tree import Tree

P = TypeVar("P", bound=HasPath)
R = TypeVar("R")

_BATCH = 16  # things that a thread takes at a time
_AHEAD = 4  # batches for each thread that are on their way


def spread(things: Iterable[P], act: Callable[[P], R], threads: int) -> Iterator[R]:
    """Yield what ``act`` makes of each thing, in their order; not far ahead of whoever takes it.

    What it raises comes in its turn, and ends all.
    """
    waiting: deque[Future[list[R]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches(things, _BATCH):
                waiting.append(pool.submit(_all, act, batch))
                while len(waiting) >= threads * _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _all(act: Callable[[P], R], things: Iterable[P]) -> list[R]:
    return list(map(act, things))


class TreePerThread:
    """A tree for each thread that asks, since one is for one thread only. A context manager.

    :param make: opens one.
    """

    def __init__(self, make: Callable[[], Tree]) -> None:
        self._make = make
        self._own = threading.local()
        self._opened = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> TreePerThread:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def __call__(self) -> Tree:
        """Return the tree of the thread that asks."""
        tree: Tree | None = getattr(self._own, "tree", None)
        if tree is None:
            tree = self._own.tree = self._make()
            with self._lock:
                self._opened.enter_context(tree)
        return tree
