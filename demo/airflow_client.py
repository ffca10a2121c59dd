"""A small client of Airflow's REST API, for the demo and the system tests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import httpx

FINISHED = ("success", "failed")

# Seconds. A server may wait for SQLite's lock as long as `AirflowStack` has it wait: longer than that for one
# answer, and time for another try.
ANSWER_TIMEOUT = 90
PATIENCE = 240

# The same in each line of a task's log, or of interest to Airflow's developers only.
UNTOLD_LOG_FIELDS = {
    *("dag_id", "run_id", "task_id", "map_index", "try_number", "ti_id", "ti"),
    *("level", "logger", "filename", "lineno"),
}


class AirflowClientError(RuntimeError):
    """Airflow refused a request, or what was waited for did not come in time."""


class AirflowClient:
    """Airflow's REST API at `url`, as one user. Paths are relative to /api/v2.

    A request is sent again for a while when the server cannot be reached, or fails, as a busy SQLite database
    now and then makes it do. Each method raises AirflowClientError, with Airflow's words, when a request is
    refused or keeps failing.
    """

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url = url
        self._credentials = {"username": user, "password": password}
        self._client = httpx.Client(base_url=url, timeout=ANSWER_TIMEOUT, trust_env=False)
        self._token = ""

    @property
    def token(self) -> str:
        """The bearer token of this user, got at first use."""
        if not self._token:
            self._token = self._send("POST", "/auth/token", json=self._credentials).json()["access_token"]
        return self._token

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON answer to GET `path`; `parameters` become its query."""
        return self._request("GET", path, params=parameters)

    def post(self, path: str, json: Any) -> Any:
        """Return the JSON answer to POST `path` with the body `json`."""
        return self._request("POST", path, json=json)

    def patch(self, path: str, json: Any) -> Any:
        """Return the JSON answer to PATCH `path` with the body `json`."""
        return self._request("PATCH", path, json=json)

    def wait_for_dag(self, dag_id: str, timeout: float = 180) -> dict[str, Any]:
        """Return the DAG's description as soon as the DAG processor has found it, `timeout` in seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for dag in self.get("/dags", dag_id_pattern=dag_id, limit=100)["dags"]:
                if dag["dag_id"] == dag_id and not dag["is_stale"]:
                    return dict(dag)
            time.sleep(0.5)
        errors = self.get("/importErrors")["import_errors"]
        stack_traces = "".join(f"\n{error['filename']}: {error['stack_trace']}" for error in errors)
        raise AirflowClientError(
            f"No DAG {dag_id} within {timeout:.0f} s. Import errors: {stack_traces or 'none'}"
        )

    def read_again(self, dag_id: str) -> None:
        """Have the DAG processor read the file of the DAG again, soon, although it has not changed."""
        token = self.get(f"/dags/{dag_id}")["file_token"]
        self._send("PUT", f"/api/v2/parseDagFile/{token}", headers=self._headers(), already_done=409)

    def unpause(self, dag_id: str) -> None:
        """Let the scheduler run the DAG."""
        self.patch(f"/dags/{dag_id}", {"is_paused": False})

    def trigger(self, dag_id: str, conf: dict[str, Any] | None = None, run_id: str | None = None) -> str:
        """Start a run without a logical date, as the button in the UI does, and return its run id."""
        run_id = run_id or f"manual_{uuid.uuid4().hex[:12]}"
        path = f"/api/v2/dags/{dag_id}/dagRuns"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf or {}}
        # Sent again after a failure that came too late to prevent the run, it is refused as already there.
        self._send("POST", path, json=body, headers=self._headers(), already_done=409)
        return run_id

    def wait_for_run(self, dag_id: str, run_id: str, timeout: float = 120) -> str:
        """Return "success" or "failed" when the run has ended.

        :raises AirflowClientError: it has not ended within `timeout` seconds; with the states of its tasks.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = str(self.get(f"/dags/{dag_id}/dagRuns/{run_id}")["state"])
            if state in FINISHED:
                return state
            time.sleep(0.5)
        tasks = self.task_states(dag_id, run_id)
        raise AirflowClientError(f"Run {run_id} of {dag_id} is {state} after {timeout:.0f} s: {tasks}")

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return the run's task instances as Airflow describes them, mapped ones one by one."""
        answer = self.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", limit=1000)
        return list(answer["task_instances"])

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """Return the state of each task by its task id; a mapped one is called `task_id[map_index]`."""
        return {
            task["task_id"] + (f"[{task['map_index']}]" if task["map_index"] >= 0 else ""): task["state"]
            for task in self.task_instances(dag_id, run_id)
        }

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """Return an XCom value of a task."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self.get(path, map_index=map_index)["value"]

    def task_log(
        self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1
    ) -> str:
        """Return the log of one try of a task: a line for each event, its further fields as key=value.

        A failure's exception is at the end of its line, as type and message.
        """
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        answer = self.get(path, map_index=map_index, full_content=True)
        return "\n".join(_log_line(event) for event in answer["content"])

    def clear(
        self, dag_id: str, run_id: str, task_ids: Sequence[str], *, downstream: bool = True, **options: Any
    ) -> None:
        """Clear tasks, so that they run again, by default with all that follow them.

        :param options: further fields of the API's request body.
        """
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": list(task_ids),
            "only_failed": False,
            "include_downstream": downstream,
        }
        self.post(f"/dags/{dag_id}/clearTaskInstances", body | options)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Accept": "application/json"}

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        return self._send(method, f"/api/v2{path}", headers=self._headers(), **arguments).json()

    def _send(
        self, method: str, path: str, already_done: int | None = None, **arguments: Any
    ) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE
        sent = 0
        while True:
            try:
                answer = self._client.request(method, path, **arguments)
                problem = f"{answer.status_code} {answer.text}"
            except httpx.TransportError as error:
                answer, problem = None, repr(error)
            sent += 1
            if answer and (answer.is_success or (answer.status_code == already_done and sent > 1)):
                return answer
            if (answer is not None and answer.status_code < 500) or time.monotonic() > deadline:
                raise AirflowClientError(f"{method} {self.url}{path}: {problem}")
            time.sleep(min(0.25 * sent, 2))


def _log_line(event: dict[str, Any] | str) -> str:
    if isinstance(event, str):
        return event
    fields = dict(event)
    line = f"{fields.pop('timestamp', None) or ''} {fields.pop('event')}".strip()
    errors = fields.pop("error_detail", None) or []
    line += "".join(f" {key}={value!r}" for key, value in fields.items() if key not in UNTOLD_LOG_FIELDS)
    return line + "".join(f"\n{error.get('exc_type')}: {error.get('exc_value')}" for error in errors)
