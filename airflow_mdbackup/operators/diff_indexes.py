"""Step 3, on B: compare the two indexes, and plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mdbackup.operators.base import BackupOperator, folded, refuse_misspelt
from airflow_mdbackup.operators.build_provider_index import REHASH
from airflow_mdbackup.scheme.backup.diff import format_changes, make_plan
from airflow_mdbackup.scheme.backup.plan import Limits, Plan, PlanOptions

if TYPE_CHECKING:
    from airflow.sdk import Context


# Parameters of a run that a person starts.
OVERRIDE_GUARD = "override_guard"
ONLY = "only"
DRY_RUN = "dry_run"
"""The DAG parameter that says, for one run, that a person has looked."""
PARAMETERS = (ONLY, DRY_RUN, OVERRIDE_GUARD, REHASH)
"""All that the DAG of a provider has."""


class DiffIndexes(BackupOperator):
    """Compare the provider index with the consumer index and write the plan.

    Returns the shards of the plan, at least one, each ``{"shard": number, "files": count}``: what
    ``PullChanged.expand(shard=...)`` takes. The XCom ``plan`` has the counts, and ``guard`` the reasons for
    which a person should look first; none if the run's parameter ``override_guard`` says that one has looked.
    That holds for the first index that the run judges, and not for another that it fetches when its tasks are
    cleared. The parameter ``only`` limits the run to some paths, and ``dry_run`` ends it here: the tasks that
    follow are skipped.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param source: the paths that the provider is configured to index.
    :param exclude: gitignore patterns, applied to both indexes.
    :param shards: the greatest number of shards.
    :param limits: how much may be gone or changed.
    :param allow_empty: accept an index without entries.
    :param on_guard: ``fail``, or ``approve`` if a task that asks a person follows.
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
        dry = bool(context["params"].get(DRY_RUN))
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
            may_trip=dry or self.on_guard == "approve",
            override=override,
            attempt=context["ti"].try_number,
        )
        self._tell(plan)
        if plan.guard and plan.overridden:
            self.log.warning("override_guard: this run goes on all the same")
        elif plan.guard and override:
            self.log.warning("override_guard was for the index that this run had first: a person is asked")
        context["ti"].xcom_push(key="plan", value=_counts(plan))
        context["ti"].xcom_push(key="guard", value=[] if plan.overridden else plan.guard)
        if dry:
            with folded(self.log, f"The plan: {plan.pull} to pull, {plan.gone} to forget"):
                for line in format_changes(run, plan):
                    self.log.info("%s", line)
            run.end_with_plan()  # or else clearing a later task would carry it out
            raise AirflowSkipException(f"{self.provider}: a dry run ends with the plan; nothing was changed")
        return [{"shard": shard, "files": files} for shard, files in enumerate(plan.shards)]

    def _override(self, context: Context) -> bool:
        """Whether a person who started this run has said that the guard is to be overridden."""
        if not context["params"].get(OVERRIDE_GUARD):
            return False
        if context["dag_run"].run_type == "manual":
            return True
        self.log.warning("override_guard is for runs that are started by hand: the guard is on")
        return False

    def _tell(self, plan: Plan) -> None:
        if plan.unreadable:
            paths = ", ".join(plan.unreadable_paths)
            self.log.warning("%s paths are unreadable on the provider: %s", plan.unreadable, paths)
        if plan.rotten:
            paths = ", ".join(plan.rotten_paths)
            self.log.warning("%s files are rotten on the provider: %s", plan.rotten, paths)
        if plan.telltale:
            self.log.warning("%s: %s, as ransomware does. Look at the provider", self.provider, plan.telltale)
        for reason in plan.guard:
            self.log.warning("Guard: %s", reason)
        if not plan.pull and not plan.gone:
            self.log.info("%s: nothing to do, %s files are unchanged", self.provider, plan.same)
            return
        self.log.info(
            "%s: %s new (%s of them are on this side already), %s changed, %s gone, %s unchanged",
            *(self.provider, plan.new, plan.adopt, plan.changed, plan.gone, plan.same),
        )


def _counts(plan: Plan) -> dict[str, int]:
    names = ("same", "new", "changed", "adopt", "copy", "gone", "kept", "unreadable", "rotten")
    return {name: getattr(plan, name) for name in names}
