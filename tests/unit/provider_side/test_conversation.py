"""The conversation with an indexer, without a connection; the provider is hostile, or its shell chats."""

from __future__ import annotations

import logging
import time

import pytest

from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.provider_side.programs import (
    NO_PYTHON,
    python_command,
    python_input,
    shell_command,
    shell_input,
)
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest, read_request, request_line
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider

REQUEST = IndexRequest(
    b"/home/\xff",
    (b"/a b", b"/\xe4"),
    b"/.mdbackup/index.md5",
    id="run 1",
    exclude=("*.tmp", "ä"),
    rehash=1.5,
)
DONE = b"mdbackup done files=3 bytes=4 hashed=2 unreadable=1 rotten=0 seconds=5.0\n"


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(REQUEST, "connection index", logging.getLogger("test"))


def test_request_survives_the_database() -> None:
    assert read_request(request_line(REQUEST).decode()) == REQUEST


def test_shell_account_gets_the_program_and_a_forced_command_the_request_only() -> None:
    for wants, answer in ((b"program", python_input(REQUEST)), (b"request", request_line(REQUEST))):
        conversation = Conversation(REQUEST, "connection index", logging.getLogger("test"))
        assert (conversation.command, conversation.opening) == (python_command(), b"")
        assert not conversation.started
        assert conversation.receive(b"Welcome to A!\r\nmdbackup ready ") == b""
        assert conversation.receive(wants + b"\r\n") == answer and conversation.started
        conversation.receive(DONE)
        assert conversation.is_over(3)
        assert conversation.result() == Done(3, 4, 2, 1, 0, 5.0)


def test_greeting_need_not_end_its_line(conversation: Conversation) -> None:
    """A login shell may print a prompt or a word of welcome without a line end."""
    assert conversation.receive(b"Welcome to A! mdbackup ready request\n") == request_line(REQUEST)


def test_time_runs_out_unless_an_indexer_reports_something(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute for the first line of an indexer, greetings do not count; three between two of them."""
    now = 1000.0
    monkeypatch.setattr("airflow_mdbackup.provider_side.conversation.time.monotonic", lambda: now)
    conversation.restart_timer()
    now += 59
    conversation.receive(b"hello\nmdbackup note not yet\n")
    assert conversation.seconds_left() == 1
    now += 1
    with pytest.raises(ConnectionLost, match="connection index: no indexer answers"):
        conversation.seconds_left()
    conversation.receive(b"mdbackup ready request\n")
    for word in (b"waiting x", b"joined x", b"note x", b"progress files=1 bytes=2 hashed=3 seconds=4"):
        now += 179
        conversation.receive(b"mdbackup " + word + b"\nhello\n")
        assert conversation.seconds_left() == 180
    now += 180
    conversation.receive(b"hello\n")
    with pytest.raises(ConnectionLost, match="connection index: no output"):
        conversation.seconds_left()
    assert conversation.progress == (1, 2)


def test_request_is_made_once_however_often_it_is_asked_for(conversation: Conversation) -> None:
    ready = b"mdbackup ready request\n"
    assert conversation.receive(ready * 3) == request_line(REQUEST)
    assert conversation.receive(b"mdbackup ready program\n") == b""


def test_without_python_the_shell_is_tried_once(conversation: Conversation) -> None:
    assert not conversation.is_over(NO_PYTHON)
    assert (conversation.command, conversation.opening) == (shell_command(), shell_input(REQUEST))
    assert conversation.is_over(NO_PYTHON)
    with pytest.raises(AccessRefused, match=r"did not run the indexer \(exit status 127\): no output"):
        conversation.result()


def test_report_is_read_byte_by_byte_and_without_its_last_line_end(
    conversation: Conversation,
) -> None:
    for byte in b"mdbackup ready request\n" + DONE[:-1]:
        conversation.receive(bytes([byte]))
    assert conversation.is_over(3)
    assert conversation.result().files == 3


def test_line_without_end_takes_no_memory(conversation: Conversation) -> None:
    for _ in range(100):
        assert conversation.receive(b"x" * 65536) == b""
    assert len(conversation._incomplete) <= 8192


def test_output_of_the_provider_is_made_printable_and_shown_in_part(
    conversation: Conversation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    conversation.receive(b"\x1b]0;owned\x07\n" * 1000)
    conversation.receive(b"mdbackup unreadable /\\x1b[2J: no\n" * 1000)
    assert 0 < len(caplog.messages) <= 100
    assert all(message.isprintable() for message in caplog.messages)
    conversation.is_over(1)
    with pytest.raises(AccessRefused, match="owned") as raised:
        conversation.result()
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.parametrize("word", ["note", "waiting", "joined"])
def test_provider_that_never_stops_reporting_does_not_fill_the_log(
    conversation: Conversation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Who waits for hours is seen all the same: then these lines are far apart."""
    caplog.set_level(logging.INFO)
    conversation.receive(b"mdbackup ready request\n")
    conversation.receive(f"mdbackup {word} {'x' * 60_000}\n".encode() * 200)
    assert 0 < len(caplog.messages) <= 40
    assert max(map(len, caplog.messages)) < 10_000
    caplog.clear()
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    conversation.receive(f"mdbackup {word} still\n".encode())
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "flood",
    [
        *(b"\n", b"\r\n", b"x\n", b"mdbackup\n", b"mdbackup note x\n", b"mdbackup unreadable /a: b\n"),
        *(
            b"mdbackup ready request\n",
            b"mdbackup progress files=1 bytes=1 hashed=1 seconds=1\n",
            b"\0" * 8192,
        ),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_output_that_never_ends_is_not_looked_at(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, flood: bytes, begun: bool
) -> None:
    """Not even if progress in between resets the timer."""
    looked_at = 0

    def answer(line: bytes) -> bytes:
        nonlocal looked_at
        looked_at += 1
        return understood(line)

    understood = conversation._answer
    monkeypatch.setattr(conversation, "_answer", answer)
    progress = b"mdbackup progress files=1 bytes=1 hashed=1 seconds=1\n"
    if begun:
        conversation.receive(b"mdbackup ready request\n")
    block = progress + flood * (65536 // len(flood))
    for _ in range(300):
        conversation.receive(block)
        conversation.receive(DONE)
    assert looked_at <= 10_100
    words = r"wrote [\d,]+ lines and [\d,]+ bytes, far more than an indexer does"
    with pytest.raises(ConnectionLost, match=f"connection index: .*{words}"):
        conversation.seconds_left()
    assert conversation.receive(b"mdbackup ready request\n") == b""


def test_build_of_many_days_may_write_all_its_lines(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every five seconds, after a long greeting."""
    now = time.monotonic()
    monkeypatch.setattr("airflow_mdbackup.provider_side.conversation.time.monotonic", lambda: now)
    conversation.receive(b"Welcome!\n" * 5000 + b"mdbackup ready request\n")
    for number in range(20_000):
        now += 5
        conversation.receive(b"mdbackup progress files=%d bytes=1 hashed=1 seconds=1\n" % number)
        assert conversation.seconds_left() > 179
    assert conversation.progress == (19_999, 1)


def test_indexer_that_ends_without_a_result_is_worth_a_retry(conversation: Conversation) -> None:
    """It ran, so that nothing is wrong with the account: somebody killed it, or memory was short."""
    conversation.receive(b"mdbackup ready request\nmdbackup progress files=1 bytes=1 hashed=1 seconds=5\n")
    assert conversation.is_over(None)
    with pytest.raises(NotOnProvider, match=r"ended without a result .*: no output\. It may have been"):
        conversation.result()


def test_error_of_the_provider_is_raised_with_what_to_check(conversation: Conversation) -> None:
    conversation.receive(b"mdbackup ready request\nmdbackup error the disk is full.\n")
    assert conversation.is_over(1)
    with pytest.raises(
        NotOnProvider, match=r"was not built: the disk is full\. The old index, if any, is unch"
    ):
        conversation.result()
