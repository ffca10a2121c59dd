"""What Airflow's lineage collector is told, and what it must not do to a backup."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from airflow.providers.common.compat.openlineage import facet
from airflow.sdk.lineage import HookLineageCollector, NoOpCollector, get_hook_lineage_collector

from airflow_mdbackup.assets import as_openlineage, provider_asset
from airflow_mdbackup.operators import lineage


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> HookLineageCollector:
    """What Airflow collects in where a plugin reads it."""
    collector = HookLineageCollector()
    monkeypatch.setattr(lineage, "get_hook_lineage_collector", lambda: collector)
    return collector


def connection(host: str, port: int | None = None) -> Any:
    return SimpleNamespace(account=SimpleNamespace(address=host, port=port))


def test_sources_and_backup_are_told_by_their_uris(collector: HookLineageCollector) -> None:
    """The backup by the same asset that the commit updates; what is no part of a URI is quoted."""
    lineage.report_lineage(connection("srv1.example.org", 2222), "srv1", ["/backups", "/a b/ü?#"])
    found = collector.collected_assets
    assert [each.asset.uri for each in found.inputs] == [
        "sftp://srv1.example.org:2222/backups",
        "sftp://srv1.example.org:2222/a%20b/%C3%BC%3F%23",
    ]
    assert [each.asset for each in found.outputs] == [provider_asset("srv1")]


def test_address_of_ipv6_is_bracketed(collector: HookLineageCollector) -> None:
    lineage.report_lineage(connection("fd00::1"), "srv1", ["/"])
    assert [each.asset.uri for each in collector.collected_assets.inputs] == ["sftp://[fd00::1]:22/"]


@pytest.mark.parametrize("path", ["/" + "x" * 2000, "/\udcff"])
def test_path_that_no_asset_may_have_is_a_warning_and_no_failure(
    collector: HookLineageCollector, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    lineage.report_lineage(connection("srv1"), "srv1", [path])
    assert not collector.has_collected
    assert "srv1: no lineage is reported to Airflow" in caplog.text


def test_nothing_is_collected_where_nobody_reads_it() -> None:
    collector = get_hook_lineage_collector()
    lineage.report_lineage(connection("srv1"), "srv1", ["/backups"])
    assert isinstance(collector, NoOpCollector) and not collector.has_collected


def test_openlineage_has_a_name_for_a_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset(NamedTuple):
        namespace: str
        name: str

    monkeypatch.setattr(facet, "Dataset", Dataset, raising=False)
    assert as_openlineage(provider_asset("srv1"), None) == Dataset("mdbackup", "srv1")
