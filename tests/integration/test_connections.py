"""Connections of every kind, against real servers: each works over all ways, or is refused with the cure."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest
from airflow.sdk.exceptions import TaskDeferred
from asyncssh.mac import get_mac_algs

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.hooks.connection import CONNECT
from airflow_mdbackup.hooks.failures import NoCommonAlgorithm
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook, account
from airflow_mdbackup.hooks.ssh_program import SshChannel
from airflow_mdbackup.operators.build_provider_index import BuildProviderIndex
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger
from demo.processes import descendants
from tests.integration.connections_table import (
    BY_ASYNCSSH,
    BY_SSH,
    CASES,
    COMMAND,
    REFUSED,
    Case,
    in_page,
    table,
)
from tests.integration.ssh_servers import CONTENT, AsyncsshServer, Dropbear, Keys, Names, ProFtpd, Sshd
from tests.waiting import until

Way = Callable[[], str]
LONG = 60.0  # seconds of a round trip
SETTINGS = {
    "usual": (),
    "of chacha20": ("Ciphers chacha20-poly1305@openssh.com",),
    "of umac": ("Ciphers aes128-ctr,aes256-ctr", "MACs umac-128-etm@openssh.com,umac-64@openssh.com"),
    "of curve25519": ("KexAlgorithms curve25519-sha256",),
    "of sntrup761": ("KexAlgorithms sntrup761x25519-sha512@openssh.com",),
}
PROXY = """
import os, socket, sys, threading
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while data := os.read(0, 65536):
        there.sendall(data)
threading.Thread(target=up, daemon=True).start()
while data := there.recv(65536):
    os.write(1, data)
"""


class Nobody:
    """A port at which a connection is noticed, and not answered."""

    backupop, index_user, prefix = "backupop", "mdbackup-index", ""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]

    def was_asked(self) -> bool:
        try:
            self._listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True


class Place:
    """The keys, and the servers, each of which is started when it is asked for first."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.keys = Keys(folder)
        self._servers: dict[str, Any] = {"nobody": Nobody()}
        (folder / "proxy.py").write_text(PROXY)
        self.proxy = f"{sys.executable} -I -S {folder / 'proxy.py'}"

    def server(self, name: str) -> Any:
        if name not in self._servers:
            folder = self.folder / name.replace(" ", "-")
            server = (
                AsyncsshServer(folder, self.keys)
                if name == "of passwords"
                else Sshd(folder, self.keys, *SETTINGS[name])
            )
            self._servers[name] = self._stack.enter_context(server)
        return self._servers[name]

    def started(self, name: str, *settings: str, **more: Any) -> Sshd:
        """Return an sshd with settings of its own."""
        server: Sshd = self._stack.enter_context(Sshd(self.folder / name, self.keys, *settings, **more))
        return server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path_factory.mktemp("connections"), stack)


def set_up(case: Case, place: Place, server: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the home and the two connections of a case."""
    names = Names(place.keys, server.port, proxy=place.proxy, jumper=server.index_user, home=str(home))

    def filled(value: Any) -> Any:
        return value.format_map(names) if isinstance(value, str) else value

    shutil.rmtree(home, ignore_errors=True)
    (home / ".ssh").mkdir(parents=True)
    shutil.copy(place.keys.folder / "ed25519", home / ".ssh" / "id_ed25519")
    shutil.copy(place.keys.folder / "ed25519", home / "my key")
    (home / "port").write_text(filled("Port {port}\n"))
    (home / "revoked").write_text(filled("{host ed25519}\n"))
    (home / "jump").write_text(filled("[127.0.0.1]:{port} {host ed25519}\n"))
    (home / "other hosts").write_text(filled("[127.0.0.1]:{port} {host ed25519}\n"))
    if case.known_hosts is not None:
        (home / ".ssh" / "known_hosts").write_bytes(filled(case.known_hosts).encode("latin-1"))
    if case.config is not None:
        (home / ".ssh" / "config").write_bytes(filled(case.config).encode("latin-1"))
    monkeypatch.setenv("HOME", str(home))
    extra = {"key_file": "{keys}/ed25519"}
    extra |= {} if case.known_hosts is not None else {"host_key": "{host ed25519}"}
    extra = {name: filled(value) for name, value in (extra | dict(case.extra)).items() if value is not None}
    for conn_id, kind, login in (("backup", "sftp", server.backupop), ("index", "ssh", server.index_user)):
        fields = {"conn_type": kind, "host": "127.0.0.1", "port": server.port, "login": login, "extra": extra}
        fields |= {name: filled(value) for name, value in case.fields.items()}
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))


# --- the ways ---------------------------------------------------------------------------------------


def read(reader: Reader, path: bytes) -> bytes | None:
    """Read one file."""
    parts: list[bytes] = []

    def sink(_: Attributes) -> Stream:
        return Stream(lambda data: parts.append(bytes(data)))

    reader.submit(Wanted(path, None, sink))
    (fetched,) = reader.wait()
    assert isinstance(fetched, Fetched) and fetched.refusal is None, fetched
    return fetched.content if fetched.content is not None else b"".join(parts)


def backup(server: Any, round_trip: float | None) -> str:
    """Read a file, and return over what."""
    with ProviderHook("backup") as hook:
        reader = hook.reader(round_trip=round_trip)
        assert read(reader, f"{server.prefix}/file".encode()) == CONTENT
        return over(reader)


def over(reader: Reader) -> str:
    return BY_SSH if isinstance(reader.stream.channel, SshChannel) else BY_ASYNCSSH


def index() -> str:
    """Run a command, as a build that is not deferred does."""
    with IndexHook("index") as hook, hook.running("echo built") as session:
        said = b"".join(iter(lambda: session.recv(1000), b""))
        assert said == b"built\n"
        return BY_SSH if isinstance(session, SshChannel) else BY_ASYNCSSH


def deferred() -> str:
    """Run a command over the connection of the trigger, or as the task does where that has no way."""

    async def run() -> object:
        trigger = BuildProviderIndexTrigger("index", "{}")
        try:
            await trigger._connect()
            assert trigger._connection is not None
            return (await trigger._connection.run("echo built")).stdout
        finally:
            await trigger.cleanup()

    try:
        assert asyncio.run(run()) == "built\n"
    except NoCommonAlgorithm:
        return index()
    return BY_ASYNCSSH


def all_ways(server: Any) -> list[Way]:
    return [lambda: backup(server, None), lambda: backup(server, LONG), index, deferred]


def tried(way: Way) -> tuple[str, str]:
    """Return over what it went; or that it was refused, and the words."""
    try:
        return way(), ""
    except AccessRefused as error:
        return REFUSED, str(error)
    except Exception as error:
        return type(error).__name__, str(error)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Have this thread read no file that only root may; see setfsuid(2)."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.setfsuid(65534)
    try:
        yield
    finally:
        libc.setfsuid(0)


# --- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", CASES)
def test_each_case_works_or_is_refused_with_words_that_name_the_cure(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    """As the table says; and all ways agree, but for what takes another one."""
    wrong = []
    for case in CASES[group]:
        if case.server == "of umac" and b"umac-128@openssh.com" not in get_mac_algs():
            continue  # asyncssh has found no libnettle
        server = place.server(case.server)
        set_up(case, place, server, tmp_path / "home", monkeypatch)
        unreadable = "may not be read" in case.what
        for expected, way in zip(case.ways, all_ways(server), strict=True):
            with as_nobody() if unreadable else nullcontext():
                came, words = tried(way)
            if came != expected or (came == REFUSED and case.says not in words) or not words.isprintable():
                wrong.append(f"{case.what}: {expected} {case.says!r} was expected, and not {came}: {words}")
            if case.server == "nobody" and server.was_asked():
                wrong.append(f"{case.what}: something was sent to the server")
        assert not (tmp_path / "home" / "touched").exists(), "a LocalCommand was run"
        if group == "known_hosts" and "known_hosts" not in case.extra:
            agrees = ssh_works(place, server, tmp_path / "home") == (case.ways[0] != REFUSED)
            wrong += [] if agrees else [f"{case.what}: ssh itself does not agree"]
    assert not wrong, "\n".join(wrong)


def ssh_works(place: Place, server: Any, home: Path) -> bool:
    """Return whether plain `ssh` gets on with known_hosts."""
    if isinstance(server, Nobody):
        server = place.server("usual")
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", "CheckHostIP=no", "IdentitiesOnly=yes",
               f"UserKnownHostsFile={home}/.ssh/known_hosts", "GlobalKnownHostsFile=none"]  # fmt: skip
    command = ["ssh", "-F", "none", "-i", str(place.keys.folder / "ed25519"), "-p", str(server.port)]
    command += [word for option in options for word in ("-o", option)]
    command += ["-l", server.backupop, "-s", "127.0.0.1", "sftp"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0


def test_the_page_has_the_table() -> None:
    assert in_page() == table(), f"docs/connections.md is out of date: run `{COMMAND}`"


# --- servers of other kinds -------------------------------------------------------------------------

SIZES = (0, 1, 100, (32 << 10) - 1, 32 << 10, (32 << 10) + 1, (256 << 10) + 1, 2_000_003)


class BadHabits(Sshd):
    """sshd with `bad_habits` as the SFTP server of the index account."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        super().__init__(folder, keys, program="/usr/bin/python3 -I -S {tree}/bad_habits.py /")

    def empty_tree(self) -> None:
        super().empty_tree()
        shutil.copy(Path(__file__).with_name("bad_habits.py"), self.tree)


@pytest.mark.parametrize("kind", [Dropbear, ProFtpd, AsyncsshServer, BadHabits])
def test_files_come_whole_from_other_servers(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path, Keys], Any]
) -> None:
    """Over the program ssh and over asyncssh, however large they are, and many at a time."""
    if kind in (Dropbear, ProFtpd) and os.geteuid():
        pytest.skip("these are run by root")
    with kind(tmp_path / "server", place.keys) as server:
        prefix, login = server.prefix, server.backupop
        if kind is BadHabits:
            prefix, login = server.seen, server.index_user
        names = [f"{size}-{number}" for size in SIZES for number in range(4)]
        for name in names:
            (server.tree / name).write_bytes(content_of(name))
        set_up(Case("", fields={"login": login}), place, server, tmp_path / "home", monkeypatch)
        for expected, round_trip in ((BY_SSH, None), (BY_ASYNCSSH, LONG)):
            with ProviderHook("backup") as hook:
                reader = hook.reader(round_trip=round_trip)
                assert over(reader) == expected
                wanted = {
                    f"{prefix}/{name}".encode(): hashlib.md5(content_of(name)).hexdigest() for name in names
                }
                assert md5s(reader, list(wanted)) == wanted


def content_of(name: str) -> bytes:
    return random.Random(name).randbytes(int(name.partition("-")[0]))


def md5s(reader: Reader, paths: list[bytes]) -> dict[bytes, str]:
    """Read files, and return the md5 of each."""
    found: dict[bytes, str] = {}
    while paths or reader.busy:
        while paths and reader.room:
            reader.submit(Wanted(paths.pop(), None, lambda _: Stream(len)))
        for fetched in reader.wait():
            assert isinstance(fetched, Fetched) and fetched.refusal is None, fetched
            found[fetched.wanted.path] = fetched.md5.decode()
    return found


# --- what a server may be like ----------------------------------------------------------------------


def test_a_build_works_where_one_session_at_a_time_is_allowed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without Python there, which takes a second session."""
    server = place.started("one-session", "MaxSessions 1", "SetEnv PATH={tree}/bin")
    (server.tree / "bin").mkdir()
    for name in os.listdir("/usr/bin"):
        if not name.startswith(("python", "pydoc")):
            (server.tree / "bin" / name).symlink_to(f"/usr/bin/{name}")
    (server.tree / "backups").mkdir()
    (server.tree / "backups" / "x").write_bytes(b"x")
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    chroot = server.chroot.encode() if server.chrooted else b"/"
    base = server.prefix.encode()
    request = IndexRequest(chroot, (base + b"/backups",), base + b"/.mdbackup/index.md5")

    async def deferred_build() -> int:
        trigger = BuildProviderIndexTrigger("index", request_line(request).decode())
        (event,) = [event async for event in trigger.run()]
        await trigger.cleanup()
        return int(event.payload["done"]["files"])

    with IndexHook("index") as hook:
        assert hook.build_index(request).files == 1
    assert asyncio.run(deferred_build()) == 1
    assert server.log_text().count("Connection from") == 3  # with the one of `started`


def test_index_is_built_over_ssh_where_asyncssh_has_no_algorithm(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deferred, too; a wrong key is refused as ever, and what ssh has none for either is told as that."""
    server = place.server("of sntrup761")
    (server.tree / "backups").mkdir(exist_ok=True)
    (server.tree / "backups" / "x").write_bytes(b"x")
    base = server.prefix
    build = BuildProviderIndex(
        task_id="build",
        provider="web",
        ssh_conn_id="index",
        chroot=str(server.chroot) if server.chrooted else "/",
        source=[f"{base}/backups"],
        index=f"{base}/.mdbackup/index.md5",
        deferrable=True,
    )
    run = SimpleNamespace(dag_id="web", run_id="r", start_date=None)
    context: Any = {"dag_run": run, "params": {}}

    def deferred_build() -> Any:
        with pytest.raises(TaskDeferred) as task:
            build.execute(context)
        trigger = cast(BuildProviderIndexTrigger, task.value.trigger)

        async def fire() -> dict[str, Any]:
            try:
                (event,) = [event async for event in trigger.run()]
            finally:
                await trigger.cleanup()
            return cast(dict[str, Any], event.payload)

        return build.execute_complete(context, asyncio.run(fire()))

    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    assert deferred_build()["files"] == 1
    assert build._build(context)["files"] == 1
    for case, words in (
        (Case("", extra={"key_file": "{keys}/wrong"}), "refuses the account's key"),
        (Case("", extra={"ciphers": ["aes256-cbc"]}), "no algorithm in common"),
    ):
        set_up(case, place, server, tmp_path / "home", monkeypatch)
        with pytest.raises(AccessRefused, match=words):
            deferred_build()
    (server.tree / "backups" / "x").unlink()


def test_a_proxy_that_ends_is_told_at_once(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as a server that does not answer."""
    for command, why in (
        ("/nonexistent/nc %h %p", "not found"),
        ("false %h", ""),
        ("sh -c 'echo proxy says no >&2; exit 3'", "proxy says no"),
    ):
        case = Case("", config=f"Host *\n  ProxyCommand {command}\n")
        set_up(case, place, place.server("nobody"), tmp_path / "home", monkeypatch)
        for way in all_ways(place.server("nobody")):
            began = time.monotonic()
            came, words = tried(way)
            assert came in ("ConnectionLost", REFUSED), (came, words)
            assert "the proxy does not connect to the server" in words and why in words, (command, words)
            assert time.monotonic() - began < CONNECT
    assert not place.server("nobody").was_asked()


def test_words_of_a_banner_are_not_taken_for_those_of_ssh(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that works, works; another one is refused, and is one failed login for each way."""
    server = place.started("banner", "Banner {tree}/banner")
    words = "Permission denied (publickey).\nDo not connect to host systems; no proxy either\n"
    (server.tree / "banner").write_text(words)
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    assert [tried(way) for way in all_ways(server)] == [(way, "") for way in Case("").ways]
    set_up(Case("", extra={"key_file": "{keys}/wrong"}), place, server, tmp_path / "home", monkeypatch)
    for number, way in enumerate(all_ways(server), 1):
        came, words = tried(way)
        assert came == REFUSED and "refuses the account's key" in words
        until(lambda number=number: failed_logins(server) >= number)
    # Refused connections are closed: there is sshd alone.
    until(lambda: len(server.processes()) == (server.way == "namespace"))
    assert failed_logins(server) == len(all_ways(server))


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


# --- what is said of a server ------------------------------------------------------------------------


def test_too_many_failed_logins_are_a_refusal(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not tried again: a server may allow one only."""
    server = place.started("tries", "MaxAuthTries 1")
    case = Case("", extra={"key_file": "{keys}/wrong"})
    set_up(case, place, server, tmp_path / "home", monkeypatch)
    for number, way in enumerate(all_ways(server)[1:], 1):
        came, words = tried(way)
        assert came == REFUSED and "refuses the account's key" in words, words
        until(lambda number=number: failed_logins(server) >= number)
    assert failed_logins(server) == 3


def test_server_that_hangs_up_is_told_with_what_may_be_the_cause(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that has had too many connections from here."""
    server = Dropping(place.server("usual"), set(range(1, 20)))
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    for way in all_ways(server):
        came, words = tried(way)
        assert came == "ConnectionLost" and "MaxStartups" in words, words


def test_swapped_accounts_are_told_as_that(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And any other account that does not speak SFTP is named."""
    server = place.started("swapped")
    keys = next((server.folder / "ssh" / "authorized_keys").glob(server.index_user), None)
    assert keys is not None
    lines = keys.read_text().splitlines()
    for command, kind, words in (
        ("echo mdbackup ready request; cat", REFUSED, "is the index account"),
        ("echo Welcome, dear user; cat", "ConnectionLost", "does not speak SFTP"),
    ):
        keys.write_text("".join(f'command="{command}" {line}\n' for line in lines if line.startswith("ssh-")))
        case = Case("", fields={"login": server.index_user})
        set_up(case, place, server, tmp_path / "home", monkeypatch)
        for way in all_ways(server)[:2]:
            came, said = tried(way)
            assert came == kind and words in said and "(connection backup)" in said, said


# --- by an audit, which connects by paramiko ----------------------------------------------------------


def audit() -> str:
    """Connect as an audit does."""
    client_of(account("backup"), BoundedTransport).close()
    return BY_PARAMIKO


BY_PARAMIKO = "paramiko"
_KEYS_OF_HOST = "[127.0.0.1]:{port} {host ed25519}\n"
_OTHER_KINDS = {
    kind: asyncssh.generate_private_key(kind).export_public_key().decode().strip()
    for kind in ("ssh-dss", "ssh-ed448")
}


def _private(kind: str) -> str:
    return asyncssh.generate_private_key(kind).export_private_key().decode()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("", config="Host *\n  ProxyCommand {proxy} %h %p\n"), ""),
        (Case("", known_hosts=f"{_KEYS_OF_HOST}[127.0.0.1]:{{port}} {_OTHER_KINDS['ssh-dss']}\n"), ""),
        (Case("", known_hosts=f"{_KEYS_OF_HOST}[127.0.0.1]:{{port}} {_OTHER_KINDS['ssh-ed448']}\n"), ""),
        (Case("", known_hosts=_KEYS_OF_HOST + "[127.0.0.1]:{port} {host other}\n"), ""),
        (Case("", known_hosts="[127.0.0.1]:{port} {host other}\n" + _KEYS_OF_HOST), ""),
        (Case("", extra={"host_key": "{host rsa}"}), ""),
        (Case("", extra={"host_key": "{host ecdsa}"}), ""),
        (Case("", extra={"key_file": "{keys}/ecdsa"}), ""),
        (Case("", extra={"key_file": "{keys}/rsa"}), ""),
        (Case("", extra={"key_file": "{keys}/certified"}), ""),
        (Case("", known_hosts="@cert-authority * {host ca}\n"), "does not support host certificates"),
        (Case("", extra={"host_key": "{host other}"}), "host key is not the expected one"),
        (Case("", extra={"key_file": None, "private_key": _private("ssh-ed448")}), "of type ssh-ed448"),
        (Case("", extra={"key_file": "{keys}/wrong"}), "refuses the account's key"),
        (Case("", server="of sntrup761"), "have no algorithm in common"),
    ],
)  # fmt: skip
def test_audit_connects_or_is_refused_with_the_reason(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, says: str
) -> None:
    """And leaves no connection or thread of its own behind."""
    set_up(case, place, place.server(case.server), tmp_path / "home", monkeypatch)
    came, words = tried(audit)
    assert came == (REFUSED if says else BY_PARAMIKO), words
    assert says in words
    until(lambda: not [one for one in threading.enumerate() if isinstance(one, BoundedTransport)])


def failed_logins(server: Sshd) -> int:
    return server.log_text().count("Failed publickey")
