"""The DAG that restores files: it has a form instead of a schedule.

A restore must run where the provider's ``dest`` is, and Airflow fixes a task's queue, pool and pod template
when it reads the DAG. So there is a single task if all providers agree on these::

    restore_files

and otherwise one for each placement, behind one that chooses::

    choose_worker >> [restore_files_on_a, restore_files_on_b, ...]
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.python import BranchPythonOperator
from airflow.sdk import DAG, Param

from airflow_mdbackup.config import Provider, load, providers_file
from airflow_mdbackup.dags.common import START, placement
from airflow_mdbackup.operators import RETRY_POLICY, RestoreFiles
from airflow_mdbackup.operators.restore_files import (
    AS_OF,
    DRY_RUN,
    INCLUDE_GONE,
    OVERWRITE,
    PATHS,
    PROVIDER,
    TARGET,
)

RESTORE = "mdbackup_restore"
_DOC = """# Restore files

Trigger this DAG: the form asks which files of which backup to restore, as of when, and where to. They are
written on the worker that has the backup, below the directory in its Airflow option
`[mdbackup] restore_below`. The backup is not changed. If Airflow is gone, `mdbackup restore` does the same
from the disk alone.
"""


def restore_dags(path: Path | None = None) -> dict[str, DAG]:
    """Return the DAG that restores, by its id; nothing if there are no providers.

    :param path: the configuration; by default the one that Airflow's options name. Whatever it contains, this
        does not raise.
    """
    providers = load(providers_file() if path is None else path).providers
    return {RESTORE: _restore_dag(providers)} if providers else {}


def _restore_dag(providers: tuple[Provider, ...]) -> DAG:
    dests = {provider.name: provider.dest for provider in providers}
    with DAG(
        dag_id=RESTORE,
        description="Restore files as of any time: trigger it, and fill in the form",
        doc_md=_DOC,
        schedule=None,
        start_date=START,
        catchup=False,
        max_active_runs=4,
        is_paused_upon_creation=False,
        tags={"mdbackup"},
        params={**_what(list(dests)), **_how()},
        user_defined_macros={"dest_of": dests},
        # Restores go before all backups, and report failures at once.
        default_args={
            "retries": 0,
            "retry_policy": RETRY_POLICY,
            "weight_rule": "absolute",
            "priority_weight": 1000,
        },
    ) as dag:
        _add_tasks(providers)
    return dag


def _add_tasks(providers: tuple[Provider, ...]) -> None:
    """Add a task for each placement to the current DAG, and one that chooses if there are several."""
    task_ids = _task_ids(providers)
    by_task = {task_ids[provider.name]: provider for provider in providers}
    if len(by_task) == 1:
        _restore_task("restore_files", providers[0], providers)
        return
    choose = BranchPythonOperator(
        task_id="choose_worker",
        python_callable=_task_of,
        op_kwargs={"tasks": task_ids},
        **placement(providers[0]),
    )
    choose >> [_restore_task(task_id, provider, providers) for task_id, provider in by_task.items()]


def _restore_task(task_id: str, placed_like: Provider, providers: tuple[Provider, ...]) -> RestoreFiles:
    return RestoreFiles(
        task_id=task_id,
        provider=f"{{{{ params.{PROVIDER} }}}}",
        dest=f"{{{{ dest_of[params.{PROVIDER}] }}}}",
        keep_out=[provider.dest for provider in providers],
        **placement(placed_like),
    )


def _task_of(tasks: dict[str, str], params: dict[str, Any]) -> str:
    """Return the task that runs where the chosen provider's backup is."""
    return tasks[params[PROVIDER]]


def _task_ids(providers: Iterable[Provider]) -> dict[str, str]:
    """Return the task id for each provider, named after its queue, pool or pod template."""
    tasks: dict[str, str] = {}
    known: dict[tuple[str | None, ...], str] = {}
    for provider in providers:
        place = (provider.queue, provider.pool, provider.pod_template_file)
        if place not in known:
            words = [provider.queue, provider.pool, Path(provider.pod_template_file or "").stem]
            name = re.sub(r"[^\w.-]", "_", "_".join(filter(None, words)) or "default", flags=re.ASCII)[:150]
            task_id = f"restore_files_on_{name}"
            while task_id in known.values():
                task_id += "_2"
            known[place] = task_id
        tasks[provider.name] = known[place]
    return tasks


def _what(names: list[str]) -> dict[str, Param]:
    """Return the parameters that say which files to restore, and where to."""
    provider: dict[str, Any] = {
        "type": "string",
        "enum": names,
        "title": "Provider",
        "description": "Whose files to restore.",
    }
    return {
        PROVIDER: Param(**provider | ({"default": names[0]} if len(names) == 1 else {})),
        PATHS: Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1},
            title="Paths",
            description=(
                "Files, directories (recursive), and gitignore patterns, as absolute paths inside the chroot;"
                " one per line. None: everything."
            ),
        ),
        AS_OF: Param(
            "",
            type=["string", "null"],
            title="As of",
            description=(
                "2026-11-23T14:00 (in the worker's time zone unless followed by +01:00 or Z), yesterday "
                "14:00, or 3 days ago. Empty: as the last backup left them."
            ),
        ),
        TARGET: Param(
            "",
            type=["string", "null"],
            title="Target directory",
            description=(
                "On the worker, below the directory in [mdbackup] restore_below: absolute, or relative to "
                "it. Empty: a new directory, whose name the task reports."
            ),
        ),
    }


def _how() -> dict[str, Param]:
    """Return the parameters that are switches."""
    return {
        INCLUDE_GONE: Param(
            False,
            type="boolean",
            title="Include deleted files",
            description="Also restore files that were gone from the provider by then.",
        ),
        OVERWRITE: Param(
            False,
            type="boolean",
            title="Overwrite",
            description="Replace different files in the target.",
        ),
        DRY_RUN: Param(
            False,
            type="boolean",
            title="Dry run",
            description="Only show what would be restored.",
        ),
    }
