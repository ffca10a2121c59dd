"""Which alerts are sent to whom, with a real scheduler, mail server and web server for the pings."""

from __future__ import annotations

import hashlib
import html
import os
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from typing import Any

import pytest

from demo.processes import CLOSED_PORT
from tests.locks import pulling
from tests.system.conftest import SharedAirflow, Site, dag_files, provider_yaml
from tests.system.listeners import Checks, Mailbox
from tests.waiting import until

HOSTILE = "<b>bold<b> {{ 7 * 7 }}"

# Two providers whose runs take too long, and one whose question nobody answers.
DAGS = """
from datetime import timedelta
from airflow_mdbackup.dags.backup import provider_dags
dags = provider_dags()
if "mdbackup_slow" in dags:  # where a task runs, only its own DAG is there
    dags["mdbackup_slow"].get_task("build_provider_index").execution_timeout = timedelta(seconds=3)
if "mdbackup_late" in dags:
    dags["mdbackup_late"].dagrun_timeout = timedelta(seconds=5)
if "mdbackup_ignored" in dags:
    dags["mdbackup_ignored"].get_task("approve").response_timeout = timedelta(seconds=5)
globals().update(dags)
"""


@pytest.fixture(scope="module")
def mailbox(shared_airflow: SharedAirflow) -> Mailbox:
    return shared_airflow.mailbox


@pytest.fixture(scope="module")
def checks() -> Iterator[Checks]:
    with Checks() as running:
        yield running


@pytest.fixture(scope="module")
def site(shared_airflow: SharedAirflow, checks: Checks) -> Site:
    server, folder = shared_airflow.server, shared_airflow.folder / "alerting"
    mail = {"email": "ops@example.org", "sender": "backup@example.org", "smtp_conn_id": "mail"}
    to_file = {
        "notifier": "own_notifier.ToFile",
        "arguments": {"path": str(folder / "told.txt"), "text": "{{ alert.text }}"},
    }

    def provider(name: str, *alerts: Any, **keys: Any) -> dict[str, Any]:
        return provider_yaml(server, folder, name, alerts=[*alerts, mail], **keys)

    dead = {"ping_url": f"http://127.0.0.1:{CLOSED_PORT}/dead-secret"}
    missing = {"notifier": "nowhere.to.be.Found"}
    slow = {"indexer": {"limit": "500KB"}}
    providers = {
        "told": provider("told", {"ping_url": f"{checks.url}/told-secret"}, to_file, shards=2),
        "warned": provider("warned", missing, dead, ssh_conn_id=None, max_index_age=None, shards=1),
        "shot": provider("shot", bandwidth_limit="500KB"),
        "slow": provider("slow", **slow),
        "late": provider("late", **slow),
        "waiting": provider("waiting", on_guard="approve"),
        "ignored": provider("ignored", on_guard="approve"),
    }
    providers["warned"]["alerts"][-1] = mail | {"also": ["warning"]}
    dags = {"backups.py": DAGS, **dag_files("mdbackup_config.py")}
    return shared_airflow.site("alerting", providers=providers, dags=dags)


@pytest.fixture(autouse=True)
def nothing_told_yet(site: Site, mailbox: Mailbox, checks: Checks) -> None:
    """Forget the alerts of other tests, in whatever order they ran."""
    mailbox.mails.clear()
    checks.pings.clear()
    (site.folder / "told.txt").unlink(missing_ok=True)


def only(mails: Callable[[], list[EmailMessage]]) -> tuple[str, str]:
    """Return subject and text of the only mail; wait for a late one, and for a second one."""
    until(lambda: bool(mails()))
    time.sleep(5)
    (mail,) = mails()
    assert mail["to"] == "ops@example.org" and mail["from"] == "backup@example.org"
    body = mail.get_body(("html",))
    assert body is not None
    return mail["subject"], body.get_content()


def test_a_failed_run_is_reported_once_by_each_channel_and_a_good_one_only_pinged(
    site: Site, shared_airflow: SharedAirflow, mailbox: Mailbox, checks: Checks
) -> None:
    """The message has step, kind, path with outcome, the last good backup and links; HTML and templates in
    names stay text; and nobody finds the URL of the ping in a log or in the database.
    """
    for number in range(20):
        site.put("told", f"file{number}", b"%d" % number)
    assert site.run("told")[0] == "success"
    until(lambda: len(checks.of("told-secret")) == 2)
    assert checks.of("told-secret") == ["/told-secret/start", "/told-secret"]
    assert "20 new" in checks.pings[1][1]

    site.put("told", HOSTILE, b"x")
    site.put("told", "another", b"y")
    for name in (HOSTILE, "another"):
        (site.source("told") / name).chmod(0)
    run_id = site.start("told")
    assert site.finish("told", run_id) == "failed"
    subject, body = only(lambda: mailbox.of("told"))
    assert subject == "[mdbackup] told: backup FAILED in commit_backup: some files could not be backed up"
    assert "2 files could not be backed up" in body and "told/another" in body
    assert html.escape(HOSTILE) in body and "<b>bold" not in body
    assert "2 unreadable" in body
    assert "Last good backup</td><td>less than a minute ago" in body or " minute ago (" in body
    link = f"{site.stack.url}/dags/mdbackup_told/runs/{run_id}"
    assert f'href="{link}"' in body and f'href="{link}/tasks/commit_backup' in body
    assert checks.of("told-secret")[2:] == ["/told-secret/start", "/told-secret/fail"]
    assert HOSTILE in (site.folder / "told.txt").read_text()
    assert (site.folder / "told.txt").read_text().count("FAILED") == 1
    kept = [file for file in site.stack.home.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert any(b"Failure alert sent by ping_url" in file.read_bytes() for file in kept)
    assert not [file for file in kept if b"told-secret" in file.read_bytes()]
    assert b"told-secret" not in shared_airflow.database.dump()


def test_a_killed_task_is_reported_though_it_stored_nothing(site: Site, mailbox: Mailbox) -> None:
    """SIGKILL on the process that pulls."""
    site.put("shot", "big", os.urandom(20_000_000))
    run_id = site.start("shot")
    staging = site.folder / "shot" / ".mdbackup" / "staging"
    until(lambda: pulling(staging))
    for pid in pulling(staging):
        os.kill(pid, 9)
    assert site.finish("shot", run_id) == "failed"
    subject, body = only(lambda: mailbox.of("shot"))
    assert "FAILED in pull_changed, shard 0: the task was killed, or its worker was lost" in subject
    assert "Last good backup</td><td>never" in body and "commit_backup" in body


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("slow", "FAILED in build_provider_index: the task exceeded its execution_timeout"),
        ("late", "FAILED: the run exceeded its dagrun_timeout"),
    ],
)
def test_a_task_or_run_that_takes_too_long_is_reported(
    site: Site, mailbox: Mailbox, provider: str, said: str
) -> None:
    """By Airflow's own timeouts, which end a task from within, and a run from outside."""
    site.put(provider, "big", os.urandom(20_000_000))
    run_id = site.start(provider)
    assert site.finish(provider, run_id) == "failed"
    subject, _ = only(lambda: mailbox.of(provider))
    assert said in subject


def test_warnings_of_a_good_run_are_reported_on_request_whatever_other_channels_do(
    site: Site, mailbox: Mailbox
) -> None:
    """A file deleted since its index; a notifier and a ping fail before the mail, and nothing else fails."""
    site.put("warned", "there", b"1")
    lines = [
        f"{hashlib.md5(b'1').hexdigest()}  {site.server.prefix}/warned/{name}" for name in ("gone", "there")
    ]
    end = "# mdbackup end format=1 files=2 unreadable=0 bytes=2"
    index = site.server.tree / ".mdbackup" / "warned.md5"
    index.write_text("\n".join([*lines, end, ""]))
    index.chmod(0o644)
    run_id = site.start("warned")
    assert site.finish("warned", run_id) == "success"
    subject, _ = only(lambda: mailbox.of("warned"))
    assert subject == "[mdbackup] warned: backup succeeded, with WARNINGS: 1 vanished during the run"
    log = site.stack.task_log("mdbackup_warned", run_id, "commit_backup")
    assert "NOT sent by ping_url at 127.0.0.1" in log and "dead-secret" not in log
    (error,) = site.import_errors()
    assert "`nowhere.to.be.Found` cannot be imported" in error["stack_trace"]


def test_alerts_can_be_tried_before_they_are_needed(site: Site, mailbox: Mailbox, checks: Checks) -> None:
    """By Airflow's own command line, with its connections, and a notifier beside the DAGs."""
    pings = len(checks.of("told-secret"))
    status, told = site.command("test-alert", "told")
    assert status == 0, told
    for way in ("ping_url at 127.0.0.1", "own_notifier.ToFile", "e-mail to ops@example.org"):
        assert f"{way}: accepted" in told.splitlines()
    assert "told-secret" not in told
    assert checks.of("told-secret")[pings:] == ["/told-secret/log"]
    assert (site.folder / "told.txt").read_text().count("told: TEST of the alerts") == 1
    assert [mail["subject"] for mail in mailbox.of("told")][-1].startswith("[mdbackup] told: TEST")

    status, failed = site.command("test-alert", "warned")
    assert status == 1, failed
    assert "nowhere.to.be.Found: REJECTED: ModuleNotFoundError" in failed
    assert "ping_url at 127.0.0.1: REJECTED: ConnectError" in failed
    assert "e-mail to ops@example.org: accepted" in failed
    assert "dead-secret" not in failed


def test_a_run_that_waits_for_approval_is_reported_at_once(site: Site, mailbox: Mailbox) -> None:
    """With the guard's reasons and where to answer; no alert unless the guard is triggered."""
    site.put("waiting", "only", b"1")
    assert site.run("waiting")[0] == "success"
    assert not mailbox.of("waiting")
    (site.source("waiting") / "only").unlink()
    run_id = site.start("waiting")
    subject, body = only(lambda: mailbox.of("waiting"))
    assert subject.endswith("waiting: backup is WAITING for approval: too much is gone or changed")
    assert "Guard</td>" in body
    assert f"{site.stack.url}/dags/mdbackup_waiting/runs/{run_id}/tasks/approve/required_actions" in body
    assert site.stack.task_states("mdbackup_waiting", run_id)["approve"] == "awaiting_input"


def test_question_that_nobody_answers_fails_the_run_and_changes_nothing(site: Site, mailbox: Mailbox) -> None:
    """There is an alert about the question, and then about the failure."""
    site.put("ignored", "only", b"1")
    assert site.run("ignored")[0] == "success"
    index = (site.folder / "ignored" / "index.md5").read_bytes()
    (site.source("ignored") / "only").unlink()
    assert site.finish("ignored", site.start("ignored")) == "failed"
    assert (site.folder / "ignored" / "index.md5").read_bytes() == index
    until(lambda: len(mailbox.of("ignored")) == 2)
    assert "WAITING" in mailbox.mails[-2]["subject"]
    assert mailbox.mails[-1]["subject"].endswith("nobody approved or rejected the changes in time")
