"""How the tests of the configuration load one."""

from __future__ import annotations

import pytest

from airflow_mdbackup.config import Configuration, load
from tests.unit.config.providers_file import MINIMAL


@pytest.fixture
def read(tmp_path):
    """Return a function that writes its argument to a file and loads it."""

    def write_and_load(content: str | bytes) -> Configuration:
        file = tmp_path / "providers.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load(file)

    return write_and_load


@pytest.fixture
def refusals(read):
    """Return a function that loads one provider with the keys given, and returns its problems by key."""

    def write_and_load(keys: str, given: str = MINIMAL) -> dict[str | None, str]:
        configuration = read(f"providers:\n  web: {{{', '.join(filter(None, [given, keys]))}}}\n")
        assert configuration.providers == ()
        assert {problem.provider for problem in configuration.problems} == {"web"}
        return {problem.key: problem.message for problem in configuration.problems}

    return write_and_load
