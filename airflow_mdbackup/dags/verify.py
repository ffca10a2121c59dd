"""The DAGs that read the backups again, one for each provider whose ``verify`` is not null.

They are in a file of their own, so that whoever verifies otherwise leaves it out. One task reads the next
part of all. It takes a slot where the backups take theirs, so that it lets theirs go first, and no two of it
run at a time. People are told of damage by the provider's ``alerts``; its pings, which are of backups, are
not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from airflow.sdk import DAG, Param

from airflow_mdbackup.alerts.callbacks import RunCallbacks
from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import Provider, Verify, load, providers_file
from airflow_mdbackup.config.schedule import UnusableSchedule
from airflow_mdbackup.dags.common import START, as_code, invalid_dag, made, schedule_of, task_defaults
from airflow_mdbackup.operators import VerifyMirror
from airflow_mdbackup.operators.verify_mirror import MISSING, PART, PATHS, REPAIR
from airflow_mdbackup.scheme.common.units import write_size

_DOC = """# Is the backup of {name} still good?

Each run reads the next part ({part}) of {dest} again, live files and versions, and fails when one is not
what it was when it came. Rotten live files are {repaired}. Backups go on meanwhile.
"""


def verify_dags(path: Path | None = None) -> dict[str, DAG]:
    """Return the DAGs that verify backups, by id. Never raises for what the configuration says.

    :param path: the configuration; by default what Airflow's options name.
    """
    makers: dict[str, Callable[[], DAG]] = {
        _dag_id(provider): partial(_dag_of, provider, provider.verify)
        for provider in load(providers_file() if path is None else path).providers
        if provider.verify is not None
    }
    return made(makers)


def _dag_id(provider: Provider) -> str:
    return f"mdbackup_verify_{provider.name}"


def _dag_of(provider: Provider, verify: Verify) -> DAG:
    try:
        return _verify_dag(provider, verify)
    except UnusableSchedule as error:
        what = f"The backup of {provider.name} is NOT verified"
        return invalid_dag(_dag_id(provider), what, (f"verify.schedule: {error}",))


def _verify_dag(provider: Provider, verify: Verify) -> DAG:
    teller = RunCallbacks(provider) if provider.alerts else None
    repaired = "pulled again by the next backup" if verify.repair else "only told of"
    with DAG(
        dag_id=_dag_id(provider),
        description=f"Read the backup of {provider.name} again, and fail if any of it is damaged",
        doc_md=_DOC.format(
            name=provider.name, part=verify.part, dest=as_code(provider.dest), repaired=repaired
        ),
        schedule=schedule_of(verify.schedule),
        start_date=START,
        catchup=False,
        max_active_runs=1,
        tags={"mdbackup", *provider.tags},
        default_args=task_defaults(provider, teller),
        params=_params(verify),
        on_failure_callback=[teller.alert_failed_verification] if teller else None,
    ) as dag:
        VerifyMirror(
            task_id="verify_mirror",
            provider=provider.name,
            dest=provider.dest,
            part=verify.part,
            limit=None if verify.limit is None else write_size(verify.limit),
            repair=verify.repair,
            missing=verify.missing,
            inlets=[provider_asset(provider.name)],
            # A slot that is free is the backups' first.
            weight_rule="absolute",
            priority_weight=0,
        )
    return dag


def _params(verify: Verify) -> dict[str, Param]:
    return {
        PART: Param(
            verify.part,
            type="string",
            title="Part",
            description="How much to read, from where the last run ended: 1/30, 50GB, or all.",
        ),
        PATHS: Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1},
            maxItems=100,
            title="Only these paths",
            description=(
                "Files, directories with all below, and gitignore patterns, as backupop sees them; one on "
                "each line. The next part is then left for another run."
            ),
        ),
        REPAIR: Param(
            verify.repair,
            type="boolean",
            title="Repair",
            description=(
                "Have the next backup pull rotten live files again. The rotten bytes become versions."
            ),
        ),
        MISSING: Param(
            verify.missing,
            type="boolean",
            title="Repair missing files, too",
            description="Have it pull live files again that are missing.",
        ),
    }
