"""Real Airflows for the system tests, and what is backed up there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from demo.sshd import ProviderServer
from demo.stack import AirflowStack
from tests.servers import Database, postgresql
from tests.system import connections, lineage
from tests.system.listeners import Mailbox, StatsdServer

PROJECT = Path(__file__).parents[2]

READ_WHEN_CHANGED = {
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
}
"""DAG files are read when they change, or when that is asked for, and then count at once. To read them again
and again, as Airflow does by default, takes most of a core."""

PREAMBLE = """\
import os
os.environ |= {environment!r}

"""
"""What stands before each DAG file: each of them is read, and each task is run, in a process of its own."""

PRELOAD = "import airflow_mdbackup.dags.backup, airflow_mdbackup.hooks.provider\n"
"""Airflow's local settings: the scheduler imports once what its tasks, which are forks of it, all need."""

NOTIFIER = """\
from airflow.sdk import BaseNotifier
class ToFile(BaseNotifier):
    template_fields = ("text",)
    def __init__(self, *, path, text, **kwargs):
        super().__init__(**kwargs)
        self.path, self.text = path, text
    def notify(self, context):
        with open(self.path, "a") as file:
            file.write(self.text)
"""
"""Somebody's own notifier: the module `own_notifier`, which lies beside the DAG files."""


class Site:
    """An Airflow with some providers, all of them on one SSH server, each with a source of its own.

    :ivar env: environment variables of these providers' DAGs, beside those of the Airflow.
    """

    def __init__(
        self,
        stack: AirflowStack,
        server: ProviderServer,
        folder: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.stack = stack
        self.server = server
        self.folder = folder
        self.env = dict(env or {})

    def source(self, provider: str) -> Path:
        return self.server.tree / provider

    def put(self, provider: str, name: str, content: bytes) -> None:
        path = self.source(provider) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def live(self, provider: str, name: str) -> Path:
        return Path(f"{self.folder}/{provider}/files{self.server.prefix}/{provider}/{name}")

    def start(self, provider: str, **parameters: Any) -> str:
        """Start a run, with parameters as a person may give it, and return its id."""
        dag_id = f"mdbackup_{provider}"
        self.stack.wait_for_dag(dag_id)
        self.stack.unpause(dag_id)
        return self.stack.trigger(dag_id, parameters)

    def finish(self, provider: str, run_id: str, timeout: float = 180) -> str:
        return self.stack.wait_for_run(f"mdbackup_{provider}", run_id, timeout=timeout)

    def run(self, provider: str) -> tuple[str, dict[str, str | None]]:
        """Do a whole run and return its state and those of its tasks."""
        run_id = self.start(provider)
        return self.finish(provider, run_id), self.stack.task_states(f"mdbackup_{provider}", run_id)

    def command(self, *words: str) -> tuple[int, str]:
        """Run `airflow mdbackup` with the configuration of these providers; return status and output."""
        done = self.stack.airflow("mdbackup", *words, env=self.env)
        return done.returncode, done.stdout

    def import_errors(self) -> list[dict[str, Any]]:
        """Return the import errors of the DAG files of these providers."""
        errors = self.stack.get("/importErrors")["import_errors"]
        return [error for error in errors if f"{self.folder.name}/" in error["filename"]]


class SharedAirflow:
    """One Airflow for the tests of several modules, each with DAG files and providers of its own.

    With LocalExecutor and PostgreSQL. Names of providers, and so DAG ids, must differ between modules.

    :ivar folder: has a directory for each module, with its configuration and its backups.
    :ivar dags: the DAG files, in a directory for each module.
    :ivar keys: directory with the keys that connections have in themselves.
    """

    def __init__(
        self, folder: Path, server: ProviderServer, database: Database, mailbox: Mailbox, statsd: StatsdServer
    ) -> None:
        self.folder = folder
        self.server = server
        self.database = database
        self.mailbox = mailbox
        self.statsd = statsd
        self.keys = folder / "keys"
        self._sites: dict[str, Site] = {}
        self.dags = folder / "dags"
        self.dags.mkdir(parents=True)
        (self.dags / "own_notifier.py").write_text(NOTIFIER)
        plugins = folder / "plugins"
        plugins.mkdir()
        (plugins / "lineage.py").write_text(lineage.PLUGIN)
        settings = folder / "airflow" / "config" / "airflow_local_settings.py"
        settings.parent.mkdir(parents=True)
        settings.write_text(PRELOAD)
        env = connections.environment(server, self.keys, mailbox.port) | {
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(plugins),
            lineage.VARIABLE: str(folder / "lineage"),
            "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
            **READ_WHEN_CHANGED,
            "AIRFLOW__METRICS__STATSD_ON": "True",
            "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
            "AIRFLOW__METRICS__STATSD_PORT": str(statsd.port),
            "NO_PROXY": "127.0.0.1",
        }
        self.stack = AirflowStack(
            folder / "airflow", dags_folder=self.dags, env=env, triggerer=True, database=database.url
        )

    def site(
        self,
        name: str,
        *,
        providers: Mapping[str, Any],
        dags: Mapping[str, str],
        env: Mapping[str, str] | None = None,
    ) -> Site:
        """Add the providers and DAG files of a module, which the DAG processor finds soon.

        :param name: of a directory below `folder`, which may be there.
        :param providers: configuration of each provider, by name.
        :param dags: DAG files' texts by name.
        :param env: what else the DAGs are to have in their environment.
        """
        if name in self._sites:  # the tests of its module are not all beside each other
            return self._sites[name]
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        configuration = folder / "providers.yaml"
        configuration.write_text(json.dumps({"providers": providers}))
        env = {"AIRFLOW__MDBACKUP__PROVIDERS_FILE": str(configuration), **(env or {})}
        (self.dags / name).mkdir()
        for file, text in dags.items():
            (self.dags / name / file).write_text(PREAMBLE.format(environment=env) + text)
        self._sites[name] = Site(self.stack, self.server, folder, env)
        return self._sites[name]


def dag_files(*names: str) -> dict[str, str]:
    """Return the texts of DAG files of the project, by their names."""
    return {name: (PROJECT / "dags" / name).read_text() for name in names}


def provider_yaml(server: ProviderServer, folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    return {
        "sftp_conn_id": "backupop",
        "ssh_conn_id": "index",
        "chroot": server.chroot,
        "index": f"{server.prefix}/.mdbackup/{name}.md5",
        "source": [f"{server.prefix}/{name}"],
        "dest": str(folder / name),
        "schedule": None,
        "retries": 0,
        **keys,
    }


@pytest.fixture(scope="package")
def shared_airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedAirflow]:
    """A running Airflow to which modules add what they need."""
    folder = tmp_path_factory.mktemp("shared-airflow")
    with ExitStack() as running:
        server = running.enter_context(ProviderServer(folder / "server"))
        mailbox = running.enter_context(Mailbox())
        statsd = running.enter_context(StatsdServer())
        database = running.enter_context(postgresql())
        shared = SharedAirflow(folder / "site", server, database, mailbox, statsd)
        running.enter_context(shared.stack)
        yield shared
