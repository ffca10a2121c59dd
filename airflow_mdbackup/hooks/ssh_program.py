"""A session over the installed ``ssh`` program, which decrypts outside of Python and on another core.

It gets what :mod:`.connection` has parsed, and has the same methods as a :class:`.Session`. The key and the
host keys reach ``ssh`` from memory: no secret is on a command line, in an environment or on the disk.

Limitations: its window is 2 MiB, too small to fill a connection with a long round trip. It cannot use a
password. If this process is killed, ``ssh`` ends as soon as it has logged in, or when a server that does not
answer hangs up.

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
from typing import BinaryIO

from airflow_mdbackup.hooks.connection import KEEPALIVE, SshAccount
from airflow_mdbackup.hooks.failures import last_lines
from airflow_mdbackup.hooks.ssh_config import environment
from airflow_mdbackup.scheme.transfer.sftp import WINDOW

_PIPE = 1 << 20  # the largest that an unprivileged user may have
_AHEAD = 2 * WINDOW  # bytes that may arrive while we send: more than a reader ever requests
_FAILED = 255  # the program's exit status for errors of its own
_ENDING = 5.0  # seconds for the program to end by itself
_MOMENT = 0.02  # seconds between two looks whether it has ended
# Options of ssh_config(5), by what asyncssh calls them.
_ALGORITHMS = {
    "encryption_algs": "Ciphers",
    "mac_algs": "MACs",
    "kex_algs": "KexAlgorithms",
    "server_host_key_algs": "HostKeyAlgorithms",
    "signature_algs": "PubkeyAcceptedAlgorithms",
}


class Program(ExitStack):
    """How to call ``ssh``, and the files that its arguments name. They exist until it is closed.

    :ivar log: messages of ``ssh`` itself; standard error has those of the server and of a ProxyCommand.
    """

    def __init__(self, path: str, config: str) -> None:
        super().__init__()
        read, write = os.pipe()
        self.log = open(read, "rb", buffering=0)  # noqa: SIM115 - the channel reads it after us
        try:
            self.command = [path, "-F", config, "-E", self._held(write)]
        finally:
            os.close(write)

    def option(self, name: str, value: str) -> None:
        """Set an option of ssh_config(5)."""
        self.command += ["-o", f"{name}={value}"]

    def file(self, content: str) -> str:
        """Return a path at which ``ssh`` can read ``content``, which is only in memory.

        ``ssh`` closes the descriptors it inherits, and other processes cannot open those of Airflow's tasks
        (PR_SET_DUMPABLE). So a ``cat`` that waits for input holds it, and ends by itself when we do.
        """
        with open(os.memfd_create("mdbackup"), "wb", buffering=0) as memory:
            os.fchmod(memory.fileno(), 0o600)
            memory.write(content.encode())
            return self._held(memory.fileno())

    def _held(self, descriptor: int) -> str:
        holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=descriptor, env=environment())
        self.enter_context(holder)
        self.callback(holder.kill)
        return f"/proc/{holder.pid}/fd/1"


def program_for(account: SshAccount, command: str | None = None) -> Program | None:
    """Return how to call ``ssh`` for an account; None without ``ssh``, or if the account has no key.

    :param command: to run there instead of SFTP.
    :raises OSError: a file for it cannot be made.
    """
    ssh = shutil.which("ssh")
    if ssh is None or not hasattr(os, "memfd_create") or not account.keys:
        return None
    program = Program(ssh, "none")  # the account has what ~/.ssh/config says
    for name, value in _options(account).items():
        program.option(name, value)
    try:
        program.option("UserKnownHostsFile", program.file(account.host_keys.lines(_known_as(account))))
        for key, _, certificate in account.keys:
            program.command += ["-i", program.file(key.export_private_key().decode())]
            if certificate is not None:
                program.option("CertificateFile", program.file(certificate.export_certificate().decode()))
    except BaseException:
        program.close()
        raise
    program.command += ["-p", str(account.port), "-l", account.user]
    if command is None:
        program.command += ["-s", "--", account.address, account.subsystem]
    else:
        program.command += ["--", account.address, command]
    return program


def _known_as(account: SshAccount) -> str:
    """Return the name under which ``ssh`` looks up host keys, and that a host certificate must have."""
    return account.host_key_alias or account.address


def _options(account: SshAccount) -> dict[str, str]:
    """Return options of ssh_config(5)."""
    options = {
        "BatchMode": "yes",
        "LogLevel": "INFO",  # below INFO, it does not say why a connection ends
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": "none",  # otherwise it tries the keys in ~/.ssh if it cannot read ours
        "StrictHostKeyChecking": "yes",
        "CheckHostIP": "no",
        "GlobalKnownHostsFile": "none",
        "UpdateHostKeys": "no",
        "HostKeyAlias": _known_as(account),
        "Compression": "yes" if account.compress else "no",
        "ConnectTimeout": str(account.connect_timeout),
        "ServerAliveInterval": str(KEEPALIVE),
    }
    if account.proxy is not None:
        options["ProxyCommand"] = account.proxy.replace("%", "%%")
    for name, algorithms in account.algorithms.items():
        options[_ALGORITHMS[name]] = algorithms if isinstance(algorithms, str) else ",".join(algorithms)
    return options


class SshChannel:
    """A running ``ssh``, as a session. For one thread at a time; any thread may call :meth:`close`.

    :param command: its path and arguments.
    :param timeout: seconds that a call may wait.
    :param log: where ``ssh`` itself writes why it fails; see :class:`Program`.
    :param runs_command: the server runs a command, whose standard error is appended to its output.
    :ivar answered: whether the server has sent anything.
    :ivar was_killed: whether a signal ended the command. ``ssh`` does not report it, and exits with 255.
    :raises OSError: it cannot be started.
    """

    was_killed = False

    def __init__(
        self, command: list[str], timeout: float, *, log: BinaryIO | None = None, runs_command: bool = False
    ) -> None:
        self._timeout = timeout
        self._runs_command = runs_command
        self.answered = False
        self._early: deque[bytes] = deque()  # arrived while we were sending
        self._ahead = 0  # bytes of it
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment()
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._log = log  # kept open, since another thread may wait for it
        self._err = self._process.stderr.fileno()
        # The last messages: of ssh itself, and of whoever writes to its standard error.
        self._messages = {self._err: b""} | ({log.fileno(): b""} if log else {})
        for descriptor in (self._in, *self._messages):
            os.set_blocking(descriptor, False)
        with suppress(OSError):  # an unprivileged user has a limit on all pipes together
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE)
        self._waiting = select.poll()
        self._sending = select.poll()
        for waiting in (self._waiting, self._sending):
            for descriptor in (self._out, *self._messages):
                waiting.register(descriptor, select.POLLIN)
        self._sending.register(self._in, select.POLLOUT)

    def sendall(self, data: bytes) -> None:
        """Send ``data``. What arrives meanwhile is buffered, so that neither side waits for the other."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                self._wait_to_send()
            except BrokenPipeError:
                raise EOFError(self._why_it_ended() or "ssh has ended") from None

    def _wait(self, waiting: select.poll) -> set[int]:
        """Return the descriptors that are ready. Messages are read here; a full pipe would stop ``ssh``."""
        deadline = time.monotonic() + self._timeout
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll(max(0, deadline - time.monotonic()) * 1000)}
            if not ready:
                raise TimeoutError("timed out")
            for each in ready & self._messages.keys():
                self._read_messages(each)
            if ready := ready - self._messages.keys():
                return ready

    def _wait_to_send(self) -> None:
        if self._out in self._wait(self._sending):
            received = os.read(self._out, _PIPE)
            if not received:
                raise EOFError(self._why_it_ended() or "ssh has ended")
            self._early.append(received)
            self._ahead += len(received)
            if self._ahead > _AHEAD:
                raise EOFError("the server sends more than was requested")

    def recv(self, size: int) -> bytes:
        """Return what has arrived, at most ``size`` bytes; empty at the end.

        :raises TimeoutError: nothing arrived in time.
        :raises EOFError: ``ssh`` has failed.
        """
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
        if why := self._why_it_ended():
            raise EOFError(why)
        if self._runs_command:
            data, self._messages[self._err] = self._messages[self._err], b""
        return data

    def _why_it_ended(self) -> str:
        """Return why ``ssh`` itself has failed; empty if the server has ended the session."""
        status = self.wait(_ENDING)
        if status is not None and status < 0:
            return f"the program ssh was ended by signal {-status}"
        return self.messages() if status == _FAILED else ""

    def messages(self) -> str:
        """Return the last messages of ``ssh`` itself, such as why it gave up, as printable text."""
        return self._last_messages(*self._messages.keys() - {self._err})

    def stderr_messages(self) -> str:
        """Return the last messages on its standard error, of the server or a ProxyCommand."""
        return self._last_messages(self._err)

    def _last_messages(self, *descriptors: int) -> str:
        for each in descriptors:
            self._read_messages(each)
        return last_lines(b"\n".join(self._messages[each] for each in descriptors))

    def _read_messages(self, descriptor: int) -> None:
        """Read messages, of which only the last are kept."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        self._messages[descriptor] = (self._messages[descriptor] + data)[-2000:]
        if not data:  # end of file
            for each in (self._waiting, self._sending):
                with suppress(KeyError):
                    each.unregister(descriptor)

    def settimeout(self, seconds: float) -> None:
        """Set how long a call may wait."""
        self._timeout = seconds

    def wait(self, seconds: float) -> int | None:
        """Wait until ``ssh`` has ended, and return its exit status, the command's; None if it still runs.

        Messages are read meanwhile, so that it can end.
        """
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
            for each in self._messages:
                self._read_messages(each)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(min(left, _MOMENT))
        return self._process.returncode

    def close(self) -> None:
        """End ``ssh`` and the connection. May be called again.

        The pipes are closed with their last reference, since another thread may be waiting for them.
        """
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING)
            return
        self._process.kill()
        with suppress(
            subprocess.TimeoutExpired
        ):  # a thread interrupted by a signal may be waiting for it, too
            self._process.wait(_ENDING)
