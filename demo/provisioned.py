"""A server A to be set up: a machine of its own in which a script may change everything as root.

It is a copy of this machine in a private mount and process namespace: /etc, /home, /srv and /usr/local/lib
are copied into memory, /run, /var/log and /tmp are empty, and what else is on the file system of / is
read-only, but for the server's own folder. So what runs in there changes nothing of that outside (other file
systems that are mounted can be written to), and all of it is gone when the server stops. There is no running
systemd in there. Only root can have one, where namespaces are allowed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from demo import processes
from demo.sshd import NAMESPACE
from demo.sshd_files import ProviderServerError, program

COPIED = ("/etc", "/home", "/srv", "/usr/local/lib")
EMPTY = ("/run", "/var/log")

# $1: folder for the copies, $2: file to make when all is ready, $3: directories to copy, $4: to be empty.
_SETUP = """
set -eu
mount -t proc proc /proc
folder=$(dirname "$1")
mount --bind "$folder" "$folder"
mount -o remount,bind,ro /
mkdir -p "$1"
mount -t tmpfs -o mode=0755 tmpfs "$1"
for directory in $3; do
    mkdir -p "$1$directory"
    cp -a "$directory/." "$1$directory"
done
for directory in $3; do mount --bind "$1$directory" "$directory"; done
for directory in $4; do mount -t tmpfs -o mode=0755 tmpfs "$directory"; done
mkdir -p /etc/ssh/sshd_config.d
ssh-keygen -A >/dev/null
# A /tmp of its own, in which the folder is still found.
mkdir -m 1777 "$1/tmp"
case $folder in
    /tmp/*)
        mkdir -p "$1$folder"
        mount --bind "$folder" "$1$folder" ;;
esac
mount --rbind "$1/tmp" /tmp
touch "$2"
exec sleep infinity
"""

DEBIAN = """\
Include /etc/ssh/sshd_config.d/*.conf
KbdInteractiveAuthentication no
UsePAM no
X11Forwarding yes
PrintMotd no
AcceptEnv LANG LC_*
Subsystem sftp /usr/lib/openssh/sftp-server
"""
"""An sshd_config as Debian has it, but for PAM, which not every machine of tests lets work."""

WITHOUT_INCLUDE = """\
SyslogFacility AUTHPRIV
PasswordAuthentication yes
ChallengeResponseAuthentication no
UsePAM no
X11Forwarding yes
Subsystem sftp /usr/lib/openssh/sftp-server
Match Group nobody
    X11Forwarding no
"""
"""An sshd_config as RHEL 8 has it, whose OpenSSH 8.0 knows no Include, with a Match block at its end."""


class ProvisionedServer:
    """A copy of this machine with an sshd on 127.0.0.1; a context manager.

    - root: the machine's `/` as the calling process sees it.
    - port: where sshd listens once `start_sshd` was called.

    :param folder: for the copies and the logs; made if missing.
    :param sshd_config: the configuration before anything is set up; the port is put before it.
    """

    def __init__(self, folder: Path, *, sshd_config: str = DEBIAN) -> None:
        self.folder = folder.resolve()
        self.port = processes.free_port()
        self._sshd_config = f"Port {self.port}\nListenAddress 127.0.0.1\n{sshd_config}"
        self._keeper: subprocess.Popen[bytes] | None = None
        self._sshd: subprocess.Popen[bytes] | None = None
        self._inside = 0

    def __enter__(self) -> ProvisionedServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make the machine. sshd does not run yet.

        :raises ProviderServerError: that is not possible, with what the system says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ready, log = self.folder / "ready", self.folder / "machine.log"
        ready.unlink(missing_ok=True)
        words = [self.folder / "machine", ready, " ".join(COPIED), " ".join(EMPTY)]
        command = [*NAMESPACE, "/bin/sh", "-c", _SETUP, "setup", *words]
        self._keeper = processes.start(command, log=log, death_signal="KILL")
        deadline = time.monotonic() + 30
        while not ready.exists():
            if self._keeper.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ProviderServerError(f"No machine of its own could be made: {log.read_text()}")
            time.sleep(0.02)
        # `unshare` waits for the one process that it started in the new namespace.
        self._inside = processes.descendants(self._keeper.pid)[0]
        if (self.root.parent / "ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink():
            raise ProviderServerError("This is no machine of its own: nothing may be changed in here.")
        (self.root / "etc/ssh/sshd_config").write_text(self._sshd_config)

    def stop(self) -> None:
        """End everything that runs in there, and forget what was changed."""
        self.stop_sshd()
        if self._keeper:
            processes.stop([self._keeper], patience=0)  # the first process of a namespace heeds no TERM
            self._keeper = None

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self._inside}/root")

    def run(self, *words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in there as root, with `text` as its standard input, and return what it said."""
        return subprocess.run(
            [*self._enter, *words],
            input=text or "",
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        )

    def run_script(self, script: str, shell: str = "/bin/sh") -> subprocess.CompletedProcess[str]:
        """Run a script in there as the administrator does: from a file, as root.

        If it has sshd read its configuration again, this returns when that is done.
        """
        file, starts = self.folder / "script.sh", self._starts_of_sshd()
        file.write_text(script)
        result = self.run(*shell.split(), file)
        deadline = time.monotonic() + 15
        while "sshd was sent SIGHUP" in result.stdout and self._starts_of_sshd() == starts:
            if time.monotonic() > deadline:
                raise ProviderServerError("sshd was sent SIGHUP, but did not reload its configuration.")
            time.sleep(0.02)
        return result

    def start_sshd(self) -> None:
        """Start sshd with the /etc/ssh/sshd_config in there, and return when it answers.

        :raises ProviderServerError: it does not, with its log.
        """
        self.run("mkdir", "-p", "-m", "0755", "/run/sshd")
        log = self.folder / "sshd.log"
        command = [*self._enter, program("sshd"), "-D", "-e", "-o", "LogLevel=VERBOSE"]
        self._sshd = processes.start(command, log=log, death_signal="KILL")
        deadline = time.monotonic() + 15
        while self._sshd.poll() is None and time.monotonic() < deadline:
            if self.sshd_answers():
                return
            time.sleep(0.05)
        self.stop_sshd()
        raise ProviderServerError(f"sshd does not answer. Its log:\n{log.read_text(errors='replace')}")

    def stop_sshd(self) -> None:
        if self._sshd:
            # sshd alone first: its parent, nsenter, ends with it and reaps it. Else the machine's init has to
            # reap it, which may take seconds, and the end of the namespace waits for that.
            for pid in processes.descendants(self._sshd.pid)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._sshd.wait(5)
            processes.stop([self._sshd])
            self._sshd = None

    def sshd_answers(self) -> bool:
        """Whether an SSH server answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return connection.recv(8) == b"SSH-2.0-"
        except OSError:
            return False

    def edit(self, file: str, old: str, new: str, *, login: str | None = None) -> None:
        """Replace the one place in a file that is `old`, and start sshd anew if it runs.

        :param file: absolute path in there, such as /etc/ssh/sshd_config.d/10-mdbackup-web.conf.
        :param old: must be there exactly once, in the Match block of `login` if that is given.
        """
        path = self.root / file.lstrip("/")
        text = path.read_text()
        before, block = "", text
        if login:
            before, mark, block = text.partition(f"Match User {login}\n")
            before += mark
        block, mark, after = block.partition("\nMatch ") if login else (block, "", "")
        if block.count(old) != 1:
            raise ValueError(f"{old!r} is {block.count(old)} times in {file}, not once")
        path.write_text(before + block.replace(old, new) + mark + after)
        if self._sshd:
            self.stop_sshd()
            self.start_sshd()

    def _starts_of_sshd(self) -> int:
        log = self.folder / "sshd.log"
        return log.read_text(errors="replace").count("Server listening on") if log.exists() else 0

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._inside}", "--mount", "--pid", "--"]


def connections(output: str) -> dict[str, dict[str, Any]]:
    """Return the Airflow connections that the lines `airflow connections add ...` make, by id."""
    found = {}
    for line in re.findall("^airflow connections add .*$", output, re.MULTILINE):
        words = shlex.split(line)[3:]
        options = dict(zip(words[1::2], words[2::2], strict=True))
        found[words[0]] = {
            "conn_type": options["--conn-type"],
            "host": options["--conn-host"],
            "port": int(options["--conn-port"]),
            "login": options["--conn-login"],
            "extra": json.loads(options["--conn-extra"]),
        }
    return found
