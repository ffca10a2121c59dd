"""Real Airflows for the system tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from demo.stack import AirflowStack


@pytest.fixture(scope="session")
def airflow_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., AirflowStack]]:
    """A function that starts a real Airflow, which runs until all tests are over.

    Starting one takes about 15 seconds: call it from a fixture of module scope or wider.
    """
    with ExitStack() as running:

        def start(
            dags_folder: Path, env: Mapping[str, str] | None = None, *, triggerer: bool = False
        ) -> AirflowStack:
            home = tmp_path_factory.mktemp("airflow")
            stack = AirflowStack(home, dags_folder=dags_folder, env=env, triggerer=triggerer)
            return running.enter_context(stack)

        yield start
