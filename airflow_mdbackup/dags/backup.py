"""From the configuration to one DAG per provider.

::

    build_provider_index >> fetch_index >> diff_indexes >> [approve] >> pull_changed[shard 0..n]
                                                 |                            |
                                                 |                     shards_finished   (however)
                                                 +-------------+--------------+
                                                       archive_old >> commit_backup

Everything keeps the default trigger rule but the join ``shards_finished``: archive and commit follow when
there is an accepted plan and the shards have finished, however. What could be pulled is committed;
``commit_backup``, the only leaf, then fails the run if a shard or an entry failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param, TriggerRule

from airflow_mdbackup.alerts.callbacks import RunCallbacks
from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import Problem, Provider, load, providers_file
from airflow_mdbackup.config.schedule import UnusableSchedule
from airflow_mdbackup.dags.common import START, as_code, invalid_dag, made, schedule_of, task_defaults
from airflow_mdbackup.operators import (
    ApproveChanges,
    ArchiveOld,
    BuildProviderIndex,
    CommitBackup,
    DiffIndexes,
    FetchIndex,
    PullChanged,
)
from airflow_mdbackup.operators.build_provider_index import REHASH
from airflow_mdbackup.operators.diff_indexes import DRY_RUN, ONLY, OVERRIDE_GUARD
from airflow_mdbackup.operators.pull_changed import PULLED
from airflow_mdbackup.scheme.backup.plan import Limits

log = logging.getLogger(__name__)
_APPROVAL = timedelta(hours=24)
_PARAMS = {
    ONLY: Param(
        [],
        type="array",
        items={"type": "string", "pattern": "^/"},
        maxItems=100,
        title="Only these paths",
        description=(
            "Files, and directories with all below, as backupop sees them; one on each line. Nothing "
            "elsewhere is touched or forgotten. Such a run is not counted as a good backup."
        ),
    ),
    DRY_RUN: Param(
        False,
        type="boolean",
        title="Dry run",
        description="End with the plan, which the log of diff_indexes has: nothing is pulled or changed.",
    ),
    REHASH: Param(
        False,
        type="boolean",
        title="Hash all files again",
        description=(
            "Have the provider find what rotted on its disk. Without effect where it builds its index "
            "itself, or by a forced command."
        ),
    ),
    OVERRIDE_GUARD: Param(
        False,
        type="boolean",
        title="Override the guard",
        description="I have looked: back up this once, though much is gone or changed on the provider.",
    ),
}
_JOIN_DOC = "Does nothing, and is always green: it lets the commit follow however the shards ended."


def provider_dags(path: Path | None = None) -> dict[str, DAG]:
    """Return the DAGs of all providers, by id: a failing one for each whose configuration is invalid.

    Never raises for what the configuration says: an import error would stop the backups of all others too.
    Where a worker reads the file for one task, that task's DAG is the only one.

    :param path: the configuration; by default what Airflow's options name.
    """
    configuration = load(providers_file() if path is None else path)
    makers: dict[str, Callable[[], DAG]] = {
        _dag_id(provider.name): partial(_dag_of, provider) for provider in configuration.providers
    }
    makers |= {
        _dag_id(name): partial(_invalid_dag, name, problems)
        for name, problems in configuration.refused.items()
    }
    return made(makers)


def _dag_of(provider: Provider) -> DAG:
    try:
        return provider_dag(provider)
    except UnusableSchedule as error:
        return _invalid_dag(provider.name, (f"schedule: {error}",))


def provider_dag(provider: Provider) -> DAG:
    """Return the DAG that backs up one provider.

    :raises UnusableSchedule: its schedule is one that Airflow cannot use.
    """
    timeouts = provider.timeouts
    asset = provider_asset(provider.name)
    common: dict[str, Any] = {"provider": provider.name, "dest": provider.dest}
    teller = RunCallbacks(provider) if provider.alerts else None
    first: dict[str, Any] = {"inlets": [asset]}
    if teller is not None:
        first["on_execute_callback"] = [teller.note_start]
    with DAG(
        dag_id=_dag_id(provider.name),
        description=f"Back up {provider.name} to {provider.dest}",
        doc_md=_doc(provider),
        schedule=schedule_of(provider.schedule),
        start_date=START,
        catchup=False,
        max_active_runs=1,
        tags={"mdbackup", *provider.tags},
        default_args=task_defaults(provider, teller),
        params=_PARAMS,
        on_failure_callback=[teller.alert_failed_run] if teller else None,
    ) as dag:
        built: Any = None
        if provider.ssh_conn_id is not None:
            built = BuildProviderIndex(
                task_id="build_provider_index",
                provider=provider.name,
                ssh_conn_id=provider.ssh_conn_id,
                chroot=provider.chroot or "/",
                source=list(provider.source),
                index=provider.index,
                exclude=list(provider.exclude),
                indexer=provider.indexer.options(),
                execution_timeout=timeouts.build_provider_index,
                **({} if provider.deferrable is None else {"deferrable": provider.deferrable}),
                **first,
            ).output
        fetch = FetchIndex(
            task_id="fetch_index",
            **common,
            sftp_conn_id=provider.sftp_conn_id,
            index=provider.index,
            max_index_age=provider.max_index_age,
            max_index_size=provider.max_index_size,
            mount=provider.mount,
            stall_timeout=provider.stall_timeout,
            built=built,
            execution_timeout=timeouts.fetch_index,
            **({"inlets": [asset]} if built is not None else first),
        )
        diff = DiffIndexes(
            task_id="diff_indexes",
            **common,
            source=list(provider.source),
            exclude=list(provider.exclude),
            shards=provider.shards,
            limits=Limits(provider.guard.share, provider.guard.number, provider.guard.above),
            allow_empty=provider.allow_empty,
            on_guard=provider.on_guard,
            execution_timeout=timeouts.diff_indexes,
        )
        accepted: Any = diff
        if provider.on_guard == "approve":
            accepted = ApproveChanges(
                task_id="approve",
                reasons=diff.output["guard"],  # type: ignore[index]
                subject=f"Backup of {provider.name}: much is gone or changed. Back it up all the same?",
                response_timeout=_APPROVAL,
                notifiers=[teller.alert_approval] if teller else None,
                retries=0,  # else a refusal would be asked again
            )
            diff >> accepted
        pull = PullChanged.partial(
            task_id="pull_changed",
            **common,
            sftp_conn_id=provider.sftp_conn_id,
            stall_timeout=provider.stall_timeout,
            bandwidth_limit=provider.bandwidth_limit,
            max_file_size=provider.max_file_size,
            source=list(provider.source),
            execution_timeout=timeouts.pull_changed,
            max_active_tis_per_dag=provider.shards,
            map_index_template=(
                "shard {{ task.shard.shard }}: {{ task.shard.files }} files"
                f"{{{{ ', ' + {PULLED} if {PULLED} is defined }}}}"
            ),
        ).expand(shard=diff.output)
        finished = EmptyOperator(
            task_id="shards_finished",
            trigger_rule=TriggerRule.ALL_DONE,
            doc_md=_JOIN_DOC,
        )
        archive = ArchiveOld(task_id="archive_old", **common, execution_timeout=timeouts.archive_old)
        commit = CommitBackup(
            task_id="commit_backup",
            **common,
            execution_timeout=timeouts.commit_backup,
            outlets=[asset],
        )
        if teller is not None:
            commit.on_success_callback = [teller.alert_good_run]
        fetch >> diff
        accepted >> pull >> finished
        [accepted, finished] >> archive >> commit
    return dag


def _dag_id(provider: str) -> str:
    return f"mdbackup_{provider}"


def _invalid_dag(name: str, problems: Sequence[Problem | str]) -> DAG:
    return invalid_dag(_dag_id(name), f"{name} is NOT backed up", problems)


def _doc(provider: Provider) -> str:
    """Return what the DAG's page says of it."""
    rows = {
        "source": ", ".join(map(as_code, provider.source)),
        "left out": ", ".join(map(as_code, provider.exclude)) or "nothing",
        "to": as_code(provider.dest),
        "index": as_code(provider.index)
        + (", built by each run" if provider.ssh_conn_id else ", built by the provider itself"),
        "guard": _guard_text(provider),
        "bandwidth": str(provider.bandwidth_limit or "not limited"),
    }
    table = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items())
    return (
        f"# Backup of {provider.name}\n\n|  |  |\n|---|---|\n{table}\n\n"
        "Only what is new is copied; a changed file's old version goes to `.old` beside it; nothing is "
        "deleted. A backup always takes the provider's present state, also in a backfill.\n"
    )


def _guard_text(provider: Provider) -> str:
    guard = provider.guard
    limits = f"{guard.share:.0%}" + (f" or {guard.number}" if guard.number is not None else "")
    does = "the run fails" if provider.on_guard == "fail" else "a person is asked"
    return (
        f"over {limits} of more than {guard.above} entries gone or changed: {does}; a run that is started by "
        "hand can override it"
    )
