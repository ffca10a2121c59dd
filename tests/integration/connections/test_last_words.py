"""The last words over ssh, and who is told to stop."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.hooks.connection import CONNECT
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.hooks.ssh_program import SshChannel
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import ConnectionLost, NotOnProvider
from demo.processes import descendants
from tests.integration.connections.ways import LONG, Place, all_ways, index, set_up, tried
from tests.integration.connections_table import BY_ASYNCSSH, REFUSED, Case
from tests.integration.ssh_servers import Sshd
from tests.waiting import until

# --- the last words over ssh ------------------------------------------------------------------------


class Dropping:
    """Stands before a server, and drops some of the connections, counted from 1."""

    prefix = ""

    def __init__(self, server: Sshd, drops: set[int]) -> None:
        self.backupop, self.index_user = server.backupop, server.index_user
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(server.port, drops), daemon=True).start()

    def _serve(self, port: int, drops: set[int]) -> None:
        for number in itertools.count(1):
            client, _ = self._listener.accept()
            if number in drops:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", port))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(("way", "drops"), [(0, {1, 3}), (1, {2}), (2, {2})])
def test_passing_failure_of_ssh_is_worth_another_try(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: int, drops: set[int]
) -> None:
    """Where asyncssh has no algorithm in common with the server, which is final, and ssh has."""
    server = Dropping(place.server("of sntrup761"), drops)
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    came, words = tried(all_ways(server)[way])
    assert came == "ConnectionLost" and "onnection" in words and "no algorithm" not in words, words


@pytest.mark.parametrize("server", ["usual", "of sntrup761"])
@pytest.mark.parametrize(
    ("command", "output", "statuses"),
    [
        ("echo hi; echo oops >&2; exit 4", b"hi\noops\n", {4}),
        ("exit 4", b"", {4}),
        ("echo hi; kill -9 $$", b"hi\n", {255, None}),
        ("kill -9 $$", b"", {255, None}),
        ("exit 255", b"", {255}),
        ("echo 'bash: Permission denied' >&2; kill -9 $$", b"bash: Permission denied\n", {255, None}),
        ("echo 'proxy: connect to host' >&2; exit 255", b"proxy: connect to host\n", {255}),
        ("exec >&-; head -c 300000 /dev/zero >&2; exit 3", b"", {3}),
    ],
    ids=str,
)
def test_end_of_a_command_is_the_same_over_both(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    command: str,
    output: bytes,
    statuses: set[int | None],
) -> None:
    """Killed or not; and what it writes is not taken for words of ssh."""
    set_up(Case(""), place, place.server(server), tmp_path / "home", monkeypatch)
    with IndexHook("index") as hook, hook.running(command) as session:
        assert isinstance(session, SshChannel) == (server != "usual")
        said = b"".join(iter(lambda: session.recv(65536), b""))
        assert said.strip(b"\0") == output
        assert session.wait(CONNECT) in statuses


def test_index_account_is_tested_over_ssh_as_it_builds(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where asyncssh has no algorithm for the server; and a wrong key is told of."""
    server = place.server("of sntrup761")
    for key, works in (("ed25519", True), ("wrong", False)):
        set_up(Case("", extra={"key_file": f"{{keys}}/{key}"}), place, server, tmp_path / "home", monkeypatch)
        with IndexHook("index") as hook:
            worked, words = hook.test_connection()
        assert worked == works, words
        assert ("logged in" if works else "refuses the account's key") in words


def test_other_host_key_is_told_as_that_where_only_ssh_can_connect(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as a lack of algorithms."""
    case = Case("", extra={"host_key": "{host other}"})
    server = place.server("of sntrup761")
    set_up(case, place, server, tmp_path / "home", monkeypatch)
    for way in all_ways(server):
        came, words = tried(way)
        assert came == REFUSED and "host key is not the expected one" in words


@pytest.mark.parametrize("broken", ["ssh", "cat"])
def test_broken_program_leaves_the_words_of_asyncssh(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Here it is of a bad format."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("ssh", "cat"):
        (programs / name).symlink_to(shutil.which(name) or name)
    (programs / broken).unlink()
    (programs / broken).write_bytes(b"\x7fELF")
    (programs / broken).chmod(0o755)
    server = place.server("of sntrup761")
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    monkeypatch.setenv("PATH", str(programs))
    for way in all_ways(server):
        came, words = tried(way)
        assert came == REFUSED and "no algorithm in common" in words


# --- who is told to stop ----------------------------------------------------------------------------


def request_for(server: Sshd, **how: Any) -> IndexRequest:
    """Return a request to index what there is to index, which is more than is read at once."""
    (server.tree / "backups").mkdir(exist_ok=True)
    (server.tree / "backups" / "large").write_bytes(bytes(30 << 20))
    base = server.prefix.encode()
    chroot = server.chroot.encode() if server.chrooted else b"/"
    return IndexRequest(chroot, (base + b"/backups",), base + b"/.mdbackup/killed.md5", **how)


@pytest.mark.parametrize("name", ["usual", "of sntrup761"])
@pytest.mark.parametrize("moment", ["before", "while connecting", "in the middle"])
def test_killed_build_builds_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    """Over asyncssh or ssh, whenever it is killed."""
    server = place.server(name)
    slow = "Host *\n  ProxyCommand sh -c 'sleep 3; exec {proxy} %h %p'\n"
    case = Case("", config=slow if moment == "while connecting" else None)
    set_up(case, place, server, tmp_path / "home", monkeypatch)
    with IndexHook("index") as hook:
        if moment == "before":
            hook.stop_build()
        elif moment == "while connecting":
            threading.Timer(1, hook.stop_build).start()
        else:
            threading.Thread(target=_stop_in_the_middle, args=[hook], daemon=True).start()
        began = time.monotonic()
        with pytest.raises((ConnectionLost, NotOnProvider)):
            hook.build_index(request_for(server, limit=1))
        assert time.monotonic() - began < CONNECT / 2
    assert not (server.tree / ".mdbackup" / "killed.md5").exists()
    shutil.rmtree(server.tree / "backups")


def _stop_in_the_middle(hook: IndexHook) -> None:
    until(lambda: hook._building is not None and hook._building[1].started, 20)
    time.sleep(1)
    hook.stop_build()


def test_hook_that_was_closed_connects_no_more(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither over ssh nor over asyncssh."""
    server = place.server("usual")
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    for round_trip in (None, LONG):
        with ProviderHook("backup") as hook:
            hook.close()
            with pytest.raises(ConnectionLost, match="closed on this side"):
                hook.reader(round_trip=round_trip)


@pytest.mark.parametrize("proxy", [False, True])
@pytest.mark.parametrize("kind", [ProviderHook, IndexHook])
def test_close_ends_an_attempt_to_connect(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[ProviderHook | IndexHook],
    proxy: bool,
) -> None:
    """To a server that is silent, or through a ProxyCommand that is; which ends, too."""
    case = Case("", config="Host *\n  ProxyCommand sleep 4711\n" if proxy else None)
    set_up(case, place, place.server("nobody"), tmp_path / "home", monkeypatch)
    with kind("backup") as hook:
        threading.Timer(1, hook.close).start()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="closed on this side"):
            hook.connected()
        assert time.monotonic() - began < CONNECT / 2
        until(lambda: not _own_programs("sleep"))
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith("ssh to")])
    assert not caplog.records
    place.server("nobody").was_asked()


def _own_programs(name: str) -> list[int]:
    found = []
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
    return found


def test_connection_through_a_proxy_ends_without_a_warning(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Be it used or refused; and nothing is left of the proxy."""
    for key, expected in (("ed25519", BY_ASYNCSSH), ("wrong", REFUSED)):
        case = Case(
            "", extra={"key_file": f"{{keys}}/{key}"}, config="Host *\n  ProxyCommand {proxy} %h %p\n"
        )
        set_up(case, place, place.server("usual"), tmp_path / "home", monkeypatch)
        assert tried(index)[0] == expected
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith("ssh to")])
    assert "is closed" not in caplog.text
