"""A provider with two small files, and triggers that wait shortly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from airflow_mdbackup.provider_side import conversation
from demo.sshd import ProviderServer
from tests.integration.build_index.builds import SetConnection


@pytest.fixture
def server(provider: ProviderServer, set_connection: SetConnection) -> Iterator[ProviderServer]:
    """A provider with two small files, reached by the connection ``index``."""
    set_connection("index", provider.ssh_connection())
    (provider.tree / "backups").mkdir()
    for name in ("one", "two"):
        (provider.tree / "backups" / name).write_text(name)
    yield provider
    provider.force_index_command(None)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have triggers wait shortly and try three times. Gives the pauses between the tries, left out here."""
    module = "airflow_mdbackup.triggers.build_provider_index"
    monkeypatch.setattr(conversation, "READY_WITHIN", 1)
    monkeypatch.setattr(conversation, "SILENT_FOR", 1)
    monkeypatch.setattr(f"{module}._CONNECT", 2.0)
    monkeypatch.setattr(f"{module}._TRIES", 3)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(f"{module}._pause", pause)
    return pauses
