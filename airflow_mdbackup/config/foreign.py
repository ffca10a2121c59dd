"""Tries the classes of other packages that the configuration names, before they are needed.

Importing them may be slow and may fail, so DAG files with backups avoid it. Only the DAG file that shows
problems does it; a provider whose notifier is missing is still backed up.
"""

from __future__ import annotations

import copy
from pathlib import Path

from airflow_mdbackup.config.alert import AlertRule
from airflow_mdbackup.config.classes import find_class
from airflow_mdbackup.config.configuration import Configuration
from airflow_mdbackup.config.problem import Problem
from airflow_mdbackup.config.schedule import Assets, Timetable, UnusableSchedule, explain_unusable

_EMAIL = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"


def unusable(configuration: Configuration, file: Path) -> tuple[Problem, ...]:
    """Return a problem for each configured notifier and timetable that cannot be instantiated.

    Imports them, which may take seconds.

    :param file: where the configuration was read from.
    """
    problems = []
    for provider in configuration.providers:
        for key, schedule in provider.schedules.items():
            if isinstance(schedule, Assets | Timetable):
                try:
                    schedule.for_airflow()
                except UnusableSchedule as error:
                    problems.append(Problem(file, provider.name, key, str(error)))
        for rule in provider.alerts:
            if why := _why_unusable(rule):
                problems.append(Problem(file, provider.name, "alerts", why))
    return tuple(problems)


def _why_unusable(rule: AlertRule) -> str:
    if rule.ping_url is not None:
        return ""
    path = rule.notifier or _EMAIL
    arguments = rule.arguments if rule.notifier else {"to": list(rule.email or ())}
    try:
        find_class(path)(**copy.deepcopy(arguments))
    except Exception as error:  # their code may raise anything
        return f"`{path}` {explain_unusable(error)}"
    return ""
