"""Step 6, on B: move staged files into place, and write the consumer index."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.assets import LAST_GOOD, provider_asset
from airflow_mdbackup.links import RunReportLink
from airflow_mdbackup.operators.base import BackupOperator
from airflow_mdbackup.operators.metrics import record_commit
from airflow_mdbackup.scheme.backup.commit import CommitSummary, commit
from airflow_mdbackup.scheme.common.units import format_count, format_size
from airflow_mdbackup.scheme.errors import EntriesFailed
from airflow_mdbackup.scheme.history.outcomes import Outcome

if TYPE_CHECKING:
    from airflow.sdk import Context

_MAX_FAILURE_LENGTH = 1000  # characters per failed entry in the XCom


class CommitBackup(BackupOperator):
    """Commit what the run has pulled. Then fail, without retry, if any entry failed.

    If the provider's asset (see :func:`airflow_mdbackup.assets.provider_asset`) is an outlet, a good commit
    updates it, with the summary as ``extra``, and records the run in its state store.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    """

    operator_extra_links = (*BackupOperator.operator_extra_links, RunReportLink())
    ui_color = "#b9dcb9"

    def execute(self, context: Context) -> dict[str, Any]:
        summary = commit(*self.run_of(context))
        record_commit(self.provider, summary)
        text = _describe(summary)
        counts = {
            "outcomes": summary.outcomes,
            "added": summary.added,
            "replaced": summary.replaced,
            "adopted": summary.adopted,
            "forgotten": summary.forgotten,
            "bytes": summary.size,
            "files": summary.files,
            "failed": summary.failed,
            "partial": summary.partial,
            "doubtful": summary.doubtful,
            "clock": summary.clock,
            "summary": text,
        }
        try:
            summary.raise_for_failures(self.provider)
        except EntriesFailed as error:
            # A task that fails returns nothing, but this is when its summary is needed most.
            failures = [failure[:_MAX_FAILURE_LENGTH] for failure in summary.failures]
            context["ti"].xcom_push(key="return_value", value={**counts, "failures": failures})
            self.log.info("%s: %s", self.provider, text)
            raise AirflowFailException(str(error)) from None
        if not summary.superseded:
            self._update_asset(context, counts)
        self.log.info("%s: %s", self.provider, text)
        return counts

    def _update_asset(self, context: Context, counts: dict[str, Any]) -> None:
        asset = provider_asset(self.provider)
        if asset not in self.outlets:
            return
        # Airflow updates the asset after each successful task; the extra shows consumers what happened.
        context["outlet_events"][asset].extra = counts
        if counts["partial"]:
            return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        context["asset_state_store"][asset].set(LAST_GOOD, {"run_id": context["run_id"], "at": at, **counts})


def _describe(summary: CommitSummary) -> str:
    """Return the summary in one line."""
    copied = summary.outcomes.get(Outcome.COPIED, 0)
    changes = {
        "new": summary.added,
        "changed": summary.replaced,
        "already here": summary.adopted,
        "gone": summary.forgotten,
        "failed": summary.failed,
    }
    parts = [f"{count:,} {name}" for name, count in changes.items() if count]
    warnings = [outcome for outcome in Outcome if outcome.warning]
    parts += [
        f"{count:,} {outcome} meanwhile"
        for outcome in (*warnings, Outcome.SUPERSEDED)
        if (count := summary.outcomes.get(outcome, 0))
    ]
    text = ", ".join(parts) or "nothing to do"
    if copied:
        text += f" ({format_count(copied, 'duplicate')} copied locally)"
    if summary.size:
        text += f", {format_size(summary.size)} in {summary.seconds:.1f} s"
    if summary.partial:
        text += ", limited to the requested paths"
    text += f"; {format_count(summary.files, 'file')} in the index"
    return f"{text}. CHECK THE CLOCK: {summary.clock}" if summary.clock else text
