"""A session over the installed ``ssh`` program, which decrypts outside of Python and on another core.

It is given what :mod:`.connection` has found out, and has the same calls as a :class:`.Session`. The key and
the host keys reach ``ssh`` from memory: no secret is on a command line, in an environment or on the disk.

What this does not give: its window is 2 MiB, so that a long line is not filled. A password cannot be told
to it. And if this process is killed outright, ``ssh`` ends as soon as it is logged in; before that, with a
server that has become silent, only when that hangs up.

Sources: ssh(1), ssh_config(5), memfd_create(2), ptrace(2) on who may look into ``/proc/<pid>/fd``.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path

from airflow_mdbackup.hooks.connection import KEEPALIVE, SshAccount
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.sftp import WINDOW

_PIPE = 1 << 20  # the largest that an unprivileged user may have
_AHEAD = 2 * WINDOW  # bytes that may arrive while we send: more than a reader ever asks for
_FAILED = 255  # the program's exit status for errors of its own
_ENDING = 5.0  # seconds that the program gets to end by itself
# Options of ssh_config(5), by what asyncssh calls them.
_ALGORITHMS = {
    "encryption_algs": "Ciphers",
    "mac_algs": "MACs",
    "kex_algs": "KexAlgorithms",
    "server_host_key_algs": "HostKeyAlgorithms",
    "signature_algs": "PubkeyAcceptedAlgorithms",
}


class Program(ExitStack):
    """How to call ``ssh``, and the files that this names. They are there until it is closed."""

    def __init__(self, path: str, config: str) -> None:
        super().__init__()
        self.command = [path, "-F", config]

    def option(self, name: str, value: str) -> None:
        """Set an option of ssh_config(5)."""
        self.command += ["-o", f"{name}={value}"]

    def file(self, content: str) -> str:
        """Return a path at which ``ssh`` reads ``content``, which is nowhere but in memory.

        ``ssh`` closes whatever it inherits, and Airflow's tasks show no other process what they have open
        (PR_SET_DUMPABLE). So a ``cat`` has it, which waits for input; without us it would end by itself.
        """
        with open(os.memfd_create("mdbackup"), "wb", buffering=0) as memory:
            os.fchmod(memory.fileno(), 0o600)
            memory.write(content.encode())
            holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=memory, env=_environment())
        self.enter_context(holder)
        self.callback(holder.kill)
        return f"/proc/{holder.pid}/fd/1"


def program_for(account: SshAccount, command: str | None = None) -> Program | None:
    """Return how to call ``ssh`` for an account; None if there is no ``ssh``, or the account has no key.

    :param command: what is to run there, instead of SFTP.
    :raises OSError: no file can be made for it.
    """
    ssh = shutil.which("ssh")
    if ssh is None or not hasattr(os, "memfd_create") or account.key is None:
        return None
    config = Path("~/.ssh/config").expanduser()
    program = Program(ssh, str(config) if config.is_file() else "none")
    program.option("BatchMode", "yes")
    program.option("LogLevel", "ERROR")  # or else the server's banner is among its words
    program.option("IdentitiesOnly", "yes")
    program.option("IdentityAgent", "none")
    program.option("IdentityFile", "none")  # or else the keys in ~/.ssh, if ours cannot be read
    program.option("StrictHostKeyChecking", "yes")
    program.option("CheckHostIP", "no")
    program.option("GlobalKnownHostsFile", "none")
    program.option("UpdateHostKeys", "no")
    program.option("Compression", "yes" if account.compress else "no")
    for name, algorithms in account.algorithms.items():
        program.option(_ALGORITHMS[name], algorithms if isinstance(algorithms, str) else ",".join(algorithms))
    program.option("ConnectTimeout", str(account.patience))
    program.option("ServerAliveInterval", str(KEEPALIVE))
    # By which it looks the keys up, and which a host certificate has to name.
    known_as = account.options.host_key_alias or account.address
    program.option("HostKeyAlias", known_as)
    try:
        program.option("UserKnownHostsFile", program.file(account.host_keys.lines(known_as)))
        program.command += ["-i", program.file(account.key.export_private_key().decode())]
        if account.certificate is not None:
            program.option("CertificateFile", program.file(account.certificate.export_certificate().decode()))
    except BaseException:
        program.close()
        raise
    program.command += ["-p", str(account.port), "-l", account.user]
    if command is None:
        program.command += ["-s", "--", account.host, account.subsystem]
    else:
        program.command += ["--", account.host, command]
    return program


def _environment() -> dict[str, str]:
    """Return what a program needs. A worker's environment has secrets, which are not to be handed on."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


class SshChannel:
    """A running ``ssh``, as a session. One thread at a time, but :meth:`close` may come from another.

    :param command: its path and arguments.
    :param timeout: seconds that a call may wait.
    :param runs_command: the other side runs a command. What that writes to standard error is not taken for
        the words of ``ssh``, and comes at the end of its output.
    :ivar answered: whether anything has come from the other side.
    :ivar was_killed: whether a signal ended the command; of which ``ssh`` says nothing, and fails.
    :raises OSError: it cannot be started.
    """

    was_killed = False

    def __init__(self, command: list[str], timeout: float, *, runs_command: bool = False) -> None:
        self._timeout = timeout
        self._runs_command = runs_command
        self.answered = False
        self._early: deque[bytes] = deque()  # what came while we were sending
        self._ahead = 0  # bytes of it
        self._said = b""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=_environment()
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._err = self._process.stderr.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._err, False)
        with suppress(OSError):  # an unprivileged user may have used up what he may have of it
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE)
        self._waiting = select.poll()
        self._sending = select.poll()
        for waiting in (self._waiting, self._sending):
            waiting.register(self._out, select.POLLIN)
            waiting.register(self._err, select.POLLIN)
        self._sending.register(self._in, select.POLLOUT)

    def sendall(self, data: bytes) -> None:
        """Send ``data``; what arrives meanwhile is taken in, so that neither side waits for the other."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                self._wait_to_send()
            except BrokenPipeError:
                raise EOFError(self.said() or "ssh has ended") from None

    def _wait(self, waiting: select.poll) -> set[int]:
        """Return what is ready; the words of ``ssh`` are taken in, since a full pipe would stop it."""
        deadline = time.monotonic() + self._timeout
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll(max(0, deadline - time.monotonic()) * 1000)}
            if not ready:
                raise TimeoutError("timed out")
            if self._err not in ready:
                return ready
            if self._listen():
                for each in (self._waiting, self._sending):
                    each.unregister(self._err)
            if ready := ready - {self._err}:
                return ready

    def _wait_to_send(self) -> None:
        if self._out in self._wait(self._sending):
            received = os.read(self._out, _PIPE)
            if not received:
                raise EOFError(self.said() or "ssh has ended")
            self._early.append(received)
            self._ahead += len(received)
            if self._ahead > _AHEAD:
                raise EOFError("the server sends more than it was asked for")

    def recv(self, size: int) -> bytes:
        """Return what has arrived, at most ``size`` bytes; nothing once ``ssh`` has ended without a word."""
        if self._early:
            data = self._early.popleft()
            if len(data) > size:
                self._early.appendleft(data[size:])
            self._ahead -= len(data[:size])
            return data[:size]
        self._wait(self._waiting)
        if data := os.read(self._out, size):
            self.answered = True
            return data
        if self._runs_command and not self._failed():
            data, self._said = self._said, b""
        elif failed := self.said() or self._failed():
            raise EOFError(failed)
        return data

    def _failed(self) -> str:
        """Return what is to be said of an ``ssh`` that has ended without a word, if it has failed.

        At this log level it does not say itself that the server has gone, or is silent.
        """
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(_ENDING) == _FAILED:
                return "ssh has ended: the server has closed the connection, or does not answer any more"
        return ""

    def said(self) -> str:
        """Return the last that ``ssh`` wrote for people, such as why it gave up, as printable text."""
        self._listen()
        lines = [to_text(words) for line in self._said.splitlines() if (words := line.strip(b" @"))]
        return " / ".join(lines[-2:])

    def _listen(self) -> bool:
        """Take in the last that ``ssh`` wrote for people, and return whether there will be no more."""
        try:
            data = os.read(self._err, 1 << 16)
        except BlockingIOError:
            return False
        self._said = (self._said + data)[-2000:]
        return not data

    def settimeout(self, seconds: float) -> None:
        """Have a call wait no longer than so."""
        self._timeout = seconds

    def wait(self, seconds: float) -> int | None:
        """Wait at most so many seconds until ``ssh`` has ended, and return its exit status: the command's."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def close(self) -> None:
        """End ``ssh`` and the connection. May be called again.

        The pipes are closed with the last reference to them, since another thread may wait for them.
        """
        self._process.terminate()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
