"""What an audit does with servers that are odd: nothing that it makes stays there unsaid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.account.backup_account import Files, probe_absolute_paths, probe_create, probe_mkdir
from airflow_mdbackup.account.connection import Unanswered
from airflow_mdbackup.account.findings import Verdict
from airflow_mdbackup.account.probes import Check, run_checks
from airflow_mdbackup.account.sftp_requests import (
    NO_SUCH_FILE,
    OK,
    PERMISSION_DENIED,
    Answer,
    NoSftp,
    Requests,
)


class OddServer:
    """Refuses everything but making things in /backups, and perhaps removing them."""

    def __init__(self, removes: bool) -> None:
        self.removes = removes
        self.there: set[bytes] = set()

    def create(self, path: bytes) -> Answer:
        if not path.startswith(b"/backups/"):
            return Answer(PERMISSION_DENIED)
        self.there.add(path)
        return Answer(OK, b"handle")

    mkdir = create

    def close(self, handle: bytes) -> Answer:
        return Answer(OK)

    def remove(self, path: bytes) -> Answer:
        if not self.removes:
            return Answer(PERMISSION_DENIED)
        self.there.discard(path)
        return Answer(OK)

    rmdir = remove


@pytest.mark.parametrize("probe", [probe_create, probe_mkdir])
def test_what_could_be_made_in_a_place_that_matters_is_removed_again(probe: Any) -> None:
    """A server may refuse what names no directory, and yet write where there is one."""
    server: Any = OddServer(removes=True)
    seen = probe(Files(server, b"/.mdbackup/index.md5", (b"/backups",)))
    assert seen.verdict is Verdict.LOOSER
    assert "worked: /backups/.mdbackup-audit-" in seen.text and seen.text.endswith(", removed again")
    assert server.there == set()


@pytest.mark.parametrize("probe", [probe_create, probe_mkdir])
def test_what_cannot_be_removed_again_is_told_loudly(probe: Any) -> None:
    """With its whole path, since somebody has to remove it by hand."""
    server: Any = OddServer(removes=False)
    seen = probe(Files(server, b"/.mdbackup/index.md5", (b"/backups",)))
    (path,) = server.there
    assert seen.text.endswith(f"worked: {path.decode()}, WHICH IS STILL THERE: please remove it")


class Tree:
    """Answers what lies where, to the requests that are allowed; what is `closed` it may not tell."""

    def __init__(self, *there: bytes, closed: bytes = b"", requests: str = "stat open") -> None:
        self.there, self.closed = there, closed
        self.requests = requests.split()

    def _answer(self, request: str, path: bytes) -> Answer:
        if request not in self.requests or path == self.closed:
            return Answer(PERMISSION_DENIED)
        return Answer(OK if path in self.there else NO_SUCH_FILE)

    def stat(self, path: bytes) -> Answer:
        return self._answer("stat", path)

    def open_to_read(self, path: bytes) -> Answer:
        return self._answer("open", path)


def outside(tree: Tree, source: bytes = b"/backups") -> Verdict:
    requests: Any = tree
    files = Files(requests, b"/.mdbackup/index.md5", (source,))
    (found,) = run_checks("backup account", files, [Check("no escape", probe_absolute_paths, "")])
    return found.verdict


@pytest.mark.parametrize(
    ("source", "there", "verdict"),
    [
        (b"/backups", b"/etc/shadow", Verdict.LOOSER),
        (b"/etc", b"/etc/shadow", Verdict.TIGHT),
        (b"/root/mail", b"/root", Verdict.TIGHT),
        (b"/roots", b"/root", Verdict.LOOSER),
        (b"/", b"/etc/shadow", Verdict.TIGHT),
        (b"/", b"/proc/self", Verdict.LOOSER),
    ],
)
def test_what_is_backed_up_is_not_taken_for_the_machine(
    source: bytes, there: bytes, verdict: Verdict
) -> None:
    """A directory of the machine may be mounted into the chroot; its processes are never."""
    assert outside(Tree(b"/.mdbackup", there), source) is verdict


@pytest.mark.parametrize(
    ("tree", "verdict"),
    [
        (Tree(b"/backups", requests="open"), Verdict.TIGHT),
        (Tree(b"/backups", b"/proc/version", requests="open"), Verdict.LOOSER),
        (Tree(b"/backups", requests=""), Verdict.UNKNOWN),
        (Tree(b"/backups", closed=b"/proc/self"), Verdict.UNKNOWN),
        (Tree(b"/"), Verdict.UNKNOWN),
    ],
    ids=["only open", "only open, and the machine", "neither stat nor open", "refused", "another directory"],
)
def test_only_a_file_that_is_not_there_proves_that_it_cannot_be_reached(tree: Tree, verdict: Verdict) -> None:
    """A refusal says nothing about what is there, nor does a directory in which no backup is."""
    assert outside(tree) is verdict


class Words:
    """A channel that says what it was given, and keeps what it is told."""

    def __init__(self, *said: bytes) -> None:
        self.said = b"".join(said)
        self.told = b""

    def sendall(self, data: bytes, /) -> None:
        self.told += data

    def recv(self, size: int, /) -> bytes:
        data, self.said = self.said[:size], self.said[size:]
        return data


VERSION = b"\0\0\0\5\2\0\0\0\3"


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        (b"", True),
        (b"mdbackup ready request\n", False),
        (b"\0\0\0\5\3\0\0\0\3", False),
        (b"\0\0", False),
    ],
    ids=["nothing", "an indexer", "another packet", "half a length"],
)
def test_what_is_no_sftp_server_is_told_from_one_that_ended(said: bytes, ended: bool) -> None:
    """A subsystem that ends at once gave nothing away; one that speaks did start something."""
    with pytest.raises(NoSftp) as caught:
        Requests(Words(said))
    assert caught.value.ended is ended


def test_server_that_sent_a_malformed_answer_gets_no_further_request() -> None:
    """Later answers could be those to earlier questions."""
    channel = Words(VERSION, b"\0\0\0\x11\x65\0\0\0\7\0\0\0\3\0\0\0\0\0\0\0\0")
    requests = Requests(channel)
    with pytest.raises(Unanswered, match="malformed answer"):
        requests.stat(b"/")
    told = channel.told
    with pytest.raises(Unanswered, match="did not answer an earlier request"):
        requests.stat(b"/")
    assert channel.told == told


def test_weekly_dag_of_the_documentation_can_be_copied() -> None:
    """It is a whole file."""
    page = (Path(__file__).parents[3] / "docs" / "audit.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(
        compile(code.replace("    AuditProvider(", "    task = AuditProvider("), "docs/audit.md", "exec"),
        names,
    )
    assert names["task"].dag.dag_id == "audit_web"
    assert names["task"].ssh_conn_id == "web_index"
