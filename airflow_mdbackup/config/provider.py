"""The keys of a provider: the schema that reads the configuration and that the reference is made from.

Every key has a description and examples, in the words of whoever writes the file; ``docs/reference`` and
the sample file are generated from them.
"""

from __future__ import annotations

import re
from datetime import timedelta
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from airflow_mdbackup.config.alert import AlertRule
from airflow_mdbackup.config.bandwidth import Bandwidth, Rate
from airflow_mdbackup.config.schedule import default_max_age
from airflow_mdbackup.config.values import (
    AbsolutePath,
    Duration,
    Part,
    PathBelowRoot,
    Paths,
    Patterns,
    Schedule,
    Share,
    Size,
    Tags,
    Text,
    as_tuple,
    check_schedule,
)
from airflow_mdbackup.scheme.backup.fetch import MAX_SIZE
from airflow_mdbackup.scheme.common.units import shown_value

RESERVED_NAMES = ("watchdog", "restore", "verify")
# Strict: text stays text and numbers stay numbers, so that nothing YAML misread is quietly accepted.
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


def is_reserved(name: str) -> bool:
    """Tell whether a name belongs to a DAG of our own that backs nothing up."""
    return name in RESERVED_NAMES or name.startswith("verify_")


def is_name(name: str) -> bool:
    """Tell whether a provider may be called so."""
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def check_name(name: object) -> str:
    """Return ``name`` if a provider may be called so.

    :raises ValueError: it is no text, has other characters, is too long, or is reserved.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"a provider's name must be text, but YAML reads {shown_value(name)}: put it in quotes"
        )
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,99}", name):
        raise ValueError(
            "a provider's name is made of lowercase letters, digits, `_` and `-`, begins with a letter or"
            " digit, and has at most 100 characters: rename it"
        )
    if is_reserved(name):
        raise ValueError(
            f"`{'`, `'.join(RESERVED_NAMES)}` and names that begin with `verify_` are reserved for DAGs that"
            " back nothing up: choose another name"
        )
    return name


class Guard(BaseModel):
    """How much may be gone or changed before a run stops. Immutable."""

    model_config = _STRICT

    share: Share = Field(
        default=0.5,
        description=(
            "Stop when more than this share of the entries in the consumer index is gone from the provider or"
            " changed, both together. A moved file counts as gone. `100%` never stops."
        ),
        examples=["25%"],
    )
    number: int | None = Field(
        default=None,
        ge=0,
        description="Stop when more than this number of entries is gone or changed, whatever their share.",
        examples=[5000],
    )
    above: int = Field(
        default=100,
        ge=0,
        description=(
            "Judge only once the consumer index has more entries than this: of a few files, many may change."
        ),
        examples=[20],
    )


class Indexer(BaseModel):
    """How the provider is asked to build its index. Immutable."""

    model_config = _STRICT

    jobs: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="How many processes hash on the provider. Default: one for each of its cores.",
        examples=[2],
    )
    nice: int = Field(
        default=10,
        ge=0,
        le=19,
        description="How much the build steps back behind whatever else runs on the provider, as in nice(1).",
        examples=[19],
    )
    limit: Rate | None = Field(
        default=None,
        description="How many bytes per second the provider reads at most to hash them.",
        examples=["50MB"],
    )
    rehash: Share = Field(
        default=0.0,
        description=(
            "The share of files that each build hashes although their size and times did not change, to find"
            " what rotted on the provider's disk; each file has its turn. `1%` of a daily build is every file"
            " in a hundred days, `100%` is all of them each time."
        ),
        examples=["1%"],
    )
    one_file_system: bool = Field(
        default=False,
        description="Leave out what is mounted below a source, unless it is, or contains, another source.",
        examples=[True],
    )

    def options(self) -> dict[str, Any]:
        """Return the fields of an :class:`.IndexRequest` that say the same."""
        words: dict[float, Any] = {0: "changed", 1: "all"}
        return {**self.model_dump(), "rehash": words.get(self.rehash, self.rehash * 100)}


def _limit(hours: int, of: str) -> Any:
    return Field(default=timedelta(hours=hours), description=f"Of {of}.", examples=[f"{2 * hours}h"])


class Timeouts(BaseModel):
    """How long each task may take. Immutable."""

    model_config = _STRICT

    build_provider_index: Duration | None = _limit(12, "building the index on the provider")
    fetch_index: Duration | None = _limit(2, "fetching it")
    diff_indexes: Duration | None = _limit(4, "comparing it with the consumer index")
    pull_changed: Duration | None = _limit(24, "one shard's pull")
    archive_old: Duration | None = _limit(12, "archiving what is about to be replaced")
    commit_backup: Duration | None = _limit(12, "putting all in place")


class Verify(BaseModel):
    """How the backup itself is read again. Immutable."""

    model_config = _STRICT

    schedule: Schedule = Field(
        default="@daily",
        description="When, written as the provider's own `schedule`; `null`: only a person starts it.",
        examples=["30 6 * * *"],
    )
    part: Part = Field(
        default="1/30",
        description=(
            "How much each run reads, from where the last one ended: a fraction of all, a size such as"
            " `50GB`, or `all`, which also tells of files that nobody knows. After the last part it begins"
            " anew."
        ),
        examples=["1/7", "50GB", "all"],
    )
    limit: Rate | None = Field(
        default=None,
        description="How many bytes per second it reads at most.",
        examples=["50MB"],
    )
    repair: bool = Field(
        default=False,
        description=(
            "Have the next backup pull again the live files that are rotten: other bytes, though size and"
            " time are as they were. The rotten bytes become versions. The run that finds them fails all the"
            " same."
        ),
        examples=[True],
    )
    missing: bool = Field(
        default=False,
        description="Have `repair` do so with live files that are missing, too.",
        examples=[True],
    )

    @field_validator("missing")
    @classmethod
    def _check_missing(cls, missing: bool, info: ValidationInfo) -> bool:
        if missing and not info.data.get("repair"):
            raise ValueError("is for `repair` only: write `repair: true`, too, or remove it")
        return missing


class Provider(BaseModel):
    """One provider: a server A whose files are backed up, and how. Immutable."""

    model_config = _STRICT

    name: str = Field(
        description="The key of the provider's mapping under `providers:`; its DAG is `mdbackup_<name>`.",
        examples=["web"],
    )
    sftp_conn_id: Text = Field(
        description=(
            "The Airflow connection, of type `sftp` or `ssh`, with which the read-only account `backupop` is"
            " reached. Its extra `subsystem` names the SFTP subsystem, if that is not `sftp`."
        ),
        examples=["web_backupop"],
    )
    ssh_conn_id: Text | None = Field(
        default=None,
        description=(
            "The Airflow connection of the index account, over which each run rebuilds the provider index."
            " Left out, the provider builds its index itself, by cron or a systemd timer."
        ),
        examples=["web_index"],
    )
    chroot: AbsolutePath | None = Field(
        default=None,
        validate_default=True,
        description=(
            "The directory that `backupop` sees as `/`, as the index account sees it; `/` if `backupop` is"
            " not confined to a directory. Required with `ssh_conn_id`, unused without."
        ),
        examples=["/home/backupop"],
    )
    source: Paths = Field(
        min_length=1,
        description=(
            "What is backed up: absolute paths as `backupop` sees them, at least one (a single path need not"
            " be a list). `/` is everything."
        ),
        examples=[["/backups", "/etc"]],
    )
    index: PathBelowRoot = Field(
        default="/.mdbackup/index.md5",
        description="The provider index, as `backupop` sees it. It is never part of itself.",
        examples=["/var/index/index.md5"],
    )
    indexer: Indexer = Field(
        default_factory=Indexer,
        description=(
            "How the provider builds its index. The script of `mdbackup provision` takes this along into the"
            " provider's own settings, which hold whenever the index account has a forced command, or the"
            " provider builds its index itself: after a change, print the script again, and run it there."
        ),
        examples=[{"rehash": "1%", "limit": "50MB"}],
    )
    deferrable: bool | None = Field(
        default=None,
        description=(
            "Wait in a triggerer while the provider builds its index, so that no worker's slot is taken."
            " Default: Airflow's option `[operators] default_deferrable`. Unused without `ssh_conn_id`."
        ),
        examples=[True],
    )
    max_index_age: Duration | None = Field(
        default=None,
        description=(
            "A run fails when the provider index is older than this; `null` accepts any age. Default: any age"
            " with `ssh_conn_id`, since each run rebuilds the index, and `26h` without."
        ),
        examples=["26h"],
    )
    max_index_size: Size = Field(
        default=MAX_SIZE,
        description=(
            "A run fails when the provider index is larger than this, whatever the provider sends. A million"
            " files take some 100 MB. While an index is read, `dest` needs room for some four times its size,"
            " and for seven times that of a malicious one."
        ),
        examples=["500MB"],
    )
    max_file_size: Size | None = Field(
        default=None,
        description=(
            "A file on the provider that is larger than this fails, by itself: all others are backed up, and"
            " the run says so. `null`: any size. Without it, a file that does not fit on the disk of `dest`"
            " fails likewise, but all that fits before it comes first."
        ),
        examples=["100GB"],
    )
    dest: PathBelowRoot = Field(
        description=(
            "The directory on the Airflow worker that receives the backup. No other provider may have the"
            " same one, one inside it or one around it, also through symbolic links."
        ),
        examples=["/srv/backups/web"],
    )
    mount: PathBelowRoot | None = Field(
        default=None,
        description=(
            "A path that must be a mount point whenever a run starts: `dest` or a directory above it. So a"
            " backup disk that is not mounted is noticed, and the disk below it is not filled."
        ),
        examples=["/srv/backups"],
    )
    schedule: Schedule = Field(
        default="@daily",
        description=(
            "When the backup runs, in Airflow's default time zone: a cron expression of five fields, one of"
            " the presets `@hourly`, `@daily`, `@weekly`, `@monthly`, `@quarterly` and `@yearly` (in quotes:"
            " no plain text in YAML begins with `@` or `*`), or `null`: only a person starts it. A mapping"
            " names assets, by URI or name: a run begins when all of them have been updated (`mdbackup://web`"
            " is, by each good backup of `web`; that of a DAG of your own is meant by its name, as"
            " `mdbackup_web`). Or it names a timetable, by its dotted path, and arguments."
        ),
        examples=[
            "0 3 * * *",
            {"assets": ["mdbackup://web"]},
            {
                "timetable": "airflow.sdk.CronTriggerTimetable",
                "arguments": {"expression": "0 3 * * *", "timezone": "Europe/Vienna"},
            },
        ],
    )
    max_age: Duration | None = Field(
        default=None,
        description=(
            "How long ago the last good run may be, before `mdbackup status` and the watchdog call the backup"
            " stale. `null`: any time. Default: two hours more than the longest time between two days"
            " on which `schedule` has runs, so `26h` of a daily one; any time with `schedule: null`, assets"
            " or a timetable."
        ),
        examples=["26h", "8d"],
    )
    exclude: Patterns = Field(
        default=(),
        description=(
            "What is not backed up: patterns as in a `.gitignore` file in `/`, as `backupop` sees it. What"
            " was backed up before stays on the consumer."
        ),
        examples=[["*.tmp", "/backups/cache/"]],
    )
    shards: int = Field(
        default=1,
        ge=1,
        le=64,
        description="How many tasks pull at the same time, each over a connection of its own; 1 to 64.",
        examples=[4],
    )
    bandwidth_limit: Bandwidth | None = Field(
        default=None,
        description=(
            "How many bytes per second the provider's tasks receive together at most while they pull files,"
            " in overlapping runs and on several workers too. A mapping limits some hours of the day only, in"
            " Airflow's default time zone; an end before the beginning is on the next day. Of a list, the"
            " first entry holds that fits the time of day; the last one may be without hours, for all others."
            " Where no entry fits, there is no limit. When a limit begins or ends, transfers that are on"
            " their way follow. Fetching the index is not limited, nor what the provider does to build it."
        ),
        examples=[
            "20MB",
            {"rate": "5MB", "from": "08:00", "to": "18:00"},
            [{"rate": "5MB", "from": "08:00", "to": "18:00"}, "50MB"],
        ],
    )
    retries: int = Field(
        default=2,
        ge=0,
        le=100,
        description="How often Airflow tries a failed task again, when trying again may help.",
        examples=[5],
    )
    retry_delay: Duration = Field(
        default=timedelta(minutes=5),
        description=(
            "How long Airflow waits before it tries a failed task again; before each further try about twice"
            " as long, but at most an hour, unless this is longer."
        ),
        examples=["15m"],
    )
    timeouts: Timeouts = Field(
        default_factory=Timeouts,
        description=(
            "How long each task may take, before it is stopped and tried again as after an error; `null` for"
            " ever. What a pull has brought by then stays staged, and the next try goes on from there. An"
            " hour of each may be spent waiting for another run."
        ),
        examples=[{"pull_changed": "3d"}],
    )
    queue: Text | None = Field(
        default=None,
        description="The queue of the Airflow workers that have `dest`. Default: Airflow's default queue.",
        examples=["backup"],
    )
    pod_template_file: PathBelowRoot | None = Field(
        default=None,
        description=(
            "For the KubernetesExecutor, which has no queues: the pod template, on the scheduler's machine,"
            " with which the tasks run. It mounts the volume that has `dest`. Default: Airflow's template."
        ),
        examples=["/opt/airflow/pod_templates/backup.yaml"],
    )
    pool: Text | None = Field(
        default=None,
        description=(
            "The Airflow pool whose slots the tasks take. While it does not exist, no task starts:"
            " `airflow mdbackup init` makes it."
            " Default: Airflow's default pool."
        ),
        examples=["backup"],
    )
    tags: Tags = Field(
        default=(),
        description="Tags of the DAG in the Airflow UI, beside those that every backup DAG has.",
        examples=[["production"]],
    )
    alerts: Annotated[tuple[AlertRule, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description=(
            "Who is told when a run fails or waits for approval, and, if asked, of other runs: a list, each"
            " entry one way of telling. Examples to copy are in docs/alerts.md."
        ),
        examples=[
            [
                {"email": "ops@example.org", "also": ["warning"]},
                {"ping_url": "https://hc-ping.com/your-uuid-here"},
            ]
        ],
    )
    verify: Verify | None = Field(
        default_factory=Verify,
        description=(
            "How the DAG `mdbackup_verify_<name>` (of the DAG file `mdbackup_verify.py`) reads live files and"
            " versions again. It fails, and tells people by `alerts`, when one is not what it was when it"
            " came; pings stay the backup's. `null`: there is no such DAG."
        ),
        examples=[{"schedule": "30 6 * * *", "limit": "50MB", "repair": True}],
    )
    guard: Guard = Field(
        default_factory=Guard,
        description="When a run stops before it changes anything, because too much is gone or changed.",
        examples=[{"share": "25%"}],
    )
    on_guard: Literal["fail", "approve"] = Field(
        default="fail",
        description=(
            "When the guard stops a run: `fail` it, or wait for a person to `approve` it in Airflow. Refused,"
            " or without an answer within 24 hours, it fails; until then the provider's next runs wait."
            " Either way, one run that is started by hand can override the guard: by its parameter"
            " `override_guard`, for the index that it finds first."
        ),
        examples=["approve"],
    )
    allow_empty: bool = Field(
        default=False,
        description="Accept a provider index without any entry, which otherwise stops the run.",
        examples=[True],
    )
    stall_timeout: Duration = Field(
        default=timedelta(seconds=60),
        description="How long the SFTP connection may be silent before the task gives it up.",
        examples=["2m"],
    )

    @property
    def schedules(self) -> dict[str, Any]:
        """The schedules of the provider's DAGs, by the key that says each."""
        return {"schedule": self.schedule} | (
            {"verify.schedule": self.verify.schedule} if self.verify is not None else {}
        )

    @model_validator(mode="before")
    @classmethod
    def _limit_the_age_of_an_index_built_elsewhere(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("ssh_conn_id") is None:
            return {"max_index_age": timedelta(hours=26), **values}
        return values

    @model_validator(mode="before")
    @classmethod
    def _limit_the_age_of_the_backup(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "max_age" in values:
            return values
        try:
            schedule = check_schedule(values.get("schedule", "@daily"))
        except ValueError:
            return values  # which is told of the schedule itself
        return {"max_age": default_max_age(schedule), **values}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("chroot")
    @classmethod
    def _check_chroot(cls, chroot: str | None, info: ValidationInfo) -> str | None:
        if chroot is None and info.data.get("ssh_conn_id"):
            raise ValueError(
                "is missing, and `ssh_conn_id` needs it: write the directory that `backupop` sees as `/`, for"
                " example `chroot: /home/backupop`"
            )
        return chroot

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: tuple[str, ...]) -> tuple[str, ...]:
        for first, second in combinations(sorted(source), 2):
            if second == first or second.startswith(first.rstrip("/") + "/"):
                raise ValueError(f"`{first}` already contains `{second}`: remove `{second}`")
        return source

    @field_validator("mount")
    @classmethod
    def _check_mount(cls, mount: str | None, info: ValidationInfo) -> str | None:
        dest = info.data.get("dest")
        if mount and dest and not f"{dest}/".startswith(f"{mount}/"):
            raise ValueError(f"`{mount}` is neither `dest` (`{dest}`) nor a directory above it")
        return mount
