"""Whom the way over the program ssh trusts; the way over asyncssh trusts the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.scheme.errors import AccessRefused
from demo.sshd import ProviderServer
from demo.sshd_files import new_key
from tests.integration.ssh_program.over_ssh import SetConnection, over_ssh, way
from tests.waiting import until


def test_other_host_key_than_the_pinned_is_refused(
    provider: ProviderServer,
    set_connection: SetConnection,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By ssh too, before anything is told to the server; and both keys are named."""
    other = new_key(tmp_path / "other")
    set_connection("backupop", provider.sftp_connection(host_key=other))
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
        with pytest.raises(AccessRefused, match="not the expected") as caught:
            hook.reader()
    for key in (other, provider.host_key):
        told = subprocess.run(["ssh-keygen", "-lf", "-"], input=key, capture_output=True, text=True).stdout
        assert told.split()[1] in str(caught.value)
    assert "Host key verification failed" in capfd.readouterr().out
    assert "Accepted" not in provider.log_text()[before:]


def test_unknown_host_key_is_refused(provider: ProviderServer, set_connection: SetConnection) -> None:
    """It is neither pinned nor in known_hosts."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    set_connection("backupop", connection)
    before = provider.log_text()
    with pytest.raises(AccessRefused, match="host key is unknown"):
        ProviderHook("backupop")
    assert provider.log_text() == before, "it was connected to"


@pytest.fixture
def known_hosts(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path
) -> Callable[..., None]:
    """A function that writes known_hosts, with which a connection without pinned key has to do.

    In its lines, {right} is the server's key, {wrong} another one, and {at} where the server listens.
    """

    def known_hosts(*lines: str, **extra: str) -> None:
        words = {"right": provider.host_key, "wrong": new_key(tmp_path / "wrong")}
        at = f"[127.0.0.1]:{provider.port}"
        text = "".join(line.format(**words, at=at) + "\n" for line in lines)
        (home / ".ssh/known_hosts").write_text(text, "latin-1")
        connection = provider.sftp_connection(**extra)
        if not extra:
            del connection["extra"]["host_key"]
        set_connection("backupop", connection)

    return known_hosts


@pytest.mark.parametrize("hashed", [False, True], ids=["plain", "hashed"])
def test_known_hosts_of_home_is_honoured(
    known_hosts: Callable[..., None], home: Path, hashed: bool, each_way: str
) -> None:
    """With the port, in $HOME, while ssh would look where the passwd entry says."""
    known_hosts("{at} {right}")
    if hashed:
        file = home / ".ssh/known_hosts"
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", file], check=True, capture_output=True)
        assert "127.0.0.1" not in file.read_text()
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


@pytest.mark.parametrize(
    "lines",
    [
        ["127.0.0.1 {right}"],
        ["* {right}"],
        ["{at} {wrong}", "{at} {right}"],
        ["{at} {right}", "{at} {wrong}"],
        ["@revoked {at} {wrong}", "{at} {right}"],
        ["{at} ssh-ed25519 AAAAB", "nonsense", "@nonsense {at} {right}", "# caf\xe9", "caf\xe9 {wrong}",
         "{at} {right} caf\xe9"],
    ],
    ids=["of no port", "a pattern", "old and new", "new and old", "another is revoked", "broken lines"],
)  # fmt: skip
def test_known_hosts_is_read_as_openssh_reads_it(
    known_hosts: Callable[..., None], each_way: str, lines: list[str]
) -> None:
    known_hosts(*lines)
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


def test_line_of_known_hosts_that_is_skipped_is_told(
    known_hosts: Callable[..., None], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With file and line, so that it can be found."""
    known_hosts("{at} {right}", "\x1b[2J")
    with ProviderHook("backupop"):
        pass
    (warning,) = [record.getMessage() for record in caplog.records if "Skipping" in record.getMessage()]
    assert warning.startswith(f"Skipping {home}/.ssh/known_hosts, line 2: ") and warning.isprintable()


@pytest.mark.parametrize(
    "lines",
    [
        ["{at} {wrong}"],
        ["@revoked {at} {right}", "{at} {right}"],
        ["@revoked * {right}", "{at} {right}", "{at} {wrong}"],
        ["@cert-authority {at} {right}"],
    ],
    ids=["another", "revoked", "revoked everywhere", "an authority's"],
)
def test_server_whose_key_known_hosts_does_not_trust_is_refused(
    provider: ProviderServer, known_hosts: Callable[..., None], lines: list[str]
) -> None:
    """By both ways."""
    known_hosts(*lines)
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook:
        assert over_ssh(hook) is None
        with pytest.raises(AccessRefused, match="host key is not the expected"):
            hook.reader()
    assert "Accepted" not in provider.log_text()[before:]


@pytest.mark.parametrize("line", ["[127.0.0.1]:1 {right}", "{at} ssh-ed25519 AAAAB", ""])
def test_known_hosts_without_a_key_for_the_server_is_of_no_help(
    provider: ProviderServer, known_hosts: Callable[..., None], line: str
) -> None:
    """Of another port, malformed, or empty; which is told before anything is sent."""
    known_hosts(line)
    before = provider.log_text()
    with pytest.raises(AccessRefused, match="host key is unknown"):
        ProviderHook("backupop")
    assert provider.log_text() == before, "it was connected to"


@pytest.mark.parametrize("line", ["{at} {wrong}", "@revoked {at} {right}", "nonsense"])
def test_pinned_key_decides_and_known_hosts_is_not_read(
    provider: ProviderServer, known_hosts: Callable[..., None], each_way: str, line: str
) -> None:
    """Whoever pins a key means that one."""
    known_hosts(line, host_key=provider.host_key)
    with ProviderHook("backupop") as hook:
        assert way(hook.reader()) == each_way


def test_pinned_key_is_not_overruled_by_known_hosts(
    provider: ProviderServer, set_connection: SetConnection, home: Path, tmp_path: Path
) -> None:
    """Not on either account."""
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{provider.port} {provider.host_key}\n")
    pinned = new_key(tmp_path / "pinned")
    set_connection("pinning", provider.sftp_connection(host_key=pinned))
    with ProviderHook("pinning") as hook:
        assert over_ssh(hook) is None
        with pytest.raises(AccessRefused, match="host key is not the expected"):
            hook.reader()
    set_connection("pinning", provider.ssh_connection(host_key=pinned))
    with IndexHook("pinning") as index, pytest.raises(AccessRefused, match="host key is not the expected"):
        index.connected()


@pytest.mark.parametrize(
    "extra",
    [{"no_host_key_check": "true"}, {"no_host_key_check": True}, {"allow_host_key_change": "true"},
     {"known_hosts": "none"}],
    ids=str,
)  # fmt: skip
def test_connection_that_trusts_any_server_is_refused(
    provider: ProviderServer, set_connection: SetConnection, extra: dict[str, Any]
) -> None:
    """Before anything is sent."""
    connection = provider.sftp_connection()
    del connection["extra"]["host_key"]
    connection["extra"] |= extra
    set_connection("backupop", connection)
    with pytest.raises(AccessRefused, match=r"connection backupop sets .* trusts any server.*host_key"):
        ProviderHook("backupop")


def test_other_key_than_the_accounts_is_refused(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path, each_way: str
) -> None:
    """The server knows no such key; which is one failed login there, and not another one by the other way."""
    new_key(tmp_path / "wrong")
    set_connection("backupop", provider.sftp_connection(key_file=str(tmp_path / "wrong")))
    before = len(provider.log_text())
    with ProviderHook("backupop") as hook, pytest.raises(AccessRefused, match="refuses the account's key"):
        hook.reader()
    until(lambda: "authenticating user" in provider.log_text()[before:], 30)
    assert provider.log_text()[before:].count("authenticating user") == 1


def test_key_that_cannot_be_read_is_told_before_anything_is_sent(
    provider: ProviderServer, set_connection: SetConnection, tmp_path: Path
) -> None:
    """No other one is tried in its stead."""
    set_connection("backupop", provider.sftp_connection(key_file=str(tmp_path / "missing")))
    before = provider.log_text()
    with pytest.raises(AccessRefused, match="missing that cannot be read on this machine"):
        ProviderHook("backupop")
    assert provider.log_text() == before, "it was connected to"
