"""The way over the program ssh: which way is taken, and what a connection says of it.

Whatever a connection says holds for the other way as well, over asyncssh.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import airflow_mdbackup.hooks.provider as provider_module
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.hooks.ssh_program import program_for
from airflow_mdbackup.scheme.errors import AccessRefused
from demo.sshd import ProviderServer
from demo.sshd_files import new_key
from tests.integration.conftest import LONG_LINE
from tests.integration.ssh_program.over_ssh import TO_LOG, SetConnection, children, in_thread, put, read, way


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
