"""Start servers that outlive nobody, and end them together with everything that they started.

Each server gets a session (hence a process group) of its own, so that Ctrl-C reaches only the program that
started it, which then stops the servers in good order. Should that program be killed outright, the kernel
ends its servers (PR_SET_PDEATHSIG, through `setpriv`): start them in the main thread, because the kernel
watches the *thread* that started them.

Not given: a descendant that detached itself before `stop` looked (its parent gone, init its new parent) is
not found. Neither OpenSSH nor Airflow has such processes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

CLOSED_PORT = 1
"""A TCP port of 127.0.0.1 that nothing listens on: only root could, and `free_port` never returns it."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on at this moment.

    It is below those that the kernel gives to outgoing connections (ip_local_port_range in ip(7)), so that
    none of them takes it before a server listens there.
    """
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return int(probe.getsockname()[1])


def start(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    death_signal: str = "TERM",
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, without input, its output appended to the file `log`.

    :param environment: its whole environment; default: that of the caller.
    :param death_signal: what the kernel sends it when the calling thread ends first.
    """
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", death_signal, *command]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop(servers: Sequence[subprocess.Popen[bytes]], *, patience: float = 5.0) -> None:
    """End servers that `start` returned and all their descendants: TERM, KILL after `patience` seconds."""
    family = {pid: _started(pid) for server in servers for pid in [server.pid, *descendants(server.pid)]}
    _signal(_alive(servers, family), signal.SIGTERM)
    deadline = time.monotonic() + patience
    while _alive(servers, family) and time.monotonic() < deadline:
        time.sleep(0.05)
    for server in servers:
        family |= {pid: _started(pid) for pid in descendants(server.pid)}
    _signal(_alive(servers, family), signal.SIGKILL)
    while _alive(servers, family):
        time.sleep(0.05)


def kill(server: subprocess.Popen[bytes]) -> None:
    """End a server that `start` returned and all its descendants at once, as a power cut would."""
    # The server first, lest it replaces the others.
    _signal([server.pid, *descendants(server.pid)], signal.SIGKILL)
    server.wait()


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children of `pid`, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = list(children.get(pid, []))
    for child in found:
        found.extend(children.get(child, []))
    return found


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _alive(servers: Sequence[subprocess.Popen[bytes]], family: Mapping[int, str | None]) -> list[int]:
    for server in servers:
        server.poll()
    return [pid for pid, started in family.items() if started is not None and _started(pid) == started]


def _started(pid: int) -> str | None:
    # The start time distinguishes a process from a later one with the same id. A zombie has ended.
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the process state on, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
