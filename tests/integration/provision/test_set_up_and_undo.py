"""The printed script, run for real as root on a machine of its own: what is promised of the whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import paramiko
import pytest

from airflow_mdbackup.hooks.provider import IndexHook
from airflow_mdbackup.provider_side.programs import python_program
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost
from demo.provisioned import DEBIAN, WITHOUT_INCLUDE, ProvisionedServer, connections
from demo.sshd import _namespaces_allowed
from demo.sshd_files import new_key
from tests.integration.provision.machine import DROP_IN, Provision, done, machine, read, say

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)


def test_machine_to_set_up_changes_nothing_outside(server: ProvisionedServer) -> None:
    """Neither in the directories that it has of its own, nor in any other but its folder."""
    name = f"mdbackup-{os.getpid()}"
    for directory in ("/etc", "/srv", "/tmp", "/run"):
        assert server.run("touch", f"{directory}/{name}").returncode == 0
        assert not Path(directory, name).exists()
    for directory in ("/", "/usr/bin", "/var/lib", "/root"):
        assert "Read-only file system" in server.run("touch", f"{directory}/{name}").stderr
    assert server.run("touch", server.folder / name).returncode == 0
    assert (server.folder / name).exists()


@pytest.mark.parametrize("options", [(), ("--sftpi",)], ids=["plain", "sftpi"])
@pytest.mark.parametrize("server", [DEBIAN, WITHOUT_INCLUDE], ids=["debian", "rhel8"], indirect=True)
def test_script_makes_both_accounts_and_can_be_undone(
    server: ProvisionedServer,
    provision: Provision,
    connect: Callable[[str], object],
    options: tuple[str, ...],
) -> None:
    """With the printed lines both accounts log in at once; a second run changes nothing; undo is complete."""
    untouched = machine(server)
    script = provision("web", "--bind", "/srv/www:/backups", *options)
    output = done(server, script)
    assert "sshd was sent SIGHUP" in output

    connect(output)
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    for command in ("id", None):
        for account in ("web_backupop", "web_index"):
            assert "uid=" not in say(account, command)

    once = machine(server)
    again = done(server, script)
    assert "Nothing to change: everything is already set up." in again
    assert "* " not in again
    assert machine(server) == once
    assert connections(again) == connections(output)

    assert "Undone." in done(server, provision("web", "--undo"))
    assert machine(server) == untouched
    with pytest.raises((AccessRefused, ConnectionLost)):
        read("web_backupop", b"/backups/alpha")
    assert "Nothing to undo." in done(server, provision("web", "--undo"))


@pytest.mark.parametrize("shell", ["dash", "bash --posix", "busybox sh"])
def test_any_posix_shell_runs_the_scripts(
    server: ProvisionedServer, provision: Provision, shell: str
) -> None:
    """Debian's sh is dash, that of RHEL bash."""
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"there is no {shell}")
    untouched = machine(server)
    words = ("web", "--bind", "/srv/www:/backups", "--sftpi", "--path-unit")
    for script in (provision(*words), provision("web", "--undo")):
        result = server.run_script(script, shell)
        assert (result.returncode, result.stderr) == (0, "")
    assert machine(server) == untouched


def test_script_that_was_cut_off_on_its_way_does_nothing(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Wherever it ends, as when it comes through a pipe that broke."""
    untouched = machine(server)
    script = provision("web", "--bind", "/srv/www:/backups")
    lines = script.splitlines(keepends=True)
    for kept in (10, len(lines) // 3, len(lines) // 2, len(lines) - 1):
        server.run_script("".join(lines[:kept]))
        assert machine(server) == untouched


def test_other_users_keep_shell_and_sftp(
    server: ProvisionedServer, provision: Provision, tmp_path: Path
) -> None:
    """With the named subsystem they write by sftp as before, and `backupop` has the named one."""
    key = new_key(tmp_path / "alice")
    server.run("useradd", "--create-home", "--password", "*", "alice")
    (server.root / "home/alice/.ssh").mkdir()
    (server.root / "home/alice/.ssh/authorized_keys").write_text(key + "\n")
    done(server, provision("web", "--sftpi"))
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(
            "127.0.0.1", server.port, "alice", key_filename=str(tmp_path / "alice"), allow_agent=False
        )
        assert b"alice" in client.exec_command("id")[1].read()
        with client.open_sftp() as sftp:
            sftp.chdir("/tmp")
            assert "alpha" not in sftp.listdir("/")
            assert "etc" in sftp.listdir("/")


def test_page_can_be_followed_by_hand_with_the_same_result(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object], tmp_path: Path
) -> None:
    """Its commands for A, one after the other, make what the script makes, whatever umask root has."""
    output = done(server, provision("web", "--bind", "/srv/www:/backups"))
    connect(output)
    by_script = {name: (server.root / name).read_text() for name in (DROP_IN[1:], "etc/mdbackup/web.json")}
    done(server, provision("web", "--undo"))

    page = (Path(__file__).parents[3] / "docs/provider-setup.md").read_text()
    by_hand = page.partition("\n## By hand\n")[2].partition("\n### Making it hold\n")[0]
    blocks = re.findall("^```sh\n(.*?)^```$", by_hand, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    on_a = "".join(block for block in blocks if "ssh-keygen" not in block and "python3 -c" not in block)
    for variable, key in (("BACKUPOP", "web_backupop"), ("INDEX", "web_index")):
        public = " ".join((tmp_path / "keys" / f"{key}.pub").read_text().split()[:2])
        on_a = on_a.replace(f"KEY_OF_{variable}='ssh-ed25519 AAAA...'", f"KEY_OF_{variable}='{public}'")
    (server.root / "srv/indexer.py").write_bytes(python_program())
    assert done(server, f"set -e\numask 027\ncd /srv\n{on_a.replace('192.0.2.7', '127.0.0.1')}") == ""
    server.stop_sshd()
    server.start_sshd()

    assert (server.root / DROP_IN[1:]).read_text() == by_script[DROP_IN[1:]]
    configuration = json.loads((server.root / "etc/mdbackup/web.json").read_text())
    assert configuration == json.loads(by_script["etc/mdbackup/web.json"])
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    assert "uid=" not in say("web_index", "id")


def test_page_tells_how_to_build_the_index_by_a_shell_account(
    server: ProvisionedServer,
    provision: Provision,
    connect: Callable[[str], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the account that reads; nothing of the indexer is installed for it."""
    found = connect(done(server, provision("self", "--bind", "/srv/www:/backups")))
    page = (Path(__file__).parents[3] / "docs/provider-setup.md").read_text()
    block = page.partition("\n### A shell account\n")[2].partition("```sh\n")[2].partition("```")[0]
    block = block.replace("ssh-ed25519 AAAA...", new_key(tmp_path / "shell")).replace(
        "192.0.2.7", "127.0.0.1"
    )
    lines = [line for line in block.splitlines() if not line.startswith("setfacl ")]  # all may read here
    assert len(lines) == 4
    assert done(server, "set -e\n" + "\n".join(lines)) == ""
    shell = {**found["self_backupop"], "conn_type": "ssh", "login": "indexer"}
    shell["extra"] = {**shell["extra"], "key_file": str(tmp_path / "shell")}
    monkeypatch.setenv("AIRFLOW_CONN_SHELL", json.dumps(shell))
    with IndexHook("shell") as hook:
        request = IndexRequest(b"/home/backupop", (b"/backups",), b"/.mdbackup/index.md5")
        assert hook.build_index(request).files == 1
    assert b"  /backups/alpha\n" in read("self_backupop", b"/.mdbackup/index.md5")


def test_files_that_cannot_be_read_are_shown_wherever_the_administrator_is(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As in root's own directory, into which neither account comes."""
    (server.root / "srv/www/secret").touch(mode=0o600)
    (server.root / "home/private").mkdir(mode=0o700)
    output = done(server, provision("web", "--bind", "/srv/www:/backups"))
    commands = re.findall("^ +(.*runuser .*)$", output, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        shown = server.run("sh", "-c", f"cd /home/private\n{command}")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout == "/home/backupop/backups/secret\n"
