"""TODO"""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What became of one entry."""

    PULLED = "pulled"
    COPIED = "copied"
    ADOPTED = "adopted"
    SUPERSEDED = "superseded"
    CHANGED = "changed"
    VANISHED = "vanished"
    DENIED = "denied"
    CORRUPT = "corrupt"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    ROTTEN = "rotten"

    @property
    def good(self) -> bool:
        """Whether the entry is where it should be."""
        return self in (Outcome.PULLED, Outcome.COPIED, Outcome.ADOPTED, Outcome.SUPERSEDED)

    @property
    def failure(self) -> bool:
        """Whether the run fails for it. What is neither good nor a failure is a warning."""
        return not self.good and self not in (Outcome.CHANGED, Outcome.VANISHED)

    @property
    def warning(self) -> bool:
        """Whether operators should know of it, although the run does not fail."""
        return not self.good and not self.failure

    @property
    def is_staged(self) -> bool:
        """Whether it means that the content is in staging."""
        return self in (Outcome.PULLED, Outcome.COPIED)
