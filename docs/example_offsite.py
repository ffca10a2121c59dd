"""A DAG that follows each backup of srv1: it checks every file, then copies all of it to another site."""

from datetime import timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowSkipException

from airflow_mdbackup.assets import provider_asset

PROVIDER, DEST = "srv1", "/srv/backups/srv1"
TARGET = "{{ var.value.offsite_srv1 }}"  # an Airflow Variable, such as backup@vault.example.org:/srv/srv1

# Names come from the provider. None of them is to act on a terminal, or on Airflow's page of the log.
VERIFY = r"""
set -euo pipefail
cd "$DEST/files"
sed 's|  /|  ./|' ../index.md5 | md5sum --check --strict --quiet 2>&1 |
    cat -v | sed 's/group:/group\\x3a/g' | head -n 100
"""

# The index is that of before: another backup may be committed meanwhile, and it must not claim what is not
# there.
COPY = r"""
set -euo pipefail
index=$(mktemp)
trap 'rm -f "$index"' EXIT
cp -p "$DEST/index.md5" "$index"
rsync --archive --timeout=600 -- "$DEST/files/" "${TARGET:?}/files/"
rsync --archive --timeout=600 --exclude=/files --exclude=/index.md5 \
    --exclude='/.mdbackup/runs/*' --exclude='/.mdbackup/staging/*' -- "$DEST/" "$TARGET/"
rsync --archive --timeout=600 -- "$index" "$TARGET/index.md5"
"""

with DAG(
    dag_id=f"offsite_{PROVIDER}",
    schedule=provider_asset(PROVIDER),
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10)},
) as dag:

    @task
    def whole_backup(triggering_asset_events=None):
        """Skip what follows if people limited all the runs that led to this; a run by hand has none."""
        events = [event for events in triggering_asset_events.values() for event in events]
        if events and all(event.extra.get("partial") for event in events):
            raise AirflowSkipException("The backup was limited to some paths: the next whole one is copied")

    verify = BashOperator(task_id="verify", bash_command=VERIFY, env={"DEST": DEST}, append_env=True)
    copy = BashOperator(
        task_id="copy",
        bash_command=COPY,
        env={"DEST": DEST, "TARGET": TARGET, "RSYNC_RSH": "ssh -o BatchMode=yes"},
        append_env=True,
    )
    whole_backup() >> verify >> copy
