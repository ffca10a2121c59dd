"""Names and words of a provider that attacks: nothing acts on who gets to see them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.definitions._internal.mixins import ResolveMixin

from airflow_mdbackup.config import load
from airflow_mdbackup.dags.backup import provider_dags
from airflow_mdbackup.operators.approve_changes import ApproveChanges
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.backup.diff import make_plan
from airflow_mdbackup.scheme.backup.plan import Limits, PlanOptions
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import BackupError
from airflow_mdbackup.scheme.index.canonical import escape
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.hostile.attack import NAMES, is_harmless, write_index
from tests.guarantees.transport.channels import PERMISSION_DENIED, ScriptedServer, status
from tests.guarantees.whatever_happens.soundness import digest
from tests.pair import Pair
from tests.torture import Cases

pytestmark = pytest.mark.guarantee("7. Hostile provider")


WORDS = b"::endgroup:: \x1b[2J\x1b]0;owned\x07\x9b31m\r\n"
WORDS += "\u202e\u0085\u200b".encode() + b"<b>{{ 7*78901 }}</b>\0"


def said_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    formatter = logging.Formatter()
    traces = [formatter.formatException(r.exc_info) for r in caplog.records if r.exc_info]
    return [record.getMessage() for record in caplog.records] + [
        line for t in traces for line in t.split("\n")
    ]


class Rude(ScriptedServer):
    """Denies, loses, fails and spoils files by the number in their name, with words that act on terminals."""

    def on_open(self, number: int, body: bytes) -> bytes:
        kind = body[-9:-8]
        if kind in b"0123":
            return status(number, {b"0": 2, b"1": PERMISSION_DENIED, b"2": 4, b"3": 77}[kind], WORDS)
        return super().on_open(number, body)

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        return (
            status(number, 4, WORDS)
            if content == b"unreadable"
            else super().read(number, content, offset, length)
        )


def test_nothing_that_a_provider_says_reaches_a_log_or_a_person_as_it_is(
    pair: Pair, caplog: pytest.LogCaptureFixture, cases: Cases
) -> None:
    """A whole failing run with hostile names and words: logs, errors, summaries, plans, records, status."""
    caplog.set_level(logging.DEBUG)
    names = [b"/rude/" + name + b"%d" % kind for kind in range(6) for name in NAMES if len(name) < 250]
    files = {name: b"unreadable" if name.endswith(b"4") else b"other bytes" for name in names}
    entries = {name: digest(name) for name in names}
    remarks = b"".join(
        b"# mdbackup %s /remark/%s\n" % (kind, escape(name))
        for kind in (b"unreadable", b"rotten")
        for name in sorted(NAMES)
    )
    write_index(pair, entries, remarks)
    run = pair.new_run()
    pair.fetch(run)
    plan = make_plan(pair.mirror, run, PlanOptions(source=[b"/rude"]))
    summary = pull(pair.mirror, run, 0, lambda: Reader(Rude(files)))
    pair.archive(run)
    committed = commit(pair.mirror, run)
    with pytest.raises(BackupError) as caught:
        committed.raise_for_failures("srv1")
    assert committed.failed > 200 and committed.outcomes["denied"] and committed.outcomes["vanished"]
    assert summary.outcomes.items() <= committed.outcomes.items()
    # A second one, over which the guard trips.
    write_index(pair, {}, b"# mdbackup unreadable /%s\n" % escape(NAMES[32]))
    second = pair.new_run()
    pair.fetch(second)
    with pytest.raises(BackupError) as tripped:
        make_plan(pair.mirror, second, PlanOptions(source=[b"/rude"]))
    told = [str(caught.value), str(tripped.value), *said_by(caplog)]
    told += [str(value) for value in (asdict(plan), asdict(summary), asdict(committed))]
    for file in [pair.mirror.status, *pair.mirror.history.iterdir(), *run.folder.glob("*.json*")]:
        told += file.read_text().splitlines()
    assert len(told) > 500
    bad = [text for text in told if not is_harmless(text)]
    assert not bad
    cases.add(len(told))


def test_nothing_that_the_index_account_says_reaches_a_log_as_it_is(
    caplog: pytest.LogCaptureFixture, cases: Cases
) -> None:
    """Greetings, reports of every kind and things that only look like them."""
    caplog.set_level(logging.DEBUG)
    log = logging.getLogger("hostile")
    request = IndexRequest(b"/", (b"/backups",), b"/i", id="1")
    kinds = [
        b"ready",
        b"waiting",
        b"joined",
        b"note",
        b"error",
        b"unreadable",
        b"rotten",
        b"progress",
        b"done",
    ]
    said = [WORDS, b"mdbackup " + WORDS]
    for kind in kinds:
        said += [b"mdbackup %s %s" % (kind, words) for words in (WORDS, b"/" + WORDS, b"/a: " + WORDS)]
        said += [b"mdbackup %s /%s: x" % (kind, name) for name in NAMES]
        said += [b"mdbackup %s /\\x1b[31m: \\x1b" % kind, b"mdbackup %s files=%s" % (kind, b"9" * 5000)]
    conversation = None
    for words in said:
        with cases.one():
            conversation = Conversation(request, "connection web_index", log)
            conversation.receive(words + b"\n")
            conversation.is_over(1)
            try:
                conversation.result()
            except BackupError as error:
                assert is_harmless(str(error))
    assert len(caplog.records) > 200
    assert all(is_harmless(record.getMessage()) for record in caplog.records)


def test_neither_markdown_nor_a_template_acts_on_names_that_a_person_is_asked_about(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, cases: Cases
) -> None:
    """The reasons of the guard are indented text to Markdown, and no template when the task gets them."""
    for number in range(120):
        pair.put(b"dir/%03d" % number, b"x")
    for name in NAMES:
        pair.put(b"dir/" + name, name)
    pair.backup()
    dag = provider_dags(_configuration(pair.a.parent, "on_guard: approve"))["mdbackup_web"]
    task = dag.get_task("approve")
    assert isinstance(task, ApproveChanges)
    shown: list[str] = []
    monkeypatch.setattr(ApproveChanges.__mro__[1], "execute", lambda self, context: shown.append(self.body))
    for name in NAMES:
        with cases.one():
            for other in NAMES:
                pair.put(b"dir/" + other, other)
            os.unlink(pair.path(b"dir/" + name))
            pair.build_index()
            run = pair.new_run()
            pair.fetch(run)
            reasons = pair.diff(run, limits=Limits(0.0), may_trip=True).guard
            asked = ApproveChanges(task_id="a", subject="s", reasons=Pushed(reasons))
            asked.render_template_fields({"ti": None})  # type: ignore[arg-type]
            asked.execute({})  # type: ignore[arg-type]
            text, _, choice = shown.pop().partition("\n\n")
            assert choice.startswith("**Approve**")
            assert all(line.startswith("    ") and is_harmless(line) for line in text.split("\n"))
            assert text.count("\n") + 1 == len(reasons)
            assert "552307" not in text, "a template in a name was filled in"


def _configuration(folder: Path, keys: str) -> Path:
    path = folder / "providers.yaml"
    path.write_text(f"providers: {{web: {{sftp_conn_id: a, source: /backups, dest: {folder}/dest, {keys}}}}}")
    return path


class Pushed(ResolveMixin):
    """What a task pushed, as the XCom argument of another."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def iter_references(self) -> Iterator[tuple[Any, str]]:
        return iter(())

    def resolve(self, context: Any) -> Any:
        return self.value


def test_what_the_configuration_names_is_shown_as_it_is(tmp_path: Path, cases: Cases) -> None:
    """On the page of a DAG: in code spans that no backtick ends, on one line."""
    names = [name.decode() for name in NAMES if is_utf8(name) and b"{" not in name]
    for name in names:
        with cases.one():
            source = json.dumps(f"/`x`/{name}")
            page = _configuration(tmp_path, f"index: {source}")
            doc = provider_dags(page)["mdbackup_web"].doc_md
            (row,) = [line for line in str(doc).split("\n") if line.startswith("| index |")]
            assert is_harmless(row)
            assert re.search(r"\| (`+) /`x`/.* \1, built by", row), row


@pytest.mark.parametrize("begin", ["{{", "{%", "{#"])
def test_a_path_that_airflow_would_take_for_a_template_is_refused(
    tmp_path: Path, cases: Cases, begin: str
) -> None:
    """It would be another path, or the outcome of an expression, by the time that a task runs."""
    for keys in (f"index: '/x/{begin} 7*78901'", f"exclude: ['{begin} 7*78901']"):
        with cases.one():
            (problems,) = load(_configuration(tmp_path, keys)).refused.values()
            assert "a template" in str(problems[0])


def is_utf8(name: bytes) -> bool:
    return name.decode("utf-8", "replace").encode() == name
