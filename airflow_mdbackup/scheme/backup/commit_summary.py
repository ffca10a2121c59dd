"""The outcome of a run: counts for its log and alerts, and the status that monitoring reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from airflow_mdbackup.scheme.backup.results import MAX_NAMED
from airflow_mdbackup.scheme.errors import EntriesFailed
from airflow_mdbackup.scheme.files.jsonl import write_state
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.history.usage import totals_state
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run


@dataclass(slots=True)
class CommitSummary:
    """The outcome of a run.

    :ivar outcomes: how many entries had each outcome.
    :ivar added: entries that are new in the mirror; ``replaced``, ``adopted``, ``forgotten`` likewise.
    :ivar size: bytes that were put in place.
    :ivar files: entries in the consumer index afterwards.
    :ivar superseded: a run with a newer provider index was committed before, and nothing was changed.
    :ivar doubtful: superseded, and the last committed run was not good, or limited to some paths.
    :ivar partial: the run was limited to some paths, so it does not count as a good run.
    :ivar failures: the first of the entries for which the run fails, as text.
    :ivar failed: how many of them there are.
    :ivar clock: a message why the clock of this machine may be wrong, or None.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    added: int = 0
    replaced: int = 0
    adopted: int = 0
    forgotten: int = 0
    size: int = 0
    files: int = 0
    superseded: bool = False
    doubtful: bool = False
    partial: bool = False
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    clock: str | None = None

    def count(self, outcome: Outcome, number: int = 1) -> None:
        """Count ``number`` entries with an outcome; a negative number takes them back."""
        total = self.outcomes.get(outcome.value, 0) + number
        if total:
            self.outcomes[outcome.value] = total
        else:
            self.outcomes.pop(outcome.value, None)

    def fail(self, outcome: Outcome, what: str, number: int = 1) -> None:
        """Record ``number`` failed entries, and name them if there is still room."""
        self.failed += number
        if number and len(self.failures) < MAX_NAMED:
            self.failures.append(f"{outcome} {what}")

    def fail_remarks(self, outcome: Outcome, number: int, paths: Sequence[str], detail: str) -> None:
        """Record that the provider's index has a remark on ``number`` paths; ``paths`` are the first few."""
        self.count(outcome, number)
        for path in paths:
            self.fail(outcome, f"{path} ({detail})")
        self.fail(outcome, "(others)", number - len(paths))

    def raise_for_failures(self, provider: str) -> None:
        """Raise :class:`EntriesFailed` if any entry failed, naming the first."""
        if self.failed:
            files = "file" if self.failed == 1 else "files"
            others = self.failed - len(self.failures)
            more = f", and {others} more" if others > 0 else ""
            raise EntriesFailed(
                f"{provider}: {self.failed} {files} could not be backed up, all others are committed: "
                f"{'; '.join(self.failures)}{more}"
            )


def write_status(
    mirror: Mirror, run: Run, summary: CommitSummary, status: dict[str, Any], order: str
) -> None:
    """Write the status, which monitoring reads, and by which later runs know whether theirs is newer.

    :param status: the previous one.
    :param order: the place of the last committed provider index in the order of all runs.
    """
    now = {
        "run_id": run.run_id,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": summary.seconds,
        "outcomes": summary.outcomes,
        "partial": summary.partial,
    }
    new = {"provider": mirror.provider, "order": order, "files": summary.files, "last_commit": now}
    good = status.get("last_good") if summary.failed or summary.partial else now
    if good:
        new["last_good"] = good
    if summary.clock:
        new["clock"] = summary.clock
    write_state(mirror.status, {**new, **totals_state(mirror, status, summary.files)})
