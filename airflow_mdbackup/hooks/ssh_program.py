"""A channel over the installed ``ssh`` program, which decrypts outside of Python and on another core.

It takes the same Airflow connection as the rest of the hook, and has the same calls as a paramiko channel as
far as an SFTP reader needs them. The host key is verified as there. Keys and known hosts reach ``ssh`` by
``/proc/<pid>/fd``, from memory, so that no secret is on a command line or on the disk.

What this does not give: its window is 2 MiB, so that a long line is not filled. And not every connection
can be told to ``ssh``; see :func:`program_for`.

Sources: ssh(1), ssh_config(5), memfd_create(2).
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_mdbackup.scheme.names import to_text

if TYPE_CHECKING:
    from airflow_mdbackup.hooks.provider import ProviderHook

_PIPE = 1 << 20  # the largest that an unprivileged user may have
_ENDING = 5.0  # seconds that the program gets to end by itself
_HOST = "provider"  # under which ssh looks up the host key that a connection pins


class Program:
    """How to call ``ssh``: its arguments, and the files in memory that they name."""

    def __init__(self) -> None:
        self.arguments = ["-F", "none"]
        self._files: list[int] = []

    def option(self, name: str, value: str) -> None:
        """Set an option of ssh_config(5)."""
        self.arguments += ["-o", f"{name}={value}"]

    def file(self, content: str) -> str:
        """Return a path at which ``ssh`` reads ``content``, as long as this process has the program."""
        descriptor = os.memfd_create("mdbackup", os.MFD_CLOEXEC)
        self._files.append(descriptor)
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, content.encode())
        return f"/proc/{os.getpid()}/fd/{descriptor}"

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def program_for(hook: ProviderHook, private_key: str | None) -> Program | None:
    """Return how to call ``ssh`` for a connection, or None where paramiko must do.

    That is where there is no ``ssh``, for passwords, passphrases and proxy commands, for algorithms that are
    disabled, and where the host key is not to be verified.

    :param private_key: the text of the key in the connection's extra, if it is there.
    """
    keyless = not (hook.key_file or private_key)
    if shutil.which("ssh") is None or keyless or hook.password or hook.host_proxy_cmd:
        return None
    if hook.no_host_key_check or hook.disabled_algorithms:
        return None
    program = Program()
    program.option("BatchMode", "yes")
    program.option("IdentitiesOnly", "yes")
    program.option("IdentityAgent", "none")
    program.option("StrictHostKeyChecking", "yes")
    program.option("GlobalKnownHostsFile", "none")
    program.option("UpdateHostKeys", "no")
    program.option("Compression", "yes" if hook.compress else "no")
    program.option("Ciphers", ",".join(hook.ciphers or ("^aes128-gcm@openssh.com", "aes256-gcm@openssh.com")))
    program.option("ConnectTimeout", str(hook.conn_timeout))
    program.option("ServerAliveInterval", str(hook.keepalive_interval))
    if hook.host_key is not None:
        line = f"{_HOST} {hook.host_key.get_name()} {hook.host_key.get_base64()}\n"
        program.option("HostKeyAlias", _HOST)
        program.option("UserKnownHostsFile", program.file(line))
    program.arguments += ["-i", str(hook.key_file) if hook.key_file else program.file(f"{private_key}\n")]
    program.arguments += ["-p", str(hook.port), "-l", str(hook.username)]
    program.arguments += ["-s", "--", hook.remote_host, hook.subsystem]
    return program


class SshChannel:
    """A running ``ssh``, as a channel. One thread at a time, but :meth:`close` may come from another.

    :param timeout: seconds that a call may wait.
    """

    def __init__(self, program: Program, timeout: float) -> None:
        self._program = program
        self._timeout = timeout * 1000
        self._early: list[bytes] = []  # what came while we were sending
        self._said = os.memfd_create("mdbackup", os.MFD_CLOEXEC)
        self._process = subprocess.Popen(
            ["ssh", *program.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        with suppress(OSError):  # an unprivileged user may have used up what he may have of it
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE)
        self._waiting = select.poll()
        self._waiting.register(self._out, select.POLLIN)
        self._sending = select.poll()
        self._sending.register(self._out, select.POLLIN)
        self._sending.register(self._in, select.POLLOUT)

    def sendall(self, data: bytes) -> None:
        """Send ``data``; what arrives meanwhile is taken in, so that neither side waits for the other."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._in, view) :]
                continue
            except BlockingIOError:
                ready = [descriptor for descriptor, _ in self._sending.poll(self._timeout)]
            if not ready:
                raise TimeoutError("timed out")
            if self._out in ready and (received := os.read(self._out, _PIPE)):
                self._early.append(received)

    def recv(self, size: int) -> bytes:
        """Return what has arrived, at most ``size`` bytes; nothing once ``ssh`` has ended."""
        if self._early:
            return self._early.pop(0)
        if not self._waiting.poll(self._timeout):
            raise TimeoutError("timed out")
        return os.read(self._out, size)

    def said(self) -> str:
        """Return what ``ssh`` wrote for people, such as why it gave up, as printable text."""
        text = os.pread(self._said, 2000, 0).strip()
        return " / ".join(to_text(line.strip()) for line in text.splitlines())

    def close(self) -> None:
        """End ``ssh`` and the connection. May be called again."""
        self._process.terminate()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._program.close()
