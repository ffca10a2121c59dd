"""TODO"""

from __future__ import annotations

from dataclasses import dataclass, field

from airflow_mdbackup.scheme.files.jsonl import Record
from airflow_mdbackup.scheme.store.run import Run


class PlanItem(Record, frozen=True):
    """An entry to pull. ``adopt`` says that a live file is there which may already be it."""

    path: bytes
    md5: bytes
    replaces: bytes | None = None  # the md5 in the consumer index
    source: bytes | None = None  # a live path which should have the same bytes
    adopt: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be gone or changed before a person should look.

    :ivar share: of the consumer index's entries, 0 to 1.
    :ivar number: of entries, or None for no limit in numbers.
    :ivar above: the limits hold once the consumer index has more entries than this.
    """

    share: float = 0.5
    number: int | None = None
    above: int = 100


USUAL_LIMITS = Limits()


@dataclass(slots=True)
class Plan:
    """The summary of a plan. The counts are of entries, after ``exclude``."""

    same: int = 0
    new: int = 0
    changed: int = 0
    adopt: int = 0  # of new: a live file is there
    gone: int = 0
    kept: int = 0  # gone, but at or below a path that the provider could not read
    copy: int = 0  # of new and changed: to be copied from content that is on B
    unreadable: int = 0
    unreadable_paths: list[str] = field(default_factory=list)  # the first few
    rotten: int = 0
    rotten_paths: list[str] = field(default_factory=list)  # the first few
    consumer: int = 0
    shards: list[int] = field(default_factory=list)  # items in each
    guard: list[str] = field(default_factory=list)  # why the guard tripped
    overridden: bool = False  # the guard, by a person
    partial: bool = False  # only some paths were asked for
    telltale: str | None = None  # what ransomware would look like, if it is anything
    digest: str = ""
    provider_time: int = 0  # Unix seconds on A: what changed there since is newer than its index
    committed: str = ""  # stamp of the last commit that the plan knows of
    attempt: int = 0  # which try of the run made it
    hides: bool = False  # entries of the consumer index may be hidden from it: excluded, or not looked at

    @property
    def pull(self) -> int:
        """Entries to pull, copy or adopt."""
        return self.new + self.changed


def read_plan(run: Run) -> Plan:
    """Return the summary of the plan of a run.

    :raises RunIncomplete: there is none.
    """
    state = run.require(run.plan, "diff_indexes")
    state.pop("format")
    return Plan(**state)
