"""Keys of all forms, and SSH servers that take them: OpenSSH's with some settings, and asyncssh's."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import asyncssh

from demo import processes
from demo.processes import free_port
from demo.sshd import NAMESPACE, ProviderServer
from demo.sshd_files import program, run
from tests.integration.connections_table import FORMS, PHRASE
from tests.waiting import until

PRINCIPAL = "tests"
PASSWORD = "pass word"
CONTENT = b"content of a file"
HOST_KINDS = ("ed25519", "ecdsa", "rsa")


class Keys:
    """The private keys of accounts in one folder, and the host keys in another. All servers have the same."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder / "keys", folder / "host"
        self.folder.mkdir()
        self.host.mkdir()
        for kind in HOST_KINDS:
            self._new(self.host / kind, kind)
            self._new(self.folder / kind, kind)
        for path, kind in ((self.host / "other", "ed25519"), (self.host / "other-rsa", "rsa"),
                           (self.host / "ca", "ed25519"), (self.folder / "wrong", "ed25519"),
                           (self.folder / "certified", "ed25519")):  # fmt: skip
            self._new(path, kind)
        ca = self.host / "ca"
        run(
            [
                "ssh-keygen",
                "-q",
                "-s",
                ca,
                "-h",
                "-I",
                "x",
                "-n",
                "127.0.0.1,localhost,web.example.org",
                f"{self.host / 'ed25519'}.pub",
            ]
        )
        run(["ssh-keygen", "-q", "-s", ca, "-I", "x", "-n", PRINCIPAL, f"{self.folder / 'certified'}.pub"])
        for name in FORMS:
            self._in_form(name)
        self._odd_ones()

    def _new(self, path: Path, kind: str) -> None:
        bits = ["-b", "2048"] if kind == "rsa" else []
        run(["ssh-keygen", "-q", "-t", kind, *bits, "-N", "", "-C", "", "-f", path])

    def _in_form(self, name: str) -> None:
        """Write the key in a form, and once more with a passphrase."""
        kind, _, form = name.partition("-")
        key = asyncssh.read_private_key(self.folder / kind)
        for path, phrase in ((self.folder / name, None), (self.folder / f"{name}-secret", PHRASE)):
            if kind == "ed25519" and form:  # ssh-keygen only has OpenSSH's form of it
                path.write_bytes(key.export_private_key("pkcs8-pem", phrase))
                path.chmod(0o600)
            elif path.name != kind:
                shutil.copy(self.folder / kind, path)
                how = ["-m", form] if form else ["-a", "1"]  # rounds, each of which takes time
                run(["ssh-keygen", "-q", "-p", "-P", "", "-N", phrase or "", *how, "-f", path])

    def _odd_ones(self) -> None:
        for name in ("ed25519", "rsa-PEM", "ed25519-secret"):
            text = self.text(name)
            self._write(f"{name}-CRLF", text.replace("\n", "\r\n"))
            self._write(f"{name}-bare", text.rstrip("\n"))
            self._write(f"{name}-blank", f"\n\n{text}\n \n")
        text = self.text("ed25519")
        self._write("public", (self.folder / "ed25519.pub").read_text())
        self._write("putty", "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\nComment: x\n")
        self._write("garbage", "my key is under the mat\n")
        self._write("half", "".join(text.splitlines(keepends=True)[:3]))
        self._write("escaped", text.replace("\n", "\\n"))
        self._write("unreadable", text)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_bytes(text.encode())
        (self.folder / name).chmod(0o600)

    def text(self, name: str) -> str:
        return (self.folder / name).read_bytes().decode()

    def public(self, name: str) -> str:
        """Return a server's public key, as `ssh-ed25519 AAAA...`."""
        return " ".join((self.host / f"{name}.pub").read_text().split()[:2])

    def authorized(self) -> list[str]:
        """Return the lines of an authorized_keys file, without options."""
        public = [(self.folder / f"{kind}.pub").read_text().strip() for kind in HOST_KINDS]
        return [*public, f'cert-authority,principals="{PRINCIPAL}" {self.public("ca")}']


class Names(dict[str, str]):
    """What stands for the names in the texts of a case."""

    def __init__(self, keys: Keys, port: int, **more: str) -> None:
        super().__init__(keys=str(keys.folder), port=str(port), **more)
        self._keys = keys
        salt = b"0123456789abcdefghij"
        digest = hmac.new(salt, b"[127.0.0.1]:%d" % port, hashlib.sha1).digest()
        hashed = "|".join(base64.b64encode(part).decode() for part in (salt, digest))
        self["hashed"] = f"|1|{hashed} {keys.public('ed25519')}"

    def __missing__(self, key: str) -> str:
        kind, _, name = key.partition(" ")
        if kind == "key":
            return self._keys.text(name)
        public = self._keys.public(name)
        return public.split()[1] if kind == "base64" else public


class Sshd(ProviderServer):
    """An sshd with all host keys, whose accounts take all keys.

    :param settings: lines of sshd_config, which come first; `{tree}` is filled in.
    :param program: what is the SFTP server of the index account, instead of sshd's own; likewise.
    """

    def __init__(self, folder: Path, keys: Keys, *settings: str, program: str = "internal-sftp") -> None:
        super().__init__(folder)
        self.keys, self.settings, self.program = keys, settings, program

    def _write_server_files(self, *, seen_as: Path) -> None:
        super()._write_server_files(seen_as=seen_as)
        lines = [setting.format(tree=self.seen) for setting in self.settings]
        for kind in HOST_KINDS:
            shutil.copy(self.keys.host / kind, self._ssh / kind)
            lines.append(f'HostKey "{seen_as}/{kind}"')
        shutil.copy(self.keys.host / "ed25519-cert.pub", self._ssh)
        lines.append(f'HostCertificate "{seen_as}/ed25519-cert.pub"')
        file = self._ssh / "sshd_config"
        text = file.read_text().replace(f'HostKey "{seen_as}/host_key"\n', "")
        text = text.replace(
            "Subsystem sftp internal-sftp\n", f"Subsystem sftp {self.program.format(tree=self.seen)}\n"
        )
        file.write_text("\n".join([*lines, text]))
        for user in {self.backupop, self.index_user}:
            with (self._ssh / "authorized_keys" / user).open("a") as file_of_user:
                file_of_user.writelines(f"{line}\n" for line in self.keys.authorized())
        (self.tree / "file").write_bytes(CONTENT)

    @property
    def seen(self) -> str:
        """Where the index account sees the tree."""
        return self.chroot if self.chrooted else str(self.tree)


class OtherServer:
    """A server of another kind; a context manager. Its accounts are both that of `login`."""

    login = "root"

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.folder, self.keys = folder, keys
        self.backupop = self.index_user = self.login
        self.tree = folder / "tree"
        self.prefix = str(self.tree)
        self.port = free_port()

    def __enter__(self) -> OtherServer:
        self.tree.mkdir(parents=True)
        self._server = processes.start(self.command(), log=self.folder / "log", death_signal="KILL")
        until(self._answers, 30)
        return self

    def __exit__(self, *error: object) -> None:
        processes.stop([self._server])

    def command(self) -> list[str | Path]:
        """Write what the server needs, and return how to start it."""
        raise NotImplementedError

    def _answers(self) -> bool:
        assert self._server.poll() is None, (self.folder / "log").read_text(errors="replace")
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


class Dropbear(OtherServer):
    """dropbear, with OpenSSH's `sftp-server`. It looks for keys in the account's home, so it gets one."""

    def command(self) -> list[str | Path]:
        home = self.folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (home / ".ssh" / "authorized_keys").write_text("\n".join(self.keys.authorized()[:3]) + "\n")
        entries = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        for entry in entries:
            if entry[0] == self.login:
                entry[5:] = [str(home), "/bin/sh"]
        (self.folder / "passwd").write_text("".join(":".join(entry) + "\n" for entry in entries))
        key = self.folder / "host_key"
        run(["dropbearconvert", "openssh", "dropbear", self.keys.host / "ed25519", key])
        script = 'mount --bind "$1" /etc/passwd && shift && exec "$@"'
        mounted = [*NAMESPACE, "/bin/sh", "-c", script, "dropbear", self.folder / "passwd"]
        return [*mounted, program("dropbear"), "-F", "-E", "-s", "-p", f"127.0.0.1:{self.port}",
                "-r", key, "-P", self.folder / "pid"]  # fmt: skip


class ProFtpd(OtherServer):
    """ProFTPD with mod_sftp, chrooted into its tree."""

    login = "backupop"

    def __init__(self, folder: Path, keys: Keys) -> None:
        super().__init__(folder, keys)
        self.prefix = ""

    def command(self) -> list[str | Path]:
        keys = [run_text(["ssh-keygen", "-e", "-f", self.keys.folder / f"{kind}.pub"]) for kind in HOST_KINDS]
        (self.folder / "authorized").write_text("".join(keys))
        users, groups = self.folder / "users", self.folder / "groups"
        users.write_text(f"{self.login}:*:0:0::{self.tree}:/bin/false\n")
        groups.write_text("root:x:0:\n")
        for file in (users, groups):
            file.chmod(0o600)
        lines = [
            "ServerType standalone", "DefaultAddress 127.0.0.1", f"Port {self.port}", "UseIPv6 off",
            "LoadModule mod_sftp.c", f"PidFile {self.folder}/pid", f"ScoreboardFile {self.folder}/scoreboard",
            f"SystemLog {self.folder}/system.log", "WtmpLog off", "TransferLog none",
            "User root", "Group root", "RootLogin on", "UseReverseDNS off",
            "AuthOrder mod_auth_file.c", f"AuthUserFile {users}",
            f"AuthGroupFile {groups}",
            "RequireValidShell off", "DefaultRoot ~", "SFTPEngine on", f"SFTPHostKey {self.keys.host}/rsa",
            f"SFTPHostKey {self.keys.host}/ed25519", "SFTPAuthMethods publickey",
            f"SFTPAuthorizedUserKeys file:{self.folder}/authorized", f"SFTPLog {self.folder}/sftp.log",
        ]  # fmt: skip
        file = self.folder / "proftpd.conf"
        file.write_text("\n".join(lines) + "\n")
        return [program("proftpd"), "--nodaemon", "--config", file]


def run_text(command: list[Any]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class AsyncsshServer:
    """asyncssh's own server, in a thread of this process; a context manager.

    :ivar connections: how many there were.
    """

    backupop, index_user, prefix = "backupop", "mdbackup-index", ""

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.folder, self.keys = folder, keys
        self.tree = folder / "tree"
        self.port = free_port()
        self.connections: list[Any] = []

    def __enter__(self) -> AsyncsshServer:
        self.tree.mkdir(parents=True)
        (self.tree / "file").write_bytes(CONTENT)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._acceptor.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _listen(self) -> None:
        tree, connections = str(self.tree), self.connections

        class Account(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                connections.append(conn)

            def password_auth_supported(self) -> bool:
                return True

            def validate_password(self, username: str, password: str) -> bool:
                return password == PASSWORD

        def run_command(process: asyncssh.SSHServerProcess[str]) -> None:
            process.stdout.write("built\n")
            process.exit(0)

        authorized = asyncssh.import_authorized_keys("\n".join(self.keys.authorized()))
        self._acceptor = await asyncssh.listen(
            "127.0.0.1",
            self.port,
            server_factory=Account,
            server_host_keys=[str(self.keys.host / kind) for kind in HOST_KINDS],
            authorized_client_keys=authorized,
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=tree),
            process_factory=run_command,
        )
