"""Servers of other kinds, what a server may be like, and what is said of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from airflow.sdk.exceptions import TaskDeferred

from airflow_mdbackup.hooks.connection import CONNECT
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.operators.build_provider_index import BuildProviderIndex
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.scheme.errors import AccessRefused
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from airflow_mdbackup.triggers.build_provider_index import BuildProviderIndexTrigger
from tests.integration import bad_habits
from tests.integration.connections.test_audit_connects import failed_logins
from tests.integration.connections.test_last_words import Dropping
from tests.integration.connections.ways import LONG, Place, all_ways, over, set_up, tried
from tests.integration.connections_table import BY_ASYNCSSH, BY_SSH, REFUSED, Case
from tests.integration.ssh_servers import AsyncsshServer, Dropbear, Keys, ProFtpd, Sshd
from tests.waiting import until

# --- servers of other kinds -------------------------------------------------------------------------


SIZES = (0, 1, 100, (32 << 10) - 1, 32 << 10, (32 << 10) + 1, (256 << 10) + 1, 2_000_003)


class BadHabits(Sshd):
    """sshd with `bad_habits` as the SFTP server of the index account."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        super().__init__(folder, keys, program="/usr/bin/python3 -I -S {tree}/bad_habits.py /")

    def empty_tree(self) -> None:
        super().empty_tree()
        shutil.copy(Path(bad_habits.__file__), self.tree)


@pytest.mark.parametrize("kind", [Dropbear, ProFtpd, AsyncsshServer, BadHabits])
def test_files_come_whole_from_other_servers(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path, Keys], Any]
) -> None:
    """Over the program ssh and over asyncssh, however large they are, and many at a time."""
    if kind in (Dropbear, ProFtpd) and os.geteuid():
        pytest.skip("these are run by root")
    with kind(tmp_path / "server", place.keys) as server:
        prefix, login = server.prefix, server.backupop
        if kind is BadHabits:
            prefix, login = server.seen, server.index_user
        names = [f"{size}-{number}" for size in SIZES for number in range(4)]
        for name in names:
            (server.tree / name).write_bytes(content_of(name))
        set_up(Case("", fields={"login": login}), place, server, tmp_path / "home", monkeypatch)
        for expected, round_trip in ((BY_SSH, None), (BY_ASYNCSSH, LONG)):
            with ProviderHook("backup") as hook:
                reader = hook.reader(round_trip=round_trip)
                assert over(reader) == expected
                wanted = {
                    f"{prefix}/{name}".encode(): hashlib.md5(content_of(name)).hexdigest() for name in names
                }
                assert md5s(reader, list(wanted)) == wanted


def content_of(name: str) -> bytes:
    return random.Random(name).randbytes(int(name.partition("-")[0]))


def md5s(reader: Reader, paths: list[bytes]) -> dict[bytes, str]:
    """Read files, and return the md5 of each."""
    found: dict[bytes, str] = {}
    while paths or reader.busy:
        while paths and reader.room:
            reader.submit(Wanted(paths.pop(), None, lambda _: Stream(len)))
        for fetched in reader.wait():
            assert isinstance(fetched, Fetched) and fetched.refusal is None, fetched
            found[fetched.wanted.path] = fetched.md5.decode()
    return found


# --- what a server may be like ----------------------------------------------------------------------


def test_a_build_works_where_one_session_at_a_time_is_allowed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without Python there, which takes a second session."""
    server = place.started("one-session", "MaxSessions 1", "SetEnv PATH={tree}/bin")
    (server.tree / "bin").mkdir()
    for name in os.listdir("/usr/bin"):
        if not name.startswith(("python", "pydoc")):
            (server.tree / "bin" / name).symlink_to(f"/usr/bin/{name}")
    (server.tree / "backups").mkdir()
    (server.tree / "backups" / "x").write_bytes(b"x")
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    chroot = server.chroot.encode() if server.chrooted else b"/"
    base = server.prefix.encode()
    request = IndexRequest(chroot, (base + b"/backups",), base + b"/.mdbackup/index.md5")

    async def deferred_build() -> int:
        trigger = BuildProviderIndexTrigger("index", request_line(request).decode())
        (event,) = [event async for event in trigger.run()]
        await trigger.cleanup()
        return int(event.payload["done"]["files"])

    with IndexHook("index") as hook:
        assert hook.build_index(request).files == 1
    assert asyncio.run(deferred_build()) == 1
    assert server.log_text().count("Connection from") == 3  # with the one of `started`


def test_index_is_built_over_ssh_where_asyncssh_has_no_algorithm(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deferred, too; a wrong key is refused as ever, and what ssh has none for either is told as that."""
    server = place.server("of sntrup761")
    (server.tree / "backups").mkdir(exist_ok=True)
    (server.tree / "backups" / "x").write_bytes(b"x")
    base = server.prefix
    build = BuildProviderIndex(
        task_id="build",
        provider="web",
        ssh_conn_id="index",
        chroot=str(server.chroot) if server.chrooted else "/",
        source=[f"{base}/backups"],
        index=f"{base}/.mdbackup/index.md5",
        deferrable=True,
    )
    run = SimpleNamespace(dag_id="web", run_id="r", start_date=None)
    context: Any = {"dag_run": run, "params": {}}

    def deferred_build() -> Any:
        with pytest.raises(TaskDeferred) as task:
            build.execute(context)
        trigger = cast(BuildProviderIndexTrigger, task.value.trigger)

        async def fire() -> dict[str, Any]:
            try:
                (event,) = [event async for event in trigger.run()]
            finally:
                await trigger.cleanup()
            return cast(dict[str, Any], event.payload)

        return build.execute_complete(context, asyncio.run(fire()))

    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    assert deferred_build()["files"] == 1
    assert build._build(context)["files"] == 1
    for case, words in (
        (Case("", extra={"key_file": "{keys}/wrong"}), "refuses the account's key"),
        (Case("", extra={"ciphers": ["aes256-cbc"]}), "no algorithm in common"),
    ):
        set_up(case, place, server, tmp_path / "home", monkeypatch)
        with pytest.raises(AccessRefused, match=words):
            deferred_build()
    (server.tree / "backups" / "x").unlink()


def test_a_proxy_that_ends_is_told_at_once(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as a server that does not answer."""
    for command, why in (
        ("/nonexistent/nc %h %p", "not found"),
        ("false %h", ""),
        ("sh -c 'echo proxy says no >&2; exit 3'", "proxy says no"),
    ):
        case = Case("", config=f"Host *\n  ProxyCommand {command}\n")
        set_up(case, place, place.server("nobody"), tmp_path / "home", monkeypatch)
        for way in all_ways(place.server("nobody")):
            began = time.monotonic()
            came, words = tried(way)
            assert came in ("ConnectionLost", REFUSED), (came, words)
            assert "the proxy does not connect to the server" in words and why in words, (command, words)
            assert time.monotonic() - began < CONNECT
    assert not place.server("nobody").was_asked()


def test_words_of_a_banner_are_not_taken_for_those_of_ssh(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that works, works; another one is refused, and is one failed login for each way."""
    server = place.started("banner", "Banner {tree}/banner")
    words = "Permission denied (publickey).\nDo not connect to host systems; no proxy either\n"
    (server.tree / "banner").write_text(words)
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    assert [tried(way) for way in all_ways(server)] == [(way, "") for way in Case("").ways]
    set_up(Case("", extra={"key_file": "{keys}/wrong"}), place, server, tmp_path / "home", monkeypatch)
    for number, way in enumerate(all_ways(server), 1):
        came, words = tried(way)
        assert came == REFUSED and "refuses the account's key" in words
        until(lambda number=number: failed_logins(server) >= number)
    # Refused connections are closed: there is sshd alone.
    until(lambda: len(server.processes()) == (server.way == "namespace"))
    assert failed_logins(server) == len(all_ways(server))


# --- what is said of a server ------------------------------------------------------------------------


def test_too_many_failed_logins_are_a_refusal(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not tried again: a server may allow one only."""
    server = place.started("tries", "MaxAuthTries 1")
    case = Case("", extra={"key_file": "{keys}/wrong"})
    set_up(case, place, server, tmp_path / "home", monkeypatch)
    for number, way in enumerate(all_ways(server)[1:], 1):
        came, words = tried(way)
        assert came == REFUSED and "refuses the account's key" in words, words
        until(lambda number=number: failed_logins(server) >= number)
    assert failed_logins(server) == 3


def test_server_that_hangs_up_is_told_with_what_may_be_the_cause(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that has had too many connections from here."""
    server = Dropping(place.server("usual"), set(range(1, 20)))
    set_up(Case(""), place, server, tmp_path / "home", monkeypatch)
    for way in all_ways(server):
        came, words = tried(way)
        assert came == "ConnectionLost" and "MaxStartups" in words, words


def test_swapped_accounts_are_told_as_that(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And any other account that does not speak SFTP is named."""
    server = place.started("swapped")
    keys = next((server.folder / "ssh" / "authorized_keys").glob(server.index_user), None)
    assert keys is not None
    lines = keys.read_text().splitlines()
    for command, kind, words in (
        ("echo mdbackup ready request; cat", REFUSED, "is the index account"),
        ("echo Welcome, dear user; cat", "ConnectionLost", "does not speak SFTP"),
    ):
        keys.write_text("".join(f'command="{command}" {line}\n' for line in lines if line.startswith("ssh-")))
        case = Case("", fields={"login": server.index_user})
        set_up(case, place, server, tmp_path / "home", monkeypatch)
        for way in all_ways(server)[:2]:
            came, said = tried(way)
            assert came == kind and words in said and "(connection backup)" in said, said
