"""SSH servers that send too much to a triggerer: other triggers get their turns, and the build ends.

The budgets are small here, so that little has to be sent until it is too much.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import asyncssh
import pytest
from asyncssh.packet import Boolean, Byte, String, UInt32

from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.triggers import bounded
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger

SetConnection = Callable[[str, dict[str, Any]], None]
Send = Callable[[asyncssh.SSHServerConnection, int], None]
REQUEST = request_line(IndexRequest(b"/", (b"/a",), b"/i", id="1")).decode()
DONE = b"mdbackup done files=1 bytes=1 hashed=1 unreadable=0 rotten=0 seconds=1.0\n"
MODULE = "airflow_mdbackup.triggers.build_provider_index"


class Open(asyncssh.SSHServer):
    """Lets everybody in."""

    def begin_auth(self, username: str) -> bool:
        return False


async def flood(process: asyncssh.SSHServerProcess[bytes], send: Send) -> None:
    """Send the same for ever, as fast as it is taken."""
    connection = process.channel.get_connection()
    with suppress(asyncssh.Error, OSError):
        while not connection.is_closed():
            send(connection, process.channel._send_chan)
            await asyncio.sleep(0)
            while (wire := connection._transport) and wire.get_write_buffer_size() > 1 << 20:
                await asyncio.sleep(0)


def flooding(send: Send) -> Callable[[asyncssh.SSHServerProcess[bytes]], Any]:
    """An indexer that begins well, and then floods."""

    async def process(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(b"mdbackup ready request\n")
        await process.stdin.readline()
        await flood(process, send)

    return process


def ignore(connection: asyncssh.SSHServerConnection, _: int) -> None:
    connection.send_packet(2, String(b""))


async def done(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """An indexer that ends well."""
    process.stdout.write(b"mdbackup ready request\n")
    await process.stdin.readline()
    process.stdout.write(DONE)
    process.exit(0)


async def fire_against(
    process: Callable[[asyncssh.SSHServerProcess[bytes]], Any],
    set_connection: SetConnection,
    server: type[asyncssh.SSHServer] = Open,
    **options: Any,
) -> dict[str, Any]:
    """Run a trigger against a server of such processes, and return what its one event carries."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    options = {"server_host_keys": [key], "process_factory": process, "encoding": None, **options}
    async with asyncssh.listen("127.0.0.1", 0, server_factory=server, **options) as listener:
        extra = {"host_key": " ".join(key.export_public_key().decode().split()[:2])}
        connection = {"conn_type": "ssh", "host": "127.0.0.1", "port": listener.get_port(), "extra": extra}
        set_connection("index", {**connection, "login": "x", "password": "x"})
        trigger = BuildProviderIndexTrigger("index", REQUEST)
        try:
            event = await asyncio.wait_for(anext(trigger.run()), 60)
        finally:
            await trigger.cleanup()
        assert isinstance(event.payload, dict)
        return event.payload


@pytest.fixture(autouse=True)
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a trigger try once, by a connection that may send little, however long it takes."""
    monkeypatch.setattr(f"{MODULE}._TRIES", 1)
    monkeypatch.setattr(bounded, "_PACKETS", (1000, 0))
    monkeypatch.setattr(bounded, "_BYTES", (1 << 20, 0))
    monkeypatch.setattr(bounded, "_KEY_EXCHANGES", (5, 0))


def test_server_that_only_compresses_is_not_talked_to(set_connection: SetConnection) -> None:
    """Of 200 kB that it sends, 200 MB could come. The task may talk to it, by the program `ssh`."""
    sessions: list[int] = []

    async def process(process: asyncssh.SSHServerProcess[bytes]) -> None:
        sessions.append(1)
        await done(process)

    event = asyncio.run(fire_against(process, set_connection, compression_algs=["zlib@openssh.com"]))
    assert (list(event), sessions) == (["no_way"], [])
    assert "no algorithm in common" in event["no_way"]


def test_build_ends_well_where_a_server_keeps_within_bounds(set_connection: SetConnection) -> None:
    """It offers compression, and does without."""
    event = asyncio.run(fire_against(done, set_connection))
    assert event["done"]["files"] == 1


@pytest.mark.parametrize(
    ("send", "what"),
    [
        (ignore, "packets"),
        (lambda connection, _: connection.send_packet(2, String(bytes(32768))), "bytes"),
        (lambda connection, _: connection.send_packet(3, UInt32(0)), "packets"),
        (lambda connection, _: connection.send_packet(4, Byte(1), String(b""), String(b"")), "packets"),
        (lambda connection, _: connection.send_packet(80, String(b"x"), Boolean(False)), "packets"),
        (lambda connection, number: connection.send_packet(93, UInt32(number), UInt32(1)), "packets"),
        (lambda connection, number: connection.send_packet(94, UInt32(number), String(b"x")), "packets"),
        (
            lambda connection, number: connection.send_packet(
                98, UInt32(number), String(b"xon-xoff"), Boolean(False), Boolean(True)
            ),
            "packets",
        ),
        (lambda connection, _: connection.send_packet(200), "packets"),
    ],
    ids=[
        "ignore", "large ignore", "unimplemented", "debug", "global request", "window adjust", "one byte",
        "channel request", "unknown",
    ],
)  # fmt: skip
def test_flood_below_the_lines_ends_the_build(
    set_connection: SetConnection, caplog: pytest.LogCaptureFixture, send: Send, what: str
) -> None:
    """Patience would not: an indexer may be silent for minutes, and go on then. No log is filled either."""
    caplog.set_level(logging.WARNING)  # as the hooks have set it for asyncssh
    logging.getLogger("asyncssh").addHandler(caplog.handler)
    try:
        event = asyncio.run(fire_against(flooding(send), set_connection))
    finally:
        logging.getLogger("asyncssh").removeHandler(caplog.handler)
    assert event["error"] == "ConnectionLost"
    assert event["message"].startswith("connection index: the server sent ")
    assert f" {what}, far more than the build of an index needs" in event["message"]
    assert len(caplog.records) < 100


def test_flood_after_the_end_of_the_output_is_told(set_connection: SetConnection) -> None:
    """Where nobody reads any more, whom the connection's end would be told."""

    async def process(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write_eof()
        await flood(process, ignore)

    event = asyncio.run(fire_against(process, set_connection))
    assert (event["error"], "the server sent 1,001 packets" in event["message"]) == ("ConnectionLost", True)


def test_key_exchanges_without_end_end_the_build(set_connection: SetConnection) -> None:
    """Each costs much more than its packets."""
    event = asyncio.run(fire_against(flooding(ignore), set_connection, rekey_bytes=1))
    assert (event["error"], "6 key exchanges, far more" in event["message"]) == ("ConnectionLost", True)


@pytest.mark.parametrize("kind", ["banner", "question"])
def test_flood_at_login_ends_it(set_connection: SetConnection, kind: str) -> None:
    """It comes before there is a session."""

    class Talkative(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            self.connection = conn

        def begin_auth(self, username: str) -> bool:
            return True

        def kbdint_auth_supported(self) -> bool:
            return kind == "question"

        def get_kbdint_challenge(self, *_: str) -> Any:
            return "", "", "", []

        def validate_kbdint_response(self, *_: Any) -> Any:
            return "", "", "", []

        def password_auth_supported(self) -> bool:
            return kind == "banner"

        async def validate_password(self, username: str, password: str) -> bool:
            while not self.connection.is_closed():
                self.connection.send_auth_banner("hello")
                await asyncio.sleep(0.001)
            return False

    event = asyncio.run(fire_against(done, set_connection, Talkative))
    assert (event["error"], "the server sent 1,001 packets" in event["message"]) == ("ConnectionLost", True)


def test_other_triggers_get_a_turn_after_each_piece(
    set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much the server has sent meanwhile, and whatever it is."""
    turns: list[int] = []
    worked_off: list[tuple[int, int]] = []
    data_received = asyncssh.SSHClientConnection.data_received

    def recorded(self: asyncssh.SSHClientConnection, data: bytes, datatype: Any = None) -> None:
        worked_off.append((len(turns), len(data)))
        data_received(self, data, datatype)

    monkeypatch.setattr(asyncssh.SSHClientConnection, "data_received", recorded)

    def burst(connection: asyncssh.SSHServerConnection, _: int) -> None:
        for _ in range(500):
            ignore(connection, 0)

    async def other() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def go() -> dict[str, Any]:
        beside = asyncio.create_task(other())
        try:
            return await fire_against(flooding(burst), set_connection)
        finally:
            beside.cancel()

    event = asyncio.run(go())
    assert "the server sent 1,001 packets" in event["message"]
    taken = [turn for turn, _ in worked_off]
    assert len(set(taken)) == len(taken), "two pieces were worked off in one turn"
    assert max(size for _, size in worked_off) <= 4096


def test_what_is_not_worked_off_is_left_in_the_socket(
    set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a server that is faster than its turns fills no memory."""
    waiting: list[int] = []
    work_off = bounded._Connection._process_chunk

    def recorded(self: bounded._Connection) -> None:
        waiting.append(len(self._buffer))
        work_off(self)

    monkeypatch.setattr(bounded._Connection, "_process_chunk", recorded)
    monkeypatch.setattr(bounded, "_BYTES", (8 << 20, 0))

    def burst(connection: asyncssh.SSHServerConnection, _: int) -> None:
        for _ in range(500):
            connection.send_packet(2, String(bytes(32768)))

    event = asyncio.run(fire_against(flooding(burst), set_connection))
    assert " bytes, far more" in event["message"]
    assert max(waiting) <= 256 << 10  # what asyncio reads at once


def test_nobody_elses_connection_is_bounded(set_connection: SetConnection) -> None:
    """Other triggers of the same process keep asyncssh's own, even while one of ours connects."""

    async def go() -> asyncssh.SSHClientConnection:
        key = asyncssh.generate_private_key("ssh-ed25519")
        async with asyncssh.listen("127.0.0.1", 0, server_factory=Open, server_host_keys=[key]) as listener:

            async def connect(client: type[asyncssh.SSHClient]) -> asyncssh.SSHClientConnection:
                return await asyncssh.connect(
                    "127.0.0.1", listener.get_port(), known_hosts=None, client_factory=client
                )

            beside = asyncio.create_task(connect(asyncssh.SSHClient))
            ours = await connect(bounded.BoundedClient)
            async with await beside as theirs, ours:
                assert isinstance(ours, bounded._Connection)
                return theirs

    assert type(asyncio.run(go())) is asyncssh.SSHClientConnection
