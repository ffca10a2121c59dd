"""The only task of a provider whose configuration is invalid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

if TYPE_CHECKING:
    from airflow.sdk import Context


class InvalidConfiguration(BaseOperator):
    """Fail with the configuration errors, so that the provider's DAG fails rather than disappears.

    :param message: what is wrong, and what to write instead.
    """

    ui_color = "#f4c7c3"

    def __init__(self, *, message: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.message = message

    def execute(self, context: Context) -> NoReturn:
        raise AirflowFailException(self.message)
