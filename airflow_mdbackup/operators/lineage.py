"""What Airflow's lineage collector is told of a pull; docs/monitoring.md has the names.

Airflow collects only where a plugin reads what it collects, such as OpenLineage's; else this does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from airflow.providers.common.compat.sdk import get_hook_lineage_collector

from airflow_mdbackup.assets import provider_asset

if TYPE_CHECKING:
    from airflow_mdbackup.hooks.provider import ProviderHook

log = logging.getLogger(__name__)


def tell_lineage(hook: ProviderHook, provider: str, source: Sequence[str]) -> None:
    """Tell from which paths of which server bytes came, and into which backup.

    :param hook: the connection by which they came.
    :param source: absolute paths, as the backup account sees them.
    """
    collector = get_hook_lineage_collector()
    host = f"[{hook.account.address}]" if ":" in hook.account.address else hook.account.address
    asset = provider_asset(provider)
    try:
        for path in source:
            collector.add_input_asset(hook, uri=f"sftp://{host}:{hook.account.port or 22}{quote(path)}")
        collector.add_output_asset(hook, uri=asset.uri, name=asset.name, group=asset.group)
    except ValueError as error:  # no asset may have a path as long as that
        log.warning("%s: Airflow is told of no lineage: %s", provider, error)
