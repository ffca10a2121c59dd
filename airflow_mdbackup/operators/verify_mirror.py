"""On B: verify live files and versions by reading them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mdbackup.operators.base import BackupOperator, refuse_misspelt, refused
from airflow_mdbackup.scheme.common.paths import to_text, unfolded
from airflow_mdbackup.scheme.common.units import parse_fraction, parse_rate
from airflow_mdbackup.scheme.errors import BackupError, DamageFound
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.verify import Verification, VerifyOutcome, describe_repair
from airflow_mdbackup.scheme.store.locks import LOCK_WAIT

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mdbackup.scheme.store.mirror import Mirror

PATHS, PART, REPAIR, MISSING = "paths", "part", "repair", "missing"
"""Parameters of a manual run."""
_MAX_LOGGED = 1000  # files


class VerifyMirror(BackupOperator):
    """Read live files and versions, and compare their md5; fail, without retry, if any is damaged.

    Each run reads the next part, so that all files are verified in turn. Backups can run meanwhile: only a
    repair takes the lock. If there is no backup yet, the task is skipped; but if the provider's asset, among
    its ``inlets``, records an earlier backup, it fails. The run's parameters ``paths``, ``part``, ``repair``
    and ``missing`` take precedence over the arguments.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param part: how much a run reads: a fraction such as ``1/30``, a size such as ``50GB``, or ``all``.
    :param limit: how much it reads per second, such as ``50MB``; None: no limit.
    :param repair: drop corrupted live files from the consumer index, so that the next run pulls them again.
        It keeps the corrupted bytes as versions.
    :param missing: with ``repair``, also drop live files that are missing.
    """

    template_fields: Sequence[str] = (*BackupOperator.template_fields, "part", "limit")
    operator_extra_links = ()  # they belong to the provider's own DAG
    ui_color = "#f5e6cc"

    def __init__(
        self,
        *,
        part: str = "1/30",
        limit: str | None = None,
        repair: bool = False,
        missing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.part = part
        self.limit = limit
        self.repair = repair
        self.missing = missing

    def execute(self, context: Context) -> dict[str, Any]:
        refuse_misspelt(context, (PATHS, PART, REPAIR, MISSING))
        mirror = self.mirror
        with mirror.translate_os_errors():
            if not mirror.is_set_up() and not self.had_good_run(context):
                raise AirflowSkipException(f"{self.provider}: there is no backup in {self.dest} yet")
            mirror.check()
            try:
                wanted = Selection(context["params"].get(PATHS) or ())
                with Timeline(mirror, wanted) as past:
                    if not past.moments and not mirror.index.exists():
                        if self.had_good_run(context):
                            raise AirflowFailException(
                                f"{self.provider}: {self.dest} has neither history nor index, although "
                                "there was a good backup: somebody deleted them. The next one copies all"
                            )
                        raise AirflowSkipException(f"{self.provider}: there is no backup yet")
                    walk = self._walk(mirror, past, wanted, context["params"])
                    self._read(walk)
                    for problem in past.problems:
                        self.log.warning("%s", unfolded(problem))
            except ValueError as error:
                raise refused(f"{self.provider}: {error}")  # noqa: B904 - it has a cause
            dropped, message = self._finish(mirror, walk)
        self.log.info("%s: %s", self.provider, walk.summary())
        if walk.is_last:
            self.log.info("This was the last part; the next run starts again with the first")
        counts = {
            **{found.value: walk.counts[found] for found in VerifyOutcome},
            "bytes": walk.size,
            "repaired": len(dropped),
        }
        try:
            walk.raise_for_damage(message)
        except DamageFound as error:
            # A task that fails returns nothing, but this is when its result is needed most.
            context["ti"].xcom_push(key="return_value", value={**counts, "damage": walk.damage})
            raise AirflowFailException(str(error)) from None
        return counts

    def _walk(
        self, mirror: Mirror, past: Timeline, wanted: Selection, params: Mapping[str, Any]
    ) -> Verification:
        """Return the verification that the run's parameters describe, or else the arguments.

        :raises ValueError: they are malformed, or contradict each other.
        """
        wanted.resolve(past.knows)
        return Verification(
            *(mirror, past, wanted),
            part=parse_fraction(params.get(PART) or self.part) if wanted.is_everything else None,
            limit=None if self.limit is None else parse_rate(self.limit),
            repair=bool(params.get(REPAIR, self.repair)),
            missing=bool(params.get(MISSING, self.missing)),
            report_progress=self.log.info,
        )

    def _read(self, walk: Verification) -> None:
        damaged = 0
        for verified in walk:
            if verified.outcome != VerifyOutcome.SOUND:
                damaged += 1
                if damaged <= _MAX_LOGGED:
                    self.log.warning("%s: %s", verified.outcome, to_text(verified.place))
        if damaged > _MAX_LOGGED:
            self.log.warning("and %s more", f"{damaged - _MAX_LOGGED:,}")

    def _finish(self, mirror: Mirror, walk: Verification) -> tuple[list[bytes], str]:
        """Repair if requested; return the paths that the next run pulls again, and a message about them."""
        try:
            dropped = walk.finish(LOCK_WAIT)
        except BackupError as error:
            if walk.is_sound:
                raise
            return [], f"Nothing was repaired: {error}"
        for path in dropped[:_MAX_LOGGED]:
            self.log.warning("dropped from the index, to be pulled again: %s", to_text(path))
        if dropped:
            return dropped, describe_repair(self.provider, dropped)
        if walk.is_repairing:
            return dropped, (
                "Check the disk. Nothing could be repaired: only corrupted live files that are in the"
                " index can be. Files dropped by an earlier repair wait for the next backup. To stop"
                " reporting files that are lost for good:"
                f" `mdbackup verify {self.provider} PATH --acknowledge-missing` on this worker"
            )
        return dropped, (
            "Check the disk. To have corrupted live files pulled again, start a run of this DAG with"
            f" `repair`, or `mdbackup verify {self.provider} PATH --repair` on this worker"
        )
