"""The dead man's watch over one provider, and over the configuration."""

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
"""Key of the asset's state store: since when it is watched, and when people were last told of what."""
_NOTE = "mdbackup_note"


class WatchBackup(BaseOperator):
    """Fail when the last good backup of a provider is too old, by what Airflow remembers of it.

    It reads the state store of the provider's asset, which must be among the inlets, and not ``dest``. It
    fails as long as the backup is not good. Its failure callbacks are called when that begins, when the
    trouble becomes another, and once a day; the next time, too, if all return False: nobody was told.

    :param provider: the provider's name.
    :param max_age: how long ago the last good run may be; None: any time. Without a good run, the provider
        has as long for its first one, from when it is first seen.
    :param problems: what is wrong in the configuration, so that the provider is not backed up at all.
    :param on_failure_callback: what tells people, as for any task.
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
        told = on_failure_callback if isinstance(on_failure_callback, Sequence) else [on_failure_callback]
        super().__init__(on_failure_callback=[_when_due(call) for call in told if call], **kwargs)
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
        known = (
            f"the last good run was {format_duration(now - at)} ago"
            if at
            else "there has been no good run yet"
        )
        if self.problems:
            state = Health.INVALID
            invalid = "its configuration is invalid, so that nothing is backed up:"
            message = "\n- ".join([invalid, *self.problems]) + f"\n{known}"
        if state == Health.GOOD:
            store.set(WATCH, {"since": watch["since"]})
            self.log.info("%s: %s", self.provider, known)
            return known
        if state != watch.get("state") or is_reminder_due(parse_stored_time(watch["told"]), now):
            noted = {"since": watch["since"], "state": state, "told": now.isoformat()}
            context[_NOTE] = lambda: store.set(WATCH, noted)  # type: ignore[literal-required]
            store.set(WATCH, {"since": watch["since"]})
        else:
            context[_NOTE] = None  # type: ignore[literal-required]
            self.log.info("People have been told of this at %s, and will be again a day later", watch["told"])
        if state != Health.INVALID:
            message += "; " + _what_goes_on(context["ti"], f"mdbackup_{self.provider}")
        raise AirflowFailException(f"{self.provider}: {message}")


class WatchConfiguration(BaseOperator):
    """Fail when the configuration has problems.

    :param problems: what is wrong.
    """

    ui_color = "#dbe9f4"

    def __init__(self, *, problems: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.problems = problems

    def execute(self, context: Context) -> None:
        if self.problems:
            raise AirflowFailException("\n- ".join(["the configuration has problems:", *self.problems]))


def _when_due(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a callback that calls ``call``, unless the task found that people know already.

    That they do is noted once ``call`` has told them. A task that was killed found nothing, and is told.
    """

    def tell(context: Any) -> None:
        note = context.get(_NOTE, _nothing)
        if note is not None and call(context) is not False:
            note()

    return tell


def _nothing() -> None:
    """Note nothing."""


def _what_goes_on(ti: Any, dag_id: str) -> str:
    """Return why there may be no good run, as far as Airflow tells a task: not of failed runs."""
    try:
        dag = ti.get_dag(dag_id)
        running, queued = (ti.get_dr_count(dag_id, states=[state]) for state in ("running", "queued"))
        asking = ti.get_ti_count(dag_id, states=["awaiting_input"])
        waiting = ti.get_ti_count(dag_id, states=["scheduled", "queued"])
    except AirflowRuntimeError as error:
        unknown = (error.error.detail or {}).get("status_code") == 404
        return f"Airflow knows no DAG {dag_id}" if unknown else f"Airflow does not tell what goes on: {error}"
    found = []
    if dag.is_paused:
        found.append(f"the DAG {dag_id} is paused: unpause it")
    if asking:
        found.append("a run waits for a person's approval: answer it in the task `approve`")
    if queued:
        found.append(f"{queued} of its runs wait to be started")
    if waiting:
        found.append(
            f"{waiting} of its tasks wait: for a worker of their queue, or a slot of their pool "
            "(`airflow mdbackup init` makes one that is missing)"
        )
    if running and not asking:
        found.append(f"{running} of its runs are under way")
    return "; ".join(found) or f"no run is under way: see what became of the last runs of {dag_id}"
