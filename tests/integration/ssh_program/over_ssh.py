"""What tests of the way over the program ssh share."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.hooks.session import Session
from airflow_mdbackup.hooks.ssh_program import SshChannel
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes
from demo.processes import descendants
from demo.sshd import ProviderServer

SetConnection = Callable[[str, dict[str, Any]], None]
FakeSsh = Callable[[str], None]
SSH = shutil.which("ssh")
TO_LOG = 'while [ "$1" != -E ]; do shift; done; exec 2>"$2"\n'  # in a script: have its words be those of ssh
MEGABYTE = 1 << 20


def way(reader: Reader) -> str:
    """Return over what a reader reads."""
    channel = reader.stream.channel
    assert isinstance(channel, SshChannel | Session)
    return "ssh" if isinstance(channel, SshChannel) else "asyncssh"


def over_ssh(hook: ProviderHook) -> Reader | None:
    """Return a reader over ssh, or None where asyncssh has to tell what is wrong."""
    return hook._over_ssh()


def children(name: str, parent: int | None = None) -> list[int]:
    """Return the descendants that run a program, without those that have ended."""
    return [pid for pid in descendants(parent or os.getpid()) if program_of(pid) == name]


def program_of(pid: int) -> str:
    try:
        return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())
    except (FileNotFoundError, ProcessLookupError):
        return ""


def read(reader: Reader, path: str, write: Callable[[Any], object] = len) -> Fetched:
    """Read one file; ``write`` gets the bytes of a large one."""

    def sink(_: Attributes) -> Stream:
        return Stream(write)

    reader.submit(Wanted(path.encode(), None, sink))
    (fetched,) = reader.wait()
    assert isinstance(fetched, Fetched)
    return fetched


def put(provider: ProviderServer, name: str, size: int | None = None) -> str:
    """Write a file on the provider, of a few bytes or with a hole of many; return its path there."""
    file = provider.tree / name
    file.write_bytes(b"content")
    if size is not None:
        os.truncate(file, size)
    return f"{provider.prefix}/{name}"


def in_thread(act: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Do something in another thread; the list gets what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised
