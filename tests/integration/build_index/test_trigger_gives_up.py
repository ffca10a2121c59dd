"""When a trigger gives up a build, and when it goes on."""

from __future__ import annotations

import asyncio
import errno
import logging
from contextlib import suppress
from typing import Any

import asyncssh
import pytest

from airflow_mdbackup.provider_side import conversation
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import ConnectionLost
from demo.sshd import ProviderServer
from tests.integration.build_index.builds import DONE, SetConnection, build, fire_within, request, trigger


@pytest.mark.parametrize(
    "command",
    [
        "while sleep 0.1; do echo hi; done",
        "yes",
        "echo mdbackup ready request; read x; kill -9 $PPID",
        "echo mdbackup ready request; sleep 60",
        # A build that makes progress, but no more than the one before, is not worth it either.
        "echo mdbackup ready request; read x; echo mdbackup progress files=5 bytes=7 hashed=5 seconds=5;"
        " sleep 0.2; kill -9 $PPID",
    ],
    ids=["chatters", "floods", "begins and breaks", "begins and hangs", "breaks at the same place"],
)
def test_trigger_gives_up_where_nothing_comes_of_it(
    server: ProviderServer, impatient: list[float], command: str
) -> None:
    """After some tries, so that a task does not hang for ever where no timeout ends it."""
    server.force_index_command(command)
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 40))
    assert event["error"] == "ConnectionLost"
    assert event["message"].count("connection index") == 1
    assert len(impatient) == 2


@pytest.mark.parametrize("line", [b"\n", b"mdbackup progress files=1 bytes=1 hashed=1 seconds=1\n"])
def test_flood_of_lines_leaves_other_triggers_their_turns(
    impatient: list[float], monkeypatch: pytest.MonkeyPatch, set_connection: SetConnection, line: bytes
) -> None:
    """Each piece that is looked at costs them one turn, and there are few before the trigger gives up."""
    looked_at: list[int] = []
    turns: list[int] = []
    receive = conversation.Conversation.receive

    def heard(self: conversation.Conversation, data: bytes) -> bytes:
        looked_at.append(len(turns))
        return receive(self, data)

    monkeypatch.setattr(conversation.Conversation, "receive", heard)

    async def flood(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(b"mdbackup ready request\n")
        await process.stdin.readline()
        with suppress(asyncssh.Error, OSError):
            while True:
                process.stdout.write(DONE.replace("done", "progress").encode() + line * (65536 // len(line)))
                await process.stdout.drain()

    class Open(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

    async def other() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def go() -> dict[str, Any]:
        key = asyncssh.generate_private_key("ssh-ed25519")
        options: dict[str, Any] = {"server_host_keys": [key], "process_factory": flood, "encoding": None}
        async with asyncssh.listen("127.0.0.1", 0, server_factory=Open, **options) as server:
            host_key = " ".join(key.export_public_key().decode().split()[:2])
            connection = {
                "conn_type": "ssh",
                "host": "127.0.0.1",
                "port": server.get_port(),
                "login": "x",
                "password": "x",
            }
            set_connection("index", connection | {"extra": {"host_key": host_key}})
            beside = asyncio.create_task(other())
            try:
                return await fire_within(trigger(IndexRequest(b"/", (b"/a",), b"/i", id="1")), 60)
            finally:
                beside.cancel()

    event = asyncio.run(go())
    assert (event["error"], "far more than an indexer does" in event["message"]) == ("ConnectionLost", True)
    assert len(impatient) == 2
    assert len(set(looked_at)) == len(looked_at), "two pieces were looked at in one turn"


def test_trigger_goes_on_while_each_connection_gets_further(
    server: ProviderServer, impatient: list[float]
) -> None:
    """A build of hours over a bad line ends well."""
    count = server.tree / "count"
    count.write_text("0")
    count.chmod(0o666)
    where = f"{server.chroot.rstrip('/')}{server.prefix}/count"
    server.force_index_command(
        f"n=$(($(cat {where}) + 1)); echo $n >{where}; echo mdbackup ready request; read x;"
        f" [ $n -lt 8 ] || {{ echo {DONE}; exit; }};"
        " echo mdbackup progress files=1 bytes=$n hashed=0 seconds=5; sleep 0.2; kill -9 $PPID"
    )
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 60))
    assert event["done"]["files"] == 1
    assert len(impatient) == 7


def test_trigger_does_not_wait_for_a_command_whose_output_has_ended(
    server: ProviderServer, impatient: list[float]
) -> None:
    """As in a worker: a server that tells no status has none to tell."""
    server.force_index_command(f"echo mdbackup ready request; echo {DONE}; exec >&- 2>&-; exec sleep 60")
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 20))
    assert event["done"]["files"] == 1


def test_trigger_gives_up_a_server_that_opens_no_session(
    impatient: list[float], set_connection: SetConnection
) -> None:
    """It lets everybody in, and then does not answer."""

    class Mute(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

        def session_requested(self) -> Any:
            async def never() -> None:
                await asyncio.sleep(1e6)

            return never()

    async def go() -> dict[str, Any]:
        key = asyncssh.generate_private_key("ssh-ed25519")
        listener = await asyncssh.create_server(Mute, "127.0.0.1", 0, server_host_keys=[key])
        host_key = key.export_public_key().decode().strip()
        connection = {
            "conn_type": "ssh",
            "host": "127.0.0.1",
            "port": listener.get_port(),
            "login": "x",
            "password": "x",
        }
        set_connection("index", connection | {"extra": {"host_key": host_key}})
        try:
            return await fire_within(trigger(IndexRequest(b"/", (b"/a",), b"/i", id="1")), 20)
        finally:
            listener.close()

    event = asyncio.run(go())
    assert (event["error"], "does not open a session" in event["message"]) == ("ConnectionLost", True)
    assert len(impatient) == 2


def test_words_of_a_server_act_on_no_terminal_that_shows_the_log_of_a_triggerer(
    impatient: list[float], set_connection: SetConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncssh logs them as they come."""
    caplog.set_level(logging.INFO, "asyncssh")
    logging.getLogger("asyncssh").addHandler(caplog.handler)

    class Rude(asyncssh.SSHServer):
        def connection_made(self, connection: asyncssh.SSHServerConnection) -> None:
            self.connection = connection

        def begin_auth(self, username: str) -> bool:
            return False

        def session_requested(self) -> bool:
            self.connection.disconnect(asyncssh.DISC_PROTOCOL_ERROR, "\x1b]0;owned\x07")
            return False

    async def against_it() -> dict[str, Any]:
        key = asyncssh.generate_private_key("ssh-ed25519")
        async with asyncssh.listen("127.0.0.1", 0, server_factory=Rude, server_host_keys=[key]) as server:
            host_key = key.export_public_key().decode().strip()
            extra = {"host_key": " ".join(host_key.split()[:2])}
            set_connection(
                "index",
                {
                    "conn_type": "ssh", "host": "127.0.0.1", "port": server.get_port(), "login": "x",
                    "password": "x", "extra": extra,
                },
            )  # fmt: skip
            request = IndexRequest(b"/", (b"/a",), b"/i")
            return await fire_within(trigger(request), 40)

    try:
        event = asyncio.run(against_it())
    finally:
        logging.getLogger("asyncssh").removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if "owned" in record.getMessage()]
    assert said and all(message.isprintable() for message in [*said, event["message"]])


def test_network_that_forbids_the_connection_is_no_matter_of_keys(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, impatient: list[float]
) -> None:
    """What a firewall answers looks like a file that may not be read, but for the name of one."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    with pytest.raises(ConnectionLost, match="Permission denied"):
        build(request(server, id="1"))
    monkeypatch.setattr("asyncssh.connect", forbidden)
    event = asyncio.run(fire_within(trigger(request(server, id="1")), 20))
    assert (event["error"], "Permission denied" in event["message"]) == ("ConnectionLost", True)
