"""Beside the steps of a backup, on B: files come back, where the worker allows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.config.airflow_options import dags_folder, restore_below
from airflow_mdbackup.operators.base import BackupOperator, refuse_misspelt, refused
from airflow_mdbackup.scheme.common.paths import to_text, unfolded
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.times import RequestedTime, requested_time
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.recovery.restore import Restored, RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.restore_target import find_other_writer, resolve_target
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of

if TYPE_CHECKING:
    from airflow.sdk import Context

PROVIDER, PATHS, AS_OF, TARGET = "provider", "paths", "as_of", "target"
INCLUDE_GONE, OVERWRITE, DRY_RUN = "include_gone", "overwrite", "dry_run"
_PARAMETERS = (PROVIDER, PATHS, AS_OF, TARGET, INCLUDE_GONE, OVERWRITE, DRY_RUN)
"""Parameters of a run that a person starts."""
_MOST_LOGGED, _MOST_TOLD = 1000, 10


class RestoreFiles(BackupOperator):
    """Write files of a backup, as of some moment, into a directory of the worker; fail if any did not come.

    What is restored, and where to, is said by the run's parameters ``paths``, ``as_of``, ``target``,
    ``include_gone``, ``overwrite`` and ``dry_run``. The target lies below what the Airflow option
    ``[mdbackup] restore_below`` names on the worker: by its whole path, or from there; if it is empty, it is
    a directory of the run's own. Without that option nothing is restored. The same parameters again, target
    and all, go on where a run was cut off.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param keep_out: directories that the target must be neither within nor above, beside the DAGs' folder and
        ``dest``.
    """

    operator_extra_links = ()  # which are of a provider's own DAG
    ui_color = "#d8e8f4"

    def __init__(self, *, keep_out: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep_out = keep_out

    def execute(self, context: Context) -> dict[str, Any]:
        refuse_misspelt(context, _PARAMETERS)
        mirror, params = self.mirror, context["params"]
        with mirror.translate_os_errors():
            mirror.check()
        dry = bool(params.get(DRY_RUN))
        counts: Counter[RestoreOutcome] = Counter()
        try:
            target = self._target(context, make=not dry)
            wanted = Selection(params.get(PATHS) or ())
            when = self._when(params.get(AS_OF))
            with state_of(mirror, wanted, when, include_deleted=bool(params.get(INCLUDE_GONE))) as state:
                self.log.info("%s; into %s", state.description, unfolded(str(target)))
                if owner := find_other_writer(target):
                    self.log.warning("%s", unfolded(owner))
                came = restore(
                    *(mirror, state.timeline, state.contents(), target),
                    overwrite=bool(params.get(OVERWRITE)),
                    dry_run=dry,
                )
                size, lost = self._bring(came, counts, dry)
                wrong = [
                    *state.describe_not_found(INCLUDE_GONE),
                    *(state.timeline.problems if state.needs_history else ()),
                ]
                for problem in [*state.timeline.problems, *state.describe_removed(INCLUDE_GONE)]:
                    self.log.warning("%s", unfolded(problem))
        except ValueError as error:
            raise refused(f"{self.provider}: {error}")  # noqa: B904 - it has a cause
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise AirflowFailException(f"{self.provider}: stopped: {where}{error.strerror}") from error
        told = ", ".join(f"{number} {came}" for came, number in counts.items()) or "nothing"
        self.log.info("%s: %s; %s%s", self.provider, told, format_size(size), ", if it were no dry run" * dry)
        summary = {came.value: counts[came] for came in RestoreOutcome} | {
            "bytes": size,
            "target": str(target),
        }
        if lost or wrong:
            # A task that fails returns nothing, and its result is wanted most then.
            context["ti"].xcom_push(key="return_value", value=summary)
            more = sum(number for came, number in counts.items() if not came.good) - len(lost)
            lines = [*lost, *([f"and {more} more, in this log"] if more else ()), *wrong[:_MOST_TOLD]]
            heading = f"{self.provider}: not everything came back into {target} ({told}):"
            raise AirflowFailException(unfolded("\n- ".join([heading, *lines])))
        return summary

    def _target(self, context: Context, *, make: bool) -> Path:
        base = restore_below()
        if base is None:
            raise AirflowFailException(
                f"{self.provider}: nothing is restored, since this worker does not say where that is allowed."
                " Set the Airflow option `[mdbackup] restore_below` there (in the environment: "
                "AIRFLOW__MDBACKUP__RESTORE_BELOW) to a directory for its user alone, such as /srv/restored"
            )
        run = f"{self.provider}/{context['dag_run'].run_after.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}"
        target = context["params"].get(TARGET) or run
        keep_out = map(Path, (self.dest, *self.keep_out, dags_folder()))
        return resolve_target(base, target, keep_out, make=make)

    def _when(self, as_of: str | None) -> RequestedTime | None:
        if not as_of:
            return None
        asked = requested_time(as_of, datetime.now().astimezone())
        if asked.understood_as:
            self.log.info("%s", asked.understood_as)
        return asked

    def _bring(
        self, came: Iterable[Restored], counts: Counter[RestoreOutcome], dry: bool
    ) -> tuple[int, list[str]]:
        """Take what comes; return how many bytes that is, and some of what did not come, and why."""
        lost: list[str] = []
        size, logged, pace = 0, 0, ReportTimer()
        for restored in came:
            counts[restored.outcome] += 1
            size += restored.size
            path = to_text(restored.content.path)
            good = restored.outcome.good
            said = f"{restored.outcome}: {path}" + (f": {restored.detail}" if restored.detail else "")
            if not good and len(lost) < _MOST_TOLD:
                lost.append(said)
            if dry or not good:
                logged += 1
                tell = self.log.info if good else self.log.warning
                if logged <= _MOST_LOGGED:
                    would = "would replace what is there" if restored.replaced else "would come"
                    tell("%s", f"{would}: {path}" if restored.outcome == RestoreOutcome.RESTORED else said)
            if pace.due():
                self.log.info("%s files, %s so far", counts.total(), format_size(size))
        if logged > _MOST_LOGGED:
            self.log.info("and %s more", logged - _MOST_LOGGED)
        return size, lost
