"""Step 6, on B: put staged files in place, and write the consumer index."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.assets import LAST_GOOD, provider_asset
from airflow_mdbackup.links import RunReportLink
from airflow_mdbackup.operators.base import BackupOperator, megabytes
from airflow_mdbackup.operators.metrics import tell_commit
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.backup.commit_summary import CommitSummary
from airflow_mdbackup.scheme.errors import EntriesFailed
from airflow_mdbackup.scheme.history.outcomes import Outcome

if TYPE_CHECKING:
    from airflow.sdk import Context

_LONGEST = 1000  # characters of what is told of one entry that failed


class CommitBackup(BackupOperator):
    """Commit what the run has pulled; then fail, without retry, if any entry failed.

    With the provider's asset as outlet (see :func:`airflow_mdbackup.assets.provider_asset`), a good commit
    updates it, with the summary as ``extra``, and remembers the run in its state store.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    """

    operator_extra_links = (*BackupOperator.operator_extra_links, RunReportLink())
    ui_color = "#b9dcb9"

    def execute(self, context: Context) -> dict[str, Any]:
        summary = commit(*self.run_of(context))
        tell_commit(self.provider, summary)
        told = _told(summary)
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
            "summary": told,
        }
        try:
            summary.raise_for_failures(self.provider)
        except EntriesFailed as error:
            # A task that fails returns nothing, and its summary is wanted most then.
            failures = [failure[:_LONGEST] for failure in summary.failures]
            context["ti"].xcom_push(key="return_value", value={**counts, "failures": failures})
            self.log.info("%s: %s", self.provider, told)
            raise AirflowFailException(str(error)) from None
        if not summary.superseded:
            self._remember(context, counts)
        self.log.info("%s: %s", self.provider, told)
        return counts

    def _remember(self, context: Context, counts: dict[str, Any]) -> None:
        asset = provider_asset(self.provider)
        if asset not in self.outlets:
            return
        # Airflow updates the asset after each good task, so that whoever follows can tell by this.
        context["outlet_events"][asset].extra = counts
        if counts["partial"]:
            return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        context["asset_state_store"][asset].set(LAST_GOOD, {"run_id": context["run_id"], "at": at, **counts})


def _told(summary: CommitSummary) -> str:
    """Return the one line that people read first."""
    copied = summary.outcomes.get(Outcome.COPIED, 0)
    changes = {
        "new": summary.added,
        "changed": summary.replaced,
        "already here": summary.adopted,
        "gone": summary.forgotten,
        "failed": summary.failed,
    }
    others = [outcome for outcome in Outcome if outcome.warning or outcome == Outcome.SUPERSEDED]
    warnings = {outcome.value: summary.outcomes.get(outcome, 0) for outcome in others}
    parts = [f"{count} {name}" for name, count in changes.items() if count]
    parts += [f"{count} {name} meanwhile" for name, count in warnings.items() if count]
    told = ", ".join(parts) or "nothing to do"
    if copied:
        told += f" ({copied} duplicates copied locally)"
    if summary.size:
        told += f", {megabytes(summary.size)} in {summary.seconds:.1f} s"
    if summary.partial:
        told += ", limited to the paths that were asked for"
    told += f"; {summary.files} files in the index"
    return f"{told}. LOOK AT THE CLOCK: {summary.clock}" if summary.clock else told
