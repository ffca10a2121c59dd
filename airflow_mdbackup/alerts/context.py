"""What Airflow knows of a run when one of its callbacks is called, as an alert.

A DAG's callback runs in the DAG processor, which can read XCom and the states of tasks, but no state store of
an asset. So what it tells is left to it by the tasks, as XCom.
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
    "approval": "backup WAITS for a person's approval: much is gone or changed",
    "success": "backup is good",
    "verification": "verification FAILED",
}


def limits(context: Mapping[str, Any]) -> str:
    """Return how a person has limited a run, in words; nothing if it backs all up."""
    asked = context.get("params") or getattr(context.get("dag_run"), "conf", None) or {}
    if asked.get("dry_run"):
        return "dry run"
    return "limited to some paths" if asked.get("only") else ""


def is_mistaken(context: Mapping[str, Any]) -> bool:
    """Tell whether a run of a backup is refused, for a person who started it misspelt a parameter."""
    return bool(misspelt(getattr(context.get("dag_run"), "conf", None), PARAMETERS))


def is_doubtful(context: Mapping[str, Any]) -> bool:
    """Tell whether a commit changed nothing, since a newer run had been there that was not good."""
    ti = context["ti"]
    return bool((ti.xcom_pull(task_ids=ti.task_id) or {}).get("doubtful"))


def keep_last_good(context: Mapping[str, Any], provider: str) -> None:
    """Leave, as XCom of the first task, when the last good backup was: a time in ISO form, or empty."""
    store = context["asset_state_store"][provider_asset(provider)]
    context["ti"].xcom_push(key=_LAST_GOOD, value=(store.get(LAST_GOOD) or {}).get("at", ""))


def keep_failure(context: Mapping[str, Any]) -> None:
    """Leave, as XCom of a task that has failed for good, why it did; nothing if only Airflow knows that."""
    error = context.get("exception")
    if isinstance(error, BaseException):
        kind, text = message.kind_of(error)
        ti = context["ti"]
        ti.xcom_push(key=_FAILURE, value={"kind": kind, "text": text, "log_url": ti.log_url})


def failed_run(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert of a failed run, from the context of its DAG's callback."""
    dag, run_id = context["dag"], context["run_id"]
    failures = [_failure(dag.dag_id, run_id, *where) for where in _failed(context)]
    timed_out = context.get("reason") == "timed_out"
    headline = f"backup FAILED: {message.TIMED_OUT}" if timed_out else ""
    if failures and all(failure.kind == message.MISTAKEN for failure in failures):
        headline = f"run REFUSED, and nothing was done: {message.MISTAKEN}"
    alert = message.failed(
        provider,
        failures,
        last_good=_last_good(dag, run_id),
        run_url=_run_url(dag.dag_id, run_id),
        outcomes=_outcomes(_xcom(dag.dag_id, run_id, _COMMIT)),
        headline=headline,
    )
    how = limits(context)
    return dataclasses.replace(alert, headline=f"{alert.headline} ({how})") if how else alert


def failed_verification(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert of a failed verification, from the context of its DAG's callback."""
    dag, run_id = context["dag"], context["run_id"]
    failures = tuple(_failure(dag.dag_id, run_id, *where) for where in _failed(context))
    kinds = ", ".join(dict.fromkeys(failure.kind for failure in failures))
    headline = f"{_HEADLINES['verification']}: {kinds}" if kinds else _HEADLINES["verification"]
    facts = (("Verification", _run_url(dag.dag_id, run_id)), ("Backups", "go on: this is no failed backup"))
    return Alert(provider, "verification", headline, facts, failures)


def failed_task(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert of a failed task that stands alone, from the context of its own callback."""
    ti, error = context["ti"], context.get("exception")
    kind, text = message.kind_of(error) if isinstance(error, BaseException) else (message.KILLED, "")
    failure = Failure(_step(ti.task_id, -1 if ti.map_index is None else ti.map_index), kind, text, ti.log_url)
    headline = (text.splitlines() or [kind])[0].removeprefix(f"{provider}: ")[:150]
    return Alert(provider, "failure", headline, (("Run", _run_url(ti.dag_id, ti.run_id)),), (failure,))


def approval(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert of a run that waits for a person, from the context of ApproveChanges."""
    ti, task = context["ti"], context["task"]
    facts = [
        *(("Guard", message.cut(reason)) for reason in task.reasons),
        ("Answer until", f"{datetime.now(UTC) + task.response_timeout:%Y-%m-%d %H:%M} UTC"),
        ("Answer here", f"{_run_url(ti.dag_id, ti.run_id)}/tasks/{ti.task_id}/required_actions"),
    ]
    return Alert(provider, "approval", _HEADLINES["approval"], tuple(facts))


def good_run(context: Mapping[str, Any], provider: str) -> Alert:
    """Return the alert of a good run, from the context of CommitBackup."""
    ti = context["ti"]
    told: dict[str, Any] = ti.xcom_pull(task_ids=ti.task_id) or {}
    outcomes = told.get("outcomes", {})
    warnings = {outcome.value: outcomes.get(outcome, 0) for outcome in Outcome if outcome.warning}
    headline = _HEADLINES["success"]
    if any(warnings.values()):
        counts = [f"{count} {name}" for name, count in warnings.items() if count]
        headline += f", with WARNINGS: {' and '.join(counts)} meanwhile"
    facts = [("Files", told.get("summary", "")), ("Run", _run_url(ti.dag_id, ti.run_id))]
    if told.get("clock"):
        facts.append(("The clock", told["clock"]))
    warning = any(warnings.values()) or bool(told.get("clock"))
    return Alert(provider, "success", headline, tuple(facts), warning=warning)


def meagre(context: Mapping[str, Any], provider: str, event: str) -> Alert:
    """Return an alert for when even Airflow cannot be asked."""
    return Alert(provider, event, _HEADLINES[event], (("Run", str(context.get("run_id", "unknown"))),))


def _failed(context: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield task and map index of each failed task, in the order of the DAG."""
    dag, run_id = context["dag"], context["run_id"]
    states = _states(dag.dag_id, run_id)
    for task in dag.topological_sort():
        # Of mapped tasks the index is part of the key.
        found = re.compile(re.escape(task.task_id) + r"(?:_(\d+))?")
        for key, state in states.items():
            if state == "failed" and (match := found.fullmatch(key)):
                yield task.task_id, -1 if match[1] is None else int(match[1])


def _states(dag_id: str, run_id: str) -> dict[str, str]:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    return dict(RuntimeTaskInstance.get_task_states(dag_id=dag_id, run_ids=[run_id]).get(run_id) or {})


def _failure(dag_id: str, run_id: str, task_id: str, map_index: int) -> Failure:
    kept = _xcom(dag_id, run_id, task_id, _FAILURE, map_index)
    mapped = f"/mapped/{map_index}" if map_index >= 0 else ""
    known = {
        "kind": message.KILLED,
        "text": "",
        "log_url": f"{_run_url(dag_id, run_id)}/tasks/{task_id}{mapped}",
        **(kept if isinstance(kept, dict) else {}),
    }
    return Failure(_step(task_id, map_index), known["kind"], known["text"], known["log_url"])


def _step(task_id: str, map_index: int) -> str:
    return f"{task_id}, shard {map_index}" if map_index >= 0 else task_id


def _last_good(dag: Any, run_id: str) -> str | None:
    """Return since when there is a good backup, in words; None if that is not known."""
    for task_id in dag.task_ids:
        at = _xcom(dag.dag_id, run_id, task_id, _LAST_GOOD)
        if isinstance(at, str):
            return message.age(datetime.fromisoformat(at), datetime.now(UTC)) if at else "never"
    return None


def _outcomes(summary: Any) -> str:
    """Return how many files came to which end, from what CommitBackup left."""
    if not isinstance(summary, dict):
        return ""
    counts = [f"{count} {outcome}" for outcome, count in sorted(summary.get("outcomes", {}).items()) if count]
    return ", ".join(counts)


def _xcom(dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
    from airflow.sdk.execution_time.xcom import XCom

    # What cannot be read is missing from the alert, which is sent all the same.
    with contextlib.suppress(Exception):
        return XCom.get_one(key=key, dag_id=dag_id, run_id=run_id, task_id=task_id, map_index=map_index)
    return None


def _run_url(dag_id: str, run_id: str) -> str:
    base = conf.get("api", "base_url", fallback=None) or "http://localhost:8080"
    return f"{base.rstrip('/')}/dags/{dag_id}/runs/{quote(run_id, safe='')}"
