"""The operator that audits a provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.operators import AuditProvider
from demo.sshd import _namespaces_allowed
from tests.integration.audit.loose_server import SetConnection, SetUp, serving

pytestmark = pytest.mark.skipif(
    not _namespaces_allowed(),
    reason="needs root and namespaces: accounts and a chroot as the design has them",
)


class TaskInstance:
    """What the operator uses of one."""

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def audit_task(source: list[str] | str = "/backups") -> AuditProvider:
    return AuditProvider(
        task_id="audit",
        provider="web",
        sftp_conn_id="backupop",
        ssh_conn_id="index",
        source=source,
    )


def test_operator_returns_counts_where_all_is_tight(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small summary; the table is in the log."""
    with serving(SetUp(), tmp_path, set_connection, monkeypatch):
        result = audit_task().execute({"ti": TaskInstance()})  # type: ignore[arg-type]
    assert result == {"tight": 42, "looser": 0, "unknown": 0, "loose": []}


def test_operator_fails_without_retry_and_tells_what_is_loose(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is there all the same."""
    task = TaskInstance()
    with (
        serving(SetUp({"PermitTTY": "yes"}), tmp_path, set_connection, monkeypatch),
        pytest.raises(AirflowFailException, match="PermitTTY no"),
    ):
        audit_task().execute({"ti": task})  # type: ignore[arg-type]
    loose = ["backup account: no PTY"]
    assert task.pushed == {"return_value": {"tight": 41, "looser": 1, "unknown": 0, "loose": loose}}


@pytest.mark.parametrize("source", ["/backups", ["/backups"]], ids=["one path", "a list"])
def test_operator_given_one_path_excuses_nothing_else(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch, source: list[str] | str
) -> None:
    """A path is not taken for its letters, of which `/` would excuse the whole machine."""
    with (
        serving(SetUp(), tmp_path, set_connection, monkeypatch) as server,
        pytest.raises(AirflowFailException, match="ChrootDirectory"),
    ):
        (server.tree / "etc").mkdir()
        (server.tree / "etc" / "shadow").write_text("")
        audit_task(source).execute({"ti": TaskInstance()})  # type: ignore[arg-type]


def test_operator_refuses_what_is_no_absolute_path() -> None:
    """Before it connects anywhere; a list that a template turned into text is one of these."""
    with pytest.raises(AirflowFailException, match="absolute"):
        audit_task("['/backups']").execute({"ti": TaskInstance()})  # type: ignore[arg-type]
