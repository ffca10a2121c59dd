"""How a connection over the program ssh ends, and that nothing is left of it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import airflow_mdbackup.hooks.ssh_program as program_module
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost
from demo.processes import CLOSED_PORT, descendants
from demo.sshd import ProviderServer
from demo.sshd_files import new_key
from tests.integration.ssh_program.over_ssh import (
    MEGABYTE,
    TO_LOG,
    FakeSsh,
    SetConnection,
    children,
    over_ssh,
    program_of,
    put,
    read,
    way,
)
from tests.waiting import until


class Relay:
    """Stands between the hook and the server, and can stop to pass anything on."""

    def __init__(self, to: int) -> None:
        self.frozen = threading.Event()
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                while self.frozen.is_set():
                    time.sleep(0.05)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.frozen.clear()
        self._listener.close()


@pytest.fixture
def relay(provider: ProviderServer) -> Iterator[Relay]:
    relay = Relay(provider.port)
    yield relay
    relay.close()


@contextmanager
def server_that_says(words: bytes) -> Iterator[int]:
    """Listen on 127.0.0.1, say something to each that comes, and then nothing more; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    connection.sendall(words)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
    for connection in connections:
        connection.close()


def test_ssh_killed_in_mid_transfer_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """And no file that is whole."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        (pid,) = children("ssh")
        with pytest.raises(ConnectionLost, match=r"closed the connection|broke"):
            read(reader, path, lambda _: _kill(pid))


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_end_of_ssh_is_told_as_what_it_may_mean(
    provider: ProviderServer, set_connection: SetConnection, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the server did not answer to a sign of life, which nobody would guess from a closed pipe."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection() | {"port": relay.port})
    monkeypatch.setattr(program_module, "KEEPALIVE", 1)
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        with pytest.raises(ConnectionLost, match=r"Timeout, server .* not responding"):
            read(reader, path, lambda _: relay.frozen.set())


def test_silence_in_mid_transfer_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection, relay: Relay, each_way: str
) -> None:
    """After as long as the connection may be silent."""
    path = put(provider, "large", 1000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection() | {"port": relay.port})
    with ProviderHook("backupop", stall_timeout=1) as hook:
        reader = hook.reader()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="stalled"):
            read(reader, path, lambda _: relay.frozen.set())
        assert time.monotonic() - began < 5
    assert not children("ssh")


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-silent\r\n"], ids=["at once", "after its banner"])
def test_server_that_is_silent_is_a_lost_connection(
    provider: ProviderServer,
    set_connection: SetConnection,
    connect_within: Callable[[int], None],
    words: bytes,
) -> None:
    """In bounded time: both ways are tried, each as long as it may take."""
    connect_within(1)
    with server_that_says(words) as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        began = time.monotonic()
        with ProviderHook("backupop", stall_timeout=1) as hook, pytest.raises(ConnectionLost):
            hook.reader()
        assert time.monotonic() - began < 10
    assert not children("ssh")


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_server_that_is_not_there_is_a_lost_connection_at_once(
    provider: ProviderServer, set_connection: SetConnection, each_way: str, host: str
) -> None:
    """With its name and port in the message, and no second attempt."""
    set_connection("backupop", provider.sftp_connection() | {"host": host, "port": CLOSED_PORT})
    began = time.monotonic()
    with ProviderHook("backupop") as hook, pytest.raises(ConnectionLost, match=f"{host}:1 .*{host}"):
        hook.reader()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "words",
    [
        b"\x1b]0;owned\x07\x1b[2J\r\nSSH-9.9\x1b[2J\r\n",
        b"owned\x1b[2J\r\nSSH-2.0-x\r\n" + b"\xff" * 500,
    ],
    ids=["no banner", "banner and no packet"],
)
def test_words_of_a_server_act_on_no_terminal(
    provider: ProviderServer,
    set_connection: SetConnection,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    connect_within: Callable[[int], None],
    words: bytes,
) -> None:
    """Neither in our errors nor in what is logged, by us or by asyncssh."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "asyncssh")
    connect_within(1)
    with server_that_says(words) as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with ProviderHook("backupop", stall_timeout=1) as hook, pytest.raises(ConnectionLost) as caught:
            hook.reader()
    ours, theirs = capfd.readouterr().out, [record.getMessage() for record in caplog.records]
    assert "without the program ssh" in ours and theirs
    lines = [line for text in (str(caught.value), ours, *theirs) for line in text.split("\n")]
    assert all(line.isprintable() for line in lines)


def test_words_of_ssh_act_on_no_terminal(
    provider: ProviderServer,
    set_connection: SetConnection,
    fake_ssh: FakeSsh,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A server's words are in them. The last are the reason; before them may be a notice of any length."""
    fake_ssh(
        f"#!/bin/sh\n{TO_LOG}"
        "printf '%8000s\\n\\033]0;owned\\007\\r\\n@@@@@@\\r\\nwhy\\377\\r\\n' notice >&2; exit 255\n"
    )
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
    (line,) = (line for line in capfd.readouterr().out.split("\n") if "program ssh" in line)
    assert line.isprintable()
    assert r"program ssh: \x1b]0;owned\x07 / why\xff " in line


def test_close_from_another_thread_ends_a_transfer(
    provider: ProviderServer, set_connection: SetConnection, each_way: str
) -> None:
    """As Airflow does when a task is to be stopped."""
    path = put(provider, "large", 100_000 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        threading.Timer(0.3, hook.close).start()
        began = time.monotonic()
        with pytest.raises(ConnectionLost):
            read(reader, path)
        assert time.monotonic() - began < 4
        until(lambda: not children("ssh"), 30, every=0.02)


def test_close_while_ssh_logs_in_ends_that(
    provider: ProviderServer, set_connection: SetConnection, no_asyncssh: None
) -> None:
    """Who is told to stop does not begin again by another way."""
    with server_that_says(b"SSH-2.0-silent\r\n") as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with ProviderHook("backupop") as hook:
            threading.Timer(0.5, hook.close).start()
            began = time.monotonic()
            with pytest.raises(ConnectionLost):
                hook.reader()
            assert time.monotonic() - began < 5
            until(lambda: not children("ssh") and not children("cat"), 30, every=0.02)


def test_nothing_is_left_of_many_connections(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path, each_way: str
) -> None:
    """No descriptor, no thread and no process, be they good, bad or refused."""
    new_key(tmp_path / "wrong")
    set_connection("good", provider.sftp_connection())
    set_connection("bad", provider.sftp_connection() | {"port": CLOSED_PORT})
    set_connection("refused", provider.sftp_connection(key_file=str(tmp_path / "wrong")))

    def connect(times: int) -> None:
        for _ in range(times):
            with ProviderHook("good") as hook:
                assert way(hook.reader()) == each_way
            with ProviderHook("bad") as hook, pytest.raises(ConnectionLost):
                hook.reader()
            with ProviderHook("refused") as hook, pytest.raises(AccessRefused):
                hook.reader()

    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    connect(1)
    gc.collect()
    gc.disable()  # nothing may depend on it
    try:
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith("ssh to")], 30)
        (files, threads), processes = left(), set(descendants(os.getpid()))
        connect(15)
        # What earlier tests left may end meanwhile.
        until(lambda: left()[0] <= files and left()[1] <= threads, 30, every=0.02)
        until(lambda: not set(descendants(os.getpid())) - processes, 30, every=0.02)
    finally:
        gc.enable()


@pytest.mark.parametrize("logged_in", [True, False])
def test_nothing_is_left_of_a_task_that_is_killed(
    provider: ProviderServer,
    set_connection: SetConnection,
    connect_within: Callable[[int], None],
    logged_in: bool,
) -> None:
    """As the kernel kills for want of memory: without a chance to end anything."""
    connect_within(2)
    path = put(provider, "large", 100_000 * MEGABYTE)
    with server_that_says(b"") as silent:
        set_connection("backupop", provider.sftp_connection() | ({} if logged_in else {"port": silent}))
        task = os.fork()
        if not task:
            try:
                with ProviderHook("backupop") as hook:
                    read(hook.reader(), path)
            finally:
                os._exit(1)
        try:
            running = {"ssh": 1, "cat": 0 if logged_in else 3}
            until(lambda: {name: len(children(name, task)) for name in running} == running, 30, every=0.02)
            left = descendants(task)
        finally:
            os.kill(task, signal.SIGKILL)
            os.waitpid(task, 0)
        until(lambda: not any(program_of(pid) == "cat" for pid in left), 30, every=0.02)
        until(lambda: not any(program_of(pid) == "ssh" for pid in left), 30, every=0.02)
