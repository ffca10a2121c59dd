"""The way over the program ssh: what is asked of it, what it may accept, and how it ends.

Whatever a connection says holds for the other way as well, over asyncssh.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from asyncssh import import_private_key

import airflow_mdbackup.hooks.connection as connection_module
import airflow_mdbackup.hooks.provider as provider_module
import airflow_mdbackup.hooks.session as session_module
import airflow_mdbackup.hooks.ssh_program as program_module
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.hooks.session import Session
from airflow_mdbackup.hooks.ssh_program import SshChannel, program_for
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes
from demo.processes import CLOSED_PORT, descendants
from demo.sshd import ProviderServer
from demo.sshd_files import new_key
from tests.integration.conftest import LONG_LINE
from tests.isolation import PREFIX
from tests.waiting import until

SetConnection = Callable[[str, dict[str, Any]], None]
FakeSsh = Callable[[str], None]
SSH = shutil.which("ssh")
TO_LOG = 'while [ "$1" != -E ]; do shift; done; exec 2>"$2"\n'  # in a script: have its words be those of ssh
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an empty ~/.ssh, so that nothing depends on who runs the tests."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    """A function that puts a script before the real ssh in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def fake_ssh(script: str) -> None:
        (folder / "ssh").write_text(script)
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return fake_ssh


@pytest.fixture
def no_asyncssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that goes on over asyncssh."""

    def fail(_: object) -> None:
        raise AssertionError("a second attempt, over asyncssh")

    monkeypatch.setattr(provider_module, "Connection", fail)


@pytest.fixture(params=["ssh", "asyncssh"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way after the other: the only one that there is, and must do."""
    if request.param == "ssh":
        request.getfixturevalue("no_asyncssh")
    else:
        monkeypatch.setattr(provider_module, "program_for", lambda account: None)
    return str(request.param)


@pytest.fixture
def connect_within(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets how long a connection may take, in seconds."""

    def connect_within(seconds: int) -> None:
        for module in (connection_module, session_module):
            monkeypatch.setattr(module, "CONNECT", seconds)

    return connect_within


def way(reader: Reader) -> str:
    """Return over what a reader reads."""
    channel = reader.stream.channel
    assert isinstance(channel, SshChannel | Session)
    return "ssh" if isinstance(channel, SshChannel) else "asyncssh"


def over_ssh(hook: ProviderHook) -> Reader | None:
    """Return a reader over ssh, or None where asyncssh has to tell what is wrong."""
    return hook._over_ssh()


def children(name: str, parent: int | None = None) -> list[int]:
    """Return the descendants that run a program, without those that have ended."""
    return [pid for pid in descendants(parent or os.getpid()) if _program(pid) == name]


def _program(pid: int) -> str:
    try:
        return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())
    except (FileNotFoundError, ProcessLookupError):
        return ""


def read(reader: Reader, path: str, write: Callable[[Any], object] = len) -> Fetched:
    """Read one file; ``write`` gets the bytes of a large one."""

    def sink(_: Attributes) -> Stream:
        return Stream(write)

    reader.submit(Wanted(path.encode(), None, sink))
    (fetched,) = reader.wait()
    assert isinstance(fetched, Fetched)
    return fetched


def put(provider: ProviderServer, name: str, size: int | None = None) -> str:
    """Write a file on the provider, of a few bytes or with a hole of many; return its path there."""
    file = provider.tree / name
    file.write_bytes(b"content")
    if size is not None:
        os.truncate(file, size)
    return f"{provider.prefix}/{name}"


def in_thread(act: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Do something in another thread; the list gets what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


# --- which way is taken -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["key_file", "private_key"])
@pytest.mark.parametrize("compress", [False, True])
def test_reader_goes_over_ssh(
    provider: ProviderServer, set_connection: SetConnection, key: str, compress: bool
) -> None:
    """With a key in a file or in the connection; and nothing stays when the hook is closed."""
    connection = provider.sftp_connection(compress=compress)
    if key == "private_key":
        del connection["extra"]["key_file"]
        connection["extra"]["private_key"] = provider.backupop_key.read_text()
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        assert read(reader, put(provider, "file")).content == b"content"
        assert way(reader) == "ssh" and hook._connection is None
        (pid,) = children("ssh")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert b"Compression=" + (b"yes" if compress else b"no") in command
        assert os.getpgid(pid) == os.getpgrp()  # Airflow kills the group of a task
        assert not children("cat")
    assert not children("ssh")


def test_named_subsystem_is_asked_for(tmp_path: Path, set_connection: SetConnection, each_way: str) -> None:
    """The server has no other."""
    with ProviderServer(tmp_path / "server", subsystem="sftpi") as server:
        set_connection("backupop", server.sftp_connection())
        with ProviderHook("backupop") as hook:
            assert way(hook.reader()) == each_way


def test_task_that_hides_what_it_has_open_goes_over_ssh(
    provider: ProviderServer, set_connection: SetConnection, no_asyncssh: None
) -> None:
    """As all of Airflow's do: /proc/<pid>/fd of a task is closed even to the programs that it starts."""
    connection = provider.sftp_connection(private_key=provider.backupop_key.read_text())
    del connection["extra"]["key_file"]
    set_connection("backupop", connection)
    libc = ctypes.CDLL(None)
    set_dumpable, drop_capability, sys_ptrace = 4, 24, 19

    def connect() -> None:
        libc.prctl(drop_capability, sys_ptrace, 0, 0, 0)  # of this thread; or root looks everywhere
        with ProviderHook("backupop") as hook:
            assert way(hook.reader()) == "ssh"

    libc.prctl(set_dumpable, 0, 0, 0, 0)
    try:
        thread, raised = in_thread(connect)
        thread.join(30)
    finally:
        libc.prctl(set_dumpable, 1, 0, 0, 0)
    assert raised == [] and not thread.is_alive()


def _passphrase(connection: dict[str, Any], folder: Path) -> None:
    connection["extra"]["private_key"] = _encrypted(connection["extra"].pop("key_file"), folder).read_text()
    connection["extra"]["private_key_passphrase"] = "open sesame"


def _passphrase_and_file(connection: dict[str, Any], folder: Path) -> None:
    new_key(folder / "other")
    (folder / "home/.ssh/config").write_text(f"Host *\n  IdentityFile {folder / 'other'}\n")
    _passphrase(connection, folder)


def _password(connection: dict[str, Any], folder: Path) -> None:
    connection["extra"]["key_file"] = str(_encrypted(connection["extra"]["key_file"], folder))
    connection["password"] = "open sesame"


def _encrypted(key: str, folder: Path) -> Path:
    copy = Path(shutil.copy(key, folder / "encrypted"))
    subprocess.run(["ssh-keygen", "-q", "-p", "-f", copy, "-P", "", "-N", "open sesame"], check=True)
    return copy


def _proxy(connection: dict[str, Any], folder: Path) -> None:
    relay = folder / "relay.py"
    relay.write_text(
        "import os, socket, threading\n"
        f"with socket.create_connection(('127.0.0.1', {connection['port']})) as server:\n"
        "    def back():\n"
        "        while data := server.recv(65536): os.write(1, data)\n"
        "    threading.Thread(target=back, daemon=True).start()\n"
        "    while data := os.read(0, 65536): server.sendall(data)\n"
    )
    (folder / "home/.ssh/config").write_text(f"Host *\n  ProxyCommand {sys.executable} {relay}\n")


def _disabled_algorithms(connection: dict[str, Any], folder: Path) -> None:
    connection["extra"]["disabled_algorithms"] = {"kex": ["curve25519-sha256@libssh.org"]}


def _host_name(connection: dict[str, Any], folder: Path) -> None:
    config = f"Host elsewhere\n  HostName {connection['host']}\n  Port {connection.pop('port')}\n"
    (folder / "home/.ssh/config").write_text(config)
    connection["host"] = "elsewhere"


@pytest.mark.parametrize(
    "change", [_passphrase, _passphrase_and_file, _password, _proxy, _disabled_algorithms, _host_name]
)
def test_what_a_connection_and_its_user_say_holds_for_both_ways(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    each_way: str,
    change: Callable[[dict[str, Any], Path], None],
) -> None:
    """Whatever is in the connection, and what ~/.ssh/config says of where it leads."""
    connection = provider.sftp_connection()
    change(connection, tmp_path)
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        assert way(reader) == each_way
        assert read(reader, put(provider, "file")).content == b"content"


def test_account_without_a_key_is_none_for_ssh(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """A password cannot be told to it. Here the server takes none."""
    connection = provider.sftp_connection() | {"password": "open sesame"}
    del connection["extra"]["key_file"]
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        assert program_for(hook.account) is None
        with pytest.raises(AccessRefused, match="refuses the account's password"):
            hook.reader()


@pytest.mark.parametrize(
    "programs",
    [
        {},
        {
            "ssh": f"#!/bin/sh\n{TO_LOG}echo 'command-line line 0: Bad SSH2 cipher spec' >&2; exit 255\n",
            "cat": None,
        },
        {"ssh": "no program", "cat": None},
        {"ssh": None},
    ],
    ids=["no ssh", "an old ssh", "a broken ssh", "no cat"],
)
def test_machine_without_a_fit_ssh_goes_over_asyncssh(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    programs: dict[str, str | None],
) -> None:
    """And works there. (None stands for the machine's own program.)"""
    for name, script in programs.items():
        if script is None:
            (tmp_path / name).symlink_to(shutil.which(name) or name)
        else:
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        assert way(reader) == "asyncssh"
        assert read(reader, put(provider, "file")).content == b"content"
        assert not children("cat") and not children("ssh")


@pytest.mark.parametrize(("round_trip", "expected"), [(None, "ssh"), (0.001, "ssh"), (0.1, "asyncssh")])
def test_line_that_is_known_to_be_long_is_left_to_asyncssh(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    round_trip: float | None,
    expected: str,
) -> None:
    """At once: with one login, not two."""
    if expected == "asyncssh":
        monkeypatch.setattr(provider_module, "LONG_ROUND_TRIP", LONG_LINE)
    set_connection("backupop", provider.sftp_connection())
    before = provider.log_text().count("Accepted publickey")
    with ProviderHook("backupop") as hook:
        assert way(hook.reader(round_trip=round_trip)) == expected
    assert provider.log_text().count("Accepted publickey") == before + 1


# --- whom it trusts -----------------------------------------------------------------------------------


def test_other_host_key_than_the_pinned_is_refused(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By ssh too, before anything is told to the server; and both keys are named."""
    other = new_key(tmp_path / "other")
    set_connection("backupop", provider.sftp_connection(host_key=other))
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
        with pytest.raises(AccessRefused, match="not the expected") as caught:
            hook.reader()
    for key in (other, provider.host_key):
        told = subprocess.run(["ssh-keygen", "-lf", "-"], input=key, capture_output=True, text=True).stdout
        assert told.split()[1] in str(caught.value)
    assert "Host key verification failed" in capfd.readouterr().out
    assert "Accepted" not in provider.log_text()[before:]


def test_unknown_host_key_is_refused(provider: ProviderServer, set_connection: SetConnection) -> None:
    """It is neither pinned nor in known_hosts."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    set_connection("backupop", connection)
    before = provider.log_text()
    with pytest.raises(AccessRefused, match="host key is unknown"):
        ProviderHook("backupop")
    assert provider.log_text() == before, "it was connected to"


@pytest.fixture
def known_hosts(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path
) -> Callable[..., None]:
    """A function that writes known_hosts, with which a connection without pinned key has to do.

    In its lines, {right} is the server's key, {wrong} another one, and {at} where the server listens.
    """

    def known_hosts(*lines: str, **extra: str) -> None:
        words = {"right": provider.host_key, "wrong": new_key(tmp_path / "wrong")}
        at = f"[127.0.0.1]:{provider.port}"
        text = "".join(line.format(**words, at=at) + "\n" for line in lines)
        (home / ".ssh/known_hosts").write_text(text, "latin-1")
        connection = provider.sftp_connection(**extra)
        if not extra:
            del connection["extra"]["host_key"]
        set_connection("backupop", connection)

    return known_hosts


@pytest.mark.parametrize("hashed", [False, True], ids=["plain", "hashed"])
def test_known_hosts_of_home_is_honoured(
    known_hosts: Callable[..., None], home: Path, hashed: bool, each_way: str
) -> None:
    """With the port, in $HOME, while ssh would look where the passwd entry says."""
    known_hosts("{at} {right}")
    if hashed:
        file = home / ".ssh/known_hosts"
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", file], check=True, capture_output=True)
        assert "127.0.0.1" not in file.read_text()
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


@pytest.mark.parametrize(
    "lines",
    [
        ["127.0.0.1 {right}"],
        ["* {right}"],
        ["{at} {wrong}", "{at} {right}"],
        ["{at} {right}", "{at} {wrong}"],
        ["@revoked {at} {wrong}", "{at} {right}"],
        ["{at} ssh-ed25519 AAAAB", "nonsense", "@nonsense {at} {right}", "# caf\xe9", "caf\xe9 {wrong}",
         "{at} {right} caf\xe9"],
    ],
    ids=["of no port", "a pattern", "old and new", "new and old", "another is revoked", "broken lines"],
)  # fmt: skip
def test_known_hosts_is_read_as_openssh_reads_it(
    known_hosts: Callable[..., None], each_way: str, lines: list[str]
) -> None:
    known_hosts(*lines)
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


def test_line_of_known_hosts_that_is_skipped_is_told(
    known_hosts: Callable[..., None], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With file and line, so that it can be found."""
    known_hosts("{at} {right}", "\x1b[2J")
    with ProviderHook("backupop"):
        pass
    (warning,) = [record.getMessage() for record in caplog.records if "Skipping" in record.getMessage()]
    assert warning.startswith(f"Skipping {home}/.ssh/known_hosts, line 2: ") and warning.isprintable()


@pytest.mark.parametrize(
    "lines",
    [
        ["{at} {wrong}"],
        ["@revoked {at} {right}", "{at} {right}"],
        ["@revoked * {right}", "{at} {right}", "{at} {wrong}"],
        ["@cert-authority {at} {right}"],
    ],
    ids=["another", "revoked", "revoked everywhere", "an authority's"],
)
def test_server_whose_key_known_hosts_does_not_trust_is_refused(
    provider: ProviderServer, known_hosts: Callable[..., None], lines: list[str]
) -> None:
    """By both ways."""
    known_hosts(*lines)
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
        with pytest.raises(AccessRefused, match="host key is not the expected"):
            hook.reader()
    assert "Accepted" not in provider.log_text()[before:]


@pytest.mark.parametrize("line", ["[127.0.0.1]:1 {right}", "{at} ssh-ed25519 AAAAB", ""])
def test_known_hosts_without_a_key_for_the_server_is_of_no_help(
    provider: ProviderServer, known_hosts: Callable[..., None], line: str
) -> None:
    """Of another port, malformed, or empty; which is told before anything is sent."""
    known_hosts(line)
    before = provider.log_text()
    with pytest.raises(AccessRefused, match="host key is unknown"):
        ProviderHook("backupop")
    assert provider.log_text() == before, "it was connected to"


@pytest.mark.parametrize("line", ["{at} {wrong}", "@revoked {at} {right}", "nonsense"])
def test_pinned_key_decides_and_known_hosts_is_not_read(
    provider: ProviderServer, known_hosts: Callable[..., None], each_way: str, line: str
) -> None:
    """Whoever pins a key means that one."""
    known_hosts(line, host_key=provider.host_key)
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


def test_pinned_key_is_not_overruled_by_known_hosts(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path
) -> None:
    """Not on either account."""
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{provider.port} {provider.host_key}\n")
    pinned = new_key(tmp_path / "pinned")
    set_connection("pinning", provider.sftp_connection(host_key=pinned))
    with ProviderHook("pinning") as hook:
        assert over_ssh(hook) is None
        with pytest.raises(AccessRefused, match="host key is not the expected"):
            hook.reader()
    set_connection("pinning", provider.ssh_connection(host_key=pinned))
    with IndexHook("pinning") as index, pytest.raises(AccessRefused, match="host key is not the expected"):
        index.connected()


@pytest.mark.parametrize(
    "extra",
    [{"no_host_key_check": "true"}, {"no_host_key_check": True}, {"allow_host_key_change": "true"},
     {"known_hosts": "none"}],
    ids=str,
)  # fmt: skip
def test_connection_that_trusts_any_server_is_refused(
    provider: ProviderServer, set_connection: SetConnection, extra: dict[str, Any]
) -> None:
    """Before anything is sent."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    connection["extra"] |= extra
    set_connection("backupop", connection)
    with pytest.raises(AccessRefused, match=r"connection backupop sets .* trusts any server.*host_key"):
        ProviderHook("backupop")


def test_other_key_than_the_accounts_is_refused(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path, each_way: str
) -> None:
    """The server knows no such key; which is one failed login there, and not another one by the other way."""
    new_key(tmp_path / "wrong")
    set_connection("backupop", provider.sftp_connection(key_file=str(tmp_path / "wrong")))
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="refuses the account's key"):
        hook.reader()
    until(lambda: "authenticating user" in provider.log_text()[before:], 30)
    assert provider.log_text()[before:].count("authenticating user") == 1


def test_key_that_cannot_be_read_is_told_before_anything_is_sent(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path
) -> None:
    """No other one is tried in its stead."""
    set_connection("backupop", provider.sftp_connection(key_file=str(tmp_path / "missing")))
    before = provider.log_text()
    with pytest.raises(AccessRefused, match="missing that cannot be read on this machine"):
        ProviderHook("backupop")
    assert provider.log_text() == before, "it was connected to"


# --- what has no say ----------------------------------------------------------------------------------


def test_agent_and_configuration_of_the_user_have_no_say(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    tmp_path: Path,
    each_way: str,
) -> None:
    """No agent is asked, and a key that ~/.ssh/config names does not come before that of the connection."""
    new_key(tmp_path / "wrong")
    (home / ".ssh/config").write_text(f"Host *\n  IdentityFile {tmp_path / 'wrong'}\n")
    connection = provider.sftp_connection(private_key=provider.backupop_key.read_text())
    del connection["extra"]["key_file"]
    set_connection("backupop", connection)
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as agent:
        agent.bind(f"{short}/agent")
        agent.listen()
        agent.setblocking(False)
        monkeypatch.setenv("SSH_AUTH_SOCK", f"{short}/agent")
        with ProviderHook("backupop") as hook:
            assert way(hook.reader()) == each_way
            with pytest.raises(BlockingIOError):
                agent.accept()


def test_ssh_itself_tells_that_nothing_else_has_a_say(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """No file of settings is read where there is none, and no key but ours is tried."""
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook, program_for(hook.account) or pytest.fail("no ssh") as program:
        assert program.command[1:3] == ["-F", "none"]
        command = [program.command[0], "-G", *program.command[1:]]
        told = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        for line in (
            "batchmode yes",
            "globalknownhostsfile none",
            "identitiesonly yes",
            "identityagent none",
            "stricthostkeychecking true",
            "updatehostkeys false",
        ):
            assert line in told
        keys = [line for line in told if line.startswith("identityfile ")]
        assert all(re.fullmatch(r"identityfile (none|/proc/\d+/fd/1)", line) for line in keys), keys
        assert any(line.startswith("userknownhostsfile /proc/") for line in told)
        assert any(line.startswith("ciphers aes128-gcm@openssh.com,aes256-gcm@openssh.com,") for line in told)


def test_ciphers_of_the_connection_are_the_only_ones(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """By both ways."""
    set_connection("backupop", provider.sftp_connection(ciphers=["aes256-ctr", "aes192-ctr"]))
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == "ssh"
        (pid,) = children("ssh")
        assert b"\0Ciphers=aes256-ctr,aes192-ctr\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert hook.connected()._connection.get_extra_info("recv_cipher") == "aes256-ctr"


def test_secret_is_on_no_command_line_in_no_environment_and_not_on_the_disk(
    provider: ProviderServer,
    set_connection: SetConnection,
    fake_ssh: FakeSsh,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither before ssh has logged in nor later."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    key = provider.backupop_key.read_text()
    # ssh is given it as it is written anew, of which the first lines are never the same.
    written = [line for line in import_private_key(key).export_private_key().splitlines()[1:-1] if line]
    secrets = {key.splitlines()[3].encode(), *written[2:]}
    connection = provider.sftp_connection(private_key=key)
    del connection["extra"]["key_file"]
    set_connection("backupop", connection)
    fake_ssh(
        f"#!/bin/sh\ntouch {tmp_path}/started\n"
        f'while ! test -e {tmp_path}/go; do sleep 0.05; done\nexec {SSH} "$@"\n'
    )
    there = {
        Path(name): set(Path(name).iterdir())
        for name in ("/tmp", "/var/tmp", "/dev/shm")
        if os.path.isdir(name)
    }

    def has_secret(data: bytes) -> bool:
        return any(secret in data for secret in secrets)

    def seen() -> list[str]:
        found = []
        for pid in descendants(os.getpid()):
            with suppress(OSError):
                if has_secret(Path(f"/proc/{pid}/cmdline").read_bytes()):
                    found.append(f"command line of {_program(pid)}")
                if has_secret(Path(f"/proc/{pid}/environ").read_bytes()):
                    found.append(f"environment of {_program(pid)}")
        places = [tmp_path, home]
        for folder, before in there.items():
            new = [path for path in folder.iterdir() if path not in before]
            places += [path for path in new if not path.name.startswith(PREFIX)]
        for file in (file for place in places for file in (place, *place.rglob("*")) if file.is_file()):
            with suppress(OSError), file.open("rb") as opened:
                if has_secret(opened.read(MEGABYTE)):
                    found.append(str(file))
        return found

    with ProviderHook("backupop") as hook:
        readers: list[Reader] = []
        thread, raised = in_thread(lambda: readers.append(hook.reader()))
        until((tmp_path / "started").exists, 30)
        assert seen() == []
        (tmp_path / "go").touch()
        thread.join(10)
        assert raised == [] and way(readers[0]) == "ssh"
        assert seen() == []
        # What was looked for can be found.
        assert has_secret(provider.backupop_key.read_bytes())
        assert has_secret(hook.account.keys[0].key.export_private_key())


def test_environment_of_ssh_has_nothing_of_the_workers(
    provider: ProviderServer, set_connection: SetConnection, fake_ssh: FakeSsh, tmp_path: Path
) -> None:
    """Secrets are there, such as connections; and its messages are to be in English."""
    fake_ssh(f"#!/bin/sh\ncat /proc/$$/environ > {tmp_path}/environment\nexit 1\n")
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
    given = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().split("\0") if line)
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME") if name in os.environ}
    assert given == {"PATH": os.environ["PATH"], "LC_ALL": "C", **kept}


# --- odd names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["host", "login", "subsystem"])
@pytest.mark.parametrize(
    "odd", ["-oProxyCommand=touch {0}", "$(touch {0})", "x'; touch {0}; '", "-V", "$(touch${{IFS}}{0})"]
)
def test_no_name_is_an_option_or_a_command(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    home: Path,
    field: str,
    odd: str,
) -> None:
    """It is refused where it is none, or else just a name that nobody has; also for a ProxyCommand."""
    (home / ".ssh" / "config").write_text("Host *\n  ProxyCommand true %h %r\n")
    odd = odd.format(tmp_path / "pwned")
    connection = provider.sftp_connection()
    if field == "subsystem":
        connection["extra"]["subsystem"] = odd
    else:
        connection[field] = odd
    set_connection("backupop", connection)
    if field in ("host", "login"):
        with pytest.raises(AccessRefused, match=r"backupop (has an invalid host|cannot be used)"):
            ProviderHook("backupop")
        assert not (tmp_path / "pwned").exists()
        return
    with ProviderHook("backupop") as hook:
        program = program_for(hook.account)
        assert program is not None
        with program, pytest.raises(ConnectionLost):
            Reader(SshChannel(program.command, 10))
    assert not (tmp_path / "pwned").exists()


def test_subsystem_that_the_server_has_not_is_told_of(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """By asyncssh, after ssh has failed."""
    set_connection("backupop", provider.sftp_connection(subsystem="sftpi"))
    with ProviderHook("backupop") as hook, pytest.raises(NotOnProvider, match="sftpi"):
        hook.reader()


def test_address_of_version_6_and_odd_login_reach_ssh_as_they_are(
    provider: ProviderServer, set_connection: SetConnection, fake_ssh: FakeSsh, tmp_path: Path
) -> None:
    """Without a port it is 22."""
    fake_ssh(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/arguments\nexit 1\n")
    connection = provider.sftp_connection() | {"host": "fe80::1%eth0", "login": "a b@c:d%h"}
    del connection["port"]
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
    told = (tmp_path / "arguments").read_text().splitlines()
    assert told[-8:] == ["-p", "22", "-l", "a b@c:d%h", "-s", "--", "fe80::1%eth0", "sftp"]


def test_address_of_version_6_is_connected_to(
    provider: ProviderServer, set_connection: SetConnection, home: Path, each_way: str
) -> None:
    """Here it is one that stands for 127.0.0.1, and is known as itself."""
    connection = provider.sftp_connection() | {"host": "::ffff:127.0.0.1"}
    del connection["extra"]["host_key"]
    (home / ".ssh/known_hosts").write_text(f"[::ffff:127.0.0.1]:{provider.port} {provider.host_key}\n")
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


# --- how it ends --------------------------------------------------------------------------------------


class Relay:
    """Stands between the hook and the server, and can stop to pass anything on."""

    def __init__(self, to: int) -> None:
        self.frozen = threading.Event()
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                while self.frozen.is_set():
                    time.sleep(0.05)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.frozen.clear()
        self._listener.close()


@pytest.fixture
def relay(provider: ProviderServer) -> Iterator[Relay]:
    relay = Relay(provider.port)
    yield relay
    relay.close()


@contextmanager
def server_that_says(words: bytes) -> Iterator[int]:
    """Listen on 127.0.0.1, say something to each that comes, and then nothing more; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    connection.sendall(words)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
    for connection in connections:
        connection.close()


def test_ssh_killed_in_mid_transfer_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """And no file that is whole."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        (pid,) = children("ssh")
        with pytest.raises(ConnectionLost, match=r"closed the connection|broke"):
            read(reader, path, lambda _: _kill(pid))


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_end_of_ssh_is_told_as_what_it_may_mean(
    provider: ProviderServer, set_connection: SetConnection, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the server did not answer to a sign of life, which nobody would guess from a closed pipe."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection() | {"port": relay.port})
    monkeypatch.setattr(program_module, "KEEPALIVE", 1)
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        with pytest.raises(ConnectionLost, match=r"Timeout, server .* not responding"):
            read(reader, path, lambda _: relay.frozen.set())


def test_silence_in_mid_transfer_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection, relay: Relay, each_way: str
) -> None:
    """After as long as the connection may be silent."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection() | {"port": relay.port})
    with ProviderHook("backupop", stall_timeout=1) as hook:
        reader = hook.reader()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="stalled"):
            read(reader, path, lambda _: relay.frozen.set())
        assert time.monotonic() - began < 5
    assert not children("ssh")


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-silent\r\n"], ids=["at once", "after its banner"])
def test_server_that_is_silent_is_a_lost_connection(
    provider: ProviderServer,
    set_connection: SetConnection,
    connect_within: Callable[[int], None],
    words: bytes,
) -> None:
    """In bounded time: both ways are tried, each as long as it may take."""
    connect_within(1)
    with server_that_says(words) as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        began = time.monotonic()
        with ProviderHook("backupop", stall_timeout=1) as hook, pytest.raises(ConnectionLost):
            hook.reader()
        assert time.monotonic() - began < 10
    assert not children("ssh")


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_server_that_is_not_there_is_a_lost_connection_at_once(
    provider: ProviderServer, set_connection: SetConnection, each_way: str, host: str
) -> None:
    """With its name and port in the message, and no second attempt."""
    set_connection("backupop", provider.sftp_connection() | {"host": host, "port": CLOSED_PORT})
    began = time.monotonic()
    with ProviderHook("backupop") as hook, pytest.raises(ConnectionLost, match=f"{host}:1 .*{host}"):
        hook.reader()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "words",
    [
        b"\x1b]0;owned\x07\x1b[2J\r\nSSH-9.9\x1b[2J\r\n",
        b"owned\x1b[2J\r\nSSH-2.0-x\r\n" + b"\xff" * 500,
    ],
    ids=["no banner", "banner and no packet"],
)
def test_words_of_a_server_act_on_no_terminal(
    provider: ProviderServer,
    set_connection: SetConnection,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    connect_within: Callable[[int], None],
    words: bytes,
) -> None:
    """Neither in our errors nor in what is logged, by us or by asyncssh."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "asyncssh")
    connect_within(1)
    with server_that_says(words) as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with ProviderHook("backupop", stall_timeout=1) as hook, pytest.raises(ConnectionLost) as caught:
            hook.reader()
    ours, theirs = capfd.readouterr().out, [record.getMessage() for record in caplog.records]
    assert "without the program ssh" in ours and theirs
    lines = [line for text in (str(caught.value), ours, *theirs) for line in text.split("\n")]
    assert all(line.isprintable() for line in lines)


def test_words_of_ssh_act_on_no_terminal(
    provider: ProviderServer,
    set_connection: SetConnection,
    fake_ssh: FakeSsh,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A server's words are in them. The last are the reason; before them may be a notice of any length."""
    fake_ssh(
        f"#!/bin/sh\n{TO_LOG}"
        "printf '%8000s\\n\\033]0;owned\\007\\r\\n@@@@@@\\r\\nwhy\\377\\r\\n' notice >&2; exit 255\n"
    )
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
    (line,) = (line for line in capfd.readouterr().out.split("\n") if "program ssh" in line)
    assert line.isprintable()
    assert r"program ssh: \x1b]0;owned\x07 / why\xff " in line


def test_close_from_another_thread_ends_a_transfer(
    provider: ProviderServer, set_connection: SetConnection, each_way: str
) -> None:
    """As Airflow does when a task is to be stopped."""
    path = put(provider, "large", 100_000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        threading.Timer(0.3, hook.close).start()
        began = time.monotonic()
        with pytest.raises(ConnectionLost):
            read(reader, path)
        assert time.monotonic() - began < 4
        until(lambda: not children("ssh"), 30, every=0.02)


def test_close_while_ssh_logs_in_ends_that(
    provider: ProviderServer, set_connection: SetConnection, no_asyncssh: None
) -> None:
    """Who is told to stop does not begin again by another way."""
    with server_that_says(b"SSH-2.0-silent\r\n") as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with ProviderHook("backupop") as hook:
            threading.Timer(0.5, hook.close).start()
            began = time.monotonic()
            with pytest.raises(ConnectionLost):
                hook.reader()
            assert time.monotonic() - began < 5
            until(lambda: not children("ssh") and not children("cat"), 30, every=0.02)


def test_nothing_is_left_of_many_connections(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path, each_way: str
) -> None:
    """No descriptor, no thread and no process, be they good, bad or refused."""
    new_key(tmp_path / "wrong")
    set_connection("good", provider.sftp_connection())
    set_connection("bad", provider.sftp_connection() | {"port": CLOSED_PORT})
    set_connection("refused", provider.sftp_connection(key_file=str(tmp_path / "wrong")))

    def connect(times: int) -> None:
        for _ in range(times):
            with ProviderHook("good") as hook:
                assert way(hook.reader()) == each_way
            with ProviderHook("bad") as hook, pytest.raises(ConnectionLost):
                hook.reader()
            with ProviderHook("refused") as hook, pytest.raises(AccessRefused):
                hook.reader()

    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    connect(1)
    gc.collect()
    gc.disable()  # nothing may depend on it
    try:
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith("ssh to")], 30)
        (files, threads), processes = left(), set(descendants(os.getpid()))
        connect(15)
        # What earlier tests left may end meanwhile.
        until(lambda: left()[0] <= files and left()[1] <= threads, 30, every=0.02)
        until(lambda: not set(descendants(os.getpid())) - processes, 30, every=0.02)
    finally:
        gc.enable()


@pytest.mark.parametrize("logged_in", [True, False])
def test_nothing_is_left_of_a_task_that_is_killed(
    provider: ProviderServer,
    set_connection: SetConnection,
    connect_within: Callable[[int], None],
    logged_in: bool,
) -> None:
    """As the kernel kills for want of memory: without a chance to end anything."""
    connect_within(2)
    path = put(provider, "large", 100_000 * MEGABYTE)
    with server_that_says(b"") as silent:
        set_connection("backupop", provider.sftp_connection() | ({} if logged_in else {"port": silent}))
        task = os.fork()
        if not task:
            try:
                with ProviderHook("backupop") as hook:
                    read(hook.reader(), path)
            finally:
                os._exit(1)
        try:
            running = {"ssh": 1, "cat": 0 if logged_in else 3}
            until(lambda: {name: len(children(name, task)) for name in running} == running, 30, every=0.02)
            left = descendants(task)
        finally:
            os.kill(task, signal.SIGKILL)
            os.waitpid(task, 0)
        until(lambda: not any(_program(pid) == "cat" for pid in left), 30, every=0.02)
        until(lambda: not any(_program(pid) == "ssh" for pid in left), 30, every=0.02)


# --- much in both directions --------------------------------------------------------------------------


@pytest.fixture
def channel(fake_ssh: FakeSsh) -> Iterator[Callable[[str], SshChannel]]:
    """A function that starts a Python script in the place of ssh, and gives the channel over it."""
    channels = []

    def channel(script: str) -> SshChannel:
        fake_ssh(
            f"#!{sys.executable}\nimport os, sys, time\n"
            "take, give = sys.stdin.buffer, sys.stdout.buffer\n"
            f"{script}\n"
        )
        ssh = shutil.which("ssh")
        assert ssh is not None
        channels.append(SshChannel([ssh], 1))
        return channels[-1]

    yield channel
    for one in channels:
        one.close()


def test_neither_side_waits_for_the_other(channel: Callable[[str], SshChannel]) -> None:
    """Here ssh takes nothing until all that it has is taken, which is more than a pipe holds; in order."""
    ssh = channel("give.write(bytes(range(256)) * 20000); give.flush(); give.write(take.read(3 << 20))")
    sent = os.urandom(3 * MEGABYTE)
    expected = bytes(range(256)) * 20000 + sent
    thread, raised = in_thread(lambda: ssh.sendall(sent))
    thread.join(10)
    assert raised == [] and not thread.is_alive()
    received = b""
    while data := ssh.recv(10_000):
        assert len(data) <= 10_000
        received += data
    assert received == expected


def test_slow_ssh_gets_all(channel: Callable[[str], SshChannel]) -> None:
    """In small pieces both ways."""
    ssh = channel("while data := os.read(0, 5000): os.write(1, data); time.sleep(0.001)")
    sent = os.urandom(2 * MEGABYTE)
    ssh.sendall(sent)
    received = b""
    while len(received) < len(sent):
        received += ssh.recv(MEGABYTE)
    assert received == sent


def test_ssh_that_takes_nothing_stalls(channel: Callable[[str], SshChannel]) -> None:
    """A call waits for a second here."""
    ssh = channel("time.sleep(30)")
    with pytest.raises(TimeoutError):
        ssh.sendall(bytes(MEGABYTE))
    with pytest.raises(TimeoutError):
        ssh.recv(1)


@pytest.mark.parametrize(
    "script",
    [
        "while True: give.write(bytes(1 << 20))",
        "os.close(1); time.sleep(30)",
        "os.close(0); time.sleep(0.2)",
    ],
    ids=["sends without end", "ends only its own side", "ends"],
)
def test_server_that_takes_nothing_does_not_fill_memory_or_keep_us_busy(
    channel: Callable[[str], SshChannel], script: str
) -> None:
    """It could send without end while our requests wait, or end its side only, for which nobody waits."""
    ssh = channel(script)
    thread, raised = in_thread(lambda: ssh.sendall(bytes(MEGABYTE)))
    thread.join(10)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [EOFError]
    assert sum(map(len, ssh._early)) <= program_module._AHEAD + MEGABYTE


def test_server_that_talks_without_end_fills_no_memory(channel: Callable[[str], SshChannel]) -> None:
    """Its words beside the files stay where they are until somebody asks for them."""
    ssh = channel("while True: os.write(2, b'word ' * 1000 + b'\\n')")
    with pytest.raises(TimeoutError):
        ssh.recv(1)
    assert len(ssh.stderr_messages()) <= 2000
    ssh.close()


def test_new_keys_are_agreed_on_in_mid_transfer(
    provider: ProviderServer, set_connection: SetConnection, fake_ssh: FakeSsh, tmp_path: Path
) -> None:
    """ssh then has to know the host key again, although what told it is gone."""
    fake_ssh(
        f"#!{sys.executable}\nimport os, sys\narguments = sys.argv[1:]\n"
        f"arguments[arguments.index('-E') + 1] = '{tmp_path}/log'\n"
        f"os.execv('{SSH}', ['ssh', '-v', '-o', 'RekeyLimit=1M', *arguments])\n"
    )
    path = put(provider, "large", 20 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        assert way(reader) == "ssh" and not children("cat")
        assert read(reader, path).size == 20 * MEGABYTE
    assert (tmp_path / "log").read_text().count("SSH2_MSG_NEWKEYS received") > 5


def test_server_that_tells_no_limits_is_reached_by_ssh_too(
    tmp_path: Path, set_connection: SetConnection
) -> None:
    """As OpenSSH before 8.5; how long the line is must not be taken from how long the login took."""
    options = "-R -p open,close,read,fstat,stat,lstat,realpath"
    with ProviderServer(tmp_path / "server", sftp_options=options) as server:
        set_connection("backupop", server.sftp_connection())
        with ProviderHook("backupop") as hook:
            assert way(hook.reader()) == "ssh"


def test_words_never_stop_ssh(tmp_path: Path) -> None:
    """Neither its own nor those of others; what was said last is kept of each."""
    script = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY)
for number in range(300):
    os.read(0, 5)
    os.write(2, b"%d" % number + b"x" * 400 + b"\\n")
    os.write(log, b"%d" % number + b"y" * 400 + b"\\n")
    os.write(1, b"hello")
sys.exit(255)
"""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    log = open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
    channel = SshChannel([sys.executable, "-c", script, str(fifo)], 5, log=log)
    try:
        for _ in range(300):
            channel.sendall(b"12345")
            assert channel.recv(10) == b"hello"
        with pytest.raises(EOFError, match="299y"):
            channel.recv(10)
        assert "299x" in channel.stderr_messages() and "y" not in channel.stderr_messages()
    finally:
        channel.close()
        log.close()
