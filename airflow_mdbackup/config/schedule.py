"""Schedules that are not a cron expression or a preset: other assets, and timetables.

Importing a timetable may be slow and may fail; only its provider's DAG, and what shows mistakes, does it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from airflow_mdbackup.config.classes import find_class


@dataclass(frozen=True, slots=True)
class Assets:
    """Run when all of these have been updated.

    :ivar assets: URIs (with ``://``) and names.
    """

    assets: tuple[str, ...]

    def made(self) -> list[Any]:
        """Return what a DAG takes for it.

        :raises UnusableSchedule: one is no URI that Airflow accepts.
        """
        from airflow.sdk import Asset

        try:
            # By the spelling that Airflow gives to URIs of assets, and does not give to references.
            return [
                Asset.ref(uri=Asset(name=asset, uri=asset).uri) if "://" in asset else Asset.ref(name=asset)
                for asset in self.assets
            ]
        except ValueError as error:
            raise UnusableSchedule(f"an asset cannot be used ({error}): correct its URI") from error


@dataclass(frozen=True, slots=True)
class Timetable:
    """Run when a timetable says so.

    :ivar path: dotted path of its class.
    :ivar arguments: what that is made with.
    """

    path: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def made(self) -> Any:
        """Return what a DAG takes for it.

        :raises UnusableSchedule: it cannot be imported or made, or Airflow cannot store it.
        """
        from airflow.serialization.encoders import encode_timetable

        try:
            timetable = find_class(self.path)(**copy.deepcopy(self.arguments))
            # What Airflow cannot store would make all DAGs of the file stale.
            encode_timetable(timetable)
        except Exception as error:  # whatever other people's code raises
            raise UnusableSchedule(f"`{self.path}` {why_not(error)}") from error
        return timetable


class UnusableSchedule(ValueError):
    """A provider's schedule cannot be used; the message says why and what to do."""


def why_not(error: Exception) -> str:
    """Say why a class of other people cannot be used, and what to do."""
    said = f"({type(error).__name__}: {error})"
    if isinstance(error, ImportError):
        return f"cannot be imported {said}: install the package that has it, or correct the path"
    if type(error).__name__ == "TimetableNotRegistered":
        return f"is not registered with Airflow {said}: list it in the `timetables` of an Airflow plugin"
    return f"cannot be used {said}: correct the path, or its `arguments`"
