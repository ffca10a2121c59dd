"""The guard: stops a run that would lose, or replace, too much at once (policy row 16).

It objects if the provider's index, or one of its sources, has no entries left, or if the share or number of
entries that are gone or changed exceeds the limits. Nothing is changed then, until an operator decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from airflow_mdbackup.scheme.backup.plan import Plan, PlanOptions
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.index.canonical import IdenticalEntries

_EXAMPLES = 3  # paths that a reason names


class Guard:
    """Counts the entries of each side while two indexes are compared.

    :ivar files: entries of the provider.
    """

    def __init__(self, source: Sequence[bytes]) -> None:
        self.files = 0
        self._examples: list[bytes] = []  # the first entries that are gone or changed
        # By source, which is a directory or a file: how many entries of it provider and consumer have.
        self._sources = {path.rstrip(b"/"): [0, 0] for path in source}

    def count_identical(self, same: IdenticalEntries) -> None:
        """Count entries that both sides have."""
        self.files += same.count
        for source, counts in self._sources.items():
            if all(path.startswith(source + b"/") for path in same.span):
                below = same.count  # paths with a common prefix are adjacent
            else:
                below = sum(is_at_or_below(path, source) for path in same.paths())
            counts[0] += below
            counts[1] += below

    def count(self, path: bytes, on_provider: bool, on_consumer: bool) -> None:
        """Count an entry that differs."""
        self.files += on_provider
        for source, counts in self._sources.items():
            if is_at_or_below(path, source):
                counts[0] += on_provider
                counts[1] += on_consumer

    def add_lost(self, path: bytes) -> None:
        """Note an entry that is gone or changed, as an example."""
        if len(self._examples) < _EXAMPLES:
            self._examples.append(path)

    def remedy(self) -> str:
        """Return what would let a plan pass that :meth:`reasons` objects to."""
        emptied = not self.files or any(ours and not theirs for theirs, ours in self._sources.values())
        return "set allow_empty" if emptied else "widen the guard"

    def reasons(self, plan: Plan, options: PlanOptions) -> list[str]:
        """Return why an operator should look at the plan first; an empty list if it is harmless."""
        reasons = [] if options.allow_empty or options.only else [*self._emptied(plan)]
        limits, lost = options.limits, plan.gone + plan.changed
        examples = ", ".join(map(to_text, self._examples))
        counts = f"{plan.gone} gone and {plan.changed} changed of {plan.consumer} entries"
        if plan.consumer > limits.above:
            if lost > limits.share * plan.consumer:
                reasons.append(f"{counts}, over {limits.share:.0%} (such as {examples})")
            elif limits.number is not None and lost > limits.number:
                reasons.append(f"{counts}, over {limits.number} (such as {examples})")
        if reasons and plan.telltale:
            reasons.append(f"{plan.telltale}, as ransomware does")
        return reasons

    def _emptied(self, plan: Plan) -> Iterator[str]:
        if not self.files:
            unreadable = ", ".join(plan.unreadable_paths)
            why = f", because it could not read {unreadable}" if unreadable else ""
            yield f"the provider's index is empty{why}"
        for source, (theirs, ours) in self._sources.items():
            if ours and not theirs:
                yield f"nothing is left of {ours} entries in {to_text(source) or '/'}"


def is_at_or_below(path: bytes, directory: bytes) -> bool:
    """Whether ``path`` is ``directory``, given without a trailing slash, or lies below it."""
    return path.startswith(directory) and path[len(directory) : len(directory) + 1] in (b"", b"/")
