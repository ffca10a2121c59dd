"""The only task of a provider that is not configured validly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

if TYPE_CHECKING:
    from airflow.sdk import Context


class InvalidConfiguration(BaseOperator):
    """Fail with what is wrong, so that a provider without backups is a failing DAG, not a missing one.

    :param message: what is wrong, and what to write instead.
    """

    ui_color = "#f4c7c3"

    def __init__(self, *, message: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.message = message

    def execute(self, context: Context) -> NoReturn:
        raise AirflowFailException(self.message)
