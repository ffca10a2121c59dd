"""On B: restore files into a directory that the worker's configuration allows."""

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
from airflow_mdbackup.scheme.common.units import format_count, format_size
from airflow_mdbackup.scheme.recovery.restore import Restored, RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.restore_target import find_other_writer, resolve_target
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of

if TYPE_CHECKING:
    from airflow.sdk import Context

PROVIDER, PATHS, AS_OF, TARGET = "provider", "paths", "as_of", "target"
INCLUDE_GONE, OVERWRITE, DRY_RUN = "include_gone", "overwrite", "dry_run"
_PARAMETERS = (PROVIDER, PATHS, AS_OF, TARGET, INCLUDE_GONE, OVERWRITE, DRY_RUN)
"""Parameters of a manual run."""
_MAX_LOGGED = 1000  # files, in the log
_MAX_IN_ERROR = 10  # files, in the error


class RestoreFiles(BackupOperator):
    """Restore files of a backup, as of some time, into a directory on the worker; fail if any is missing.

    The run's parameters say what is restored, and where to: ``paths``, ``as_of``, ``target``,
    ``include_gone``, ``overwrite`` and ``dry_run``. The target must be below the directory in the worker's
    Airflow option ``[mdbackup] restore_below``, without which nothing is restored. It is an absolute path, or
    relative to that directory; if empty, a new directory for this run. A run with the same parameters,
    including the target, resumes an interrupted one.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param keep_out: directories that the target must be neither inside nor above, in addition to the DAGs
        folder and ``dest``.
    """

    operator_extra_links = ()  # they belong to a provider's own DAG
    ui_color = "#d8e8f4"

    def __init__(self, *, keep_out: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep_out = keep_out

    def execute(self, context: Context) -> dict[str, Any]:
        refuse_misspelt(context, _PARAMETERS)
        mirror, params = self.mirror, context["params"]
        with mirror.translate_os_errors():
            mirror.check()
        is_dry_run = bool(params.get(DRY_RUN))
        counts: Counter[RestoreOutcome] = Counter()
        try:
            target = self._target(context, make=not is_dry_run)
            wanted = Selection(params.get(PATHS) or ())
            when = self._when(params.get(AS_OF))
            with state_of(mirror, wanted, when, include_deleted=bool(params.get(INCLUDE_GONE))) as state:
                self.log.info("%s; into %s", state.description, unfolded(str(target)))
                if owner := find_other_writer(target):
                    self.log.warning("%s", unfolded(owner))
                files = restore(
                    *(mirror, state.timeline, state.contents(), target),
                    overwrite=bool(params.get(OVERWRITE)),
                    dry_run=is_dry_run,
                )
                size, failures = self._restore(files, counts, is_dry_run)
                problems = [
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
        outcomes = ", ".join(f"{number:,} {outcome}" for outcome, number in counts.items())
        outcomes = outcomes or "nothing restored"
        self.log.info(
            "%s: %s; %s%s", self.provider, outcomes, format_size(size), " (dry run)" if is_dry_run else ""
        )
        summary: dict[str, Any] = {outcome.value: counts[outcome] for outcome in RestoreOutcome}
        summary |= {"bytes": size, "target": str(target)}
        if failures or problems:
            # A task that fails returns nothing, but this is when its result is needed most.
            context["ti"].xcom_push(key="return_value", value=summary)
            heading = f"{self.provider}: not everything could be restored into {target} ({outcomes}):"
            raise AirflowFailException(_describe_failures(heading, failures, problems, counts))
        return summary

    def _target(self, context: Context, *, make: bool) -> Path:
        base = restore_below()
        if base is None:
            raise AirflowFailException(
                f"{self.provider}: nothing is restored, since restoring is not enabled on this worker. Set"
                " its Airflow option `[mdbackup] restore_below` (in the environment: "
                "AIRFLOW__MDBACKUP__RESTORE_BELOW) to a directory of its user alone, such as /srv/restored"
            )
        run = f"{self.provider}/{context['dag_run'].run_after.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}"
        target = context["params"].get(TARGET) or run
        keep_out = map(Path, (self.dest, *self.keep_out, dags_folder()))
        return resolve_target(base, target, keep_out, make=make)

    def _when(self, as_of: str | None) -> RequestedTime | None:
        if not as_of:
            return None
        requested = requested_time(as_of, datetime.now().astimezone())
        if requested.understood_as:
            self.log.info("%s", requested.understood_as)
        return requested

    def _restore(
        self, files: Iterable[Restored], counts: Counter[RestoreOutcome], is_dry_run: bool
    ) -> tuple[int, list[str]]:
        """Restore the files; return their size in bytes, and the first failures as texts.

        :param counts: receives the number of files with each outcome.
        """
        failures: list[str] = []
        size, logged, timer = 0, 0, ReportTimer()
        for restored in files:
            counts[restored.outcome] += 1
            size += restored.size
            path = to_text(restored.content.path)
            good = restored.outcome.good
            text = f"{restored.outcome}: {path}" + (f": {restored.detail}" if restored.detail else "")
            if not good and len(failures) < _MAX_IN_ERROR:
                failures.append(text)
            if is_dry_run or not good:
                logged += 1
                log = self.log.info if good else self.log.warning
                if logged <= _MAX_LOGGED:
                    would = "would overwrite" if restored.replaced else "would restore"
                    log("%s", f"{would}: {path}" if restored.outcome == RestoreOutcome.RESTORED else text)
            if timer.due():
                self.log.info("%s, %s so far", format_count(counts.total(), "file"), format_size(size))
        if logged > _MAX_LOGGED:
            self.log.info("and %s more", f"{logged - _MAX_LOGGED:,}")
        return size, failures


def _describe_failures(
    heading: str, failures: Sequence[str], problems: Sequence[str], counts: Counter[RestoreOutcome]
) -> str:
    more = sum(number for outcome, number in counts.items() if not outcome.good) - len(failures)
    lines = [*failures, *([f"and {more:,} more, see this log"] if more else ()), *problems[:_MAX_IN_ERROR]]
    return unfolded("\n- ".join([heading, *lines]))
