"""What is on a machine that a script sets up, and what it lets the accounts do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import paramiko

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.hooks.provider import account as account_of
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from demo.provisioned import ProvisionedServer

DROP_IN = "/etc/ssh/sshd_config.d/10-mdbackup-web.conf"
KEYS = "/etc/ssh/mdbackup/web"
MAIN = "/etc/ssh/sshd_config"
Provision = Callable[..., str]


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what is in a folder, each path's mode, owner and content, without what useradd leaves behind."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # Copies of the account files before the last change, and locks.
        if re.fullmatch(r"(passwd|shadow|group|gshadow|subuid|subgid)-|\.pwd\.lock|.*\.lock", name):
            continue
        about = path.lstat()
        content: object = os.readlink(path) if path.is_symlink() else None
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
        found[name] = (oct(about.st_mode), about.st_uid, about.st_gid, content)
    return found


def machine(server: ProvisionedServer) -> dict[str, dict[str, tuple[object, ...]]]:
    """Return all that a script may have changed on a machine."""
    return {name: tree(server.root / name) for name in ("etc", "home", "srv", "usr/local/lib")}


def done(server: ProvisionedServer, script: str) -> str:
    """Run a script that must succeed, and return what it printed."""
    result = server.run_script(script)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(server: ProvisionedServer, script: str, because: str) -> None:
    """Run a script that must refuse, saying why in one line, without leaving any change."""
    before = machine(server)
    result = server.run_script(script)
    assert result.returncode == 1
    assert because in result.stderr
    assert machine(server) == before


def take_cron(server: ProvisionedServer) -> None:
    """Have a machine with the directory of cron's jobs, and without cron."""
    server.run("mkdir", "-p", "/etc/cron.d")
    for program in ("sbin/cron", "sbin/crond", "bin/cron", "bin/crond", "bin/crontab"):
        if (server.root / "usr" / program).exists():
            server.run("mount", "--bind", "/dev/null", f"/usr/{program}")


def give_cron(server: ProvisionedServer) -> None:
    """Have a machine with a program that is called like cron; none of its jobs is started."""
    server.run("mkdir", "-p", "/etc/cron.d")
    give = "cp -a /usr/sbin /run/sbin; rm -f /run/sbin/cron; cp /bin/true /run/sbin/cron"
    assert server.run("sh", "-ec", f"{give}; mount --bind /run/sbin /usr/sbin").stderr == ""


def read(connection_id: str, path: bytes) -> bytes:
    """Return a file of the provider, by the way that backups take."""
    with ProviderHook(connection_id) as hook:
        reader = hook.reader()
        reader.submit(Wanted(path, None, lambda _: Stream(len)))
        (fetched,) = reader.wait()
        assert isinstance(fetched, Fetched) and fetched.content is not None
        return fetched.content


def say(connection_id: str, command: str | None) -> str:
    """Return what an exec, or for None a shell, answers when it gets no input."""
    with client_of(account_of(connection_id), BoundedTransport) as client:
        transport = client.get_transport()
        assert transport is not None
        channel = transport.open_session()
        channel.settimeout(10)
        channel.set_combine_stderr(True)
        try:
            if command is None:
                channel.invoke_shell()
                channel.sendall(b"id\n")
            else:
                channel.exec_command(command)
            channel.shutdown_write()
            return channel.makefile("rb").read().decode(errors="replace")
        except (paramiko.SSHException, OSError) as error:
            return f"refused: {error}"
