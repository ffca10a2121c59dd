"""What tests of the configuration write into a file of providers, and get out of it."""

from __future__ import annotations

from airflow_mdbackup.config import Configuration, Provider

MINIMAL = "sftp_conn_id: web_backupop, source: /backups, dest: /srv/web"


def one(configuration: Configuration) -> Provider:
    assert [str(problem) for problem in configuration.problems] == []
    (provider,) = configuration.providers
    return provider


def names(configuration: Configuration) -> list[str]:
    return [provider.name for provider in configuration.providers]


def one_with(read, keys: str) -> Provider:
    """Return the provider that has these keys besides what it must have."""
    return one(read(f"providers: {{web: {{{MINIMAL}, {keys}}}}}"))
