"""Connections to servers that are not as they should be."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paramiko
import pytest
from airflow.providers.ssh.hooks.ssh import SSHHook

import airflow_mdbackup.hooks.provider as provider_module
import airflow_mdbackup.provider_side.conversation as conversation_module
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.provider_side import Done, IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost
from demo.sshd import ProviderServer

SetConnection = Callable[[str, dict[str, Any]], None]


@contextmanager
def server_that_says(banner: bytes) -> Iterator[int]:
    """Listen on loopback for one connection, send `banner`, and close; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(banner)
                while connection.recv(1000):
                    pass

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def test_words_of_a_server_act_on_no_terminal(
    provider: ProviderServer, set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in our errors nor in what paramiko logs of its own accord."""
    caplog.set_level(logging.DEBUG)
    with server_that_says(b"SSH-9.9\x1b]0;owned\x07\x1b[2J-x\r\n") as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with ProviderHook("backupop") as hook, pytest.raises(ConnectionLost, match="owned") as caught:
            hook.get_conn()
    assert "owned" in caplog.text
    assert str(caught.value).isprintable()
    assert all(line.isprintable() for record in caplog.records for line in record.getMessage().splitlines())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (paramiko.AuthenticationException("Authentication failed."), AccessRefused),
        (paramiko.BadAuthenticationType("Bad authentication type", ["publickey"]), AccessRefused),
        (paramiko.AuthenticationException("Authentication timeout."), ConnectionLost),
        (paramiko.AuthenticationException("transport shut down or saw EOF"), ConnectionLost),
        (paramiko.SSHException("Error reading SSH protocol banner"), ConnectionLost),
        (paramiko.SSHException("not a valid OPENSSH private key file"), AccessRefused),
        (EOFError(), ConnectionLost),
    ],
    ids=str,
)
def test_refusals_are_told_from_connections_that_broke(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
) -> None:
    """A refusal fails at once, so that nobody is locked out for trying; the rest is worth a retry."""
    set_connection("backupop", provider.sftp_connection())

    def fail(_: SSHHook) -> None:
        raise error

    monkeypatch.setattr(SSHHook, "get_conn", fail)
    with ProviderHook("backupop") as hook, pytest.raises(kind, match="connection backupop"):
        hook.get_conn()


def test_silent_build_is_not_cut_off(
    provider: ProviderServer, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow's own commands end after ten silent seconds; here silence only makes us look again."""
    set_connection("index", provider.ssh_connection())
    monkeypatch.setattr(provider_module, "_LISTEN", 0.1)
    done = "mdbackup done files=1 bytes=2 hashed=1 unreadable=0 rotten=0 seconds=3.0"
    monkeypatch.setattr(conversation_module, "python_command", lambda: f"sleep 2; echo {done}")
    with ProviderHook("index") as hook:
        assert hook.build_index(IndexRequest(b"/", (b"/backups",), b"/index.md5")) == Done(1, 2, 1, 0, 0, 3.0)


def test_build_whose_connection_breaks_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build goes on without us, and a retry may find its index."""
    set_connection("index", provider.ssh_connection())
    monkeypatch.setattr(conversation_module, "python_command", lambda: "sleep 20")
    monkeypatch.setattr(provider_module, "_LISTEN", 0.1)
    with ProviderHook("index") as hook:
        transport = hook.get_conn().get_transport()
        assert transport is not None
        threading.Timer(1, transport.sock.close).start()
        with pytest.raises(ConnectionLost, match="broke"):
            hook.build_index(IndexRequest(b"/", (b"/backups",), b"/index.md5"))
