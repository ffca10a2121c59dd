"""The programs that we are measured against, called as their manuals would have it.

All get the same cipher where they can be told (rclone prefers it by itself) and no compression, and are
otherwise left as they are. rclone is told that the account has no shell, which spares it hashing every file.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.scene import REPOSITORY, Scene

CIPHER = "aes128-gcm@openssh.com"


@dataclass(frozen=True, slots=True)
class Call:
    """A program to run. One that tells its own seconds on standard output is not clocked from outside."""

    command: Sequence[str | Path]
    input: str = ""
    environment: Mapping[str, str] | None = None
    tells_seconds: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """What a client is told: the server, the port by which to reach it, and which path to copy where."""

    scene: Scene
    port: int
    path: str
    dest: Path

    @property
    def source(self) -> str:
        """The path as the index account sees it."""
        return self.scene.root + self.path

    @property
    def login(self) -> str:
        return f"{self.scene.server.index_user}@127.0.0.1"

    @property
    def ssh(self) -> list[str]:
        """What every program of OpenSSH is told."""
        known = self.scene.known_hosts
        options = [f"UserKnownHostsFile={known}", "HostKeyAlias=provider", "Compression=no", "BatchMode=yes"]
        identity = ["-F", "none", "-i", str(self.scene.server.index_key), "-c", CIPHER]
        return [*identity, *(f"-o{option}" for option in options)]


def clock(name: str, line: Line) -> float:
    """Have a peer copy a path, and return the seconds that it took."""
    call = PEERS[name](line)
    environment = call.environment and dict(call.environment)
    started = time.monotonic()
    done = subprocess.run(
        call.command, input=call.input, env=environment, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{name} failed: {' '.join(map(str, call.command))}")
    return float(done.stdout) if call.tells_seconds else seconds


def is_installed(name: str) -> bool:
    """Whether a peer can be measured here."""
    return name not in PROGRAMS or shutil.which(PROGRAMS[name][0]) is not None


def versions() -> dict[str, str]:
    """Return the version of each installed program."""
    found = {}
    for command in dict.fromkeys(PROGRAMS.values()):
        if shutil.which(command[0]):
            said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
            found[command[0]] = re.findall(r"\d[\w.-]*", said)[0]
    return found


def _sftp(line: Line) -> Call:
    command = ["sftp", "-q", "-P", str(line.port), *line.ssh, "-b", "-", line.login]
    return Call(command, f'get -r "{line.source}" "{line.dest}"\n')


def _rsync(line: Line, options: str = "-a") -> Call:
    shell = " ".join(["ssh", "-p", str(line.port), *line.ssh])
    return Call(["rsync", options, "-e", shell, f"{line.login}:{line.source}/", f"{line.dest}/"])


def _rclone(line: Line) -> Call:
    server = line.scene.server
    options = {
        "transfers": 16,
        "config": "",
        "sftp-host": "127.0.0.1",
        "sftp-port": line.port,
        "sftp-user": server.index_user,
        "sftp-key-file": server.index_key,
        "sftp-known-hosts-file": line.scene.known_hosts,
        "sftp-shell-type": "none",
    }
    told = [f"--{name}={value}" for name, value in options.items()]
    return Call(["rclone", "copy", *told, "--sftp-disable-hashcheck", f":sftp:{line.source}", line.dest])


def _lftp(line: Line) -> Call:
    program = " ".join(["ssh", "-a", "-x", *line.ssh])
    steps = [
        f'set sftp:connect-program "{program}"',
        f"open -u {line.scene.server.index_user}, sftp://127.0.0.1:{line.port}",
        f'mirror --parallel=8 "{line.source}" "{line.dest}"',
    ]
    return Call(["lftp", "--norc", "-c", "; ".join(steps)])


def _sftp_hook(line: Line) -> Call:
    folder = line.scene.server.tree / line.path.lstrip("/")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    wanted = json.dumps({"source": line.source, "dest": str(line.dest), "names": names})
    command = [sys.executable, "-m", "benchmarks.sftp_hook"]
    return Call(command, wanted, line.scene.environment(line.port), tells_seconds=True)


PEERS: dict[str, Callable[[Line], Call]] = {
    "sftp": _sftp,
    "rclone": _rclone,
    "lftp": _lftp,
    "SFTPHook": _sftp_hook,
    "rsync -a": _rsync,
    "rsync -ac": partial(_rsync, options="-ac"),
}

PROGRAMS = {
    "sftp": ("ssh", "-V"),
    "rclone": ("rclone", "version"),
    "lftp": ("lftp", "--version"),
    "rsync -a": ("rsync", "--version"),
    "rsync -ac": ("rsync", "--version"),
}
