"""What an audit does with servers that are odd: nothing that it makes stays there unsaid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.account.backup_account import Files, absolute_paths, creation, directory_creation
from airflow_mdbackup.account.connection import Unanswered
from airflow_mdbackup.account.findings import Verdict
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


@pytest.mark.parametrize("probe", [creation, directory_creation])
def test_what_could_be_made_in_a_place_that_matters_is_removed_again(probe: Any) -> None:
    """A server may refuse what names no directory, and yet write where there is one."""
    server: Any = OddServer(removes=True)
    seen = probe(Files(server, b"/.mdbackup/index.md5", (b"/backups",)))
    assert seen.verdict is Verdict.LOOSER
    assert "worked: /backups/.mdbackup-audit-" in seen.text and seen.text.endswith(", removed again")
    assert server.there == set()


@pytest.mark.parametrize("probe", [creation, directory_creation])
def test_what_cannot_be_removed_again_is_told_loudly(probe: Any) -> None:
    """With its whole path, since somebody has to remove it by hand."""
    server: Any = OddServer(removes=False)
    seen = probe(Files(server, b"/.mdbackup/index.md5", (b"/backups",)))
    (path,) = server.there
    assert seen.text.endswith(f"worked: {path.decode()}, WHICH IS STILL THERE: please remove it")


class Tree:
    """Answers what lies where."""

    def __init__(self, *there: bytes) -> None:
        self.there = there

    def stat(self, path: bytes) -> Answer:
        return Answer(OK if path in self.there else NO_SUCH_FILE)


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
    tree: Any = Tree(there)
    assert absolute_paths(Files(tree, b"/.mdbackup/index.md5", (source,))).verdict is verdict


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


def test_server_that_spoke_nonsense_is_not_asked_again() -> None:
    """Later answers could be those to earlier questions."""
    channel = Words(VERSION, b"\0\0\0\x11\x65\0\0\0\7\0\0\0\3\0\0\0\0\0\0\0\0")
    requests = Requests(channel)
    with pytest.raises(Unanswered, match="nonsense"):
        requests.stat(b"/")
    told = channel.told
    with pytest.raises(Unanswered, match="before"):
        requests.stat(b"/")
    assert channel.told == told


def test_weekly_dag_of_the_documentation_can_be_copied() -> None:
    """It is a whole file."""
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(
        compile(code.replace("    AuditProvider(", "    task = AuditProvider("), "docs/audit.md", "exec"),
        names,
    )
    assert names["task"].dag.dag_id == "audit_web"
    assert names["task"].ssh_conn_id == "web_index"
