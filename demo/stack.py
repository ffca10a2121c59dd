"""A throw-away Airflow: real API server, scheduler and DAG processor; by default LocalExecutor and SQLite.

Everything lies below one directory, which is also the servers' HOME, so that no configuration, plugin, SSH
setting or database of the caller's own Airflow takes part. Only 127.0.0.1 is listened on.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from demo import processes
from demo.airflow_client import AirflowClient

START_TIMEOUT = 180.0


class AirflowStackError(RuntimeError):
    """Airflow did not come up; the message holds the end of the log of the component that failed."""


class AirflowStack(AirflowClient):
    """A throw-away Airflow, and the REST client of its administrator; a context manager.

    After `start`: url (of UI and API), and user and password for it ("viewer" has the same password). The
    components log to home/logs-<component>.log, tasks below home/logs.

    :param home: AIRFLOW_HOME; made if missing, stays when Airflow ends.
    :param dags_folder: directory with DAG files.
    :param env: further environment variables, such as AIRFLOW_CONN_... ; they win over those set here.
    :param triggerer: start a triggerer too, for deferrable operators.
    :param database: URL of an empty metadata database; default: an SQLite file below `home`.
    :param further: components beside these, such as Celery workers: their commands, by name. `airflow` is
        found in their PATH.
    """

    def __init__(
        self,
        home: Path,
        *,
        dags_folder: Path,
        env: Mapping[str, str] | None = None,
        triggerer: bool = False,
        database: str | None = None,
        further: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.home = home.resolve()
        self.port = processes.free_port()
        self.user, self.password = "admin", secrets.token_urlsafe(9)
        super().__init__(f"http://127.0.0.1:{self.port}", self.user, self.password)
        self.environment = self._environment(dags_folder.resolve(), database) | dict(env or {})
        airflow = _airflow_program()
        self._components: dict[str, Sequence[str]] = {
            "api-server": [airflow, "api-server"],
            "scheduler": [airflow, "scheduler", "--skip-serve-logs"],
            "dag-processor": [airflow, "dag-processor"],
        }
        if triggerer:
            self._components["triggerer"] = [airflow, "triggerer", "--skip-serve-logs"]
        self._components |= further or {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> AirflowStack:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make the database and start the components; return when all are healthy.

        :raises AirflowStackError: a component ended, or is not healthy within three minutes.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        passwords = self.home / "passwords.json"
        passwords.touch(mode=0o600)
        passwords.write_text(json.dumps({"admin": self.password, "viewer": self.password}))
        # Where Airflow imports from. By default SQLite gives up after five seconds of waiting for its lock.
        (self.home / "config").mkdir(exist_ok=True)
        (self.home / "config" / "stack_settings.py").write_text('CONNECT_ARGS = {"timeout": 60}\n')
        migration = self.airflow("db", "migrate")
        if migration.returncode:
            raise AirflowStackError(f"`airflow db migrate` failed:\n{migration.stdout[-3000:]}")
        try:
            for name in self._components:
                self._start(name)
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the components with all their descendants; what a running task was doing is cut off."""
        processes.stop(list(self._running.values()), patience=15)
        self._running.clear()
        self.close()

    def restart(self, name: str) -> None:
        """End a component, with all that it was doing, and start it again.

        :raises AirflowStackError: it ended, or is not healthy within three minutes.
        """
        processes.stop([self._running.pop(name)], patience=15)
        self._start(name)
        self._wait_until_healthy()

    def kill(self, name: str) -> None:
        """End a component, and all that it was doing, as a power cut would; it stays ended until `revive`."""
        processes.kill(self._running.pop(name))

    def revive(self, name: str) -> None:
        """Start a component that was killed; leave one alone that runs."""
        if name not in self._running:
            self._start(name)

    def _start(self, name: str) -> None:
        self._running[name] = processes.start(
            self._components[name],
            log=self.home / f"logs-{name}.log",
            environment=self.environment,
        )

    def airflow(
        self, *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run an `airflow` command in this Airflow; stdout of the result has its stderr too.

        :param env: environment variables for this command alone.
        """
        return subprocess.run(
            [_airflow_program(), *arguments],
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise AirflowStackError(f"{name} ended ({process.returncode}):\n{self._log_end(name)}")
            try:
                health = self._client.get("/api/v2/monitor/health", timeout=5).json()
            except (httpx.TransportError, ValueError):
                health = {}
            parts = ["metadatabase", "scheduler", "dag_processor"]
            parts += ["triggerer"] if "triggerer" in self._running else []
            if all(health.get(part, {}).get("status") == "healthy" for part in parts):
                return
            time.sleep(0.5)
        ends = "\n".join(f"--- {name}\n{self._log_end(name)}" for name in self._running)
        raise AirflowStackError(f"Not healthy within {START_TIMEOUT:.0f} s: {health}\n{ends}")

    def _log_end(self, name: str) -> str:
        log = self.home / f"logs-{name}.log"
        return log.read_text(errors="replace")[-3000:]

    def _environment(self, dags_folder: Path, database: str | None) -> dict[str, str]:
        settings = {
            ("core", "dags_folder"): str(dags_folder),
            ("core", "load_examples"): "False",
            ("core", "executor"): "LocalExecutor",
            ("core", "parallelism"): "4",
            ("core", "simple_auth_manager_users"): "admin:admin,viewer:viewer",
            ("core", "simple_auth_manager_passwords_file"): f"{self.home}/passwords.json",
            ("core", "execution_api_server_url"): f"{self.url}/execution/",
            ("core", "fernet_key"): base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            ("database", "sql_alchemy_conn"): database or f"sqlite:///{self.home}/airflow.db",
            ("api", "host"): "127.0.0.1",
            ("api", "port"): str(self.port),
            ("api", "base_url"): self.url,
            ("api", "workers"): "1",
            ("api", "secret_key"): secrets.token_hex(32),
            ("api_auth", "jwt_secret"): secrets.token_hex(32),
            ("scheduler", "scheduler_heartbeat_sec"): "1",
            ("scheduler", "scheduler_idle_sleep_time"): "0.25",
            ("dag_processor", "refresh_interval"): "5",
            ("dag_processor", "min_file_process_interval"): "5",
            ("dag_processor", "bundle_refresh_check_interval"): "2",
            ("logging", "base_log_folder"): f"{self.home}/logs",
        }
        if database is None:
            settings["database", "sql_alchemy_connect_args"] = "stack_settings.CONNECT_ARGS"
            settings["database", "sql_alchemy_connect_args_async"] = "stack_settings.CONNECT_ARGS"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
        programs = f"{Path(sys.executable).parent}:{inherited.get('PATH', os.defpath)}"
        return (
            inherited
            | {"AIRFLOW_HOME": str(self.home), "HOME": str(self.home), "PATH": programs}
            | {
                f"AIRFLOW__{section.upper()}__{key.upper()}": value
                for (section, key), value in settings.items()
            }
        )


def _airflow_program() -> str:
    beside = Path(sys.executable).parent / "airflow"
    program = str(beside) if beside.exists() else shutil.which("airflow")
    if program is None:
        raise AirflowStackError(f"No `airflow` beside {sys.executable}: run this with `.venv/bin/python`.")
    return program
