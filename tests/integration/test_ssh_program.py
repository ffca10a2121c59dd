"""The way over the program ssh: what is asked of it, what it may accept, and how it ends."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
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
from airflow.providers.ssh.hooks.ssh import SSHHook

import airflow_mdbackup.hooks.provider as provider_module
import airflow_mdbackup.hooks.ssh_program as program_module
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.hooks.ssh_program import SshChannel, program_for
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.sftp import Attributes, Fetched, Reader, Stream, Wanted
from demo.processes import CLOSED_PORT, descendants
from demo.sshd import ProviderServer
from demo.sshd_files import new_key
from tests.integration.conftest import LONG_LINE
from tests.isolation import PREFIX
from tests.waiting import until

SetConnection = Callable[[str, dict[str, Any]], None]
FakeSsh = Callable[[str], None]
SSH = shutil.which("ssh")
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
def no_paramiko(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that goes on with paramiko."""

    def fail(_: SSHHook) -> None:
        raise AssertionError("a second attempt, with paramiko")

    monkeypatch.setattr(SSHHook, "get_conn", fail)


def way(reader: Reader) -> str:
    """Return over what a reader reads."""
    return "ssh" if isinstance(reader._channel, SshChannel) else "paramiko"


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
        assert way(reader) == "ssh" and hook.client is None
        (pid,) = children("ssh")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert b"Compression=" + (b"yes" if compress else b"no") in command
        assert os.getpgid(pid) == os.getpgrp()  # Airflow kills the group of a task
        assert not children("cat")
    assert not children("ssh")


def test_named_subsystem_is_asked_for(tmp_path: Path, set_connection: SetConnection) -> None:
    """The server has no other."""
    with ProviderServer(tmp_path / "server", subsystem="sftpi") as server:
        set_connection("backupop", server.sftp_connection())
        with ProviderHook("backupop") as hook:
            assert way(hook.reader()) == "ssh"


def test_task_that_hides_what_it_has_open_goes_over_ssh(
    provider: ProviderServer, set_connection: SetConnection, no_paramiko: None
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


def _no_host_key_check(connection: dict[str, Any], folder: Path) -> None:
    del connection["extra"]["host_key"]
    connection["extra"]["no_host_key_check"] = "true"


def _disabled_algorithms(connection: dict[str, Any], folder: Path) -> None:
    connection["extra"]["disabled_algorithms"] = {"kex": ["curve25519-sha256@libssh.org"]}


@pytest.mark.parametrize(
    "change",
    [_passphrase, _passphrase_and_file, _password, _proxy, _no_host_key_check, _disabled_algorithms],
)
def test_what_ssh_cannot_be_told_goes_over_paramiko(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    change: Callable[[dict[str, Any], Path], None],
) -> None:
    """And works there."""
    connection = provider.sftp_connection()
    change(connection, tmp_path)
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        assert program_for(hook, hook._key_text) is None
        reader = hook.reader()
        assert way(reader) == "paramiko"
        assert read(reader, put(provider, "file")).content == b"content"


@pytest.mark.parametrize(
    "programs",
    [
        {},
        {"ssh": "#!/bin/sh\necho 'command-line line 0: Bad SSH2 cipher spec' >&2; exit 255\n", "cat": None},
        {"ssh": "no program", "cat": None},
        {"ssh": None},
    ],
    ids=["no ssh", "an old ssh", "a broken ssh", "no cat"],
)
def test_machine_without_a_fit_ssh_goes_over_paramiko(
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
        assert way(reader) == "paramiko"
        assert read(reader, put(provider, "file")).content == b"content"
        assert not children("cat") and not children("ssh")


# --- whom it trusts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("round_trip", "expected"), [(None, "ssh"), (0.001, "ssh"), (0.1, "paramiko")])
def test_line_that_is_known_to_be_long_is_left_to_paramiko(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    round_trip: float | None,
    expected: str,
) -> None:
    """At once: with one login, not two."""
    if expected == "paramiko":
        monkeypatch.setattr(provider_module, "_LONG", LONG_LINE)
    set_connection("backupop", provider.sftp_connection())
    before = provider.log_text().count("Accepted publickey")
    with ProviderHook("backupop") as hook:
        assert way(hook.reader(round_trip=round_trip)) == expected
    assert provider.log_text().count("Accepted publickey") == before + 1


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
        assert hook.host_key is not None
        assert hook._fast_reader() is None
        with pytest.raises(AccessRefused, match="not the expected") as caught:
            hook.reader()
        assert hook.host_key.fingerprint in str(caught.value)
    right = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=provider.host_key, capture_output=True, text=True
    ).stdout
    assert right.split()[1] in str(caught.value)
    assert "Host key verification failed" in capfd.readouterr().out
    assert "Accepted" not in provider.log_text()[before:]


def test_unknown_host_key_is_refused(provider: ProviderServer, set_connection: SetConnection) -> None:
    """It is neither pinned nor in known_hosts."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    set_connection("backupop", connection)
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="host key is unknown"):
        hook.reader()
    assert "Accepted" not in provider.log_text()[before:]


@pytest.mark.parametrize("hashed", [False, True], ids=["plain", "hashed"])
def test_known_hosts_of_home_is_honoured(
    provider: ProviderServer, set_connection: SetConnection, home: Path, hashed: bool
) -> None:
    """As paramiko reads it: with the port, in $HOME, while ssh would look where the passwd entry says."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    set_connection("backupop", connection)
    known_hosts = home / ".ssh/known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{provider.port} {provider.host_key}\n")
    if hashed:
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", known_hosts], check=True, capture_output=True)
        assert "127.0.0.1" not in known_hosts.read_text()
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == "ssh"


@pytest.mark.parametrize("line", ["127.0.0.1 {right}", "* {right}", "[127.0.0.1]:{port} {wrong}"])
def test_known_hosts_without_the_servers_key_is_of_no_help(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path, line: str
) -> None:
    """Of another port, by a pattern that paramiko does not know, or of another key."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    set_connection("backupop", connection)
    words = {"right": provider.host_key, "wrong": new_key(tmp_path / "wrong"), "port": provider.port}
    (home / ".ssh/known_hosts").write_text(line.format(**words) + "\n")
    with ProviderHook("backupop") as hook:
        assert hook._fast_reader() is None
        with pytest.raises(AccessRefused, match="host key is"):
            hook.reader()


def test_known_hosts_that_contradicts_the_pinned_key_is_left_to_paramiko(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path
) -> None:
    """It lets known_hosts decide; ssh must not be the way around that."""
    wrong = new_key(tmp_path / "wrong")
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{provider.port} {wrong}\n")
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="host key is not the expected"):
        hook.reader()


def test_pinned_key_is_not_overruled_by_known_hosts(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path
) -> None:
    """paramiko itself would take either; whoever pins a key means that one, on both accounts."""
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{provider.port} {provider.host_key}\n")
    pinned = new_key(tmp_path / "pinned")
    for kind in (provider.sftp_connection, provider.ssh_connection):
        set_connection("pinning", kind(host_key=pinned))
        with (
            ProviderHook("pinning") as hook,
            pytest.raises(AccessRefused, match="known_hosts on this worker"),
        ):
            hook.get_conn()
        assert hook.client is None or not hook.client.get_transport()
        with (
            ProviderHook("pinning") as hook,
            pytest.raises(AccessRefused, match="host key is not the expected"),
        ):
            hook.reader()


def test_malformed_known_hosts_is_told(
    provider: ProviderServer, set_connection: SetConnection, home: Path
) -> None:
    """With the file named, not as an error of some library."""
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{provider.port} ssh-ed25519 AAAAB\n")
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="known_hosts on this worker"):
        hook.reader()


def test_other_key_than_the_accounts_is_refused(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path
) -> None:
    """The server knows no such key."""
    new_key(tmp_path / "wrong")
    set_connection("backupop", provider.sftp_connection(key_file=str(tmp_path / "wrong")))
    with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="refuses the account's key"):
        hook.reader()


# --- what has no say ----------------------------------------------------------------------------------


def test_agent_and_configuration_of_the_user_have_no_say(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    tmp_path: Path,
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
            assert way(hook.reader()) == "ssh"
            with pytest.raises(BlockingIOError):
                agent.accept()


def test_ssh_itself_tells_that_nothing_else_has_a_say(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path
) -> None:
    """No file of settings is read. Where the key cannot be read it tries none, not those of ~/.ssh."""
    set_connection("backupop", provider.sftp_connection(key_file=str(tmp_path / "missing")))
    with ProviderHook("backupop") as hook, program_for(hook, None) or pytest.fail("no ssh") as program:
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
        assert [line for line in told if line.startswith("identityfile ")] == ["identityfile none"]
        assert any(line.startswith("userknownhostsfile /proc/") for line in told)
        assert any(line.startswith("ciphers aes128-gcm@openssh.com,aes256-gcm@openssh.com,") for line in told)
        with pytest.raises(AccessRefused, match="cannot be read on this worker"):
            hook.reader()


def test_ciphers_of_the_connection_are_the_only_ones(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """They hold from the first exchange of keys on, unlike with paramiko."""
    set_connection("backupop", provider.sftp_connection(ciphers=["aes256-ctr", "aes192-ctr"]))
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == "ssh"
        (pid,) = children("ssh")
        assert b"\0Ciphers=aes256-ctr,aes192-ctr\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


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
    secret = key.splitlines()[3].encode()
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

    def seen() -> list[str]:
        found = []
        for pid in descendants(os.getpid()):
            with suppress(OSError):
                if secret in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(f"command line of {_program(pid)}")
                if secret in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(f"environment of {_program(pid)}")
        places = [tmp_path, home]
        for folder, before in there.items():
            new = [path for path in folder.iterdir() if path not in before]
            places += [path for path in new if not path.name.startswith(PREFIX)]
        for file in (file for place in places for file in (place, *place.rglob("*")) if file.is_file()):
            with suppress(OSError), file.open("rb") as opened:
                if secret in opened.read(MEGABYTE):
                    found.append(str(file))
        return found

    with ProviderHook("backupop") as hook:
        readers: list[Reader] = []
        thread, raised = in_thread(lambda: readers.append(hook.reader()))
        until((tmp_path / "started").exists, 5)
        assert seen() == []
        (tmp_path / "go").touch()
        thread.join(10)
        assert raised == [] and way(readers[0]) == "ssh"
        assert seen() == []
    assert secret in provider.backupop_key.read_bytes()  # what was looked for can be found


def test_environment_of_ssh_has_nothing_of_the_workers(
    provider: ProviderServer, set_connection: SetConnection, fake_ssh: FakeSsh, tmp_path: Path
) -> None:
    """Secrets are there, such as connections; and its messages are to be in English."""
    fake_ssh(f"#!/bin/sh\ncat /proc/$$/environ > {tmp_path}/environment\nexit 1\n")
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        assert hook._fast_reader() is None
    given = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().split("\0") if line)
    assert given == {"PATH": os.environ["PATH"], "LC_ALL": "C"}


# --- odd names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["host", "login", "subsystem"])
@pytest.mark.parametrize("odd", ["-oProxyCommand=touch {0}", "$(touch {0})", "x'; touch {0}; '", "-V"])
def test_no_name_is_an_option_or_a_command(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path, field: str, odd: str
) -> None:
    """It is just a name that nobody has."""
    odd = odd.format(tmp_path / "pwned")
    connection = provider.sftp_connection()
    if field == "subsystem":
        connection["extra"]["subsystem"] = odd
    else:
        connection[field] = odd
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        program = program_for(hook, None)
        assert program is not None
        with program, pytest.raises(ConnectionLost):
            Reader(SshChannel(program.command, 10))
    assert not (tmp_path / "pwned").exists()


def test_subsystem_that_the_server_has_not_is_told_of(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """By paramiko, after ssh has failed."""
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
        assert hook._fast_reader() is None
    told = (tmp_path / "arguments").read_text().splitlines()
    assert told[-8:] == ["-p", "22", "-l", "a b@c:d%h", "-s", "--", "fe80::1%eth0", "sftp"]


def test_address_of_version_6_is_connected_to(
    provider: ProviderServer, set_connection: SetConnection, home: Path
) -> None:
    """Here it is one that stands for 127.0.0.1, known by the name that paramiko would look for."""
    connection = provider.sftp_connection() | {"host": "::ffff:127.0.0.1"}
    del connection["extra"]["host_key"]
    (home / ".ssh/known_hosts").write_text(f"[::ffff:127.0.0.1]:{provider.port} {provider.host_key}\n")
    set_connection("backupop", connection)
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == "ssh"


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


def test_words_of_ssh_say_why_a_transfer_ended(
    provider: ProviderServer, set_connection: SetConnection, relay: Relay
) -> None:
    """Here that the server did not answer to a sign of life, which nobody would guess from a closed pipe."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection() | {"port": relay.port})
    with ProviderHook("backupop") as hook:
        hook.keepalive_interval = 1
        reader = hook.reader()
        with pytest.raises(ConnectionLost, match=r"Timeout, server 127\.0\.0\.1 not responding"):
            read(reader, path, lambda _: relay.frozen.set())


def test_silence_in_mid_transfer_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection, relay: Relay
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
    provider: ProviderServer, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    """In bounded time: both ways are tried, each as long as it may take."""
    monkeypatch.setattr(provider_module, "_CONNECT", 1)
    with server_that_says(words) as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        began = time.monotonic()
        with ProviderHook("backupop", stall_timeout=1) as hook, pytest.raises(ConnectionLost):
            hook.reader()
        assert time.monotonic() - began < 10
    assert not children("ssh")


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_server_that_is_not_there_is_a_lost_connection_at_once(
    provider: ProviderServer, set_connection: SetConnection, no_paramiko: None, host: str
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
    monkeypatch: pytest.MonkeyPatch,
    words: bytes,
) -> None:
    """Neither in our errors nor in what is logged, by us or by paramiko."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(provider_module, "_CONNECT", 1)
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
        "#!/bin/sh\n"
        "printf '%8000s\\n\\033]0;owned\\007\\r\\n@@@@@@\\r\\nwhy\\377\\r\\n' notice >&2; exit 255\n"
    )
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        assert hook._fast_reader() is None
    (line,) = (line for line in capfd.readouterr().out.split("\n") if "program ssh" in line)
    assert line.isprintable()
    assert r"program ssh: \x1b]0;owned\x07 / why\xff " in line


def test_close_from_another_thread_ends_a_transfer(
    provider: ProviderServer, set_connection: SetConnection
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
        until(lambda: not children("ssh"), 5, every=0.02)


def test_close_while_ssh_logs_in_ends_that(
    provider: ProviderServer, set_connection: SetConnection, no_paramiko: None
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
            until(lambda: not children("ssh") and not children("cat"), 5, every=0.02)


def test_nothing_is_left_of_many_connections(provider: ProviderServer, set_connection: SetConnection) -> None:
    """No descriptor and no process, be they good or bad."""
    set_connection("good", provider.sftp_connection())
    set_connection("bad", provider.sftp_connection() | {"port": CLOSED_PORT})

    def connect(times: int) -> None:
        for _ in range(times):
            with ProviderHook("good") as hook:
                assert way(hook.reader()) == "ssh"
            with ProviderHook("bad") as hook, pytest.raises(ConnectionLost):
                hook.reader()

    connect(1)
    gc.collect()
    gc.disable()  # nothing may depend on it
    try:
        files, processes = len(os.listdir("/proc/self/fd")), set(descendants(os.getpid()))
        connect(50)
        # What earlier tests left may end meanwhile.
        assert len(os.listdir("/proc/self/fd")) <= files
        until(lambda: not set(descendants(os.getpid())) - processes, 5, every=0.02)
    finally:
        gc.enable()


@pytest.mark.parametrize("logged_in", [True, False])
def test_nothing_is_left_of_a_task_that_is_killed(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    logged_in: bool,
) -> None:
    """As the kernel kills for want of memory: without a chance to end anything."""
    monkeypatch.setattr(provider_module, "_CONNECT", 2)
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
            running = {"ssh": 1, "cat": 0 if logged_in else 1}
            until(lambda: {name: len(children(name, task)) for name in running} == running, 5, every=0.02)
            left = descendants(task)
        finally:
            os.kill(task, signal.SIGKILL)
            os.waitpid(task, 0)
        until(lambda: not any(_program(pid) == "cat" for pid in left), 1, every=0.02)
        until(lambda: not any(_program(pid) == "ssh" for pid in left), 4, every=0.02)


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
    assert len(ssh.said()) <= 2000
    ssh.close()


def test_new_keys_are_agreed_on_in_mid_transfer(
    provider: ProviderServer, set_connection: SetConnection, fake_ssh: FakeSsh, tmp_path: Path
) -> None:
    """ssh then has to know the host key again, although what told it is gone."""
    fake_ssh(f'#!/bin/sh\nexec {SSH} -v -E {tmp_path}/log -o RekeyLimit=1M "$@"\n')
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


def test_words_of_ssh_never_stop_it() -> None:
    """A server's log may come that way; what was said last is kept."""
    script = """
import os
for number in range(300):
    os.read(0, 5)
    os.write(2, b"%d" % number + b"x" * 400 + b"\\n")
    os.write(1, b"hello")
"""
    channel = SshChannel([sys.executable, "-c", script], 5)
    try:
        for _ in range(300):
            channel.sendall(b"12345")
            assert channel.recv(10) == b"hello"
        with pytest.raises(EOFError, match="299x"):
            channel.recv(10)
    finally:
        channel.close()
