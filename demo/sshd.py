"""A throw-away OpenSSH server on 127.0.0.1 that plays server A: a provider with its two accounts.

Three ways, the first one possible is taken:

    namespace   root. sshd runs in a private mount namespace with a passwd, group, shadow and /etc/ssh of its
                own, and the chroot is bind-mounted onto a directory that sshd trusts (it refuses a chroot
                below a world-writable directory such as /tmp). The machine's own files are never written.
    users       root where namespaces are forbidden. Two users are made with useradd and removed at the end,
                the tree lies in a new directory below /srv, also removed at the end.
    own         not root. Both accounts are the user who calls, distinguished by their keys, and nobody can be
                chrooted: see `ProviderServer.prefix`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, TextIO

from demo import processes
from demo.sshd_files import (
    ProviderServerError,
    chroot_settings,
    configuration,
    new_key,
    program,
    run,
    write_authorized_keys,
    write_private_accounts,
)

STRICT_SFTP_OPTIONS = "-R -p open,close,read,fstat,stat,lstat,realpath,limits"
"""Options of internal-sftp that leave just what reading named files takes: no writing, no listing."""

_USERS_FOLDER = "/srv/mdbackup-demo-"

NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--"]

# $1: folder of the server, $2: directory to mount the tree on, $3: sshd. sshd becomes the first process of
# its process namespace, so that the kernel ends every login with it. /etc is replaced as a whole, by a copy
# in memory: a mount on /etc/passwd itself would be gone as soon as somebody adds a user to the machine.
ENTER_NAMESPACE = """
set -eu
mkdir -p "$1/memory"
mount -t tmpfs -o mode=0755 tmpfs "$1/memory"
cp -a /etc/. "$1/etc/." "$1/memory/"
mount --bind "$1/memory" /etc
mount --bind "$1/ssh" /etc/ssh
mount --bind "$1/chroot" "$2"
mount --bind "$1/tmp" /tmp
test -d /run/sshd || { mount -t tmpfs -o mode=0755 tmpfs /run; mkdir -m 0755 /run/sshd; }
exec "$3" -D -e -f /etc/ssh/sshd_config
"""


class ProviderServer:
    """A throw-away OpenSSH server with the account `backupop` and an index account; a context manager.

    After `start`:

    - port, host_key ("ssh-ed25519 AAAA..."), backupop_key and index_key (files with the private keys),
      backupop and index_user (login names), way ("namespace", "users" or "own"), chrooted.
    - tree: the provider's files as the calling process sees them. Put there what is to be backed up. It holds
      /.mdbackup, which belongs to the index account and is all that this account may write.
    - chroot: where the index account sees what `backupop` sees as `/`.
    - tmp: the server's /tmp as the calling process sees it; its own where there is a namespace.
    - prefix: what comes before the path of a file of the tree in the eyes of `backupop`. Empty when chrooted.
      Without a chroot `backupop` sees the whole machine, and a file tree/backups/x is not `/backups/x` but
      `<prefix>/backups/x`: configure `source` and `index` with it.

    :param folder: directory for keys, configuration and log; made if missing. It stays when the server ends.
    :param sftp_options: options of `backupop`'s internal-sftp.
    :param subsystem: name of the only SFTP subsystem offered; the original scheme has `sftpi`.
    :param way: take this way instead of the first one possible.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sftp_options: str = STRICT_SFTP_OPTIONS,
        subsystem: str = "sftp",
        way: str | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.sftp_options = sftp_options
        self.subsystem = subsystem
        self.way = way or ("own" if os.geteuid() else "namespace" if _namespaces_allowed() else "users")
        self.chrooted = self.way != "own"
        self.backupop, self.index_user = "backupop", "mdbackup-index"
        self.tree = self.folder / "chroot"
        self.chroot, self.prefix = "/", ""
        self.tmp = Path("/tmp")
        self.port = 0
        self.host_key = ""
        self.backupop_key = self.folder / "keys" / "backupop"
        self.index_key = self.folder / "keys" / "index"
        self._ssh = self.folder / "ssh"
        self._server: subprocess.Popen[bytes] | None = None
        self._made_directories: list[Path] = []
        self._made_users: list[str] = []
        self._index_ids = (-1, -1)
        self._lock: TextIO | None = None

    def __enter__(self) -> ProviderServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, and return when it answers.

        :raises ProviderServerError: a program is missing, or sshd does not come up; with its log.
        """
        for name in ("sshd", "ssh-keygen"):
            program(name)
        try:
            command = {"namespace": self._namespace, "users": self._users, "own": self._own}[self.way]()
            self._server = processes.start(command, log=self.folder / "sshd.log", death_signal="KILL")
            self._wait_until_it_answers(self._server)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and every login, and remove users and directories made outside of `folder`."""
        if self._server:
            processes.stop([self._server])
            self._server = None
        while self._made_users:
            _remove_user(self._made_users.pop())
        while self._made_directories:
            shutil.rmtree(self._made_directories.pop())
        if self._lock:
            self._lock.close()

    def empty_tree(self) -> None:
        """Remove everything from the tree, and make an empty /.mdbackup for the index account."""
        self.tree.mkdir(parents=True, exist_ok=True)
        self.tree.chmod(0o755)
        run(["chmod", "-R", "u+rwX", self.tree])
        for entry in self.tree.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        index_folder = self.tree / ".mdbackup"
        index_folder.mkdir()
        index_folder.chmod(0o755)
        if self.chrooted:
            os.chown(index_folder, *self._index_ids)

    def sftp_connection(self, **extra: Any) -> dict[str, Any]:
        """Return an Airflow connection for `backupop`, to be dumped as JSON into AIRFLOW_CONN_<ID>."""
        if self.subsystem != "sftp":
            extra = {"subsystem": self.subsystem} | extra
        return self._connection("sftp", self.backupop, self.backupop_key, extra)

    def ssh_connection(self, **extra: Any) -> dict[str, Any]:
        """Return an Airflow connection for the index account, to be dumped as JSON into AIRFLOW_CONN_<ID>."""
        return self._connection("ssh", self.index_user, self.index_key, extra)

    def force_index_command(self, command: str | None) -> None:
        """Have the index account's key run `command`, whatever is asked for, from the next login on."""
        forced = "" if command is None else f',command="{command}"'
        file = self._ssh / "authorized_keys" / self.index_user
        key = Path(f"{self.index_key}.pub").read_text().strip()
        others = [line for line in file.read_text().splitlines() if not line.endswith(key)]
        file.write_text("\n".join([*others, f"restrict{forced} {key}"]) + "\n")

    def processes(self) -> list[int]:
        """Return the ids of the processes that run on the server: sshd's own, and those of its logins."""
        return processes.descendants(self._server.pid) if self._server else []

    def log_text(self) -> str:
        """Return what sshd has logged so far."""
        log = self.folder / "sshd.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _connection(self, kind: str, login: str, key: Path, extra: dict[str, Any]) -> dict[str, Any]:
        return {
            "conn_type": kind,
            "host": "127.0.0.1",
            "port": self.port,
            "login": login,
            "extra": {"key_file": str(key), "host_key": self.host_key} | extra,
        }

    def _namespace(self) -> list[str | Path]:
        self._index_ids = write_private_accounts(self.folder / "etc", self.backupop, self.index_user)
        self.chroot = _mount_point(self.folder)
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir(exist_ok=True)
        self.tmp.chmod(0o1777)
        self._write_server_files(seen_as=Path("/etc/ssh"))
        shell = ["/bin/sh", "-c", ENTER_NAMESPACE, "enter-namespace"]
        return [*NAMESPACE, *shell, self.folder, self.chroot, program("sshd")]

    def _users(self) -> list[str | Path]:
        remove_abandoned_users()
        suffix = secrets.token_hex(3)
        folder = self._make_directory(Path(f"{_USERS_FOLDER}{suffix}"))
        self._lock = (folder / "new-lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (folder / "new-lock").rename(folder / "lock")  # whoever finds it, finds it held
        self.backupop, self.index_user = f"backupop-{suffix}", f"mdbackup-index-{suffix}"
        for name, shell in ((self.backupop, "/bin/false"), (self.index_user, "/bin/sh")):
            options = ["--system", "--user-group", "--no-create-home", "--home-dir", "/", "--shell", shell]
            # Without PAM, sshd refuses a locked account, which useradd makes unless it is given a password.
            run(["useradd", *options, "--password", "*", name])
            self._made_users.append(name)
        index_account = pwd.getpwnam(self.index_user)
        self._index_ids = (index_account.pw_uid, index_account.pw_gid)
        self._ssh = folder / "ssh"
        self.tree = folder / "chroot"
        self.chroot = str(self.tree)
        if not Path("/run/sshd").exists():
            self._make_directory(Path("/run/sshd"))
        self._write_server_files(seen_as=self._ssh)
        return [program("sshd"), "-D", "-e", "-f", self._ssh / "sshd_config"]

    def _own(self) -> list[str | Path]:
        if os.geteuid() == 0:
            raise ProviderServerError("The way 'own' is for other users than root: root logins are refused.")
        self.backupop = self.index_user = pwd.getpwuid(os.geteuid()).pw_name
        self.prefix = str(self.tree)
        self._write_server_files(seen_as=self._ssh)
        return [program("sshd"), "-D", "-e", "-f", self._ssh / "sshd_config"]

    def _make_directory(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        self._made_directories.append(directory)
        return directory

    def _write_server_files(self, *, seen_as: Path) -> None:
        """Write keys, authorised keys, configuration and an empty tree; sshd sees them below `seen_as`."""
        for directory in (self._ssh, self.backupop_key.parent):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o755)
        self.host_key = new_key(self._ssh / "host_key")
        # Without a Match block for one of two users, the key itself says what its holder may do.
        forced = "" if self.chrooted else f',command="internal-sftp {self.sftp_options}"'
        keys = [
            (self.backupop, f"restrict{forced} {new_key(self.backupop_key)}"),
            (self.index_user, f"restrict {new_key(self.index_key)}"),
        ]
        write_authorized_keys(self._ssh / "authorized_keys", keys)
        self.port = processes.free_port()
        settings = configuration(
            folder=seen_as,
            port=self.port,
            users=sorted({self.backupop, self.index_user}),
            subsystem=self.subsystem,
            strict_modes=self.chrooted,
        )
        if self.chrooted:
            settings += chroot_settings(
                user=self.backupop, chroot=self.chroot, sftp_options=self.sftp_options
            )
        (self._ssh / "sshd_config").write_text("\n".join(settings) + "\n")
        self.empty_tree()

    def _wait_until_it_answers(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 15
        while server.poll() is None and time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                    if connection.recv(8) == b"SSH-2.0-" and server.poll() is None:
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise ProviderServerError(
            f"The throw-away sshd ({self.way}) does not answer on port {self.port}. Its log, "
            f"{self.folder / 'sshd.log'}:\n{self.log_text()}"
        )


def remove_abandoned_users() -> None:
    """Remove the users and directories of servers whose process was killed before it could."""
    for folder in Path("/").glob(f"{_USERS_FOLDER.lstrip('/')}*"):
        with contextlib.suppress(OSError), (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is in use
            for name in ("backupop", "mdbackup-index"):
                user = f"{name}-{folder.name.rpartition('-')[2]}"
                if user in {account.pw_name for account in pwd.getpwall()}:
                    _remove_user(user)
            shutil.rmtree(folder)


def _remove_user(name: str) -> None:
    """Remove a user, who may not be logged in any more; what was killed may take a moment to be gone."""
    deadline = time.monotonic() + 10
    while True:
        try:
            run(["userdel", name])
            return
        except ProviderServerError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _namespaces_allowed() -> bool:
    if not shutil.which("unshare"):
        return False
    probe = ["mount", "--bind", "/etc/passwd", "/etc/passwd"]
    return subprocess.run([*NAMESPACE, *probe], capture_output=True).returncode == 0


def _mount_point(folder: Path) -> str:
    """Return a directory that sshd accepts as a chroot, and that hides nothing of `folder` when covered."""
    for candidate in map(Path, ("/srv", "/mnt", "/media", "/opt")):
        if candidate.is_dir() and not candidate.is_symlink() and not folder.is_relative_to(candidate):
            return str(candidate)
    raise ProviderServerError(
        f"None of /srv, /mnt, /media and /opt can hold the chroot of {folder}: make /srv."
    )
