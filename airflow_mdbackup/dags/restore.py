"""The DAG by which people get files back: no schedule, but a form.

A restore must run where the provider's ``dest`` is, and Airflow fixes a task's queue, pool and pod template
when it reads the DAG. So there is one task where all providers agree on these::

    restore_files

and else one for each of their placements, behind one that chooses::

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
_DOC = """# Get files back

Trigger this DAG: the form asks which files, of which backup, as of when, and where to. They are written on
the worker that has the backup, below the directory that the Airflow option `[mdbackup] restore_below` names
there. Nothing in the backup is changed. Where Airflow is gone, `mdbackup restore` does the same from the disk
alone.
"""


def restore_dags(path: Path | None = None) -> dict[str, DAG]:
    """Return the DAG that restores, by its id; none without providers. Never raises for what they say.

    :param path: the configuration; by default what Airflow's options name.
    """
    providers = load(providers_file() if path is None else path).providers
    return {RESTORE: _restore_dag(providers)} if providers else {}


def _restore_dag(providers: tuple[Provider, ...]) -> DAG:
    dests = {provider.name: provider.dest for provider in providers}
    with DAG(
        dag_id=RESTORE,
        description="Get files back, as of any moment: trigger it, and fill the form",
        doc_md=_DOC,
        schedule=None,
        start_date=START,
        catchup=False,
        max_active_runs=4,
        is_paused_upon_creation=False,
        tags={"mdbackup"},
        params=_params(list(dests)),
        user_defined_macros={"dest_of": dests},
        # Who needs files back comes before all backups, and reads what is wrong at once.
        default_args={
            "retries": 0,
            "retry_policy": RETRY_POLICY,
            "weight_rule": "absolute",
            "priority_weight": 1000,
        },
    ) as dag:

        def restore(task_id: str, provider: Provider) -> RestoreFiles:
            return RestoreFiles(
                task_id=task_id,
                provider=f"{{{{ params.{PROVIDER} }}}}",
                dest=f"{{{{ dest_of[params.{PROVIDER}] }}}}",
                keep_out=list(dests.values()),
                **placement(provider),
            )

        tasks = _tasks(providers)
        examples = {tasks[provider.name]: provider for provider in providers}
        if len(examples) == 1:
            restore("restore_files", providers[0])
        else:
            choose = BranchPythonOperator(
                task_id="choose_worker",
                python_callable=_task_of,
                op_kwargs={"tasks": tasks},
                **placement(providers[0]),
            )
            choose >> [restore(task_id, provider) for task_id, provider in examples.items()]
    return dag


def _task_of(tasks: dict[str, str], params: dict[str, Any]) -> str:
    """Return the task that runs where the chosen provider's backup is."""
    return tasks[params[PROVIDER]]


def _tasks(providers: Iterable[Provider]) -> dict[str, str]:
    """Return the task for each provider: named after queue, pool or template, as people know the place."""
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


def _params(names: list[str]) -> dict[str, Param]:
    whose: dict[str, Any] = {
        "type": "string",
        "enum": names,
        "title": "Provider",
        "description": "Whose files.",
    }
    return {
        PROVIDER: Param(**whose | ({"default": names[0]} if len(names) == 1 else {})),
        PATHS: Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1},
            title="Paths",
            description=(
                "Files, directories with all below, and gitignore patterns, as backupop sees them; one on "
                "each line. None: everything."
            ),
        ),
        AS_OF: Param(
            "",
            type=["string", "null"],
            title="As of",
            description=(
                "2026-11-23T14:00 (with +01:00 or Z behind it, else in the time zone of the worker), "
                "yesterday 14:00, or 3 days ago. Empty: as the last backup left them."
            ),
        ),
        TARGET: Param(
            "",
            type=["string", "null"],
            title="Target directory",
            description=(
                "On the worker, below what [mdbackup] restore_below names, by its whole path or from "
                "there. Empty: a new directory, which the task tells."
            ),
        ),
        INCLUDE_GONE: Param(
            False,
            type="boolean",
            title="Include what was gone",
            description="Also what had gone from the provider by then.",
        ),
        OVERWRITE: Param(
            False,
            type="boolean",
            title="Overwrite",
            description="Replace files of the target that have other bytes.",
        ),
        DRY_RUN: Param(
            False,
            type="boolean",
            title="Dry run",
            description="Only tell what would come back.",
        ),
    }
