"""The asset of a provider: ``mdbackup://<provider>``, updated by each good commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from airflow.sdk import Asset

if TYPE_CHECKING:
    from airflow.providers.common.compat.openlineage.facet import Dataset

LAST_GOOD = "last_good"
"""Key of the asset's state store: the last good run. It survives the loss of ``dest``."""


def provider_asset(provider: str) -> Asset:
    """Return the asset of a provider's backup."""
    return Asset(name=f"mdbackup_{provider}", uri=f"mdbackup://{provider}", group="mdbackup")


def check_uri(uri: SplitResult) -> SplitResult:
    """Return the URI if it is ``mdbackup://<provider>``.

    :raises ValueError: it is not.
    """
    if not uri.netloc or uri.path.strip("/") or uri.query or uri.fragment:
        raise ValueError(f"the URI of a backup is mdbackup://<provider>, not {uri.geturl()!r}")
    return uri


def as_openlineage(asset: Asset, lineage_context: Any) -> Dataset:
    """Return the dataset of OpenLineage: namespace ``mdbackup``, and the provider's name."""
    from airflow.providers.common.compat.openlineage.facet import Dataset

    return Dataset(namespace="mdbackup", name=urlsplit(asset.uri).netloc)
