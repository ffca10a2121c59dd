"""Notifiers that the configuration names: found when they are needed, and looked for beforehand.

Importing one may be slow and may fail, so that no DAG file does it. What shows mistakes does, and a provider
whose notifier is missing keeps its backups.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

from airflow_mdbackup.config.configuration import Configuration
from airflow_mdbackup.config.problem import Problem

_EMAIL = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"


def find_notifier(path: str) -> Any:
    """Return the class of this dotted path.

    :raises ImportError, AttributeError: it is not there. Other errors come from the module itself.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def unusable_notifiers(configuration: Configuration, file: Path) -> tuple[Problem, ...]:
    """Return a problem for each notifier that cannot be made of what the configuration says.

    Imports them, which may take seconds.

    :param file: where the configuration was read.
    """
    problems = []
    for provider in configuration.providers:
        for rule in provider.alerts:
            if rule.ping_url is not None:
                continue
            path = rule.notifier or _EMAIL
            arguments = rule.arguments if rule.notifier else {"to": list(rule.email or ())}
            try:
                find_notifier(path)(**copy.deepcopy(arguments))
            except Exception as error:  # whatever other people's code raises
                problems.append(Problem(file, provider.name, "alerts", _message(path, error)))
    return tuple(problems)


def _message(path: str, error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        return f"`{path}` cannot be imported ({said}): install the package that has it, or correct the path"
    return f"`{path}` cannot be used ({said}): correct the path, or its `arguments`"
