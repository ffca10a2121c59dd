"""Connections to providers."""

from airflow_mdbackup.hooks.provider import ProviderHook

__all__ = ["ProviderHook"]
