"""The options that mdbackup reads from Airflow's configuration. No other module reads them."""

from __future__ import annotations

import configparser
import os
from datetime import UTC, datetime, time, tzinfo
from pathlib import Path
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo


def providers_file() -> Path:
    """Return the file, or directory of ``*.yaml`` files, that describes the providers. It need not exist.

    The option is ``[mdbackup] providers_file``, or ``AIRFLOW__MDBACKUP__PROVIDERS_FILE`` in the environment;
    the default is ``<AIRFLOW_HOME>/mdbackup/providers.yaml``. Airflow expands ``~`` and ``$VARIABLES`` in it;
    a relative path is relative to ``AIRFLOW_HOME``.
    """
    # Imported here, so that commands with --providers-file need no Airflow.
    from airflow.configuration import AIRFLOW_HOME, conf

    option = conf.get("mdbackup", "providers_file", fallback=None) or "mdbackup/providers.yaml"
    return Path(AIRFLOW_HOME) / option


def restore_below() -> Path | None:
    """Return the directory below which the DAG may restore files, ``[mdbackup] restore_below``.

    None if it is not set: then the DAG restores nothing.
    """
    from airflow.configuration import conf

    option = conf.get("mdbackup", "restore_below", fallback=None)
    return Path(option) if option else None


def dags_folder() -> str:
    """Return the folder of Airflow's DAG files, by ``[core] dags_folder``."""
    from airflow.configuration import conf

    return conf.get_mandatory_value("core", "dags_folder")


def local_time() -> time:
    """Return the time of day in Airflow's default time zone, ``[core] default_timezone``."""
    from airflow.sdk import timezone

    return timezone.make_naive(timezone.utcnow()).time()


def default_timezone() -> tzinfo:
    """Return Airflow's default time zone, ``[core] default_timezone``, without importing Airflow; else UTC.

    From the environment, or from ``airflow.cfg``, which ``AIRFLOW_CONFIG`` or ``AIRFLOW_HOME`` names.
    """
    home = os.environ.get("AIRFLOW_HOME", "~/airflow")
    file = os.path.expanduser(os.path.expandvars(os.environ.get("AIRFLOW_CONFIG", f"{home}/airflow.cfg")))
    options = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        options.read(file, encoding="utf-8")
        name = options.get("core", "default_timezone", fallback="utc")
        name = os.environ.get("AIRFLOW__CORE__DEFAULT_TIMEZONE", name)
        if name == "system":
            return datetime.now().astimezone().tzinfo or UTC
        return UTC if name.lower() == "utc" else ZoneInfo(name)
    except (OSError, ValueError, LookupError, configparser.Error):  # Airflow itself would not start
        return UTC


def web_path() -> str:
    """Return the path below which Airflow's pages are: empty, or that of ``[api] base_url``."""
    from airflow.configuration import conf

    return urlsplit(conf.get("api", "base_url", fallback=None) or "").path.rstrip("/")
