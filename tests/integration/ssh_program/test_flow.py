"""Much in both directions over the program ssh, and servers that never stop."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import airflow_mdbackup.hooks.ssh_program as program_module
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.hooks.ssh_program import SshChannel
from demo.sshd import ProviderServer
from tests.integration.ssh_program.over_ssh import (
    MEGABYTE,
    SSH,
    FakeSsh,
    SetConnection,
    children,
    in_thread,
    put,
    read,
    way,
)


@pytest.fixture
def channel(fake_ssh: FakeSsh) -> Iterator[Callable[[str], SshChannel]]:
    """A function that starts a Python script in the place of ssh, and gives the channel over it."""
    channels = []

    def channel(script: str) -> SshChannel:
        fake_ssh(
            f"#!{sys.executable}\nimport os, sys, time\n"
            "take, give = sys.stdin.buffer, sys.stdout.buffer\n"
            f"{script}\n"
        )
        ssh = shutil.which("ssh")
        assert ssh is not None
        channels.append(SshChannel([ssh], 1))
        return channels[-1]

    yield channel
    for one in channels:
        one.close()


def test_neither_side_waits_for_the_other(channel: Callable[[str], SshChannel]) -> None:
    """Here ssh takes nothing until all that it has is taken, which is more than a pipe holds; in order."""
    ssh = channel("give.write(bytes(range(256)) * 20000); give.flush(); give.write(take.read(3 << 20))")
    sent = os.urandom(3 * MEGABYTE)
    expected = bytes(range(256)) * 20000 + sent
    thread, raised = in_thread(lambda: ssh.sendall(sent))
    thread.join(10)
    assert raised == [] and not thread.is_alive()
    received = b""
    while data := ssh.recv(10_000):
        assert len(data) <= 10_000
        received += data
    assert received == expected


def test_slow_ssh_gets_all(channel: Callable[[str], SshChannel]) -> None:
    """In small pieces both ways."""
    ssh = channel("while data := os.read(0, 5000): os.write(1, data); time.sleep(0.001)")
    sent = os.urandom(2 * MEGABYTE)
    ssh.sendall(sent)
    received = b""
    while len(received) < len(sent):
        received += ssh.recv(MEGABYTE)
    assert received == sent


def test_ssh_that_takes_nothing_stalls(channel: Callable[[str], SshChannel]) -> None:
    """A call waits for a second here."""
    ssh = channel("time.sleep(30)")
    with pytest.raises(TimeoutError):
        ssh.sendall(bytes(MEGABYTE))
    with pytest.raises(TimeoutError):
        ssh.recv(1)


@pytest.mark.parametrize(
    "script",
    [
        "while True: give.write(bytes(1 << 20))",
        "os.close(1); time.sleep(30)",
        "os.close(0); time.sleep(0.2)",
    ],
    ids=["sends without end", "ends only its own side", "ends"],
)
def test_server_that_takes_nothing_does_not_fill_memory_or_keep_us_busy(
    channel: Callable[[str], SshChannel], script: str
) -> None:
    """It could send without end while our requests wait, or end its side only, for which nobody waits."""
    ssh = channel(script)
    thread, raised = in_thread(lambda: ssh.sendall(bytes(MEGABYTE)))
    thread.join(10)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [EOFError]
    assert sum(map(len, ssh._early)) <= program_module._AHEAD + MEGABYTE


def test_server_that_talks_without_end_fills_no_memory(channel: Callable[[str], SshChannel]) -> None:
    """Its words beside the files stay where they are until somebody asks for them."""
    ssh = channel("while True: os.write(2, b'word ' * 1000 + b'\\n')")
    with pytest.raises(TimeoutError):
        ssh.recv(1)
    assert len(ssh.stderr_messages()) <= 2000
    ssh.close()


def test_new_keys_are_agreed_on_in_mid_transfer(
    provider: ProviderServer, set_connection: SetConnection, fake_ssh: FakeSsh, tmp_path: Path
) -> None:
    """ssh then has to know the host key again, although what told it is gone."""
    fake_ssh(
        f"#!{sys.executable}\nimport os, sys\narguments = sys.argv[1:]\n"
        f"arguments[arguments.index('-E') + 1] = '{tmp_path}/log'\n"
        f"os.execv('{SSH}', ['ssh', '-v', '-o', 'RekeyLimit=1M', *arguments])\n"
    )
    path = put(provider, "large", 20 * MEGABYTE)
    set_connection("backupop", provider.sftp_connection())
    with ProviderHook("backupop") as hook:
        reader = hook.reader()
        assert way(reader) == "ssh" and not children("cat")
        assert read(reader, path).size == 20 * MEGABYTE
    assert (tmp_path / "log").read_text().count("SSH2_MSG_NEWKEYS received") > 5


def test_server_that_tells_no_limits_is_reached_by_ssh_too(
    tmp_path: Path, set_connection: SetConnection
) -> None:
    """As OpenSSH before 8.5; how long the line is must not be taken from how long the login took."""
    options = "-R -p open,close,read,fstat,stat,lstat,realpath"
    with ProviderServer(tmp_path / "server", sftp_options=options) as server:
        set_connection("backupop", server.sftp_connection())
        with ProviderHook("backupop") as hook:
            assert way(hook.reader()) == "ssh"


def test_words_never_stop_ssh(tmp_path: Path) -> None:
    """Neither its own nor those of others; what was said last is kept of each."""
    script = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY)
for number in range(300):
    os.read(0, 5)
    os.write(2, b"%d" % number + b"x" * 400 + b"\\n")
    os.write(log, b"%d" % number + b"y" * 400 + b"\\n")
    os.write(1, b"hello")
sys.exit(255)
"""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    log = open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
    channel = SshChannel([sys.executable, "-c", script, str(fifo)], 5, log=log)
    try:
        for _ in range(300):
            channel.sendall(b"12345")
            assert channel.recv(10) == b"hello"
        with pytest.raises(EOFError, match="299y"):
            channel.recv(10)
        assert "299x" in channel.stderr_messages() and "y" not in channel.stderr_messages()
    finally:
        channel.close()
        log.close()
