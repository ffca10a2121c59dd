"""Real Airflows for the system tests, and what is backed up there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from demo.sshd import ProviderServer
from demo.stack import AirflowStack

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def airflow_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., AirflowStack]]:
    """A function that starts a real Airflow, which runs until the tests of the module are over.

    Starting one takes about 15 seconds: call it from a fixture of module scope. Also an idle one takes a
    seventh of a core.
    """
    with ExitStack() as running:

        def start(
            dags_folder: Path, env: Mapping[str, str] | None = None, *, triggerer: bool = False
        ) -> AirflowStack:
            home = tmp_path_factory.mktemp("airflow")
            stack = AirflowStack(home, dags_folder=dags_folder, env=env, triggerer=triggerer)
            return running.enter_context(stack)

        yield start


class Site:
    """An Airflow with some providers, all of them on one SSH server, each with a source of its own."""

    def __init__(self, stack: AirflowStack, server: ProviderServer, folder: Path) -> None:
        self.stack = stack
        self.server = server
        self.folder = folder

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
