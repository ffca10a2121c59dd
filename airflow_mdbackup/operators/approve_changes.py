"""Between steps 3 and 4: ask a person if the guard tripped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


_CHOICE = """\
**Approve**: what changed is replaced, old versions are kept in `.old`; what is gone leaves the consumer's
index, its files stay.

**Reject**: this run fails, and nothing changes. So it does if nobody answers in time. Until then no other run
of this provider starts."""


class ApproveChanges(ApprovalOperator):
    """Wait for a person's approval of a plan over which the guard tripped; pass at once if it did not.

    Refused or unanswered, the task fails, and nothing is changed.

    :param reasons: why the guard tripped: the XCom ``guard`` of DiffIndexes.
    """

    template_fields: Sequence[str] = (*ApprovalOperator.template_fields, "reasons")

    def __init__(self, *, reasons: Any, **kwargs: Any) -> None:
        super().__init__(fail_on_reject=True, **kwargs)
        self.reasons = reasons

    def execute(self, context: Context) -> Any:
        if not self.reasons:
            self.log.info("The guard is quiet: nothing to approve")
            return None
        self.log.warning("Waiting for a person's approval: %s", "; ".join(self.reasons))
        # Indented, so that Markdown leaves names from the provider alone.
        reasons = "\n".join(f"    {reason}" for reason in self.reasons)
        self.body = f"{reasons}\n\n{_CHOICE}"
        return super().execute(context)
