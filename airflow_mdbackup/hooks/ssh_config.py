"""What ``~/.ssh/config`` says about a host, as the program ``ssh`` reads it.

``ssh -G`` resolves ``Host``, ``Match`` and ``Include``, and reports errors with their line, so that every way
to connect understands the file alike. Only the options in :data:`HEEDED` are used; the others have no effect
on a backup.

A ``ProxyJump`` becomes a ``ProxyCommand`` that runs ``ssh -W``: only ``~/.ssh/config`` says how to reach the
jump host.

Limitations: ``/etc/ssh/ssh_config`` is not read, and names of known_hosts files may not contain blanks.

Sources: ssh(1) on ``-G``, ssh_config(5), OpenSSH's ``valid_hostname`` and ``valid_ruser`` (misc.c, ssh.c).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from airflow_mdbackup.scheme.common.paths import to_text

HEEDED = (
    *("HostName", "Port", "ProxyCommand", "ProxyJump", "IdentityFile", "HostKeyAlias"),
    *("UserKnownHostsFile", "GlobalKnownHostsFile", "RevokedHostKeys"),
    *("Ciphers", "MACs", "KexAlgorithms", "HostKeyAlgorithms"),
)
_MOST_HOPS = 8  # jump hosts that are reached through jump hosts
_SECONDS = 30  # for ssh to read the file, including what `Match exec` runs
# Characters that mean something to the shell that runs a ProxyCommand, and that no name has.
_NOT_A_HOST = re.compile(r"[\s'`\"$\\;&<>|(){}]|^-")
_NOT_A_LOGIN = re.compile(r"['`\"$;&<>|(){}\n\r\t\0]|^-|\s-|\\$")


@dataclass(frozen=True, slots=True)
class Reached:
    """How to reach a host.

    :ivar host: its name or address.
    :ivar options: the options that the file sets to other values than ``ssh`` has by default: lists, by name.
    :ivar proxy: a shell command, whose input and output are the connection.
    :ivar jumps: whether ``proxy`` stands for a ``ProxyJump``.
    """

    host: str
    port: int
    host_key_alias: str | None = None
    options: Mapping[str, list[str]] = field(default_factory=dict)
    proxy: str | None = None
    jumps: bool = False


def reached(host: str, port: int | None, user: str) -> Reached:
    """Return how to reach a host, by a connection and ``~/.ssh/config``.

    :raises ValueError: host or login could act on a shell, or the file has an error; the message says which.
    """
    if _NOT_A_HOST.search(host):
        raise ValueError(
            f"the host {to_text(host.encode())!r} has characters that no host name has: correct it"
        )
    if _NOT_A_LOGIN.search(user):
        raise ValueError(f"the login {to_text(user.encode())!r} has characters that no login has: correct it")
    path = Path("~/.ssh/config").expanduser()
    if not path.exists():
        return Reached(host.lower(), port or 22)
    options = _options(path, host, port, user)
    usual = _usual()
    said = {
        name: options[name.lower()] for name in HEEDED if options.get(name.lower()) != usual.get(name.lower())
    }
    address, number = options["hostname"][0], int(options["port"][0])
    alias = options.get("hostkeyalias", [""])[0] or None
    jump = said.get("ProxyJump", ["none"])[0]
    if jump != "none":
        _check_no_loop(path, jump)
        return Reached(address, number, alias, said, _jump(path, jump, address, number), jumps=True)
    line = said.get("ProxyCommand", ["none"])[0]
    proxy = None if line == "none" else _expanded(line, host, address, number, user)
    return Reached(address, number, alias, said, proxy)


@cache
def _usual() -> Mapping[str, list[str]]:
    """Return the defaults of ``ssh``."""
    return _options(None, "localhost", None, "nobody")


def _options(path: Path | None, host: str, port: int | None, user: str) -> dict[str, list[str]]:
    """Return what ``ssh -G`` prints: lists of values, by the option's name in lower case."""
    ssh = shutil.which("ssh")
    if ssh is None:
        raise ValueError(f"{path} exists, but the program ssh, which reads it, is not installed")
    command = [
        ssh,
        "-G",
        "-F",
        str(path) if path else "none",
        *(["-p", str(port)] if port else []),
        "-l",
        user,
    ]
    try:
        ended = subprocess.run(
            [*command, "--", host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(),
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"ssh did not finish reading {path} within {_SECONDS} seconds") from None
    if ended.returncode:
        lines = [
            to_text(line) for line in ended.stderr.splitlines() if not line.startswith(b"Pseudo-terminal")
        ]
        raise ValueError(f"{' / '.join(lines[:3])}. Correct that file")
    found: dict[str, list[str]] = {}
    for line in os.fsdecode(ended.stdout).splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name.lower(), []).extend(
            value.split() if name.endswith("knownhostsfile") else [value]
        )
    return found


def environment() -> dict[str, str]:
    """Return the environment for a program. A worker's own has secrets in it."""
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME") if name in os.environ}
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **kept}


def _check_no_loop(path: Path, jump: str) -> None:
    """Refuse a loop of jump hosts, in which ``ssh`` would start itself forever.

    :raises ValueError: there is one.
    """
    for _ in range(_MOST_HOPS):
        # The file says how to reach the first of several; the others are reached through it.
        first = jump.partition(",")[0].removeprefix("ssh://").rpartition("@")[2]
        name = re.sub(r":\d+$", "", first).strip("[]")
        jump = _options(path, name, None, "nobody").get("proxyjump", ["none"])[0]
        if jump == "none":
            return
    raise ValueError(f"in {path}, the ProxyJump is a loop: write `ProxyJump none` for {name}")


def _jump(path: Path, hops: str, host: str, port: int) -> str:
    """Return the command that connects through the last of several jump hosts, as ``ssh`` builds it."""
    before, _, last = hops.rpartition(",")
    command = ["ssh", "-F", str(path), "-o", "BatchMode=yes", *(["-J", before] if before else [])]
    command += ["-W", f"[{host}]:{port}"]
    if last.startswith("ssh://"):
        return shlex.join([*command, "--", last])
    user, at, name = last.rpartition("@")
    address, colon, number = name.rpartition(":")
    if colon and (":" not in address or address.endswith("]")):
        command += ["-p", number]
        name = address
    return shlex.join([*command, *(["-l", user] if at else []), "--", name.strip("[]")])


def _expanded(line: str, name: str, host: str, port: int, user: str) -> str:
    """Return a ``ProxyCommand`` with its tokens filled in.

    :raises ValueError: a token is unknown.
    """
    tokens = {"%": "%", "h": host, "n": name, "p": str(port), "r": user}

    def filled(found: re.Match[str]) -> str:
        try:
            return tokens[found[1]]
        except KeyError:
            raise ValueError(f"its ProxyCommand has %{found[1]}; only %h, %n, %p and %r are known") from None

    return re.sub(r"%(.?)", filled, line)
