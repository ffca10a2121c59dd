"""Faults of the way to a provider that only a real SSH server has."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import airflow_mdbackup.hooks.provider as provider_module
from airflow_mdbackup.hooks.provider import ProviderHook
from airflow_mdbackup.scheme.backup.archive import archive
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.backup.diff import make_plan
from airflow_mdbackup.scheme.backup.fetch import fetch_index
from airflow_mdbackup.scheme.backup.pull import PullSummary, pull
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.errors import ConnectionLost
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.index.canonical import IndexWriter
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from demo.sshd import ProviderServer
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("2. Faulty transport")

SetConnection = Callable[[str, dict[str, Any]], None]
SFTP_SERVER = "/usr/lib/openssh/sftp-server"
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home with an empty ~/.ssh, so that nothing depends on who runs the tests."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(params=["ssh", "asyncssh"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Over what a reader reads: either must do."""
    if request.param == "asyncssh":
        monkeypatch.setattr(provider_module, "program_for", lambda account: None)
    return str(request.param)


class RekeyingServer(ProviderServer):
    """Agrees on new keys after each MiB, and tells of it."""

    def _write_server_files(self, *, seen_as: Path) -> None:
        super()._write_server_files(seen_as=seen_as)
        settings = self.folder / "ssh" / "sshd_config"
        settings.write_text("RekeyLimit 1M\nLogLevel DEBUG1\n" + settings.read_text())


def test_a_server_that_wants_new_keys_all_the_time_costs_nothing(
    tmp_path: Path, set_connection: SetConnection, way: str, cases: Cases
) -> None:
    """A transfer goes on through dozens of key exchanges, on one connection."""
    size = scaled(24, 256) * MEGABYTE
    content = random.Random(1).randbytes(MEGABYTE) * (size // MEGABYTE)
    with cases.one(), RekeyingServer(tmp_path / "server") as server:
        (server.tree / "large").write_bytes(content)
        set_connection("backupop", server.sftp_connection())
        with ProviderHook("backupop") as hook:
            reader = hook.reader()
            expected = hashlib.md5(content).hexdigest().encode()
            path = f"{server.prefix}/large".encode()
            reader.submit(Wanted(path, expected, lambda _: Stream(len)))
            (fetched,) = reader.wait()
        assert isinstance(fetched, Fetched) and fetched.md5 == expected and fetched.size == size
        assert server.log_text().count("SSH2_MSG_NEWKEYS received") > size // MEGABYTE // 2
        assert server.log_text().count("Accepted publickey") == 1


@pytest.mark.parametrize("words", ["Welcome to srv1", "", "hi"])
def test_a_login_shell_that_prints_is_told_of(
    provider: ProviderServer, set_connection: SetConnection, way: str, words: str, cases: Cases
) -> None:
    """An account whose shell runs the SFTP server, and says something before."""
    provider.force_index_command(f"echo {words}; exec {SFTP_SERVER}")
    try:
        set_connection("chatty", provider.ssh_connection())
        with cases.one(), ProviderHook("chatty") as hook, pytest.raises(ConnectionLost) as caught:
            hook.reader()
        assert "Does a login shell print text?" in str(caught.value)
        assert words in str(caught.value)
        provider.force_index_command(f"exec {SFTP_SERVER}")
        with cases.one(), ProviderHook("chatty") as hook:
            assert hook.reader().round_trip > 0
    finally:
        provider.force_index_command(None)


class Site:
    """A provider with files, and a run that is planned for all of them."""

    def __init__(self, server: ProviderServer, folder: Path, names: list[str]) -> None:
        self.server = server
        self.mirror = Mirror(folder / "dest", "srv1")
        self.run: Run = self.mirror.run("manual__1")
        (server.tree / "backups").mkdir()
        with IndexWriter(server.tree / ".mdbackup" / "index.md5") as writer:
            for name in sorted(names):
                (server.tree / "backups" / name).write_bytes(name.encode() * 1000)
                writer.add(self.path(name), hashlib.md5(name.encode() * 1000).hexdigest().encode())
        self.mirror.claim()

    def path(self, name: str) -> bytes:
        return f"{self.server.prefix}/backups/{name}".encode()

    def plan(self) -> None:
        with ProviderHook("backupop") as hook:
            index = f"{self.server.prefix}/.mdbackup/index.md5".encode()
            fetch_index(self.mirror, self.run, hook.reader, index)
        make_plan(self.mirror, self.run)

    def pull(self, stall_timeout: float) -> PullSummary:
        with ProviderHook("backupop", stall_timeout=stall_timeout) as hook:
            return pull(self.mirror, self.run, 0, hook.reader)

    def results(self) -> dict[str, Result]:
        found = read_records(self.run.results(0), Result)
        return {os.path.basename(each.path).decode(): each for each in found}


def test_a_named_pipe_in_the_place_of_a_file_keeps_no_other_from_coming(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path, way: str, cases: Cases
) -> None:
    """The server waits for the pipe's other end, and the stall timer ends that; a retry gets all the rest."""
    set_connection("backupop", provider.sftp_connection())
    names = [f"{number:03}" for number in range(300)]
    site = Site(provider, tmp_path, names)
    site.plan()
    pipe = provider.tree / "backups" / "007"
    pipe.unlink()
    os.mkfifo(pipe, 0o644)
    try:
        with cases.one():
            with pytest.raises(ConnectionLost, match="stalled"):
                site.pull(stall_timeout=2)
            assert site.pull(stall_timeout=20).outcomes == {"pulled": 299, "failed": 1}
            assert site.results()["007"].detail == "not a regular file but a named pipe"
    finally:
        os.close(os.open(pipe, os.O_RDWR))  # the server's process of the first try is let go
    archive(site.mirror, site.run)
    summary = commit(site.mirror, site.run)
    assert summary.failed == 1 and summary.files == 299
