"""Files that nobody ends: pipes in the place of files, and servers that stream for ever."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest

from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Stream, Wanted
from tests.guarantees.transport.channels import ATTRS, DATA, ScriptedServer, packet, string
from tests.guarantees.transport.line import Line
from tests.pair import Pair, ServerProcess
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("2. Faulty transport")


# --- whoever opens it waits -------------------------------------------------------------------------


@contextmanager
def a_pipe_instead(pair: Pair, name: str) -> Iterator[None]:
    """Hold while a named pipe is in the place of a file."""
    path = pair.path(name)
    os.rename(path, path + b".aside")
    os.mkfifo(path)
    try:
        yield
    finally:
        # A server that waits for the other end is let go.
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        os.rename(path + b".aside", path)


@pytest.mark.parametrize("name", ["a", "c", "larger", "same"])
def test_a_named_pipe_in_the_place_of_a_file_keeps_no_other_from_coming(
    line: Line, name: str, cases: Cases
) -> None:
    """The try that meets it stalls, as the whole server does; the next one does not open it."""
    with cases.one():
        server = ServerProcess()
        with a_pipe_instead(line.pair, name):
            server.channel.settimeout(0.3)
            # "same" is a copy of "a", and only asked about.
            with pytest.raises(ConnectionLost, match="stalled") if name != "same" else nullcontext():
                pull(line.pair.mirror, line.run, 0, lambda: Reader(server.channel, window=1))
            server.channel.close()
            line.pull(lambda channel: channel)
            (found,) = [r for r in line.results() if r.outcome not in ("pulled", "copied")]
            assert (found.path, found.outcome) == (line.pair.path(name), "failed")
            assert found.detail == "not a regular file but a named pipe"
        server.stop()
        line.retry()
    line.finish()


def test_equal_files_come_although_a_pipe_is_in_the_place_of_the_first(line: Line, cases: Cases) -> None:
    """Whoever waits for its content fetches it."""
    with cases.one():
        server = ServerProcess()
        with a_pipe_instead(line.pair, "a"):
            server.channel.settimeout(0.3)
            with pytest.raises(ConnectionLost, match="stalled"):
                pull(line.pair.mirror, line.run, 0, lambda: Reader(server.channel, window=1))
            server.channel.close()
            line.pull(lambda channel: channel)
            told = {os.path.basename(result.path): result.outcome for result in line.results()}
            assert told[b"a"] == "failed" and told[b"same"] == "pulled"
        server.stop()
        line.retry()
    line.finish()


# --- without end ------------------------------------------------------------------------------------


class Endless(ScriptedServer):
    """Answers a READ with something that has no end."""

    flood = b""
    sent = 0

    def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
        self.flood = self.endless(number)
        return b""

    def endless(self, number: int) -> bytes:
        raise NotImplementedError

    def silent(self) -> bytes:
        self.sent += len(self.flood)
        assert self.sent < 1 << 20, "it is listened to for ever"
        return self.flood


class Unasked(Endless):
    def endless(self, number: int) -> bytes:
        return packet(DATA, number + 1000, string(bytes(1000)))


class Shapeless(Endless):
    def endless(self, number: int) -> bytes:
        return b"x" * 1000


class NeverWhole(Endless):
    def endless(self, number: int) -> bytes:
        return bytes(999) + b"\1"


@pytest.mark.parametrize("kind", [Unasked, Shapeless, NeverWhole])
def test_a_server_that_streams_for_ever_is_given_up(kind: type[Endless], cases: Cases) -> None:
    """Before it has sent more than a packet may hold."""
    server = kind({b"/f": bytes(100_000)})
    with cases.one(), pytest.raises(ConnectionLost):
        reader = Reader(server)
        reader.submit(Wanted(b"/f", None, lambda _: Stream(len)))
        reader.wait()


def test_a_file_without_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    """Its size is what the provider says; where it goes, the disk sets the limit."""
    monkeypatch.undo()
    most = scaled(200, 2000) << 20
    block = bytes(255 << 10)

    class Boundless(ScriptedServer):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            return packet(ATTRS, number, struct.pack(">IQIII", 13, (1 << 63) - 1, 0o100644, 5, 5))

        def read(self, number: int, content: bytes, offset: int, length: int) -> bytes:
            return packet(DATA, number, string(block[:length]))

    written = 0

    def write(data: bytes | memoryview) -> None:
        nonlocal written
        written += len(data)
        if written > most:
            raise OSError(28, "No space left on device")

    tracemalloc.start()
    try:
        with cases.one(), pytest.raises(OSError, match="No space"):
            reader = Reader(Boundless({b"/f": b""}), window=2 << 20)
            reader.submit(Wanted(b"/f", None, lambda _: Stream(write)))
            reader.wait()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
