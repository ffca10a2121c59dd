"""One provider: the schema that reads the configuration, and from which the reference page is generated.

Every key has a description and examples, written for whoever edits the file; ``docs/reference`` and the
sample file are generated from them.
"""

from __future__ import annotations

import re
from datetime import timedelta
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from airflow_mdbackup.config.alert import AlertRule
from airflow_mdbackup.config.bandwidth import Bandwidth
from airflow_mdbackup.config.schedule import default_max_age
from airflow_mdbackup.config.sections import STRICT, Guard, Indexer, Timeouts, Verify
from airflow_mdbackup.config.value_types import (
    AbsolutePath,
    Duration,
    PathBelowRoot,
    Paths,
    Patterns,
    Schedule,
    Size,
    Tags,
    Text,
    as_tuple,
    check_schedule,
)
from airflow_mdbackup.scheme.backup.fetch import MAX_SIZE
from airflow_mdbackup.scheme.common.units import shown_value

RESERVED_NAMES = ("watchdog", "restore", "verify")


def is_reserved(name: str) -> bool:
    """Whether the name would clash with a DAG of mdbackup that is not a backup."""
    return name in RESERVED_NAMES or name.startswith("verify_")


def is_name(name: str) -> bool:
    """Whether a provider may have this name."""
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def check_name(name: object) -> str:
    """Return ``name`` if a provider may have it.

    :raises ValueError: it is not text, has other characters, is too long, or is reserved.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"a provider's name must be text, but YAML reads {shown_value(name)}: put it in quotes"
        )
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,99}", name):
        raise ValueError(
            "a provider's name consists of lowercase letters, digits, `_` and `-`, begins with a letter or"
            " digit, and has at most 100 characters: rename it"
        )
    if is_reserved(name):
        raise ValueError(
            f"`{'`, `'.join(RESERVED_NAMES)}` and names that begin with `verify_` are reserved for DAGs that"
            " are not backups: choose another name"
        )
    return name


class Provider(BaseModel):
    """One provider: a server A whose files are backed up, and how. Immutable."""

    model_config = STRICT

    name: str = Field(
        description="The key of the provider's mapping under `providers:`; its DAG is `mdbackup_<name>`.",
        examples=["web"],
    )
    sftp_conn_id: Text = Field(
        description=(
            "The Airflow connection, of type `sftp` or `ssh`, of the read-only account `backupop`. Its extra"
            " `subsystem` names the SFTP subsystem, if that is not `sftp`."
        ),
        examples=["web_backupop"],
    )
    ssh_conn_id: Text | None = Field(
        default=None,
        description=(
            "The Airflow connection of the index account, over which each run rebuilds the provider index."
            " Without it, the provider builds its index by itself, by cron or a systemd timer."
        ),
        examples=["web_index"],
    )
    chroot: AbsolutePath | None = Field(
        default=None,
        validate_default=True,
        description=(
            "The directory to which `backupop` is confined, as the index account sees it; `/` if it is not"
            " confined. Required with `ssh_conn_id`, unused without."
        ),
        examples=["/home/backupop"],
    )
    source: Paths = Field(
        min_length=1,
        description=(
            "What is backed up: absolute paths inside the chroot, at least one (a single path need not be a"
            " list). `/` is everything."
        ),
        examples=[["/backups", "/etc"]],
    )
    index: PathBelowRoot = Field(
        default="/.mdbackup/index.md5",
        description="Path of the provider index inside the chroot. It never lists itself.",
        examples=["/var/index/index.md5"],
    )
    indexer: Indexer = Field(
        default_factory=Indexer,
        description=(
            "How the provider builds its index. The script of `mdbackup provision` copies this into the"
            " provider's own settings, which apply if the index account has a forced command, or if the"
            " provider builds its index by itself: after a change, print the script again, and run it there."
        ),
        examples=[{"rehash": "1%", "limit": "50MB"}],
    )
    deferrable: bool | None = Field(
        default=None,
        description=(
            "Wait in a triggerer while the provider builds its index, so that no worker slot is occupied."
            " Default: Airflow's option `[operators] default_deferrable`. Unused without `ssh_conn_id`."
        ),
        examples=[True],
    )
    max_index_age: Duration | None = Field(
        default=None,
        description=(
            "A run fails if the provider index is older than this; `null` accepts any age. Default: any age"
            " with `ssh_conn_id`, since each run rebuilds the index, and `26h` without."
        ),
        examples=["26h"],
    )
    max_index_size: Size = Field(
        default=MAX_SIZE,
        description=(
            "A run fails if the provider index is larger than this. A million files take about 100 MB. While"
            " an index is read, `dest` needs about four times its size, and seven times that of a malicious"
            " one."
        ),
        examples=["500MB"],
    )
    max_file_size: Size | None = Field(
        default=None,
        description=(
            "A file larger than this fails on its own: all others are backed up, and the run reports it."
            " `null`: any size. Without a limit, a file that does not fit on the disk of `dest` also fails on"
            " its own, after everything that fits."
        ),
        examples=["100GB"],
    )
    dest: PathBelowRoot = Field(
        description=(
            "The directory on the Airflow worker that receives the backup. No other provider may have the"
            " same one, one inside it or one around it, not even through symbolic links."
        ),
        examples=["/srv/backups/web"],
    )
    mount: PathBelowRoot | None = Field(
        default=None,
        description=(
            "A path that must be a mount point whenever a run starts: `dest` or a directory above it. If the"
            " backup disk is not mounted, the run then fails instead of filling the disk below."
        ),
        examples=["/srv/backups"],
    )
    schedule: Schedule = Field(
        default="@daily",
        description=(
            "When the backup runs, in Airflow's default time zone: a cron expression of five fields, one of"
            " the presets `@hourly`, `@daily`, `@weekly`, `@monthly`, `@quarterly` and `@yearly` (in quotes:"
            " unquoted text in YAML cannot begin with `@` or `*`), or `null`: only when started manually. A"
            " mapping names assets, by URI or name: a run starts once all of them have been updated. Each"
            " good backup of `web` updates `mdbackup://web`; the asset of a DAG of your own goes by its name,"
            " such as `mdbackup_web`. Or it names a timetable, by its dotted path, and arguments."
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
            "How old the last good run may be before `mdbackup status` and the watchdog report the backup as"
            " stale. `null`: any age. Default: two hours more than the longest time between two days on which"
            " `schedule` has runs, so `26h` for a daily one; any age with `schedule: null`, assets or a"
            " timetable."
        ),
        examples=["26h", "8d"],
    )
    exclude: Patterns = Field(
        default=(),
        description=(
            "What is not backed up: patterns as in a `.gitignore` file in the root of the chroot. What was"
            " backed up before stays on the consumer."
        ),
        examples=[["*.tmp", "/backups/cache/"]],
    )
    shards: int = Field(
        default=1,
        ge=1,
        le=64,
        description="How many tasks pull at the same time, each over its own connection; 1 to 64.",
        examples=[4],
    )
    bandwidth_limit: Bandwidth | None = Field(
        default=None,
        description=(
            "Maximum rate at which the provider's tasks together receive files, also in overlapping runs and"
            " on several workers. A mapping limits only some hours of the day, in Airflow's default time"
            " zone; an end before the start is on the next day. In a list, the first entry that includes the"
            " time of day applies; the last one may have no hours, for all other times. If no entry applies,"
            " there is no limit. Transfers in progress follow when a limit starts or ends. Fetching and"
            " building the index are not limited."
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
        description="How often Airflow retries a failed task, if a retry may help.",
        examples=[5],
    )
    retry_delay: Duration = Field(
        default=timedelta(minutes=5),
        description=(
            "How long Airflow waits before it retries a failed task; about twice as long before each further"
            " retry, but at most an hour, unless this is longer."
        ),
        examples=["15m"],
    )
    timeouts: Timeouts = Field(
        default_factory=Timeouts,
        description=(
            "How long each task may take before it is stopped and retried as after an error; `null`: no"
            " limit. What a pull has transferred by then stays staged, and the next try continues from there."
            " Up to an hour of each may be spent waiting for another run."
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
            "For the KubernetesExecutor, which has no queues: the pod template of the tasks, on the"
            " scheduler's machine. It mounts the volume that has `dest`. Default: Airflow's template."
        ),
        examples=["/opt/airflow/pod_templates/backup.yaml"],
    )
    pool: Text | None = Field(
        default=None,
        description=(
            "The Airflow pool whose slots the tasks take. Without the pool, no task starts: `airflow mdbackup"
            " init` creates it. Default: Airflow's default pool."
        ),
        examples=["backup"],
    )
    tags: Tags = Field(
        default=(),
        description="Tags of the DAG in the Airflow UI, in addition to those of every backup DAG.",
        examples=[["production"]],
    )
    alerts: Annotated[tuple[AlertRule, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description=(
            "Who is alerted when a run fails or waits for approval, and optionally about other runs: a list"
            " with an entry for each service. Examples to copy are in docs/alerts.md."
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
            " versions again. It fails, and sends `alerts` except for pings, if one of them is no longer what"
            " was backed up. `null`: there is no such DAG."
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
            "When the guard stops a run: `fail` it, or wait for somebody to `approve` it in Airflow. If it is"
            " rejected or not answered within 24 hours, it fails; until then the provider's next runs wait."
            " Either way, a manually started run can override the guard with its parameter `override_guard`,"
            " for the index that it fetches first."
        ),
        examples=["approve"],
    )
    allow_empty: bool = Field(
        default=False,
        description="Accept a provider index without entries, which otherwise stops the run.",
        examples=[True],
    )
    stall_timeout: Duration = Field(
        default=timedelta(seconds=60),
        description="How long the SFTP connection may be silent before the task drops it.",
        examples=["2m"],
    )

    @property
    def schedules(self) -> dict[str, Any]:
        """The schedules of the provider's DAGs, by their keys."""
        return {"schedule": self.schedule} | (
            {"verify.schedule": self.verify.schedule} if self.verify is not None else {}
        )

    @model_validator(mode="before")
    @classmethod
    def _default_max_index_age(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("ssh_conn_id") is None:
            return {"max_index_age": timedelta(hours=26), **keys}
        return keys

    @model_validator(mode="before")
    @classmethod
    def _default_max_age(cls, keys: Any) -> Any:
        if not isinstance(keys, dict) or "max_age" in keys:
            return keys
        try:
            schedule = check_schedule(keys.get("schedule", "@daily"))
        except ValueError:
            return keys  # the schedule's own validation reports it
        return {"max_age": default_max_age(schedule), **keys}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("chroot")
    @classmethod
    def _check_chroot(cls, chroot: str | None, info: ValidationInfo) -> str | None:
        if chroot is None and info.data.get("ssh_conn_id"):
            raise ValueError(
                "is missing, and `ssh_conn_id` needs it: write the directory to which `backupop` is confined,"
                " for example `chroot: /home/backupop`"
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
