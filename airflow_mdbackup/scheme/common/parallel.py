"""Work on many things in a few threads, with the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from airflow_mdbackup.scheme.common.sorted_paths import HasPath, batches

P = TypeVar("P", bound=HasPath)
R = TypeVar("R")

_BATCH = 16  # small things that a thread takes at a time
_SMALL = 80 << 10  # bytes; a larger thing is worth a batch of its own sooner
_AHEAD = 4  # batches per thread that are under way


def parallel_map(
    things: Iterable[P],
    act: Callable[[P], R],
    threads: int,
    size: Callable[[P], int | None],
) -> Iterator[R]:
    """Yield what ``act`` returns for each thing, in order, and not far ahead of the consumer.

    An exception of ``act`` is raised in its turn, and ends everything.

    :param threads: how many things are worked on at a time.
    :param size: returns how many bytes are read for a thing; None if that is not known.
    """
    under_way: deque[Future[list[R]]] = deque()

    def weight(thing: P) -> int:
        known = size(thing)
        return _SMALL if known is None else known

    def act_on(batch: list[P]) -> list[R]:
        return list(map(act, batch))

    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches(things, _BATCH, _BATCH * _SMALL, weight):
                under_way.append(pool.submit(act_on, batch))
                if len(under_way) >= threads * _AHEAD:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
