"""Connections to providers."""

from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook

__all__ = ["IndexHook", "ProviderHook"]
