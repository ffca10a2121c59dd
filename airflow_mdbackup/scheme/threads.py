"""Many things are worked on in some threads at a time, and what becomes of each comes in their order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from airflow_mdbackup.scheme.ordered import HasPath, batches
from airflow_mdbackup.scheme.tree import Tree

P = TypeVar("P", bound=HasPath)
R = TypeVar("R")

_BATCH = 16  # things that a thread takes at a time, if they are short
_WAITING = 2.0  # times as long as it was busy
_JUDGED = 0.2  # seconds of work after which that is judged
_AHEAD = 4  # batches for each thread that are on their way
_SHORT = 80 << 10  # bytes; below, the interpreter takes longer for a file than its bytes do


def spread(
    things: Iterable[P],
    act: Callable[[P], R],
    threads: int,
    size: Callable[[P], int | None],
) -> Iterator[R]:
    """Yield what ``act`` makes of each thing, in their order; not far ahead of whoever takes it.

    Short work is done by the caller's own thread as long as that keeps it busy: others would only wait with
    it for the interpreter. What ``act`` raises comes in its turn, and ends all.

    :param size: tells how many bytes are read of a thing, or None.
    """
    waiting: deque[Future[list[R]]] = deque()
    own = _OwnThread()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches(things, _BATCH, _BATCH * _SHORT, lambda thing: size(thing) or 0):
                is_short = sum(size(thing) or 0 for thing in batch) < _SHORT * len(batch)
                submit = own.submit if is_short and own.is_busy else pool.submit
                waiting.append(submit(_all, act, batch))
                while waiting and (waiting[0].done() or len(waiting) >= threads * _AHEAD):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _all(act: Callable[[P], R], things: Iterable[P]) -> list[R]:
    return list(map(act, things))


class _OwnThread:
    """Does work at once, and judges whether it is the interpreter that takes the time, or the disk.

    :ivar is_busy: whether the processor was busy with the last work, and not waiting.
    """

    def __init__(self) -> None:
        self.is_busy = True
        self._took = self._busy = 0.0

    def submit(self, work: Callable[..., R], *arguments: Any) -> Future[R]:
        """Return what has come of it, as a pool does."""
        begun = time.monotonic(), time.thread_time()
        future: Future[R] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        self._took += time.monotonic() - begun[0]
        self._busy += time.thread_time() - begun[1]
        if self._took > _JUDGED:
            self.is_busy = self._took < _WAITING * self._busy
            self._took = self._busy = 0.0
        return future


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
