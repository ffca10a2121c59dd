"""Between steps 3 and 4: ask an operator for approval if the guard was triggered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


_CHOICE = """\
**Approve**: changed files are replaced, and their old versions kept in `.old`. Deleted files leave the
consumer's index, but stay on the disk.

**Reject**: this run fails, and nothing changes. The same happens if nobody answers in time. Until then no
other run of this provider starts."""


class ApproveChanges(ApprovalOperator):
    """Wait until an operator approves a plan that triggered the guard. Pass at once if none did.

    If it is rejected or nobody answers, the task fails, and nothing is changed.

    :param reasons: why the guard was triggered: the XCom ``guard`` of DiffIndexes.
    """

    template_fields: Sequence[str] = (*ApprovalOperator.template_fields, "reasons")

    def __init__(self, *, reasons: Any, **kwargs: Any) -> None:
        super().__init__(fail_on_reject=True, **kwargs)
        self.reasons = reasons

    def execute(self, context: Context) -> Any:
        if not self.reasons:
            self.log.info("Guard not triggered: nothing to approve")
            return None
        self.log.warning("Waiting for approval: %s", "; ".join(self.reasons))
        # Indented, so that Markdown does not interpret names from the provider.
        reasons = "\n".join(f"    {reason}" for reason in self.reasons)
        self.body = f"{reasons}\n\n{_CHOICE}"
        return super().execute(context)
