"""The ways to a provider, tried one after the other against servers of many kinds."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.hooks.failures import NoCommonAlgorithm
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.hooks.ssh_program import SshChannel
from airflow_mdbackup.scheme.errors import AccessRefused
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger
from tests.integration.connections_table import BY_ASYNCSSH, BY_SSH, REFUSED, Case
from tests.integration.ssh_servers import CONTENT, AsyncsshServer, Keys, Names, Sshd

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
