"""The DAGs that read the backups again, one for each provider whose ``verify`` is not null.

Their DAG file is separate, so that it can be left out if backups are verified in another way. One task reads
the next part of the backup. It uses the same pool as the backups and lets them go first, and only one runs at
a time. Damage is reported by the provider's ``alerts``, except for pings, which are about backups.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from airflow.sdk import DAG, Param

from airflow_mdbackup.alerts.callbacks import RunCallbacks
from airflow_mdbackup.assets import provider_asset
from airflow_mdbackup.config import Provider, Verify, load, providers_file
from airflow_mdbackup.dags.common import START, DagMaker, as_code, make_dags, schedule_of, task_defaults
from airflow_mdbackup.operators import VerifyMirror
from airflow_mdbackup.operators.verify_mirror import MISSING, PART, PATHS, REPAIR
from airflow_mdbackup.scheme.common.units import write_size

_DOC = """# Is the backup of {name} still good?

Each run reads the next part ({part}) of {dest} again, live files and versions, and fails if one of them is no
longer what was backed up. Rotten live files are {repaired}. Backups continue meanwhile.
"""


def verify_dags(path: Path | None = None) -> dict[str, DAG]:
    """Return the DAGs that verify backups, by id. Whatever the configuration contains, this does not raise.

    :param path: the configuration; by default the one that Airflow's options name.
    """
    return make_dags(
        DagMaker(
            _dag_id(provider),
            partial(_verify_dag, provider, provider.verify),
            f"The backup of {provider.name} is NOT verified",
            "verify.schedule",
        )
        for provider in load(providers_file() if path is None else path).providers
        if provider.verify is not None
    )


def _dag_id(provider: Provider) -> str:
    return f"mdbackup_verify_{provider.name}"


def _verify_dag(provider: Provider, verify: Verify) -> DAG:
    callbacks = RunCallbacks(provider) if provider.alerts else None
    repaired = "pulled again by the next run" if verify.repair else "only reported"
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
        default_args=task_defaults(provider, callbacks),
        params=_params(verify),
        on_failure_callback=[callbacks.alert_failed_verification] if callbacks else None,
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
            # Backups go first when a slot is free.
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
            description="How much to read, from where the last run stopped: 1/30, 50GB, or all.",
        ),
        PATHS: Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1},
            maxItems=100,
            title="Only these paths",
            description=(
                "Files, directories (recursive), and gitignore patterns, as absolute paths inside the chroot;"
                " one per line. The next part is then left to another run."
            ),
        ),
        REPAIR: Param(
            verify.repair,
            type="boolean",
            title="Repair",
            description=(
                "Have the next backup pull rotten live files again. The rotten content becomes a version."
            ),
        ),
        MISSING: Param(
            verify.missing,
            type="boolean",
            title="Also repair missing files",
            description="Also have it pull missing live files again.",
        ),
    }
