"""Connections to servers that are not as they should be."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncssh
import paramiko
import pytest

import airflow_mdbackup.hooks.connection as connection_module
import airflow_mdbackup.hooks.provider as provider_module
import airflow_mdbackup.provider_side.conversation as conversation_module
from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.hooks.provider import IndexHook, IndexHookAsync, ProviderHook, account
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost
from demo.sshd import ProviderServer

SetConnection = Callable[[str, dict[str, Any]], None]
REQUEST = IndexRequest(b"/", (b"/backups",), b"/index.md5")


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


def test_words_of_a_server_that_paramiko_repeats_act_on_no_terminal(
    provider: ProviderServer, set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in our errors nor in what it logs of its own accord, in an audit or by Airflow's hook."""
    caplog.set_level(logging.DEBUG)
    with server_that_says(b"SSH-9.9\x1b]0;owned\x07\x1b[2J-x\r\n") as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with pytest.raises(ConnectionLost, match="owned") as caught:
            client_of(account("backupop"), BoundedTransport)
    assert "owned" in caplog.text
    assert str(caught.value).isprintable()
    assert all(line.isprintable() for record in caplog.records for line in record.getMessage().splitlines())


def test_words_of_a_server_that_asyncssh_repeats_act_on_no_terminal(
    provider: ProviderServer, set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the name of an algorithm, as which any text will do."""
    caplog.set_level(logging.DEBUG, "asyncssh")
    lists = [b"owned\x1b]0;\x07\x1b[2J", *[b"x"] * 9]
    names = b"".join(len(name).to_bytes(4, "big") + name for name in lists)
    payload = b"\x14" + bytes(16) + names + bytes(5)
    padding = 8 - (len(payload) + 5) % 8 + 8
    packet = (len(payload) + padding + 1).to_bytes(4, "big") + bytes([padding]) + payload + bytes(padding)
    with server_that_says(b"SSH-2.0-x\r\n" + packet) as port:
        set_connection("backupop", provider.sftp_connection() | {"port": port})
        with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="owned") as caught:
            hook.connected()
    assert str(caught.value).isprintable()
    assert all(line.isprintable() for record in caplog.records for line in record.getMessage().splitlines())


def test_other_host_key_is_refused_and_both_are_named(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """So that a person can compare them; by backups and by an audit."""
    other = asyncssh.generate_private_key("ssh-ed25519")
    pinned = " ".join(other.export_public_key().decode().split()[:2])
    shown = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=provider.host_key, capture_output=True, text=True
    ).stdout.split()[1]
    set_connection("index", provider.ssh_connection(host_key=pinned))
    with IndexHook("index") as hook, pytest.raises(AccessRefused) as caught:
        hook.connected()
    for told in (str(caught.value), _refusal_of_the_audit()):
        assert "the server's host key is not the expected one" in told
        assert f"it has {shown}, the connection's host_key expects {other.get_fingerprint()}" in told


def _refusal_of_the_audit() -> str:
    with pytest.raises(AccessRefused) as caught:
        client_of(account("index"), BoundedTransport)
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (asyncssh.PermissionDenied("Permission denied for user x on host y"), AccessRefused),
        (asyncssh.HostKeyNotVerifiable("Host key is not trusted for host y"), AccessRefused),
        (asyncssh.HostKeyNotVerifiable("Host key is revoked"), AccessRefused),
        (asyncssh.KeyExchangeFailed("No matching encryption algorithm found"), AccessRefused),
        (asyncssh.ConnectionLost("Connection lost"), ConnectionLost),
        (asyncssh.ProtocolError("Banner line too long"), ConnectionLost),
        (ConnectionRefusedError(111, "Connect call failed"), ConnectionLost),
        (socket.gaierror(-2, "Name or service not known"), ConnectionLost),
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

    async def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(asyncssh, "connect", fail)
    with ProviderHook("backupop") as hook, pytest.raises(kind, match="connection backupop"):
        hook.connected()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (paramiko.AuthenticationException("Authentication failed."), AccessRefused),
        (paramiko.BadAuthenticationType("Bad authentication type", ["publickey"]), AccessRefused),
        (paramiko.AuthenticationException("Authentication timeout."), ConnectionLost),
        (paramiko.AuthenticationException("transport shut down or saw EOF"), ConnectionLost),
        (paramiko.SSHException("Error reading SSH protocol banner"), ConnectionLost),
        (EOFError(), ConnectionLost),
    ],
    ids=str,
)
def test_refusals_of_an_audit_are_told_from_connections_that_broke(
    provider: ProviderServer,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
) -> None:
    """The same of paramiko, by which an audit connects."""
    set_connection("backupop", provider.sftp_connection())

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(paramiko.SSHClient, "connect", fail)
    with pytest.raises(kind, match="connection backupop"):
        client_of(account("backupop"), BoundedTransport)


def test_silent_build_is_not_cut_off(
    provider: ProviderServer, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow's own commands end after ten silent seconds; here silence only makes us look again."""
    set_connection("index", provider.ssh_connection())
    monkeypatch.setattr(provider_module, "_LISTEN", 0.1)
    done = "mdbackup done files=1 bytes=2 hashed=1 unreadable=0 rotten=0 seconds=3.0"
    monkeypatch.setattr(conversation_module, "python_command", lambda: f"sleep 2; echo {done}")
    with IndexHook("index") as hook:
        assert hook.build_index(REQUEST) == Done(1, 2, 1, 0, 0, 3.0)


def test_build_whose_connection_breaks_is_a_lost_connection(
    provider: ProviderServer, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build goes on without us, and a retry may find its index."""
    set_connection("index", provider.ssh_connection())
    monkeypatch.setattr(conversation_module, "python_command", lambda: "sleep 20")
    monkeypatch.setattr(provider_module, "_LISTEN", 0.1)
    with IndexHook("index") as hook:
        wire = hook.connected()._connection.get_extra_info("socket")
        threading.Timer(1, wire.shutdown, [socket.SHUT_RDWR]).start()
        with pytest.raises(ConnectionLost, match="broke"):
            hook.build_index(REQUEST)


def test_what_is_sent_to_a_command_that_has_ended_is_no_matter(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """As where there is no Python, and the command ends before we have said anything."""
    set_connection("index", provider.ssh_connection())
    with IndexHook("index") as hook:
        session = hook.connected().session(20, command="echo hello; exit 127")
        assert session.closed.wait(20)
        session.sendall(b"x")
        assert (session.recv(100), session.recv(100), session.exit_status) == (b"hello\n", b"", 127)


def test_methods_of_airflows_hooks_work_without_a_client_made_first(
    provider: ProviderServer, set_connection: SetConnection
) -> None:
    """They read the connection in their own way, but only when they are asked."""
    (provider.tree / "file").write_bytes(b"content")
    set_connection("index", provider.ssh_connection())
    with ProviderHook("index") as hook:
        assert "remote_host" not in vars(hook)
        assert hook.path_exists(str(provider.tree)) or provider.chrooted
        assert not hook.path_exists("/nowhere")
        with pytest.raises(AttributeError, match="'ProviderHook' object has no attribute 'nothing'"):
            hook.nothing  # type: ignore[attr-defined]  # noqa: B018
    with IndexHook("index") as index:
        assert index.remote_host == "127.0.0.1"
        assert index.get_conn().exec_command("echo hi")[1].read() == b"hi\n"


def test_key_is_opened_beside_the_loop_of_the_triggerer(
    provider: ProviderServer, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encrypted one may take seconds, in which no other trigger would have its turn."""
    set_connection("index", provider.ssh_connection())
    threads: list[threading.Thread] = []

    def account_of(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return connection_module.account_of(*given)

    monkeypatch.setattr(provider_module, "account_of", account_of)

    async def connect() -> None:
        (await IndexHookAsync("index").get_conn()).close()

    asyncio.run(connect())
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
