"""What alerts say, whom they reach, and that they never harm what they are about."""

from __future__ import annotations

import logging
import re
import socket
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from airflow.sdk import BaseNotifier
from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.alerts import context, message, senders
from airflow_mdbackup.alerts.callbacks import RunCallbacks, failure_callbacks
from airflow_mdbackup.alerts.message import Alert, Failure
from airflow_mdbackup.cli.main import main
from airflow_mdbackup.config import AlertRule, Configuration, Provider, load
from airflow_mdbackup.config.foreign import unusable
from airflow_mdbackup.dags.backup import provider_dag
from airflow_mdbackup.dags.verify import verify_dags
from airflow_mdbackup.operators.base import refuse_misspelt, refused
from airflow_mdbackup.operators.diff_indexes import PARAMETERS
from airflow_mdbackup.scheme import errors

HOSTILE = "/a/<b>&'\" <!channel> {{ 7 * 7 }}"
FAILURE = Failure(
    "pull_changed, shard 3", "it broke", f"denied {HOSTILE}", "https://airflow/log?try_number=1&x"
)


def read(folder: Path, alerts: Any) -> Configuration:
    keys = {"sftp_conn_id": "c", "source": "/a", "dest": str(folder / "dest"), "alerts": alerts}
    (folder / "providers.yaml").write_text(yaml.safe_dump({"providers": {"web": keys}}))
    return load(folder / "providers.yaml")


def provider(folder: Path, *alerts: Any) -> Provider:
    configuration = read(folder, list(alerts))
    assert not configuration.problems, configuration.problems
    return configuration.providers[0]


# --- what is said -----------------------------------------------------------------------------------


def test_each_kind_of_error_of_ours_has_its_words() -> None:
    """No message has the name of a class in place of what happened."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 10
    for kind in kinds:
        if kind is not errors.BackupError:
            assert message.describe_error(kind("said"))[0] != message.UNEXPECTED, kind


def test_our_error_behind_one_of_airflows_is_described() -> None:
    """As CommitBackup raises it, so that it is not retried."""
    with pytest.raises(AirflowFailException) as raised:
        try:
            raise errors.EntriesFailed("web: 2 files")
        except errors.EntriesFailed as error:
            raise AirflowFailException(str(error)) from None
    assert message.describe_error(raised.value) == ("some files could not be backed up", "web: 2 files")


def test_a_misspelt_or_malformed_parameter_is_described_as_such() -> None:
    """And no exception of Airflow is described by its class name, which means nothing to people."""
    run = SimpleNamespace(conf={"dryrun": True})
    with pytest.raises(AirflowFailException, match="did you mean dry_run") as raised:
        refuse_misspelt({"dag_run": run}, PARAMETERS)  # type: ignore[typeddict-item]
    assert message.describe_error(raised.value)[0] == message.BAD_PARAMETER
    with pytest.raises(AirflowFailException) as raised:
        try:
            raise ValueError("1/x is not a fraction")
        except ValueError as error:
            raise refused(f"web: {error}")  # noqa: B904 - it has its own cause
    assert message.describe_error(raised.value) == (message.BAD_PARAMETER, "web: 1/x is not a fraction")
    assert message.describe_error(AirflowFailException("said")) == (
        "the task failed and is not retried",
        "said",
    )


def test_unexpected_error_is_named_in_its_text_alone_and_cut() -> None:
    """A message as long as a log would not be delivered."""
    kind, text = message.describe_error(ZeroDivisionError("x" * 100_000))
    assert kind == message.UNEXPECTED and text.startswith("ZeroDivisionError: xxx")
    assert len(text) < message.MAX_TEXT + 10


def test_alert_has_all_in_text_and_html_and_each_is_escaped_for_its_place() -> None:
    """The names come from another server."""
    alert = message.failed(
        "web", [FAILURE], last_good=None, run_url="https://airflow/run", outcomes="1 denied"
    )
    assert alert.subject == "[mdbackup] web: backup FAILED in pull_changed, shard 3: it broke"
    for said in ("web", FAILURE.step, FAILURE.kind, HOSTILE, FAILURE.log_url, "1 denied", "unknown"):
        assert said in alert.text
    assert (
        "<b>" not in alert.html.replace("<b>pull_changed, shard 3</b>", "") and "<!channel>" not in alert.html
    )
    assert (
        "&lt;b&gt;&amp;&#x27;&quot;" in alert.html
        and 'href="https://airflow/log?try_number=1&amp;x"' in alert.html
    )
    assert "<" not in alert.mrkdwn and "&lt;!channel&gt;" in alert.mrkdwn


def test_slack_makes_no_links_of_names() -> None:
    """Text formatted as code has none; and no name can end the code."""
    name = "/a/www.example.com/```b"
    failure = Failure(FAILURE.step, FAILURE.kind, f"denied {name}\nand {name}", FAILURE.log_url)
    alert = Alert(
        "web", "failure", f"gone: {name}", (("Guard", name), ("Run", "https://airflow/x")), (failure,)
    )
    lines = re.sub(r"```\n[^`]*\n```|`[^`\n]*`", "", alert.mrkdwn)
    assert "www" not in lines and "`" not in lines and "Run: https://airflow/x" in lines
    assert alert.mrkdwn.count("/a/www.example.com/") == 4


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (timedelta(seconds=-5), "less than a minute ago"),
        (timedelta(minutes=1), "1 minute ago"),
        (timedelta(hours=26, minutes=5), "1 day 2 hours ago"),
        (timedelta(days=40), "40 days ago"),
    ],
)
def test_age_of_the_last_good_backup_is_written_out(passed: timedelta, said: str) -> None:
    """And as the time itself."""
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    assert message.age(now - passed, now) == f"{said} ({now - passed:%Y-%m-%d %H:%M} UTC)"


# --- who is told ------------------------------------------------------------------------------------


class Told(BaseNotifier):
    """A notifier that remembers its messages."""

    template_fields = ("text",)
    texts: list[str] = []  # noqa: RUF012 - of all its instances

    def __init__(self, *, text: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.text = text

    def notify(self, context: Any) -> None:
        self.texts.append(self.text)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(Told, "texts", texts)
    monkeypatch.setattr("airflow_mdbackup.alerts.senders.find_class", {"tests.Told": Told}.__getitem__)
    return texts


@pytest.mark.parametrize(
    ("also", "outcomes", "said"),
    [
        ([], {"vanished": 1}, False),
        (["warning"], {"pulled": 9}, False),
        (["warning"], {"pulled": 9, "changed": 2}, True),
        (["success"], {}, True),
    ],
)
def test_a_good_run_is_reported_only_to_those_who_asked(
    tmp_path: Path, told: list[str], also: list[str], outcomes: dict[str, int], said: bool
) -> None:
    """`also: [warning]` or `also: [success]`."""
    rule = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.headline }}"}, "also": also}

    class Task:
        task_id, dag_id, run_id = "commit_backup", "mdbackup_web", "r"

        def xcom_pull(self, task_ids: str) -> Any:
            return {"outcomes": outcomes, "summary": "9 new"}

    RunCallbacks(provider(tmp_path, rule)).alert_good_run({"ti": Task()})
    assert bool(told) == said
    assert not said or ("WARNINGS: 2 changed" in told[0]) == bool(outcomes)


def test_templates_of_a_notifier_see_the_alert_and_what_is_in_the_alert_is_no_template(
    told: list[str],
) -> None:
    """A file called `{{ ... }}` runs nothing; the arguments stay as the configuration has them."""
    rule = AlertRule(notifier="tests.Told", arguments={"text": "{{ alert.text }}"})
    for name in ("one", "two"):
        senders.send(rule, "failure", Alert("web", "failure", f"{name} {HOSTILE}"), {})
    assert [text.splitlines()[0] for text in told] == [f"web: one {HOSTILE}", f"web: two {HOSTILE}"]


def test_a_run_that_airflow_knows_nothing_about_is_reported(tmp_path: Path, told: list[str]) -> None:
    """A short message is better than none."""
    rule = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.text }}"}}
    RunCallbacks(provider(tmp_path, rule)).alert_failed_run({"run_id": "r1"})
    assert len(told) == 1 and "web: backup FAILED" in told[0] and "r1" in told[0]


def test_a_task_on_its_own_reports_its_own_failure(tmp_path: Path, told: list[str]) -> None:
    """With its exception; a killed task has none."""
    rule = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.text }}"}}

    class Task:
        task_id, dag_id, run_id, map_index, log_url = "look", "watch", "r", 0, "https://airflow/log"

    (callback,) = failure_callbacks(provider(tmp_path, rule))["on_failure_callback"]
    callback({"ti": Task(), "exception": RuntimeError("web is stale")})
    callback({"ti": Task()})
    assert "web: web is stale" in told[0] and "look, shard 0" in told[0] and "https://airflow/log" in told[0]
    assert message.KILLED in told[1]


def test_a_failed_verification_is_reported_as_such_and_not_by_pings(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not a failed backup; the state of its check stays."""
    rule = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.event }} {{ alert.text }}"}}
    failure = Failure("verify_mirror", "files of the backup are damaged", "rotten: /x", "https://airflow/log")
    monkeypatch.setattr(context, "_failed_tasks", lambda context: [("verify_mirror", -1)])
    monkeypatch.setattr(context, "_read_failure", lambda *where: failure)
    with web_server(200) as (url, paths):
        teller = RunCallbacks(provider(tmp_path, {"ping_url": url}, rule))
        dag = verify_dags(tmp_path / "providers.yaml")["mdbackup_verify_web"]
        teller.alert_failed_verification({"dag": dag, "run_id": "r1"})
        teller.alert_failed_verification({"run_id": "r2"})  # Airflow knows nothing of it
    assert paths == [] and "NOT sent" not in caplog.text
    assert told[0].startswith("verification web: verification FAILED: files of the backup are damaged\n")
    assert "rotten: /x" in told[0] and "https://airflow/log" in told[0] and "good backup" not in told[0]
    assert told[1].startswith("verification web: verification FAILED\n") and "r2" in told[1]
    (task,) = dag.tasks
    assert [each.__name__ for each in task.on_failure_callback] == ["note_failure"]
    assert dag.has_on_failure_callback and not dag.has_on_success_callback and not task.on_execute_callback


def test_a_run_refused_for_a_misspelt_parameter_is_reported_as_such_and_not_by_pings(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its start, whose end a check would wait for, nor its failure: a typo is not a failed backup."""
    rule = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.subject }}"}}
    failure = Failure("diff_indexes", message.BAD_PARAMETER, "did you mean dry_run?", "https://airflow/log")
    monkeypatch.setattr(context, "_failed_tasks", lambda context: [("diff_indexes", -1)])
    monkeypatch.setattr(context, "_read_failure", lambda *where: failure)
    monkeypatch.setattr(context, "store_last_good", lambda *where: None)
    with web_server(200) as (url, paths):
        one = provider(tmp_path, {"ping_url": url}, rule)
        dag = provider_dag(one)
        for conf in ({"dryrun": True}, {}):
            run = {"dag": dag, "run_id": "r1", "dag_run": SimpleNamespace(conf=conf)}
            RunCallbacks(one).note_start(run)
            RunCallbacks(one).alert_failed_run(run)
            assert [path.rpartition("/")[2] for path in paths] == ([] if conf else ["start", "fail"])
    assert told[0] == f"[mdbackup] web: run REFUSED, and nothing was done: {message.BAD_PARAMETER}"


def test_provider_without_alerts_has_no_callbacks(tmp_path: Path) -> None:
    """So that Airflow starts nothing for it."""
    quiet = provider(tmp_path)
    assert failure_callbacks(quiet) == {}
    dag = provider_dag(quiet)
    assert not dag.on_failure_callback
    assert not any(task.on_failure_callback or task.on_execute_callback for task in dag.tasks)


def test_with_alerts_only_the_run_reports_failures(tmp_path: Path) -> None:
    """One alert per run: tasks only store their failures, the first also pings, the last reports success."""
    dag = provider_dag(provider(tmp_path, {"email": "ops@example.org"}))
    assert dag.has_on_failure_callback and not dag.has_on_success_callback
    for task in dag.tasks:
        (callback,) = task.on_failure_callback
        assert callback.__name__ == "note_failure"
    assert [task.task_id for task in dag.tasks if task.on_execute_callback] == ["fetch_index"]
    assert [task.task_id for task in dag.tasks if task.on_success_callback] == ["commit_backup"]


# --- pings ------------------------------------------------------------------------------------------


@contextmanager
def web_server(status: int) -> Iterator[tuple[str, list[str]]]:
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret", paths
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("event", "path"),
    [("start", "/secret/start"), ("success", "/secret"), ("failure", "/secret/fail")],
)
def test_ping_says_which_event_it_is_by_its_path(event: str, path: str) -> None:
    """As healthchecks.io expects it."""
    with web_server(200) as (url, paths):
        senders.send(AlertRule(ping_url=url), event, None, {})
    assert paths == [path]


@pytest.mark.parametrize("status", [404, 500, 302])
def test_ping_that_is_refused_is_logged_without_its_url(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And raises nothing, and follows no redirection."""
    with web_server(status) as (url, paths), caplog.at_level(logging.DEBUG, "airflow_mdbackup"):
        senders.send(AlertRule(ping_url=url), "success", None, {})
    assert paths == ["/secret"]
    assert "was NOT sent by ping_url at 127.0.0.1" in caplog.text and str(status) in caplog.text
    assert "secret" not in caplog.text


def test_a_ping_without_an_answer_times_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A backup does not wait for it."""
    assert senders.PING_TIMEOUT == 10
    monkeypatch.setattr(senders, "PING_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        senders.send(AlertRule(ping_url=f"http://127.0.0.1:{silent.getsockname()[1]}/x"), "start", None, {})
    assert "ReadTimeout" in caplog.text


# --- trying it --------------------------------------------------------------------------------------


@pytest.fixture
def try_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs `mdbackup test-alert` for a provider with some alerts, and returns its status."""

    def run(alerts: Any, *options: str) -> int:
        read(tmp_path, alerts)
        monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))
        return main(["test-alert", "web", *options])

    return run


@pytest.mark.parametrize(("options", "path"), [((), "/secret/log"), (("--fail",), "/secret/fail")])
def test_alerts_are_tried_with_a_message_that_is_marked_as_a_test(
    try_alerts: Callable[..., int],
    told: list[str],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    path: str,
) -> None:
    """A ping does not change the state of its check, unless asked to."""
    notifier = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.event }}: {{ alert.text }}"}}
    with web_server(200) as (url, paths):
        assert try_alerts([{"ping_url": url}, notifier], *options) == 0
    assert paths == [path]
    assert "test: web: TEST of the alerts; nothing is wrong" in told[0] and socket.gethostname() in told[0]
    said = capsys.readouterr()
    assert said.out.splitlines() == ["ping_url at 127.0.0.1: accepted", "tests.Told: accepted"]
    assert "secret" not in said.out + said.err


def test_a_channel_that_rejects_the_test_is_reported_and_the_others_are_tried(
    try_alerts: Callable[..., int],
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 1, whichever it was; one that does not answer times out as in a real alert."""
    monkeypatch.setattr(senders, "SEND_TIMEOUT", 1.0)
    good = {"notifier": "tests.Told", "arguments": {"text": "{{ alert.text }}"}}
    bad = {"notifier": "tests.Told", "arguments": {"text": "{{ ti.task_id }}"}}
    with web_server(404) as (url, _), socket.create_server(("127.0.0.1", 0)) as silent:
        never = f"http://127.0.0.1:{silent.getsockname()[1]}/secret"
        assert try_alerts([{"ping_url": url}, {"ping_url": never}, bad, good]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "ping_url at 127.0.0.1: REJECTED: RuntimeError: the service answered 404 Not Found",
        "ping_url at 127.0.0.1: REJECTED: TimeoutError: it took longer than 1 s",
        "tests.Told: REJECTED: UndefinedError: 'ti' is undefined",
        "tests.Told: accepted",
    ]
    assert len(told) == 1 and "secret" not in said.out + said.err


def test_provider_without_alerts_has_none_to_try(
    try_alerts: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says so, rather than that all accepted it."""
    assert try_alerts([]) == 2
    assert (
        "the provider web has no `alerts`, so its failures are not reported to anybody"
        in capsys.readouterr().err
    )


# --- the configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alerts", "key", "said"),
    [
        ([{}], "alerts", "exactly one of `email`, `notifier` and `ping_url`"),
        ([{"email": "a@b", "ping_url": "https://x/y"}], "alerts", "exactly one of"),
        ([{"email": "ops"}], "alerts.email", "'ops' is not an e-mail address"),
        ([{"email": "a@b.org\nBcc: c@d.org"}], "alerts.email", "is not an e-mail address"),
        ([{"email": []}], "alerts.email", "must not be empty: write for example `email: ops@example.org`"),
        ([{"mail": "a@b"}], "alerts.mail", "did you mean `email`?"),
        ([{"notifier": "Slack"}], "alerts.notifier", "is not the dotted path of a class"),
        ([{"email": "a@b", "arguments": {}}], "alerts", "`arguments` belongs to `notifier`, not to `email`"),
        ([{"email": "a@b", "also": ["failure"]}], "alerts.also", "must be 'warning' or 'success'"),
        ([{"ping_url": "https://x/y", "also": ["success"]}], "alerts", "`also` is not for `ping_url`"),
        ({"email": "a@b"}, "alerts", "must be a list, but is a mapping: write for example `alerts: [{"),
    ],
)
def test_alert_that_does_not_fit_is_refused_with_what_to_write(
    tmp_path: Path, alerts: Any, key: str, said: str
) -> None:
    """Where, what, and what instead."""
    problems = read(tmp_path, alerts).problems
    assert [problem.key for problem in problems] == [key], problems
    assert said in problems[0].message, problems[0].message


@pytest.mark.parametrize(
    "url",
    [
        "hc-ping.com/secret",
        "https://x/secret?a=b",
        "ftp://x/secret",
        "https:///secret",
        "https://x:99999/secret",
    ],
)
def test_wrong_ping_url_is_refused_without_being_shown(tmp_path: Path, url: str) -> None:
    """Whoever has the URL can report that all is well."""
    (problem,) = read(tmp_path, [{"ping_url": url}]).problems
    assert problem.key == "alerts.ping_url" and "is not the URL of a check" in problem.message
    assert "secret" not in str(problem)
    assert "secret" not in repr(provider(tmp_path, {"ping_url": "https://x/secret"}))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"notifier": "nowhere.Slack"}, "`nowhere.Slack` cannot be imported"),
        ({"notifier": "logging.Nothing"}, "`logging.Nothing` cannot be used (AttributeError"),
        ({"notifier": "fractions.Fraction", "arguments": {"colour": "red"}}, "or its `arguments`"),
        ({"notifier": "fractions.Fraction", "arguments": {"numerator": 1}}, None),
        ({"email": "ops@example.org"}, None),
        ({"ping_url": "https://x/y"}, None),
    ],
)
def test_notifier_that_cannot_be_made_is_a_problem_that_refuses_nobody(
    tmp_path: Path, rule: dict[str, Any], said: str | None
) -> None:
    """It is found when the configuration is read, not when an alert is needed; backups continue."""
    configuration = read(tmp_path, [rule])
    assert configuration.providers and not configuration.problems
    problems = unusable(configuration, tmp_path / "providers.yaml")
    assert (said is None) == (not problems)
    if said:
        assert said in str(problems[0]) and "provider `web`: `alerts`" in str(problems[0])


def test_examples_of_the_page_and_of_each_key_are_valid(tmp_path: Path) -> None:
    """What people copy works."""
    page = (Path(__file__).parents[3] / "docs" / "alerts.md").read_text()
    blocks = [
        yaml.safe_load(textwrap.dedent(block)) for block in re.findall(r"```yaml\n(.*?)```", page, re.S)
    ]
    assert len(blocks) == 4
    for block in blocks:
        block = block.get("defaults", block) if isinstance(block, dict) else {"alerts": block}
        assert provider(tmp_path, *block["alerts"]).alerts
    for name, field in AlertRule.model_fields.items():
        assert field.description and field.examples, name
        base = {"sender": "email", "smtp_conn_id": "email", "arguments": "notifier", "also": "email"}.get(
            name
        )
        rule = {base: (AlertRule.model_fields[base].examples or [])[0]} if base else {}
        for example in field.examples:
            assert provider(tmp_path, {**rule, name: example}).alerts, (name, example)
