"""From what Airflow knows about a run, when it calls a callback, to an alert.

A DAG's callback runs in the DAG processor, which can read XCom and the states of tasks, but not the state
store of an asset. So tasks leave what it needs as XCom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from airflow.configuration import conf

from airflow_mdbackup.alerts import message
from airflow_mdbackup.alerts.message import Alert, Failure
from airflow_mdbackup.assets import LAST_GOOD, provider_asset
from airflow_mdbackup.operators.base import misspelt
from airflow_mdbackup.operators.diff_indexes import PARAMETERS
from airflow_mdbackup.scheme.history.outcomes import Outcome

log = logging.getLogger(__name__)

_FAILURE = "failure"  # keys of XCom
_LAST_GOOD = "last_good"
_COMMIT = "commit_backup"
_HEADLINES = {
    "failure": "backup FAILED",
    "approval": "backup is WAITING for approval: too much is gone or changed",
    "success": "backup succeeded",
    "verification": "verification FAILED",
}
_WARNINGS = [outcome.value for outcome in Outcome if outcome.warning]


def describe_limits(context: Mapping[str, Any]) -> str:
    """Return how whoever started a run limited it, as text; empty if it backs up everything."""
    asked = context.get("params") or getattr(context.get("dag_run"), "conf", None) or {}
    if asked.get("dry_run"):
        return "dry run"
    return "limited to some paths" if asked.get("only") else ""


def has_misspelt_parameter(context: Mapping[str, Any]) -> bool:
    """Whether a backup run is refused because whoever started it misspelt a parameter."""
    return bool(misspelt(getattr(context.get("dag_run"), "conf", None), PARAMETERS))


def is_doubtful(context: Mapping[str, Any]) -> bool:
    """Whether a commit changed nothing because of a newer run, and that run was not good."""
    ti = context["ti"]
    return bool((ti.xcom_pull(task_ids=ti.task_id) or {}).get("doubtful"))


def store_last_good(context: Mapping[str, Any], provider: str) -> None:
    """Store the time of the last good backup as XCom of the first task: in ISO form, or empty."""
    store = context["asset_state_store"][provider_asset(provider)]
    context["ti"].xcom_push(key=_LAST_GOOD, value=(store.get(LAST_GOOD) or {}).get("at", ""))


def store_failure(context: Mapping[str, Any]) -> None:
    """Store why a task failed for good as its XCom; nothing if only Airflow knows why."""
    error = context.get("exception")
    if isinstance(error, BaseException):
        kind, text = message.describe_error(error)
        ti = context["ti"]
        ti.xcom_push(key=_FAILURE, value={"kind": kind, "text": text, "log_url": ti.log_url})


def failed_run(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert about a failed run, from the context of its DAG's callback."""
    dag, run_id = context["dag"], context["run_id"]
    failures = [_read_failure(dag.dag_id, run_id, *task) for task in _failed_tasks(context)]
    timed_out = context.get("reason") == "timed_out"
    headline = f"{_HEADLINES['failure']}: {message.TIMED_OUT}" if timed_out else ""
    if failures and all(failure.kind == message.BAD_PARAMETER for failure in failures):
        headline = f"run REFUSED, and nothing was done: {message.BAD_PARAMETER}"
    alert = message.failed(
        provider,
        failures,
        last_good=_describe_last_good(dag, run_id),
        run_url=_run_url(dag.dag_id, run_id),
        outcomes=_describe_outcomes(_xcom(dag.dag_id, run_id, _COMMIT)),
        headline=headline,
    )
    limits = describe_limits(context)
    return dataclasses.replace(alert, headline=f"{alert.headline} ({limits})") if limits else alert


def failed_verification(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert about a failed verification, from the context of its DAG's callback."""
    dag, run_id = context["dag"], context["run_id"]
    failures = tuple(_read_failure(dag.dag_id, run_id, *task) for task in _failed_tasks(context))
    kinds = ", ".join(dict.fromkeys(failure.kind for failure in failures))
    headline = f"{_HEADLINES['verification']}: {kinds}" if kinds else _HEADLINES["verification"]
    facts = (
        ("Verification", _run_url(dag.dag_id, run_id)),
        ("Backups", "they continue; no backup has failed"),
    )
    return Alert(provider, "verification", headline, facts, failures)


def failed_task(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert about a failed task on its own, from the context of its own callback."""
    ti, error = context["ti"], context.get("exception")
    kind, text, headline = message.KILLED, "", message.KILLED
    if isinstance(error, BaseException):
        kind, text = message.describe_error(error)
        headline = (str(error).splitlines() or [kind])[0].removeprefix(f"{provider}: ")[:150]
    step = _step(ti.task_id, -1 if ti.map_index is None else ti.map_index)
    facts = (("Run", _run_url(ti.dag_id, ti.run_id)),)
    return Alert(provider, "failure", headline, facts, (Failure(step, kind, text, ti.log_url),))


def approval(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert about a run that waits for approval, from the context of ApproveChanges."""
    ti, task = context["ti"], context["task"]
    facts = [
        *(("Guard", message.shorten(reason)) for reason in task.reasons),
        ("Answer before", f"{datetime.now(UTC) + task.response_timeout:%Y-%m-%d %H:%M} UTC"),
        ("Answer at", f"{_run_url(ti.dag_id, ti.run_id)}/tasks/{ti.task_id}/required_actions"),
    ]
    return Alert(provider, "approval", _HEADLINES["approval"], tuple(facts))


def good_run(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert about a good run, from the context of CommitBackup."""
    ti = context["ti"]
    summary: dict[str, Any] = ti.xcom_pull(task_ids=ti.task_id) or {}
    outcomes = summary.get("outcomes", {})
    warnings = [f"{outcomes[name]} {name}" for name in _WARNINGS if outcomes.get(name)]
    headline = _HEADLINES["success"]
    if warnings:
        headline += f", with WARNINGS: {' and '.join(warnings)} during the run"
    facts = [("Files", summary.get("summary", "")), ("Run", _run_url(ti.dag_id, ti.run_id))]
    if summary.get("clock"):
        facts.append(("Clock", summary["clock"]))
    is_warning = bool(warnings or summary.get("clock"))
    return Alert(provider, "success", headline, tuple(facts), warning=is_warning)


def minimal(context: Mapping[str, Any], provider: str, event: str) -> Alert:
    """Return an alert for when even Airflow cannot be asked."""
    return Alert(provider, event, _HEADLINES[event], (("Run", str(context.get("run_id", "unknown"))),))


def _failed_tasks(context: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield task id and map index of each failed task, in the order of the DAG."""
    dag, run_id = context["dag"], context["run_id"]
    states = _states(dag.dag_id, run_id)
    for task in dag.topological_sort():
        # For mapped tasks the index is part of the key.
        pattern = re.compile(re.escape(task.task_id) + r"(?:_(\d+))?")
        for key, state in states.items():
            if state == "failed" and (match := pattern.fullmatch(key)):
                yield task.task_id, -1 if match[1] is None else int(match[1])


def _states(dag_id: str, run_id: str) -> dict[str, str]:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    return dict(RuntimeTaskInstance.get_task_states(dag_id=dag_id, run_ids=[run_id]).get(run_id) or {})


def _read_failure(dag_id: str, run_id: str, task_id: str, map_index: int) -> Failure:
    stored = _xcom(dag_id, run_id, task_id, _FAILURE, map_index)
    mapped = f"/mapped/{map_index}" if map_index >= 0 else ""
    known = {
        "kind": message.KILLED,
        "text": "",
        "log_url": f"{_run_url(dag_id, run_id)}/tasks/{task_id}{mapped}",
        **(stored if isinstance(stored, dict) else {}),
    }
    return Failure(_step(task_id, map_index), known["kind"], known["text"], known["log_url"])


def _step(task_id: str, map_index: int) -> str:
    return f"{task_id}, shard {map_index}" if map_index >= 0 else task_id


def _describe_last_good(dag: Any, run_id: str) -> str | None:
    """Return the age of the last good backup, as text; None if not known."""
    for task_id in dag.task_ids:
        at = _xcom(dag.dag_id, run_id, task_id, _LAST_GOOD)
        if isinstance(at, str):
            return message.age(datetime.fromisoformat(at), datetime.now(UTC)) if at else "never"
    return None


def _describe_outcomes(summary: Any) -> str:
    """Return how many files had each outcome, from the XCom of CommitBackup."""
    if not isinstance(summary, dict):
        return ""
    counts = [f"{count} {outcome}" for outcome, count in sorted(summary.get("outcomes", {}).items()) if count]
    return ", ".join(counts)


def _xcom(dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
    from airflow.sdk.execution_time.xcom import XCom

    # An alert that lacks what cannot be read is still sent.
    with contextlib.suppress(Exception):
        return XCom.get_one(key=key, dag_id=dag_id, run_id=run_id, task_id=task_id, map_index=map_index)
    return None


def _run_url(dag_id: str, run_id: str) -> str:
    base = conf.get("api", "base_url", fallback=None) or "http://localhost:8080"
    return f"{base.rstrip('/')}/dags/{dag_id}/runs/{quote(run_id, safe='')}"
