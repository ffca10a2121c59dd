"""Step 3, on B: compare the two indexes, and write the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mdbackup.operators.base import BackupOperator, log_group, refuse_misspelt
from airflow_mdbackup.operators.build_provider_index import REHASH
from airflow_mdbackup.scheme.backup.diff import format_changes, make_plan
from airflow_mdbackup.scheme.backup.plan import Limits, Plan, PlanOptions
from airflow_mdbackup.scheme.common.units import format_count

if TYPE_CHECKING:
    from airflow.sdk import Context


# Parameters of a manual run.
ONLY = "only"
DRY_RUN = "dry_run"
OVERRIDE_GUARD = "override_guard"
PARAMETERS = (ONLY, DRY_RUN, OVERRIDE_GUARD, REHASH)
"""All parameters of a provider's DAG."""


class DiffIndexes(BackupOperator):
    """Compare the provider index with the consumer index and write the plan.

    Returns the shards of the plan, at least one, each ``{"shard": number, "files": count}``, as
    ``PullChanged.expand(shard=...)`` expects them. The XCom ``plan`` has the counts, and ``guard`` the
    reasons why the guard was triggered.

    Parameters of a manual run: ``override_guard`` overrides the guard for the first index that the run
    compares, but not for another one that it fetches after its tasks are cleared. ``only`` limits the run to
    some paths. ``dry_run`` ends it here, and skips all tasks that follow.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param source: the paths that the provider should index, as configured.
    :param exclude: gitignore patterns, applied to both indexes.
    :param shards: the maximum number of shards.
    :param limits: how many entries may be deleted or changed before the guard is triggered.
    :param allow_empty: accept an index without entries.
    :param on_guard: ``fail``, or ``approve`` if a task that asks for approval follows.
    """

    template_fields: Sequence[str] = (*BackupOperator.template_fields, "source", "exclude")

    def __init__(
        self,
        *,
        source: Sequence[str] = (),
        exclude: Sequence[str] = (),
        shards: int = 1,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        allow_empty: bool = False,
        on_guard: str = "fail",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.exclude = exclude
        self.shards = shards
        self.limits = limits
        self.allow_empty = allow_empty
        self.on_guard = on_guard

    def execute(self, context: Context) -> list[dict[str, int]]:
        refuse_misspelt(context, PARAMETERS)
        is_dry_run = bool(context["params"].get(DRY_RUN))
        mirror, run = self.run_of(context)
        override = self._override(context)
        plan = make_plan(
            mirror,
            run,
            PlanOptions(
                source=[path.encode() for path in self.source],
                exclude=self.exclude,
                only=[path.encode("utf-8", "surrogateescape") for path in context["params"].get(ONLY) or ()],
                limits=self.limits,
                allow_empty=self.allow_empty,
            ),
            shards=self.shards,
            may_trip=is_dry_run or self.on_guard == "approve",
            override=override,
            attempt=context["ti"].try_number,
        )
        self._log(plan)
        if plan.guard and plan.overridden:
            self.log.warning("override_guard: this run continues despite the guard")
        elif plan.guard and override:
            self.log.warning("override_guard applied to the first index of this run: this one needs approval")
        context["ti"].xcom_push(key="plan", value=_counts(plan))
        context["ti"].xcom_push(key="guard", value=[] if plan.overridden else plan.guard)
        if is_dry_run:
            with log_group(self.log, f"The plan: {plan.pull:,} to pull, {plan.gone:,} to forget"):
                for line in format_changes(run, plan):
                    self.log.info("%s", line)
            run.end_with_plan()  # otherwise clearing a later task would carry it out
            raise AirflowSkipException(f"{self.provider}: dry run: nothing was changed")
        return [{"shard": shard, "files": files} for shard, files in enumerate(plan.shards)]

    def _override(self, context: Context) -> bool:
        """Return whether this is a manual run that overrides the guard."""
        if not context["params"].get(OVERRIDE_GUARD):
            return False
        if context["dag_run"].run_type == "manual":
            return True
        self.log.warning("override_guard is ignored: it works in manual runs only")
        return False

    def _log(self, plan: Plan) -> None:
        if plan.unreadable:
            paths = ", ".join(plan.unreadable_paths)
            self.log.warning(
                "%s unreadable on the provider: %s", format_count(plan.unreadable, "path"), paths
            )
        if plan.rotten:
            paths = ", ".join(plan.rotten_paths)
            self.log.warning("%s corrupted on the provider: %s", format_count(plan.rotten, "file"), paths)
        if plan.telltale:
            self.log.warning("%s: %s, as ransomware does. Check the provider", self.provider, plan.telltale)
        for reason in plan.guard:
            self.log.warning("Guard: %s", reason)
        unchanged = f"{plan.same:,} unchanged"
        if not plan.pull and not plan.gone:
            self.log.info("%s: nothing to do, %s", self.provider, unchanged)
            return
        here = f"{plan.adopt:,}" if plan.adopt else "none"
        new = f"{plan.new:,} new ({here} already here under the same name)" if plan.new else "0 new"
        self.log.info(
            "%s: %s, %s changed, %s gone, %s",
            *(self.provider, new, f"{plan.changed:,}", f"{plan.gone:,}", unchanged),
        )


def _counts(plan: Plan) -> dict[str, int]:
    names = ("same", "new", "changed", "adopt", "copy", "gone", "kept", "unreadable", "rotten")
    return {name: getattr(plan, name) for name in names}
