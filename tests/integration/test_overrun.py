"""SSH servers that send more than they may: neither memory nor a log grows with it.

Each sends so much of it that it would go through unbounded, and then waits; nothing here depends on time.
Backups go over asyncssh, audits over paramiko, and either has its own faults.
"""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import asyncssh
import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_EXT_INFO,
)

from airflow_mdbackup.account import bounded
from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.hooks import session as session_module
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook, account
from airflow_mdbackup.hooks.session import Session
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost
from tests.waiting import until

SetConnection = Callable[[str, dict[str, Any]], None]
Attack = Callable[[paramiko.Channel], None]
KEY = paramiko.RSAKey.generate(2048)
WINDOW = 1 << 20  # that a client of the audit has here
REQUEST = IndexRequest(b"/", (b"/a",), b"/i", id="1")
DONE = Done(files=1, bytes=1, hashed=1, unreadable=0, rotten=0, seconds=1.0)


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
def serving(
    attack: Attack,
    set_connection: SetConnection,
    attacker: type[Attacker] = Attacker,
    prepare: Callable[[paramiko.Transport], object] = lambda transport: None,
) -> Iterator[None]:
    """Serve the connection ``attacked``, by which everything is attacked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

        def serve() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    connection, _ = listener.accept()
                    transport = paramiko.Transport(connection)
                    transports.append(transport)
                    transport.set_log_channel("attacker")  # its own lines are not what is counted
                    transport.add_server_key(KEY)
                    prepare(transport)
                    transport.start_server(server=attacker(attack), event=threading.Event())

        transports: list[paramiko.Transport] = []
        threading.Thread(target=serve, daemon=True).start()
        define(set_connection, listener.getsockname()[1])
        try:
            yield
        finally:
            for transport in transports:
                transport.close()


def define(set_connection: SetConnection, port: int) -> None:
    connection = {"conn_type": "ssh", "host": "127.0.0.1", "port": port, "login": "x", "password": "x"}
    set_connection("attacked", {**connection, "extra": {"host_key": f"ssh-rsa {KEY.get_base64()}"}})


def audited() -> paramiko.SSHClient:
    """Return a client as audits have it."""
    return client_of(account("attacked"), BoundedTransport)


def command(client: paramiko.SSHClient) -> paramiko.Channel:
    """Have the server attack a client; what the command writes is then read from the channel."""
    transport = client.get_transport()
    assert transport is not None
    channel = transport.open_session(window_size=WINDOW)
    channel.settimeout(20)
    channel.set_combine_stderr(True)
    channel.exec_command("x")
    channel.sendall(b"x")
    return channel


def end_of(client: paramiko.SSHClient) -> str:
    """Have the server attack a client, and return why the connection has ended."""
    channel = command(client)
    transport: Any = channel.get_transport()
    transport.join(30)
    assert not transport.is_alive()
    error = transport.get_exception()
    assert isinstance(error, bounded.Overrun)
    return str(error)


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


# --- the window -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [overflow, overflow_stderr, overflow_both])
def test_more_than_the_window_ends_the_connection_of_an_audit(
    attack: Attack, set_connection: SetConnection
) -> None:
    """Nobody reads meanwhile, so that nothing more is granted."""
    with serving(attack, set_connection), audited() as client:
        channel = command(client)
        transport: Any = channel.get_transport()
        transport.join(30)
        assert not transport.is_alive()
        assert len(channel.in_buffer) + len(channel.in_stderr_buffer) <= WINDOW
        told = "more than its window of 1,048,576 bytes"
        assert told in str(transport.get_exception())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sessions of asyncssh grant little, so that little has to be sent until it is too much."""
    monkeypatch.setattr(session_module, "_WINDOW", WINDOW)
    monkeypatch.setattr(session_module, "_UNREAD", WINDOW // 4)


def held(session: Session) -> int:
    """Return how many bytes wait to be read, here and in asyncssh."""
    return session._size + sum(len(data) for data, _ in session._channel._recv_buf)


@pytest.mark.parametrize("attack", [overflow, overflow_stderr, overflow_both])
def test_more_than_the_window_ends_the_connection(
    attack: Attack, set_connection: SetConnection, small: None
) -> None:
    """Nobody reads meanwhile, so that nothing more is granted."""
    with serving(attack, set_connection), IndexHook("attacked") as hook:
        session = hook.connected().session(20, command="x")
        session.sendall(b"x")
        assert session.closed.wait(30)
        assert held(session) <= WINDOW + WINDOW // 4 + 65536
        with pytest.raises(EOFError, match="Window exceeded"):
            while session.recv(65536):
                pass
        with pytest.raises(EOFError, match="Window exceeded"):
            session.sendall(b"x")


def test_server_that_keeps_to_its_window_waits_for_who_reads(
    set_connection: SetConnection, small: None
) -> None:
    """However much it has to say, and however long nobody looks."""
    with serving(much, set_connection), IndexHook("attacked") as hook:
        session = hook.connected().session(20, command="x")
        session.sendall(b"x")
        until(lambda: session._is_paused and session._channel.get_recv_window() == WINDOW, every=0.01)
        until(lambda: session._channel._recv_window < 65536, every=0.01)  # it has used up all of it
        assert WINDOW <= held(session) <= WINDOW + WINDOW // 4 + 65536
        read = 0
        while data := session.recv(30000):
            read += len(data)
        assert read == MUCH + len(Attacker.opening)


def test_window_of_an_audit_is_granted_again_as_data_are_read(set_connection: SetConnection) -> None:
    """An honest server may fill it to the last byte, many times over, by both streams."""
    with serving(much, set_connection), audited() as client:
        channel = command(client)
        read = 0
        while data := channel.recv(30000):
            read += len(data)
        assert read == MUCH + len(Attacker.opening)


MUCH = 8 * WINDOW


def much(channel: paramiko.Channel) -> None:
    for begin in range(0, MUCH, 65536):
        (channel.sendall if begin % 131072 else channel.sendall_stderr)(bytes(65536))
    channel.shutdown_write()


def test_server_that_takes_none_of_our_answers_is_given_up(
    set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its requests wants one, which would wait here until it takes it."""
    monkeypatch.setattr(session_module, "_UNSENT", 65536)

    def attack(channel: paramiko.Channel) -> None:
        transport: Any = channel.get_transport()
        transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # likewise
        transport.packetizer.read_message = lambda: threading.Event().wait()
        question = paramiko.Message()
        question.add_byte(bytes([80]))
        question.add_string("x" * 10)
        question.add_boolean(True)
        while transport.is_active():
            transport._send_user_message(question)

    with serving(attack, set_connection), IndexHook("attacked") as hook:
        wire = hook.connected()._connection.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # or it would hold megabytes
        session = hook.connected().session(180, command="x")
        session.sendall(b"x")
        with pytest.raises(EOFError, match="does not accept our replies"):
            while session.recv(65536):
                pass


# --- what makes no sense ----------------------------------------------------------------------------


def test_reader_says_what_the_server_did(set_connection: SetConnection) -> None:
    """As asyncssh tells it."""
    told = pytest.raises(ConnectionLost, match="the connection broke: Incomplete packet")
    with serving(unknown, set_connection), ProviderHook("attacked") as hook, told:
        hook.reader()


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


def flood_of(message: Attack) -> Attack:
    """Return an indexer that ends well, and says much else before that."""

    def attack(channel: paramiko.Channel) -> None:
        for _ in range(2000):
            message(channel)
        ends_well(channel)

    return attack


def ends_well(channel: paramiko.Channel) -> None:
    channel.sendall(b"mdbackup done files=1 bytes=1 hashed=1 unreadable=0 rotten=0 seconds=1.0\n")
    channel.send_exit_status(0)
    channel.close()


MESSAGES = [unknown, unimplemented, refused, banner, kind_of_data]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_that_are_out_of_place_fill_no_log_of_an_audit(
    message: Attack, set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """And end its connection."""
    caplog.set_level(logging.INFO)
    with serving(flood_of(message), set_connection), audited() as client:
        assert end_of(client).startswith("the server sent")
    said = [record.getMessage() for record in caplog.records if record.name == "paramiko.transport"]
    assert 0 < len(said) <= 100 and max(map(len, said)) < 10_000


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_that_are_out_of_place_fill_no_log(
    message: Attack, set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """The first ends the connection, but for those that are not kept, and told nobody."""
    with serving(flood_of(message), set_connection), IndexHook("attacked") as hook:
        if message in (unimplemented, banner):
            assert hook.build_index(REQUEST) == DONE
        else:
            with pytest.raises(ConnectionLost, match="the connection broke: "):
                hook.build_index(REQUEST)
    assert len([record for record in caplog.records if record.name.startswith("asyncssh")]) < 10


def test_packet_of_an_audit_that_is_too_large_is_not_read(set_connection: SetConnection) -> None:
    """Its length alone ends the connection."""
    with serving(large, set_connection), audited() as client:
        assert end_of(client).startswith("the server sent a packet of 5")


def test_packet_that_is_too_large_is_not_read(set_connection: SetConnection) -> None:
    """Its length alone ends the connection."""
    told = pytest.raises(ConnectionLost, match="the connection broke: Max packet size exceeded")
    with serving(large, set_connection), IndexHook("attacked") as hook, told:
        hook.build_index(REQUEST)


def large(channel: paramiko.Channel) -> None:
    send(channel, 2, bytes(2 * bounded._MAX_PACKET))  # it may be ignored, says its type
    channel.send_exit_status(0)


def test_server_that_only_compresses_is_not_talked_to(set_connection: SetConnection) -> None:
    """A packet of it may be a thousand times as large as it was on the line."""

    def only_compress(transport: paramiko.Transport) -> None:
        transport.get_security_options().compression = ("zlib@openssh.com", "zlib")

    with serving(overflow, set_connection, prepare=only_compress):
        with IndexHook("attacked") as hook, pytest.raises((AccessRefused, ConnectionLost)):
            hook.connected()
        with pytest.raises(AccessRefused, match="no algorithm in common"):
            audited()


def test_extensions_are_not_counted_beyond_their_message(set_connection: SetConnection) -> None:
    """paramiko would look for each; of four billion, for hours."""

    def attack(channel: paramiko.Channel) -> None:
        send(channel, MSG_EXT_INFO, 1 << 20, b"name", b"value")
        channel.send_exit_status(0)
        channel.shutdown_write()

    with serving(attack, set_connection):
        with audited() as client:
            assert end_of(client) == "the server sent a message that claims more items than it contains"
        with IndexHook("attacked") as hook, pytest.raises(ConnectionLost, match="broke: Unexpected ext_info"):
            hook.build_index(REQUEST)


# --- before there is a session ----------------------------------------------------------------------


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

    with serving(overflow, set_connection, Curious):
        with pytest.raises(AccessRefused, match="allowed types:"):
            audited()
        assert "the server sent a message that claims more items than it contains" in caplog.text
        with IndexHook("attacked") as hook, pytest.raises(ConnectionLost, match="Incomplete packet"):
            hook.connected()


def test_questions_without_end_are_given_up(
    set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as long as a login may take."""
    monkeypatch.setattr("airflow_mdbackup.hooks.connection.CONNECT", 1)

    class Talkative(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def password_auth_supported(self) -> bool:
            return False

        def kbdint_auth_supported(self) -> bool:
            return True

        def get_kbdint_challenge(self, *_: str) -> Any:
            return "", "", "", []

        def validate_kbdint_response(self, *_: Any) -> Any:
            return "", "", "", []

    told = pytest.raises(ConnectionLost, match=r"Login timeout expired|no login within")
    with served_by_asyncssh(Talkative, set_connection), IndexHook("attacked") as hook, told:
        hook.connected()


@contextmanager
def served_by_asyncssh(server: type[asyncssh.SSHServer], set_connection: SetConnection) -> Iterator[None]:
    """Serve the connection ``attacked``, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        key = asyncssh.import_private_key(pem(KEY))

        async def listen() -> asyncssh.SSHAcceptor:
            return await asyncssh.listen("127.0.0.1", 0, server_factory=server, server_host_keys=[key])

        listener = asyncio.run_coroutine_threadsafe(listen(), loop).result(20)
        define(set_connection, listener.get_port())
        yield

        async def end() -> None:
            listener.close()
            await listener.wait_closed()

        asyncio.run_coroutine_threadsafe(end(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


def pem(key: paramiko.RSAKey) -> str:
    file = io.StringIO()
    key.write_private_key(file)
    return file.getvalue()


@pytest.mark.parametrize("line", [bytes(4 * bounded._MAX_BANNER), b"hello\r\n" * 20_000], ids=["one", "many"])
def test_greeting_without_end_is_not_read(set_connection: SetConnection, line: bytes) -> None:
    """Before the version a server may print lines; this one never ends its first, or the last never comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    with suppress(OSError):
                        connection.sendall(line)

        connections: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        define(set_connection, listener.getsockname()[1])
        with pytest.raises(ConnectionLost, match=r"without an SSH version|protocol version"):
            audited()
        with IndexHook("attacked") as hook, pytest.raises(ConnectionLost, match="anner line"):
            hook.connected()
    for connection in connections:
        connection.close()


def test_nobody_else_gets_a_client_of_ours(set_connection: SetConnection) -> None:
    """Airflow's own part of our hooks, and others of the same process, keep paramiko's own."""
    with serving(overflow, set_connection), audited() as client, IndexHook("attacked") as hook:
        assert isinstance(client.get_transport(), BoundedTransport)
        assert type(hook.get_conn().get_transport()) is paramiko.Transport
        assert type(hook.connected()._connection) is session_module._BoundedConnection
