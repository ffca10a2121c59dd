"""The watchdog for one provider, and for the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException, AirflowRuntimeError

from airflow_mdbackup.assets import LAST_GOOD, provider_asset
from airflow_mdbackup.scheme.common.units import format_duration
from airflow_mdbackup.scheme.recovery.health import Health, is_reminder_due, judge, parse_stored_time

if TYPE_CHECKING:
    from airflow.sdk import Context

WATCH = "watch"
"""Key of the asset's state store: since when it is watched, and the last alert."""
_RECORD_ALERT = "mdbackup_note"  # key of the context


class WatchBackup(BaseOperator):
    """Fail if the last good backup of a provider is too old, according to Airflow.

    It reads the state store of the provider's asset, which must be among the inlets, and not ``dest``. It
    fails as long as the backup is not good. Its failure callbacks are called when that begins, when the cause
    changes, and once a day; and the next time again if all return False, that is if no alert was sent.

    :param provider: the provider's name.
    :param max_age: the maximum age of the last good run; None: no limit. A provider without a good run has as
        long for its first one, from when it is first seen.
    :param problems: errors in the configuration, because of which the provider is not backed up at all.
    :param on_failure_callback: sends the alerts, as for any task.
    """

    ui_color = "#dbe9f4"

    def __init__(
        self,
        *,
        provider: str,
        max_age: timedelta | None,
        problems: Sequence[str] = (),
        on_failure_callback: Any = None,
        **kwargs: Any,
    ) -> None:
        is_several = isinstance(on_failure_callback, Sequence)
        callbacks = on_failure_callback if is_several else [on_failure_callback]
        super().__init__(on_failure_callback=[_when_due(call) for call in callbacks if call], **kwargs)
        self.provider = provider
        self.max_age = max_age
        self.problems = problems

    def execute(self, context: Context) -> str:
        now = datetime.now(UTC)
        store = context["asset_state_store"][provider_asset(self.provider)]
        watch = cast("dict[str, Any]", store.get(WATCH)) or {"since": now.isoformat()}
        last_good = cast("dict[str, Any] | None", store.get(LAST_GOOD))
        at = parse_stored_time(last_good["at"]) if last_good else None
        state, message = judge(at, self.max_age, now, since=parse_stored_time(watch["since"]))
        known = f"the last good run was {format_duration(now - at)} ago" if at else "there is no good run yet"
        if self.problems:
            state = Health.INVALID
            invalid = "its configuration is invalid, so nothing is backed up:"
            message = "\n- ".join([invalid, *self.problems]) + f"\n{known}"
        if state == Health.GOOD:
            store.set(WATCH, {"since": watch["since"]})
            self.log.info("%s: %s", self.provider, known)
            return known
        if state != watch.get("state") or is_reminder_due(parse_stored_time(watch["told"]), now):
            alerted = {"since": watch["since"], "state": state, "told": now.isoformat()}
            context[_RECORD_ALERT] = lambda: store.set(WATCH, alerted)  # type: ignore[literal-required]
            store.set(WATCH, {"since": watch["since"]})
        else:
            context[_RECORD_ALERT] = None  # type: ignore[literal-required]
            self.log.info("Already alerted at %s; the next reminder follows 24 h after that", watch["told"])
        if state != Health.INVALID:
            message += "; " + _explain(context["ti"], f"mdbackup_{self.provider}")
        raise AirflowFailException(f"{self.provider}: {message}")


class WatchConfiguration(BaseOperator):
    """Fail if the configuration has errors.

    :param problems: the errors.
    """

    ui_color = "#dbe9f4"

    def __init__(self, *, problems: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.problems = problems

    def execute(self, context: Context) -> None:
        if self.problems:
            raise AirflowFailException("\n- ".join(["the configuration has errors:", *self.problems]))


def _when_due(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a callback that calls ``call`` if an alert is due, and records that it was sent.

    If the task was killed, it could not determine whether one is due, so it is sent.
    """

    def alert_if_due(context: Any) -> None:
        record = context.get(_RECORD_ALERT, _record_nothing)
        if record is not None and call(context) is not False:
            record()

    return alert_if_due


def _record_nothing() -> None:
    """Record nothing, since the task did not decide what."""


def _explain(ti: Any, dag_id: str) -> str:
    """Return why there may be no good run, except for failed runs, about which a task cannot ask."""
    try:
        dag = ti.get_dag(dag_id)
        running, queued = (ti.get_dr_count(dag_id, states=[state]) for state in ("running", "queued"))
        awaiting_approval = ti.get_ti_count(dag_id, states=["awaiting_input"])
        waiting = ti.get_ti_count(dag_id, states=["scheduled", "queued"])
    except AirflowRuntimeError as error:
        unknown = (error.error.detail or {}).get("status_code") == 404
        return f"Airflow has no DAG {dag_id}" if unknown else f"Airflow cannot say what is running: {error}"
    found = []
    if dag.is_paused:
        found.append(f"the DAG {dag_id} is paused: unpause it")
    if awaiting_approval:
        found.append("a run is waiting for approval: answer it in the task `approve`")
    if queued:
        found.append(f"queued runs: {queued}")
    if waiting:
        found.append(
            f"tasks waiting for a worker of their queue, or a slot of their pool: {waiting} "
            "(`airflow mdbackup init` creates a missing pool)"
        )
    if running and not awaiting_approval:
        found.append(f"running runs: {running}")
    return "; ".join(found) or f"no run is active: check the last runs of {dag_id}"
