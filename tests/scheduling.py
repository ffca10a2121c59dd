"""In which order tests run, and which worker process (pytest-xdist) gets which of them.

Most tests are handed out one by one, to whoever is free. Those that share something that takes long to start
(an Airflow), or that there is once on a machine, stay together: one process does them, one after the other.
What takes longest comes first, so that in the end no process waits for another.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

_TOGETHER = {
    "tests/system/test_scheduler.py": "first Airflow",
    "tests/distributed/": "first Airflow",
    "tests/system/test_watchdog.py": "second Airflow",
    "tests/system/test_wheel.py": "an environment without Airflow",
    "tests/system/": "second Airflow",
    "tests/integration/test_provider_server.py": "accounts of this machine",
}
"""What the node ids of tests that stay together begin with, and the group of such tests; the first that fits.

Tests of one group run in this order. Two Airflows at a time keep two cores busy, beside the other tests; each
of them takes a gigabyte.
"""

_ORDER = ("tests/integration/", "tests/guarantees/", "tests/unit/")


class InGroups(LoadScopeScheduling):
    """Hands out whole groups first, then the other tests in their order."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """Return the group of a test, which for most of them is the test alone."""
    return next((group for start, group in _TOGETHER.items() if nodeid.startswith(start)), nodeid)


def sort(items: list[pytest.Item], *, shuffled: bool) -> None:
    """Put the longest tests first, and those of a group beside each other; the rest stays as it is.

    :param shuffled: whether to leave their order alone, and only put those of a module or group together.
    """
    groups = list(dict.fromkeys(_TOGETHER.values()))
    modules: dict[str, int] = {}

    def rank(item: pytest.Item) -> tuple[int, int, int]:
        module = modules.setdefault(item.nodeid.partition("::")[0], len(modules))
        for place, (start, group) in enumerate(_TOGETHER.items()):
            if item.nodeid.startswith(start):
                return groups.index(group), 0 if shuffled else place, module
        if shuffled:
            return len(groups), 0, 0
        folder = next((n for n, start in enumerate(_ORDER) if item.nodeid.startswith(start)), len(_ORDER))
        return len(groups) + folder, item.get_closest_marker("guarantee") is None, 0

    items.sort(key=rank)
