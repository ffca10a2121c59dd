"""Many things are worked on in some threads at a time, and what becomes of each comes in their order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from airflow_mdbackup.scheme.common.sorted_paths import HasPath, batches

P = TypeVar("P", bound=HasPath)
R = TypeVar("R")
A = TypeVar("A")

_BATCH = 16  # things that a thread takes at a time, if they are short
_WAITING = 3.0  # times as long as it was busy
_JUDGED = 0.2  # seconds of work after which that is judged
_AGAIN = 32  # short batches, one of which tells whether the disk has become fast
_AHEAD = 4  # batches for each thread that are on their way
_SHORT = 80 << 10  # bytes; below, the interpreter takes longer for a file than its bytes do


def parallel_map(
    things: Iterable[P],
    act: Callable[[P], R],
    threads: int,
    size: Callable[[P], int | None],
) -> Iterator[R]:
    """Yield what ``act`` makes of each thing, in their order; not far ahead of whoever takes it.

    Short work is done by the caller's own thread, unless it is the disk that takes the time: several threads
    would only wait for the interpreter. What ``act`` raises comes in its turn, and ends all.

    :param threads: how many things are worked on at a time.
    :param size: tells how many bytes are read of a thing; None where that is not known.
    """
    waiting: deque[Future[list[R]]] = deque()
    own, at_work = _OwnThread(), threading.Semaphore(threads)

    def weight(thing: P) -> int:
        known = size(thing)
        return _SHORT if known is None else known

    def act_on(batch: list[P]) -> list[R]:
        return list(map(act, batch))

    def act_beside(batch: list[P]) -> list[R]:
        with at_work:
            return act_on(batch)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches(things, _BATCH, _BATCH * _SHORT, weight):
                is_short = sum(map(weight, batch)) < _SHORT * len(batch)
                if is_short and own.is_next():
                    while waiting and not own.is_busy:  # others would make it wait for the interpreter
                        yield from waiting.popleft().result()
                    with at_work:
                        waiting.append(own.submit(act_on, batch))
                else:
                    waiting.append(pool.submit(act_beside, batch))
                while waiting and (waiting[0].done() or len(waiting) >= threads * _AHEAD):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _OwnThread:
    """Does work at once, and judges whether it is the interpreter that takes the time, or the disk.

    :ivar is_busy: whether it was the interpreter when last seen.
    """

    def __init__(self) -> None:
        self.is_busy = True
        self._left_out = 0
        self._took = self._busy = 0.0

    def is_next(self) -> bool:
        """Whether the next short work is for this thread: while it is busy, and else now and then, to see."""
        self._left_out += 1
        if self.is_busy or self._left_out >= _AGAIN:
            self._left_out = 0
            return True
        return False

    def submit(self, work: Callable[[A], R], things: A) -> Future[R]:
        """Return what has come of it, as a pool does."""
        begun = time.monotonic(), time.thread_time()
        future: Future[R] = Future()
        try:
            future.set_result(work(things))
        except Exception as error:
            future.set_exception(error)
        self._took += time.monotonic() - begun[0]
        self._busy += time.thread_time() - begun[1]
        if self._took > _JUDGED or not self.is_busy:
            self.is_busy = self._took < _WAITING * self._busy
            self._took = self._busy = 0.0
        return future
