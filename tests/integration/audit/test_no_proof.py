"""Accounts of which an audit can tell nothing: what is no proof, and what is one all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_mdbackup.account.connection import Account, Unanswered
from demo.sshd import _namespaces_allowed
from tests.integration.audit.loose_server import STAND_IN, Audited, SetConnection, SetUp, serving
from tests.integration.audit.test_loosened import CHANGES, ESCAPES, SEEING, backupop, index

pytestmark = pytest.mark.skipif(
    not _namespaces_allowed(),
    reason="needs root and namespaces: accounts and a chroot as the design has them",
)


def test_command_that_never_answers_is_no_proof(audited: Callable[[SetUp], Audited]) -> None:
    """Nor does it keep the audit for ever; what it is told might run in the end."""
    audit = audited(SetUp(stand_in="#!/bin/sh\nexec sleep 60\n"))
    expected = index("only its forced command", "arguments ignored", "no shell", "no subsystem")
    assert (audit.of("unknown"), audit.of("looser")) == (expected, set())
    assert audit.status == 1
    assert audit.seconds < 40


def test_command_that_takes_programs_is_told_as_such(audited: Callable[[SetUp], Audited]) -> None:
    """It is no shell, and yet B could run anything."""
    audit = audited(SetUp(stand_in='#!/bin/sh\necho "mdbackup ready program"\nread -r size\n'))
    assert audit.seen("index account", "only its forced command") == "it runs any program that is sent to it"


def test_server_that_allows_one_session_at_a_time_is_judged_as_well(
    audited: Callable[[SetUp], Audited],
) -> None:
    """The server needs a moment to be rid of the session before."""
    assert audited(SetUp({"MaxSessions": "1"}, index={"MaxSessions": "1"})).status == 0


def test_command_that_repeats_what_it_is_told_does_not_run_it(audited: Callable[[SetUp], Audited]) -> None:
    """An echo is told from a shell, which would have taken the quotes away."""
    key = 'restrict,command="echo $SSH_ORIGINAL_COMMAND; exec /etc/ssh/stand-in"'
    assert audited(SetUp(index_key=key)).status == 0


def test_connection_that_ends_on_the_way_is_not_taken_for_a_refusal(
    audited: Callable[[SetUp], Audited],
) -> None:
    """Asked for a shell, all processes of the index account end, the server's part of the connection too."""
    end = '[ -n "$SSH_ORIGINAL_COMMAND" ] || kill -9 -1'
    audit = audited(SetUp(stand_in=STAND_IN.replace("#!/bin/sh", f"#!/bin/sh\n{end}")))
    assert (audit.of("unknown"), audit.of("looser")) == (index("no shell", "no subsystem"), set())
    assert audit.seen("index account", "no shell") == "the connection ended"
    assert audit.status == 1


def test_connection_that_breaks_while_something_is_asked_is_no_answer(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where paramiko does not know of it yet, what it raises then is neither a proof nor the audit's end."""

    def broken(_: object) -> None:
        raise EOFError

    def in_a_session(account: Account) -> None:
        with account.session():
            monkeypatch.setattr(account.transport.packetizer, "send_message", broken)

    with serving(SetUp(), tmp_path, set_connection, monkeypatch):
        for ask in (Account.listens, lambda account: account.listens_on_socket(b"/x/y"), in_a_session):
            with Account("index") as account:
                if ask is not in_a_session:
                    monkeypatch.setattr(account.transport.packetizer, "send_message", broken)
                with pytest.raises(Unanswered, match="the connection ended"):
                    ask(account)


def test_account_without_an_indexer_is_no_proof(audited: Callable[[SetUp], Audited]) -> None:
    """It may be closed, but nothing shows that the forced command is ours."""
    audit = audited(SetUp(stand_in="#!/bin/sh\necho This account is not available.\nexit 1\n"))
    assert audit.of("unknown") == index("only its forced command", "arguments ignored", "no shell")
    assert "This account is not available." in audit.seen("index account", "arguments ignored")
    assert audit.status == 1


def test_subsystem_that_does_not_start_leaves_its_checks_unjudged(
    audited: Callable[[SetUp], Audited],
) -> None:
    """Nothing is proven about files that nobody could ask for."""
    audit = audited(SetUp(sftp_extra={"subsystem": "other"}))
    files = {*CHANGES, *ESCAPES, *SEEING}
    assert audit.of("unknown") == backupop(*files)
    assert "does not start the subsystem other" in audit.seen("backup account", "no write")
