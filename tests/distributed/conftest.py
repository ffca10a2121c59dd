"""An Airflow on several machines, as far as one can play them: CeleryExecutor, Redis and PostgreSQL.

Each worker is in a mount and a host name namespace of its own: it has its own name, and sees its own disk
only. Where the disk of another one is, it sees an empty directory, as a worker does that lacks a mount.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from demo.sshd import ProviderServer
from demo.stack import START_TIMEOUT, AirflowStack
from tests.servers import postgresql, redis_server
from tests.system.conftest import PROJECT, READ_WHEN_CHANGED, Site, provider_yaml
from tests.waiting import until

WORKERS = {"east-1": "east", "east-2": "east", "west-1": "west"}
"""The queue of each worker. Those of one queue share a disk."""

LOST_WORKER = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
}
"""How soon Airflow takes a worker for lost that nothing is heard of: much sooner than by default."""

# $1: name of the machine, $2: its disk, $3: where it has that. The rest: what runs there.
ENTER_MACHINE = 'set -eu; hostname "$1"; mount --bind "$2" "$3"; shift 3; exec "$@"'
NAMESPACE = ["unshare", "--mount", "--uts", "--propagation", "private", "--"]


class Machines:
    """The machines of the workers, and the Airflow that has them do its tasks.

    :param server: where all providers have their files.
    :param database: URL of an empty database.
    :param broker: URL of Redis.
    """

    def __init__(self, folder: Path, server: ProviderServer, database: str, broker: str) -> None:
        self.folder = folder
        self.server = server
        self._broker = broker
        self._file = folder / "providers.yaml"
        self._providers: dict[str, dict[str, Any]] = {}
        env = {
            "AIRFLOW_CONN_BACKUPOP": json.dumps(server.sftp_connection()),
            "AIRFLOW_CONN_INDEX": json.dumps(server.ssh_connection()),
            "AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(self._file),
            "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
            "AIRFLOW__CORE__PARALLELISM": "16",
            "AIRFLOW__CELERY__BROKER_URL": broker,
            "AIRFLOW__CELERY__RESULT_BACKEND": f"db+{database}",
            **READ_WHEN_CHANGED,
            **LOST_WORKER,
        }
        home = folder / "airflow"
        self.stack = AirflowStack(
            home,
            dags_folder=PROJECT / "dags",
            env=env,
            database=database,
            further={name: self._worker(name, home) for name in WORKERS},
        )

    def disk(self, queue: str) -> Path:
        """Return where the disk of the workers of a queue really is."""
        return self.folder / "disks" / queue

    def mount(self, queue: str) -> Path:
        """Return where the workers of a queue have their disk; nobody else sees anything there."""
        return self.folder / "srv" / queue

    def site(self, queue: str) -> Site:
        """Return the providers whose backups are on the disk of the workers of a queue."""
        return Site(self.stack, self.server, self.disk(queue))

    def configure(self, provider: str, disk: str, queue: str | None = None, **keys: Any) -> None:
        """Set up a provider, or change it: its backup is on the disk of the workers of the queue `disk`.

        :param queue: where its tasks go; default: to those workers.
        """
        keys = {"queue": queue or disk, "retry_delay": "1s", **keys}
        self._providers[provider] = provider_yaml(self.server, self.mount(disk), provider, **keys)
        self._file.write_text(json.dumps({"providers": self._providers}))

    def bring_up(self) -> None:
        """Start the workers that were lost, and wait until each of them takes tasks."""
        for name in WORKERS:
            self.stack.revive(name)
        with Celery(broker=self._broker) as celery:
            ask = partial(celery.control.ping, [f"celery@{name}" for name in WORKERS], 5, limit=len(WORKERS))
            until(lambda: len(ask()) == len(WORKERS), START_TIMEOUT)

    def _worker(self, name: str, home: Path) -> list[str]:
        """Return the command that runs a Celery worker with two slots, on a machine of its own."""
        queue = WORKERS[name]
        for directory in (self.disk(queue), self.mount(queue)):
            directory.mkdir(parents=True, exist_ok=True)
        machine = [name, str(self.disk(queue)), str(self.mount(queue))]
        worker = ["airflow", "celery", "worker", "--queues", queue, "--concurrency", "2", "--skip-serve-logs"]
        worker += ["--pid", str(home / f"{name}.pid")]
        return [*NAMESPACE, "/bin/sh", "-c", ENTER_MACHINE, "enter-machine", *machine, *worker]


@pytest.fixture(scope="module")
def running_machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A running Airflow; not all workers of `WORKERS` need be there, or be there yet."""
    folder = tmp_path_factory.mktemp("machines")
    with ExitStack() as running:
        server = running.enter_context(ProviderServer(folder / "server"))
        database = running.enter_context(postgresql())
        broker = running.enter_context(redis_server(folder / "redis"))
        machines = Machines(folder, server, database.url, broker)
        # Of no effect here: only the KubernetesExecutor looks at it.
        machines.configure("far", "west", pod_template_file="/opt/airflow/pod_templates/backup.yaml")
        machines.configure("shared", "east", shards=4, bandwidth_limit="1MB")
        machines.configure("lost", "east", shards=2, bandwidth_limit="300KB", retries=1)
        machines.configure("near", "east")
        machines.configure("misled", "east")
        running.enter_context(machines.stack)
        yield machines


@pytest.fixture
def machines(running_machines: Machines) -> Machines:
    """A running Airflow with all the workers of `WORKERS`, whatever the tests before have done to them."""
    running_machines.bring_up()
    return running_machines
