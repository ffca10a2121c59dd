"""Beside the steps of a backup, on B: read what lies there again."""

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
"""Parameters of a run that a person starts."""
_MOST_LOGGED = 1000


class VerifyMirror(BackupOperator):
    """Read live files and versions again; fail, without retry, if any is not what it was when it came.

    Each run takes the next part of all, and so comes round to everything. Backups go on meanwhile: the lock
    is taken for a repair only. Where there is no backup yet, the task is skipped; with the provider's asset
    among its ``inlets``, it fails where one has been. The run's parameters ``paths``, ``part``, ``repair``
    and ``missing`` win over what is said here.

    :param provider: the provider's name.
    :param dest: absolute path of its backup on the worker.
    :param part: how much a run reads: a fraction of all such as ``1/30``, a size such as ``50GB``, or
        ``all``.
    :param limit: how much it reads per second, such as ``50MB``; None for no limit.
    :param repair: take rotten live files out of the consumer index, so that the next run pulls them again,
        and keeps the rotten bytes as versions.
    :param missing: with ``repair``, also live files that are missing.
    """

    template_fields: Sequence[str] = (*BackupOperator.template_fields, "part", "limit")
    operator_extra_links = ()  # which are of the provider's own DAG
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
                                f"{self.provider}: {self.dest} has neither history nor index, though there "
                                "was a good backup: somebody deleted them. The next one copies all again"
                            )
                        raise AirflowSkipException(f"{self.provider}: nothing was backed up yet")
                    walk = self._walk(mirror, past, wanted, context["params"])
                    self._read(walk)
                    for problem in past.problems:
                        self.log.warning("%s", unfolded(problem))
            except ValueError as error:
                raise refused(f"{self.provider}: {error}")  # noqa: B904 - it has a cause
            gone, done = self._finish(mirror, walk)
        self.log.info("%s: %s", self.provider, walk.summary())
        if walk.is_last:
            self.log.info("That was the last part; the next one begins anew")
        counts = {
            **{found.value: walk.counts[found] for found in VerifyOutcome},
            "bytes": walk.size,
            "repaired": len(gone),
        }
        try:
            walk.raise_for_damage(done)
        except DamageFound as error:
            # A task that fails returns nothing, and its result is wanted most then.
            context["ti"].xcom_push(key="return_value", value={**counts, "damage": walk.damage})
            raise AirflowFailException(str(error)) from None
        return counts

    def _walk(
        self, mirror: Mirror, past: Timeline, wanted: Selection, params: Mapping[str, Any]
    ) -> Verification:
        """Return what was asked for, by the form or else by what is configured.

        :raises ValueError: it is malformed, or does not go together.
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
        told = 0
        for verified in walk:
            if verified.outcome != VerifyOutcome.SOUND:
                told += 1
                if told <= _MOST_LOGGED:
                    self.log.warning("%s: %s", verified.outcome, to_text(verified.place))
        if told > _MOST_LOGGED:
            self.log.warning("and %s more", told - _MOST_LOGGED)

    def _finish(self, mirror: Mirror, walk: Verification) -> tuple[list[bytes], str]:
        """Repair, if asked; return the paths of which the next run takes care, and what is told of it."""
        try:
            gone = walk.finish(LOCK_WAIT)
        except BackupError as error:
            if walk.is_sound:
                raise
            return [], f"Nothing was repaired: {error}"
        for path in gone[:_MOST_LOGGED]:
            self.log.warning("left the index, to be pulled again: %s", to_text(path))
        if gone:
            return gone, describe_repair(self.provider, gone)
        if walk.is_repairing:
            return gone, (
                "Look at the disk. Nothing of it could be repaired: only what is rotten, live, and in the"
                " index is; what an earlier repair took out of it waits for the next backup. To stop"
                " reporting files lost for good, run on this worker:"
                f" `mdbackup verify {self.provider} PATH --acknowledge-missing`"
            )
        return gone, (
            "Look at the disk. To have rotten live files pulled again, start a run of this DAG with `repair`,"
            f" or `mdbackup verify {self.provider} PATH --repair` on this worker"
        )
