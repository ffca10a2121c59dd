"""Many things are worked on in some threads at a time, and what becomes of each comes in their order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TypeVar

from airflow_mdbackup.scheme.ordered import HasPath, batches
from airflow_mdbackup.scheme.tree import Tree

P = TypeVar("P", bound=HasPath)
R = TypeVar("R")

_BATCH = 16  # things that a thread takes at a time
_WAITING = 3.0  # times as long as it was busy: who waits for the interpreter, waits less
_JUDGED = 0.2  # seconds of work after which that is judged
_AHEAD = 4  # batches for each thread that are on their way


_SHORT = 128 << 10  # bytes; below, the interpreter takes longer for a file than its bytes do


def spread(
    things: Iterable[P],
    act: Callable[[P], R],
    threads: int,
    size: Callable[[P], int | None] = lambda thing: None,
) -> Iterator[R]:
    """Yield what ``act`` makes of each thing, in their order; not far ahead of whoever takes it.

    What it raises comes in its turn, and ends all.

    :param size: tells how many bytes are read of a thing, or None.
    """
    waiting: deque[Future[list[R]]] = deque()
    turns = _Turns()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches(things, _BATCH):
                is_short = sum(size(thing) or 0 for thing in batch) < _SHORT * len(batch)
                waiting.append(pool.submit(_all, act, batch, turns if is_short else nullcontext()))
                while len(waiting) >= threads * _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _all(act: Callable[[P], R], things: Iterable[P], turns: AbstractContextManager[object]) -> list[R]:
    with turns:
        return list(map(act, things))


class _Turns(AbstractContextManager[None]):
    """Lets threads take turns with short work, as long as it is the interpreter that it waits for.

    Together they would only hand its lock to each other, at every call of the system: two threads take half
    as long again as one. Where the disk is what they wait for, they all go on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = threading.local()
        self._waits = False
        self._took = self._busy = 0.0

    def __enter__(self) -> None:
        self._own.begun = None
        if not self._waits:
            self._lock.acquire()
            self._own.begun = time.monotonic(), time.thread_time()

    def __exit__(self, *error: object) -> None:
        if self._own.begun is not None:
            self._took += time.monotonic() - self._own.begun[0]
            self._busy += time.thread_time() - self._own.begun[1]
            if self._took > _JUDGED:
                self._waits = self._took > _WAITING * self._busy
                self._took = self._busy = 0.0
            self._lock.release()


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
