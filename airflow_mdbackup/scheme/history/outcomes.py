"""What can become of an entry in a run.

A new one is added here. The steps, operators and alerts ask here whether it is good, a warning or a failure.
It also needs the step that sets it (for a pull, ``backup/pull_item``), and its line in docs/errors.md.
"""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What became of one entry in a run."""

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
        """Whether nothing is left to do for the entry in this run."""
        return self in (Outcome.PULLED, Outcome.COPIED, Outcome.ADOPTED, Outcome.SUPERSEDED)

    @property
    def failure(self) -> bool:
        """Whether it fails the run. An outcome that is neither good nor a failure is a warning."""
        return not self.good and self not in (Outcome.CHANGED, Outcome.VANISHED)

    @property
    def warning(self) -> bool:
        """Whether operators should know of it, although the run does not fail."""
        return not self.good and not self.failure

    @property
    def is_staged(self) -> bool:
        """Whether it means that the content is in staging."""
        return self in (Outcome.PULLED, Outcome.COPIED)
