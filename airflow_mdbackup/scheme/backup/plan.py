"""A plan: what a run will do, and the options by which that is decided.

The items are in files of the run's directory, one for each shard; the summary is in ``plan.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from airflow_mdbackup.scheme.files.jsonl import Record
from airflow_mdbackup.scheme.store.run import Run


class PlanItem(Record, frozen=True):
    """An entry to pull. ``adopt``: there is a live file that may already have its content."""

    path: bytes
    md5: bytes
    replaces: bytes | None = None  # the md5 in the consumer index
    source: bytes | None = None  # the path of a live file that should have the same bytes
    adopt: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be gone or changed before the guard stops a run.

    :ivar share: of the consumer index's entries, 0 to 1.
    :ivar number: of entries, or None for no limit in numbers.
    :ivar above: the limits apply if the consumer index has more entries than this.
    """

    share: float = 0.5
    number: int | None = None
    above: int = 100


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a plan is made.

    :ivar source: the paths that the provider is configured to index.
    :ivar exclude: gitignore patterns, matched against paths without their leading slash.
    :ivar only: files, and directories with everything below, to which the run is limited; empty: no limit.
    :ivar limits: when the guard stops the run.
    :ivar allow_empty: whether the guard lets an index or a source without any entries pass.
    """

    source: Sequence[bytes] = ()
    exclude: Sequence[str] = ()
    only: Sequence[bytes] = ()
    limits: Limits = DEFAULT_LIMITS
    allow_empty: bool = False


@dataclass(slots=True)
class Plan:
    """The summary of a plan, as in ``plan.json``. Counts are of entries that are not excluded."""

    same: int = 0
    new: int = 0
    changed: int = 0
    adopt: int = 0  # of new: those with a live file
    gone: int = 0
    kept: int = 0  # gone, but at or below a path that the provider could not read
    copy: int = 0  # of new and changed: to be copied from content on B
    unreadable: int = 0
    unreadable_paths: list[str] = field(default_factory=list)  # the first few
    rotten: int = 0
    rotten_paths: list[str] = field(default_factory=list)  # the first few
    consumer: int = 0
    shards: list[int] = field(default_factory=list)  # items in each
    guard: list[str] = field(default_factory=list)  # the reasons of the guard
    overridden: bool = False  # by an operator, although the guard has reasons
    partial: bool = False  # limited to some paths
    telltale: str | None = None  # a warning of what looks like ransomware
    digest: str = ""
    provider_time: int = 0  # when A's index was begun, in Unix seconds by A's clock
    committed: str = ""  # stamp of the last commit when the plan was made
    attempt: int = 0  # the try of the task that made it
    hides: bool = False  # it may not cover all entries of the consumer index

    @property
    def pull(self) -> int:
        """Entries to pull, copy or adopt."""
        return self.new + self.changed


def read_plan(run: Run) -> Plan:
    """Return the summary of the plan of a run.

    :raises RunIncomplete: the run has no plan.
    """
    state = run.require(run.plan, "diff_indexes")
    state.pop("format")
    return Plan(**state)
