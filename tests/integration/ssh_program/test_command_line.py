"""What the program ssh is asked for: what has no say in it, and odd names."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from asyncssh import import_private_key

from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.hooks.ssh_program import SshChannel, program_for
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider
from airflow_mdbackup.scheme.transfer.sftp import Reader
from demo.processes import descendants
from demo.sshd import ProviderServer
from demo.sshd_files import new_key
from tests.integration.ssh_program.over_ssh import (
    MEGABYTE,
    SSH,
    FakeSsh,
    SetConnection,
    children,
    in_thread,
    over_ssh,
    program_of,
    way,
)
from tests.isolation import PREFIX
from tests.waiting import until

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
                    found.append(f"command line of {program_of(pid)}")
                if has_secret(Path(f"/proc/{pid}/environ").read_bytes()):
                    found.append(f"environment of {program_of(pid)}")
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
