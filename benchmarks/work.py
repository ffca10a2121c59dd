"""A work: what is measured, with how much data, against whom, and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.data import Data
from benchmarks.results import Measurement
from benchmarks.scene import Scene


@dataclass(frozen=True, slots=True)
class Against:
    """A peer, the ratio that is wanted, and which part of the data it gets if all would take too long."""

    peer: str
    wanted: str = ""
    part: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """Something to measure.

    :ivar about: what it is, for people; ``note``: what is counted.
    :ivar measure: does so, for a number of rounds.
    :ivar rtt: milliseconds of a round trip, each in turn; empty if it is no work of copying.
    :ivar shards: their numbers, each in turn.
    :ivar wanted: targets beside those of ``against``, by contestant.
    :ivar room_each: bytes of disk that it takes for each of `data`'s files; default: their own, three times.
    """

    about: str
    note: str
    measure: Callable[[Scene, Work, int], Iterator[Measurement]]
    data: Data
    against: tuple[Against, ...] = ()
    rtt: tuple[float, ...] = ()
    shards: tuple[int, ...] = (1,)
    wanted: tuple[tuple[str, str], ...] = ()
    room_each: int = 0

    @property
    def room(self) -> int:
        """Bytes of disk that it takes."""
        return self.room_each * self.data.files or 3 * self.data.room

    @property
    def targets(self) -> dict[str, str]:
        """What is wanted, by contestant."""
        return {other.peer: other.wanted for other in self.against} | dict(self.wanted)

    def scaled(self, scale: float) -> Work:
        """Return the same with less data."""
        return replace(self, data=self.data.scaled(scale))
