"""SSH servers that send more than they may: neither memory nor a log grows with it.

Each sends so much of it that it would go through unbounded, and then waits; nothing here depends on time.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_EXT_INFO,
)

from airflow_mdbackup.hooks import bounded
from airflow_mdbackup.hooks.bounded import ToldChannel
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.provider_side import IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost

SetConnection = Callable[[str, dict[str, Any]], None]
Attack = Callable[[paramiko.Channel], None]
KEY = paramiko.RSAKey.generate(2048)
WINDOW = 1 << 20
REQUEST = IndexRequest(b"/", (b"/a",), b"/i", id="1")


def send(channel: paramiko.Channel, kind: int, *fields: int | bytes) -> None:
    """Send a message as it is, whatever the window has left."""
    message = paramiko.Message()
    message.add_byte(bytes([kind]))
    for field in fields:
        if isinstance(field, int):
            message.add_int(field)
        else:
            message.add_string(field)
    channel.get_transport()._send_user_message(message)  # type: ignore[attr-defined]


class Attacker(paramiko.ServerInterface):
    """Lets everybody in, and attacks once a command or a subsystem has been started, and sent something."""

    opening = b"mdbackup ready request\n"

    def __init__(self, attack: Attack) -> None:
        self._attack = attack

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_auth_password(self, username: str, password: str) -> int:
        return paramiko.common.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._go, args=[channel], daemon=True).start()
        return True

    def check_channel_subsystem_request(self, channel: paramiko.Channel, name: str) -> bool:
        self.opening = struct.pack(">IBI", 5, 2, 3)  # VERSION
        return self.check_channel_exec_request(channel, b"")

    def _go(self, channel: paramiko.Channel) -> None:
        with suppress(OSError, EOFError, paramiko.SSHException):  # the client has hung up
            channel.sendall(self.opening)
            channel.recv(65536)  # so that the client knows that its request was granted
            self._attack(channel)


@contextmanager
def attacked_by(
    attack: Attack, set_connection: SetConnection, *, attacker: type[Attacker] = Attacker, **options: Any
) -> Iterator[ProviderHook]:
    """A hook whose server attacks.

    :param options: extras of the connection.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            transports.append(paramiko.Transport(connection))
            transports[0].set_log_channel("attacker")  # its own lines are not what is counted
            transports[0].add_server_key(KEY)
            transports[0].use_compression(bool(options.get("compress")))
            transports[0].start_server(server=attacker(attack))

        transports: list[paramiko.Transport] = []
        threading.Thread(target=serve, daemon=True).start()
        connection = {"conn_type": "ssh", "host": "127.0.0.1", "port": listener.getsockname()[1]}
        extra = {"host_key": f"ssh-rsa {KEY.get_base64()}", "cmd_timeout": None, **options}
        set_connection("attacked", {**connection, "login": "x", "password": "x", "extra": extra})
        try:
            with ProviderHook("attacked", stall_timeout=20) as hook:
                yield hook
        finally:
            for transport in transports:
                transport.close()


def overflow(channel: paramiko.Channel) -> None:
    for _ in range(4 * WINDOW // 32768):
        send(channel, MSG_CHANNEL_DATA, channel.remote_chanid, bytes(32768))


def overflow_stderr(channel: paramiko.Channel) -> None:
    for _ in range(4 * WINDOW // 32768):
        send(channel, MSG_CHANNEL_EXTENDED_DATA, channel.remote_chanid, 1, bytes(32768))


def overflow_both(channel: paramiko.Channel) -> None:
    """Neither of them alone is more than the window."""
    for _ in range(24):
        send(channel, MSG_CHANNEL_DATA, channel.remote_chanid, bytes(32768))
        send(channel, MSG_CHANNEL_EXTENDED_DATA, channel.remote_chanid, 1, bytes(32768))


@pytest.mark.parametrize("attack", [overflow, overflow_stderr, overflow_both])
def test_more_than_the_window_ends_the_connection(attack: Attack, set_connection: SetConnection) -> None:
    """Nobody reads meanwhile, so that nothing more is granted."""
    with attacked_by(attack, set_connection) as hook:
        channel = hook._session(WINDOW)
        channel.exec_command("x")
        channel.sendall(b"x")
        transport = channel.get_transport()
        transport.join(30)
        assert not transport.is_alive()
        assert len(channel.in_buffer) + len(channel.in_stderr_buffer) <= WINDOW
        with pytest.raises(EOFError, match="more than the window that it was granted, 1,048,576 bytes"):
            while ToldChannel(channel).recv(65536):
                pass
        with pytest.raises(EOFError, match="more than the window"):
            ToldChannel(channel).sendall(b"x")


def test_reader_says_what_the_server_did(set_connection: SetConnection) -> None:
    """It may have got a part of it, which is no less true."""

    def attack(channel: paramiko.Channel) -> None:
        for _ in range(200):
            send(channel, 5)

    told = pytest.raises(ConnectionLost, match="the connection broke: the server sent 100 messages")
    with attacked_by(attack, set_connection) as hook, told:
        hook._paramiko_reader()


@pytest.mark.parametrize("compress", [False, True])
def test_window_is_granted_again_as_data_are_read(set_connection: SetConnection, compress: bool) -> None:
    """An honest server may fill it to the last byte, many times over, by both streams."""
    size = 8 * WINDOW

    def attack(channel: paramiko.Channel) -> None:
        for begin in range(0, size, 65536):
            (channel.sendall if begin % 131072 else channel.sendall_stderr)(bytes(65536))
        channel.shutdown_write()

    with attacked_by(attack, set_connection, compress=compress) as hook:
        channel = hook._session(WINDOW)
        channel.set_combine_stderr(True)
        channel.exec_command("x")
        channel.sendall(b"x")
        read = 0
        while data := ToldChannel(channel).recv(30000):
            read += len(data)
        assert read == size + len(Attacker.opening)


def unknown(channel: paramiko.Channel) -> None:
    """What only a client may ask for."""
    send(channel, 5)


def unimplemented(channel: paramiko.Channel) -> None:
    send(channel, 3, 1)


def refused(channel: paramiko.Channel) -> None:
    """That a channel is opened, which nobody asked for."""
    send(channel, MSG_CHANNEL_OPEN_FAILURE, 77, 1, b"no\x1b[2J" * 5000, b"")


def banner(channel: paramiko.Channel) -> None:
    """What greets whoever logs in, long after that."""
    send(channel, 53, b"hello " * 5000, b"")


def kind_of_data(channel: paramiko.Channel) -> None:
    """Neither standard output nor standard error."""
    send(channel, MSG_CHANNEL_EXTENDED_DATA, channel.remote_chanid, 2, b"x")


@pytest.mark.parametrize("message", [unknown, unimplemented, refused, banner, kind_of_data])
def test_messages_that_are_out_of_place_fill_no_log(
    message: Attack, set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside what an indexer says, so that nobody's patience ends."""
    caplog.set_level(logging.INFO)

    def attack(channel: paramiko.Channel) -> None:
        for _ in range(2000):
            message(channel)
        channel.sendall(b"mdbackup done files=1 bytes=1 hashed=1 unreadable=0 rotten=0 seconds=1.0\n")
        channel.send_exit_status(0)

    told = pytest.raises(ConnectionLost, match="the connection broke: the server sent")
    with attacked_by(attack, set_connection) as hook, told:
        hook.build_index(REQUEST)
    said = [record.getMessage() for record in caplog.records if record.name == "paramiko.transport"]
    assert 0 < len(said) <= 100 and max(map(len, said)) < 10_000


def test_packet_that_is_too_large_is_not_read(set_connection: SetConnection) -> None:
    """Its length alone ends the connection."""

    def attack(channel: paramiko.Channel) -> None:
        send(channel, 2, bytes(2 * bounded._PACKET))  # it may be ignored, says its type
        channel.send_exit_status(0)

    told = pytest.raises(ConnectionLost, match=r"broke: the server sent a packet of \d{3},\d{3} bytes")
    with attacked_by(attack, set_connection) as hook, told:
        hook.build_index(REQUEST)


def test_packet_that_is_too_large_once_decompressed_is_not_kept(set_connection: SetConnection) -> None:
    """On the line it is a thousandth of that."""

    def attack(channel: paramiko.Channel) -> None:
        send(channel, 2, bytes(2 * bounded._PACKET))
        channel.send_exit_status(0)
        channel.shutdown_write()

    told = pytest.raises(ConnectionLost, match=r"a packet of [\d,]+ bytes that decompresses to more than SSH")
    with attacked_by(attack, set_connection, compress=True) as hook, told:
        hook.build_index(REQUEST)


def test_extensions_are_not_counted_beyond_their_message(set_connection: SetConnection) -> None:
    """paramiko would look for each; of four billion, for hours."""

    def attack(channel: paramiko.Channel) -> None:
        send(channel, MSG_EXT_INFO, 1 << 20, b"name", b"value")
        channel.send_exit_status(0)
        channel.shutdown_write()

    told = pytest.raises(ConnectionLost, match="broke: the server sent a message that counts more items")
    with attacked_by(attack, set_connection) as hook, told:
        hook.build_index(REQUEST)


def test_questions_at_login_are_not_counted_beyond_their_message(
    set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """paramiko would keep each; four billion fill any memory. It tells its log alone how that ended."""

    class Questions(list[tuple[str, bool]]):
        def __len__(self) -> int:
            return 1 << 20

    class Curious(Attacker):
        def get_allowed_auths(self, username: str) -> str:
            return "keyboard-interactive"

        def check_auth_password(self, username: str, password: str) -> int:
            return paramiko.common.AUTH_FAILED

        def check_auth_interactive(self, username: str, submethods: str) -> paramiko.InteractiveQuery:
            query = paramiko.InteractiveQuery()
            query.prompts = Questions()
            return query

    told = pytest.raises(AccessRefused, match="allowed types:")
    with attacked_by(overflow, set_connection, attacker=Curious) as hook, told:
        hook.get_conn()
    assert "the server sent a message that counts more items than it holds" in caplog.text


def test_greeting_without_end_is_not_read(set_connection: SetConnection) -> None:
    """Before the version a server may print lines; this one never ends its first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.sendall(bytes(4 * bounded._GREETING))
                    while connection.recv(1000):
                        pass
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        connection = {"conn_type": "ssh", "host": "127.0.0.1", "port": listener.getsockname()[1]}
        extra = {"host_key": f"ssh-rsa {KEY.get_base64()}"}
        set_connection("attacked", {**connection, "login": "x", "password": "x", "extra": extra})
        with ProviderHook("attacked") as hook, pytest.raises(ConnectionLost, match="no version of SSH"):
            hook.get_conn()


def test_nobody_else_gets_a_client_of_ours(set_connection: SetConnection) -> None:
    """Other hooks of the same process keep paramiko's own."""
    usual = paramiko.SSHClient
    with attacked_by(overflow, set_connection) as hook:
        assert isinstance(hook.get_conn().get_transport(), bounded.BoundedTransport)
        assert hook.get_conn() is hook.client
    assert paramiko.SSHClient is usual
