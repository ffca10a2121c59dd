"""The asset of a provider: ``mdbackup://<provider>``, updated by each good commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from airflow.sdk import Asset

if TYPE_CHECKING:
    from airflow.providers.common.compat.openlineage.facet import Dataset

LAST_GOOD = "last_good"
"""Key of the last good run in the asset's state store, which survives the loss of ``dest``."""


def provider_asset(provider: str) -> Asset:
    """Return the asset that represents the backup of a provider."""
    return Asset(name=f"mdbackup_{provider}", uri=f"mdbackup://{provider}", group="mdbackup")


def check_uri(uri: SplitResult) -> SplitResult:
    """Return a URI that names a provider and nothing else.

    :raises ValueError: it names something else.
    """
    if not uri.netloc or uri.path.strip("/") or uri.query or uri.fragment:
        raise ValueError(f"the URI of a backup is mdbackup://<provider>, not {uri.geturl()!r}")
    return uri


def as_openlineage(asset: Asset, lineage_context: Any) -> Dataset:
    """Return the OpenLineage dataset of a provider's backup: namespace ``mdbackup``, and its name."""
    from airflow.providers.common.compat.openlineage.facet import Dataset

    return Dataset(namespace="mdbackup", name=urlsplit(asset.uri).netloc)
