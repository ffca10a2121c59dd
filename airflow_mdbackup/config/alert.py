"""The keys of an alert: one service that reports a provider's runs to people."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from airflow_mdbackup.config.value_types import Addresses, DottedPath, Text, WebAddress, as_tuple

Event = Literal["warning", "success"]


class AlertRule(BaseModel):
    """What to report, and where. Immutable. Has exactly one of ``email``, ``notifier`` and ``ping_url``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    email: Addresses | None = Field(
        default=None,
        min_length=1,
        description=(
            "Send an e-mail to these addresses (a single one need not be a list), with Airflow's"
            " `SmtpNotifier`: install `airflow-mdbackup[smtp]`."
        ),
        examples=["ops@example.org", ["ops@example.org", "boss@example.org"]],
    )
    sender: Text | None = Field(
        default=None,
        description="The sender of the e-mail. Default: that of the connection.",
        examples=["backup@example.org"],
    )
    smtp_conn_id: Text | None = Field(
        default=None,
        description="The Airflow connection, of type `smtp`, of the mail server. Default: `smtp_default`.",
        examples=["mail"],
    )
    notifier: DottedPath | None = Field(
        default=None,
        description=(
            "Call an Airflow notifier, given by the dotted path of its class. Its package must be installed"
            " where the DAG processor and the workers run."
        ),
        examples=["airflow.providers.slack.notifications.slack.SlackNotifier"],
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Arguments of the notifier. Its template fields may use `{{ alert.text }}`, `{{ alert.mrkdwn }}`"
            " (the same, escaped for Slack), `{{ alert.html }}`, `{{ alert.subject }}`,"
            " `{{ alert.provider }}` and `{{ alert.event }}`, in addition to Airflow's own variables."
        ),
        examples=[{"slack_conn_id": "slack", "channel": "#backups", "text": "{{ alert.mrkdwn }}"}],
        json_schema_extra={"title": "mapping"},
    )
    ping_url: WebAddress | None = Field(
        default=None,
        repr=False,
        description=(
            "The URL of a check at healthchecks.io or a compatible service: POST to `<url>/start` when a run"
            " starts, to `<url>` when it succeeds, to `<url>/fail` when it fails. Keep it secret."
        ),
        examples=["https://hc-ping.com/your-uuid-here"],
    )
    also: Annotated[tuple[Event, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description=(
            "What to report besides failures and runs that wait for approval: `warning`, good runs in which"
            " files changed or vanished; `success`, all good runs. Not for `ping_url`, which reports every"
            " start and end."
        ),
        examples=[["warning"]],
    )

    @model_validator(mode="after")
    def _check_keys(self) -> AlertRule:
        given = {name for name in ("email", "notifier", "ping_url") if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(
                "an alert needs exactly one of `email`, `notifier` and `ping_url`: write for example"
                " `alerts: [{email: ops@example.org}]`, and a separate entry for each"
            )
        (way,) = given
        belongs = {"sender": "email", "smtp_conn_id": "email", "arguments": "notifier"}
        for name, owner in belongs.items():
            if name in self.model_fields_set and owner != way:
                raise ValueError(f"`{name}` belongs to `{owner}`, not to `{way}`: remove it")
        if self.also and way == "ping_url":
            raise ValueError("`also` is not for `ping_url`, which reports every start and end: remove it")
        return self
