"""The mappings inside a provider's: ``guard``, ``indexer``, ``timeouts`` and ``verify``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from airflow_mdbackup.config.bandwidth import Rate
from airflow_mdbackup.config.value_types import Duration, Part, Schedule, Share

# Strict: text stays text and numbers stay numbers, so that nothing that YAML misread is silently accepted.
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Guard(BaseModel):
    """How much may be gone or changed before a run stops. Immutable."""

    model_config = STRICT

    share: Share = Field(
        default=0.5,
        description=(
            "Stop if more than this share of the consumer index's entries is gone from the provider or"
            " changed, taken together. A moved file counts as gone. `100%` never stops a run."
        ),
        examples=["25%"],
    )
    number: int | None = Field(
        default=None,
        ge=0,
        description="Stop if more than this number of entries is gone or changed, whatever their share.",
        examples=[5000],
    )
    above: int = Field(
        default=100,
        ge=0,
        description=(
            "Do not stop a run while the consumer index has no more entries than this: if there are only a"
            " few files, many of them may change."
        ),
        examples=[20],
    )


class Indexer(BaseModel):
    """How the provider builds its index. Immutable."""

    model_config = STRICT

    jobs: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Number of processes that hash files on the provider. Default: one per core.",
        examples=[2],
    )
    nice: int = Field(
        default=10,
        ge=0,
        le=19,
        description="Niceness of the build on the provider, as in nice(1): 19 gives way most.",
        examples=[19],
    )
    limit: Rate | None = Field(
        default=None,
        description="Maximum rate at which the provider reads files to hash them.",
        examples=["50MB"],
    )
    rehash: Share = Field(
        default=0.0,
        description=(
            "The share of files that each build hashes although their size and times did not change, to find"
            " bit rot on the provider's disk; every file gets its turn. With daily builds, `1%` hashes every"
            " file once in a hundred days; `100%` hashes all of them in each build."
        ),
        examples=["1%"],
    )
    one_file_system: bool = Field(
        default=False,
        description="Skip file systems mounted below a source, unless they are, or contain, another source.",
        examples=[True],
    )

    def options(self) -> dict[str, Any]:
        """Return the corresponding fields of an :class:`.IndexRequest`."""
        words: dict[float, Any] = {0: "changed", 1: "all"}
        return {**self.model_dump(), "rehash": words.get(self.rehash, self.rehash * 100)}


def _timeout(hours: int, what: str) -> Any:
    return Field(default=timedelta(hours=hours), description=f"For {what}.", examples=[f"{2 * hours}h"])


class Timeouts(BaseModel):
    """How long each task may take. Immutable."""

    model_config = STRICT

    build_provider_index: Duration | None = _timeout(12, "building the index on the provider")
    fetch_index: Duration | None = _timeout(2, "fetching it")
    diff_indexes: Duration | None = _timeout(4, "comparing it with the consumer index")
    pull_changed: Duration | None = _timeout(24, "pulling one shard")
    archive_old: Duration | None = _timeout(12, "archiving the files that will be replaced")
    commit_backup: Duration | None = _timeout(12, "putting everything in place")


class Verify(BaseModel):
    """How the backup itself is verified. Immutable."""

    model_config = STRICT

    schedule: Schedule = Field(
        default="@daily",
        description="When it runs, written as the provider's `schedule`; `null`: only when started manually.",
        examples=["30 6 * * *"],
    )
    part: Part = Field(
        default="1/30",
        description=(
            "How much each run reads, from where the last one stopped: a fraction of the backup, a size such"
            " as `50GB`, or `all`, which also reports files that mdbackup does not know. After the last part,"
            " it starts over."
        ),
        examples=["1/7", "50GB", "all"],
    )
    limit: Rate | None = Field(
        default=None,
        description="Maximum rate at which it reads.",
        examples=["50MB"],
    )
    repair: bool = Field(
        default=False,
        description=(
            "Have the next backup pull rotten live files again (bit rot: other bytes with the same size and"
            " time). The rotten content becomes a version. The run that finds them still fails."
        ),
        examples=[True],
    )
    missing: bool = Field(
        default=False,
        description="Have `repair` also do that with missing live files.",
        examples=[True],
    )

    @field_validator("missing")
    @classmethod
    def _check_missing(cls, missing: bool, info: ValidationInfo) -> bool:
        if missing and not info.data.get("repair"):
            raise ValueError("only works with `repair`: also write `repair: true`, or remove it")
        return missing
