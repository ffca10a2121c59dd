"""Report pulls to Airflow's lineage collector; docs/monitoring.md has the names.

Airflow collects lineage only if a plugin, such as OpenLineage's, reads it. Without one this does nothing.
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


def report_lineage(hook: ProviderHook, provider: str, source: Sequence[str]) -> None:
    """Report from which paths of which server bytes were pulled, and into which backup.

    :param hook: the connection that was used.
    :param source: absolute paths, as the backup account sees them.
    """
    collector = get_hook_lineage_collector()
    host = f"[{hook.account.address}]" if ":" in hook.account.address else hook.account.address
    asset = provider_asset(provider)
    try:
        for path in source:
            collector.add_input_asset(hook, uri=f"sftp://{host}:{hook.account.port or 22}{quote(path)}")
        collector.add_output_asset(hook, uri=asset.uri, name=asset.name, group=asset.group)
    except ValueError as error:  # the path is too long for an asset
        log.warning("%s: no lineage is reported to Airflow: %s", provider, error)
