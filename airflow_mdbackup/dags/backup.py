"""From the configuration to one DAG per provider.

::

    build_provider_index >> fetch_index >> diff_indexes >> [approve] >> pull_changed[shard 0..n]
                                                 |                            |
                                                 |                     shards_finished   (even if some failed)
                                                 +-------------+--------------+
                                                       archive_old >> commit_backup

All tasks have the default trigger rule except the join ``shards_finished``: archive and commit follow once
the plan is accepted and all shards have finished, successfully or not. What could be pulled is committed;
``commit_backup``, the only leaf, then fails the run if a shard or an entry failed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param, TriggerRule

from airflow_mdbackup.alerts.callbacks import RunCallbacks
from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import Problem, Provider, load, providers_file
from airflow_mdbackup.dags.common import (
    START,
    DagMaker,
    as_code,
    invalid_dag,
    make_dags,
    schedule_of,
    task_defaults,
)
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
_APPROVAL_TIMEOUT = timedelta(hours=24)
_PARAMS = {
    ONLY: Param(
        [],
        type="array",
        items={"type": "string", "pattern": "^/"},
        maxItems=100,
        title="Only these paths",
        description=(
            "Files and directories (recursive), as absolute paths inside the chroot; one per line. Nothing "
            "elsewhere is touched or forgotten. Such a run does not count as a good backup."
        ),
    ),
    DRY_RUN: Param(
        False,
        type="boolean",
        title="Dry run",
        description="Stop after the plan, which is in the log of diff_indexes: nothing is pulled or changed.",
    ),
    REHASH: Param(
        False,
        type="boolean",
        title="Hash all files again",
        description=(
            "Have the provider find bit rot on its disk. No effect if the provider builds its index by "
            "itself, or by a forced command."
        ),
    ),
    OVERRIDE_GUARD: Param(
        False,
        type="boolean",
        title="Override the guard",
        description="I checked: back up this once, although many files are gone or changed on the provider.",
    ),
}
_JOIN_DOC = "Does nothing and always succeeds: it lets the commit follow even if shards failed."


def provider_dags(path: Path | None = None) -> dict[str, DAG]:
    """Return the DAGs of all providers, by id: one that fails for each invalid provider.

    Whatever the configuration contains, this does not raise: an import error would stop all other backups.
    If a worker reads the file for one task, only that task's DAG is returned.

    :param path: the configuration; by default the one that Airflow's options name.
    """
    configuration = load(providers_file() if path is None else path)
    makers = [
        DagMaker(_dag_id(provider.name), partial(provider_dag, provider), _failure(provider.name), "schedule")
        for provider in configuration.providers
    ]
    makers += [
        DagMaker(_dag_id(name), partial(_invalid_dag, name, problems), _failure(name), "schedule")
        for name, problems in configuration.refused.items()
    ]
    return make_dags(makers)


def provider_dag(provider: Provider) -> DAG:
    """Return the DAG that backs up one provider.

    :raises UnusableSchedule: Airflow cannot use its schedule.
    """
    callbacks = RunCallbacks(provider) if provider.alerts else None
    with DAG(
        dag_id=_dag_id(provider.name),
        description=f"Back up {provider.name} to {provider.dest}",
        doc_md=_doc(provider),
        schedule=schedule_of(provider.schedule),
        start_date=START,
        catchup=False,
        max_active_runs=1,
        tags={"mdbackup", *provider.tags},
        default_args=task_defaults(provider, callbacks),
        params=_PARAMS,
        on_failure_callback=[callbacks.alert_failed_run] if callbacks else None,
    ) as dag:
        fetch = _build_and_fetch(provider, callbacks)
        diff = _diff(provider)
        accepted = _approve(provider, diff, callbacks) if provider.on_guard == "approve" else diff
        pull = _pull(provider, diff)
        finished = EmptyOperator(
            task_id="shards_finished", trigger_rule=TriggerRule.ALL_DONE, doc_md=_JOIN_DOC
        )
        archive = ArchiveOld(
            task_id="archive_old", **_mirror(provider), execution_timeout=provider.timeouts.archive_old
        )
        commit = _commit(provider, callbacks)
        fetch >> diff
        accepted >> pull >> finished
        [accepted, finished] >> archive >> commit
    return dag


def _mirror(provider: Provider) -> dict[str, Any]:
    """Return the arguments of every task that works on the provider's mirror."""
    return {"provider": provider.name, "dest": provider.dest}


def _build_and_fetch(provider: Provider, callbacks: RunCallbacks | None) -> FetchIndex:
    """Return the task that fetches the index, behind the one that builds it if runs build it.

    The first of them has the asset as an inlet, and notes when the run started.
    """
    asset = provider_asset(provider.name)
    first: dict[str, Any] = {"inlets": [asset]}
    if callbacks is not None:
        first["on_execute_callback"] = [callbacks.note_start]
    built = _build(provider, first) if provider.ssh_conn_id is not None else None
    return FetchIndex(
        task_id="fetch_index",
        **_mirror(provider),
        sftp_conn_id=provider.sftp_conn_id,
        index=provider.index,
        max_index_age=provider.max_index_age,
        max_index_size=provider.max_index_size,
        mount=provider.mount,
        stall_timeout=provider.stall_timeout,
        built=built,
        execution_timeout=provider.timeouts.fetch_index,
        **({"inlets": [asset]} if built is not None else first),
    )


def _build(provider: Provider, first: dict[str, Any]) -> Any:
    """Return the output of a task that builds the index on the provider."""
    assert provider.ssh_conn_id is not None
    return BuildProviderIndex(
        task_id="build_provider_index",
        provider=provider.name,
        ssh_conn_id=provider.ssh_conn_id,
        chroot=provider.chroot or "/",
        source=list(provider.source),
        index=provider.index,
        exclude=list(provider.exclude),
        indexer=provider.indexer.options(),
        execution_timeout=provider.timeouts.build_provider_index,
        **({} if provider.deferrable is None else {"deferrable": provider.deferrable}),
        **first,
    ).output


def _diff(provider: Provider) -> DiffIndexes:
    return DiffIndexes(
        task_id="diff_indexes",
        **_mirror(provider),
        source=list(provider.source),
        exclude=list(provider.exclude),
        shards=provider.shards,
        limits=Limits(provider.guard.share, provider.guard.number, provider.guard.above),
        allow_empty=provider.allow_empty,
        on_guard=provider.on_guard,
        execution_timeout=provider.timeouts.diff_indexes,
    )


def _approve(provider: Provider, diff: DiffIndexes, callbacks: RunCallbacks | None) -> ApproveChanges:
    approve = ApproveChanges(
        task_id="approve",
        reasons=diff.output["guard"],  # type: ignore[index]
        subject=f"Backup of {provider.name}: many files are gone or changed. Back it up anyway?",
        response_timeout=_APPROVAL_TIMEOUT,
        notifiers=[callbacks.alert_approval] if callbacks else None,
        retries=0,  # a rejection must not be asked about again
    )
    diff >> approve
    return approve


def _pull(provider: Provider, diff: DiffIndexes) -> Any:
    """Return the mapped task that pulls the shards of the plan."""
    return PullChanged.partial(
        task_id="pull_changed",
        **_mirror(provider),
        sftp_conn_id=provider.sftp_conn_id,
        stall_timeout=provider.stall_timeout,
        bandwidth_limit=provider.bandwidth_limit,
        max_file_size=provider.max_file_size,
        source=list(provider.source),
        execution_timeout=provider.timeouts.pull_changed,
        max_active_tis_per_dag=provider.shards,
        map_index_template=(
            "shard {{ task.shard.shard }}: {{ task.shard.files }} file{{ 's' if task.shard.files != 1 }}"
            f"{{{{ ', ' + {PULLED} if {PULLED} is defined }}}}"
        ),
    ).expand(shard=diff.output)


def _commit(provider: Provider, callbacks: RunCallbacks | None) -> CommitBackup:
    return CommitBackup(
        task_id="commit_backup",
        **_mirror(provider),
        execution_timeout=provider.timeouts.commit_backup,
        outlets=[provider_asset(provider.name)],
        on_success_callback=[callbacks.alert_good_run] if callbacks else None,
    )


def _dag_id(provider: str) -> str:
    return f"mdbackup_{provider}"


def _failure(name: str) -> str:
    return f"{name} is NOT backed up"


def _invalid_dag(name: str, problems: Sequence[Problem]) -> DAG:
    return invalid_dag(_dag_id(name), _failure(name), problems)


def _doc(provider: Provider) -> str:
    """Return the text of the DAG's page."""
    rows = {
        "source": ", ".join(map(as_code, provider.source)),
        "excluded": ", ".join(map(as_code, provider.exclude)) or "nothing",
        "to": as_code(provider.dest),
        "index": as_code(provider.index)
        + (", built by each run" if provider.ssh_conn_id else ", built by the provider by itself"),
        "guard": _guard_text(provider),
        "bandwidth": str(provider.bandwidth_limit or "not limited"),
    }
    table = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items())
    return (
        f"# Backup of {provider.name}\n\n|  |  |\n|---|---|\n{table}\n\n"
        "Only new and changed files are copied; the old version of a changed file moves to `.old` beside it; "
        "nothing is deleted. A run always backs up the provider's present state, even in a backfill.\n"
    )


def _guard_text(provider: Provider) -> str:
    guard = provider.guard
    limits = f"{guard.share:.0%}" + (f" or {guard.number}" if guard.number is not None else "")
    effect = "the run fails" if provider.on_guard == "fail" else "the run waits for approval"
    return (
        f"over {limits} of more than {guard.above} entries gone or changed: {effect}; a manually started run"
        " can override it"
    )
