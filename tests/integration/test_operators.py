"""The six operators, one after the other as a DAG runs them, against a real, strictly locked SSH server."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mdbackup.operators import (
    ArchiveOld,
    BuildProviderIndex,
    CommitBackup,
    DiffIndexes,
    FetchIndex,
    PullChanged,
)
from airflow_mdbackup.scheme import errors
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.recovery.health import check_health
from airflow_mdbackup.scheme.store.mirror import Mirror
from demo.sshd import ProviderServer

SetConnection = Callable[[str, dict[str, Any]], None]


class TaskInstance:
    """What our operators use of one."""

    try_number = 1

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


class Backup:
    """The DAG of one provider, step by step, in this process."""

    def __init__(self, server: ProviderServer, dest: Path) -> None:
        self.server = server
        self.dest = dest
        self.common = {"provider": "srv1", "dest": str(dest)}
        self.index = f"{server.prefix}/.mdbackup/index.md5"
        self.run_id = "manual__1"
        self.run_type = "manual"
        self.params: dict[str, Any] = {}
        self.task = TaskInstance()
        self.source = [f"{server.prefix}/backups"]
        (server.tree / "backups").mkdir(exist_ok=True)

    def _execute(self, operator: Any) -> Any:
        self.task = TaskInstance()
        dag_run = SimpleNamespace(
            dag_id="mdbackup_srv1",
            run_id=self.run_id,
            start_date=None,
            run_type=self.run_type,
            conf=self.params,
        )
        context = {"run_id": self.run_id, "ti": self.task, "dag_run": dag_run, "params": self.params}
        return operator.execute(context)

    def build(self) -> dict[str, Any]:
        return self._execute(
            BuildProviderIndex(
                task_id="build",
                provider="srv1",
                ssh_conn_id="index",
                chroot=self.server.chroot,
                source=self.source,
                index=self.index,
            )
        )

    def fetch(self, **options: Any) -> dict[str, Any]:
        return self._execute(
            FetchIndex(task_id="fetch", **self.common, sftp_conn_id="backupop", index=self.index, **options)
        )

    def diff(self, **options: Any) -> list[dict[str, int]]:
        return self._execute(DiffIndexes(task_id="diff", **self.common, source=self.source, **options))

    def pull(self, shard: dict[str, int], **options: Any) -> dict[str, Any]:
        return self._execute(
            PullChanged(task_id="pull", **self.common, sftp_conn_id="backupop", shard=shard, **options)
        )

    def archive(self) -> dict[str, Any]:
        return self._execute(ArchiveOld(task_id="archive", **self.common))

    def commit(self) -> dict[str, Any]:
        return self._execute(CommitBackup(task_id="commit", **self.common))

    def run(self, run_id: str) -> dict[str, Any]:
        """Do all of it."""
        self.run_id = run_id
        self.build()
        self.fetch()
        for shard in self.diff():
            self.pull(shard)
        self.archive()
        return self.commit()

    def put(self, name: bytes, content: bytes) -> None:
        """Write a file on A."""
        path = os.fsencode(self.server.tree) + b"/backups/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)

    def live(self, name: bytes) -> Path:
        prefix = os.fsencode(self.server.prefix)
        return Path(os.fsdecode(os.fsencode(self.dest) + b"/files" + prefix + b"/backups/" + name))


@pytest.fixture
def backup(provider: ProviderServer, tmp_path: Path, set_connection: SetConnection) -> Backup:
    set_connection("backupop", provider.sftp_connection())
    set_connection("index", provider.ssh_connection())
    return Backup(provider, tmp_path / "dest")


AWKWARD = [
    b"plain",
    b"new\nline",
    b"carriage\rreturn",
    b"ends in cr\r",
    b"back\\slash",
    b"back\\nslash-n",
    b"tab\there",
    b"invalid \xff\xfe utf-8",
    "\N{SNOWMAN} and \u202e".encode(),
    b" leading blank",
    b"trailing blank ",
    b"-rf",
    b"--",
    b"*",
    b"~",
    b"$(touch pwned); `id` & | > < ' \" !",
    b"#comment",
    b"x" * 255,
    *(bytes([code]) + b"-control" for code in range(1, 32)),
    b"\x7f-control",
]


def test_awkward_names_arrive_whole_and_md5sum_accepts_the_consumer_index(backup: Backup) -> None:
    """Newline, CR, backslash, every control character, invalid UTF-8, 255 bytes: all kept, all verified."""
    for number, name in enumerate(AWKWARD):
        backup.put(name, b"content %d" % number)
        backup.put(b"deep/" + name + b"/" + name[:200], b"below %d" % number)
    summary = backup.run("manual__1")
    assert summary["outcomes"] == {"pulled": 2 * len(AWKWARD)}
    for number, name in enumerate(AWKWARD):
        assert backup.live(name).read_bytes() == b"content %d" % number
    relative = (backup.dest / "index.md5").read_bytes().replace(b"  /", b"  ./")
    checked = subprocess.run(
        ["md5sum", "-c", "--strict", "--quiet"],
        cwd=backup.dest / "files",
        input=relative,
        capture_output=True,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_second_run_replaces_archives_forgets_and_copies(backup: Backup) -> None:
    """Changed, deleted on A, deleted on B, moved: as the scheme says; a third run finds nothing to do."""
    for name in (b"changed", b"deleted-on-a", b"deleted-on-b", b"moved"):
        backup.put(name, b"first of " + name)
    backup.run("manual__1")
    backup.put(b"changed", b"second")
    (backup.server.tree / "backups" / "deleted-on-a").unlink()
    (backup.server.tree / "backups" / "moved").rename(backup.server.tree / "backups" / "moved-here")
    backup.live(b"deleted-on-b").unlink()
    summary = backup.run("manual__2")
    assert summary["outcomes"] == {"pulled": 1, "copied": 1}
    assert (summary["replaced"], summary["added"], summary["forgotten"]) == (1, 1, 2)
    assert backup.live(b"changed").read_bytes() == b"second"
    (old,) = backup.live(b".old").iterdir()
    assert old.name.startswith("changed.2") and old.read_bytes() == b"first of changed"
    assert backup.live(b"deleted-on-a").read_bytes() == b"first of deleted-on-a"
    assert backup.live(b"moved-here").read_bytes() == b"first of moved"
    assert not backup.live(b"deleted-on-b").exists()
    names = [path.rpartition(b"/")[2] for path, _ in read_entries(backup.dest / "index.md5")]
    assert names == [b"changed", b"deleted-on-b", b"moved-here"]
    before = (backup.dest / "index.md5").read_bytes()
    third = backup.run("manual__3")
    assert third["outcomes"] == {} and "nothing to do" in third["summary"]
    assert (backup.dest / "index.md5").read_bytes() == before


def test_unreadable_file_is_reported_all_else_is_backed_up_and_the_run_fails(backup: Backup) -> None:
    """A file that A's index account cannot read must not pass silently, nor stop the others."""
    backup.put(b"open", b"1")
    backup.put(b"secret", b"2")
    (backup.server.tree / "backups" / "secret").chmod(0)
    assert backup.build()["unreadable"] == 1
    backup.fetch()
    for shard in backup.diff():
        backup.pull(shard)
    backup.archive()
    with pytest.raises(AirflowFailException, match=r"unreadable .*/backups/secret"):
        backup.commit()
    assert backup.task.pushed["return_value"]["failed"] == 1
    assert backup.live(b"open").read_bytes() == b"1"


def test_file_that_the_backup_account_cannot_read_is_denied(backup: Backup) -> None:
    """Readable when it was indexed, refused when it is pulled: an outcome of that file alone."""
    backup.put(b"open", b"1")
    backup.put(b"secret", b"2")
    backup.build()
    (backup.server.tree / "backups" / "secret").chmod(0)
    backup.fetch()
    for shard in backup.diff():
        assert backup.pull(shard)["outcomes"] == {"pulled": 1, "denied": 1}
    backup.archive()
    with pytest.raises(AirflowFailException, match=r"denied .*/backups/secret .Permission denied"):
        backup.commit()


def nothing_in(dest: Path) -> bool:
    """Whether no backup has been made there."""
    return not (dest / "index.md5").exists() and not list((dest / "files").glob("*"))


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"host_key": None}, errors.AccessRefused, "host key is unknown"),
        ({"host_key": "other"}, errors.AccessRefused, "host key is not the expected one"),
        ({"key_file": "other"}, errors.AccessRefused, "refuses the account's key"),
        ({"key_file": "/no/such/key"}, errors.AccessRefused, "cannot be read on this machine"),
        ({"allow_host_key_change": True}, errors.AccessRefused, "allow_host_key_change"),
    ],
    ids=["unknown host key", "wrong host key", "wrong key", "no key file", "host key change allowed"],
)
def test_wrong_key_or_host_key_is_refused_with_the_connection_named(
    backup: Backup,
    set_connection: SetConnection,
    tmp_path: Path,
    extra: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """Nobody is trusted who is not the expected one, and a person is told which connection to mend."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    real = {"key_file": str(other), "host_key": other.with_suffix(".pub").read_text()}
    connection = backup.server.sftp_connection()
    for name, value in extra.items():
        connection["extra"][name] = real[name] if value == "other" else value
    connection["extra"] = {k: v for k, v in connection["extra"].items() if v is not None}
    set_connection("backupop", connection)
    with pytest.raises(error, match=message) as caught:
        backup.fetch()
    assert "backupop" in str(caught.value)
    assert nothing_in(backup.dest)


def test_server_that_is_not_there_is_a_lost_connection(backup: Backup, set_connection: SetConnection) -> None:
    """Worth a retry, unlike a refused key."""
    set_connection("backupop", backup.server.sftp_connection() | {"port": 1})
    with pytest.raises(errors.ConnectionLost, match=r"127\.0\.0\.1"):
        backup.fetch()


def test_connection_that_does_not_exist_is_told_with_how_to_make_it(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No retry makes it."""
    monkeypatch.delenv("AIRFLOW_CONN_BACKUPOP")
    with pytest.raises(errors.AccessRefused, match=r"backupop does not exist.*connections add"):
        backup.fetch()


@pytest.mark.parametrize("broken", ["{", "sftp://backupop@127.0.0.1:ssh", '{"port": "ssh"}'])
def test_connection_in_a_variable_that_cannot_be_parsed_is_not_taken_for_missing(
    backup: Backup, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Airflow says of both that there is none, and somebody would make it a second time."""
    monkeypatch.setenv("AIRFLOW_CONN_BACKUPOP", broken)
    with pytest.raises(
        errors.AccessRefused, match=r"backupop cannot be read: .*AIRFLOW_CONN_BACKUPOP is neither"
    ):
        backup.fetch()


@pytest.mark.parametrize(
    ("host_key", "told"),
    [
        ("", r"backupop leads to a server whose host key is unknown: .* Pin it in its extra host_key"),
        ("ssh-ed25519 AAAA", r"backupop has an extra host_key that is not a public key: it must look like"),
    ],
)
def test_connection_with_a_spoilt_host_key_is_told(
    backup: Backup, set_connection: SetConnection, host_key: str, told: str
) -> None:
    """An empty file of ssh-keyscan, pasted into the extra; or a part of a key."""
    set_connection("backupop", backup.server.sftp_connection(host_key=host_key))
    with pytest.raises(errors.AccessRefused, match=told):
        backup.fetch()


def test_account_that_runs_no_indexer_is_told(backup: Backup, set_connection: SetConnection) -> None:
    """The backup account in place of the index account, say."""
    connection = backup.server.sftp_connection()
    set_connection("index", connection)
    with pytest.raises(errors.AccessRefused, match=r"did not run the indexer .*sftp connections only"):
        backup.build()


def test_dest_that_cannot_be_made_is_told_with_the_command_that_makes_it(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most frequent mistake of a first run."""
    backup.build()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(backup.dest))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(errors.DestinationRefused, match=rf"As root: install -d -o .* {backup.dest}"):
        backup.fetch()


def test_missing_index_is_told_with_where_it_was_looked_for(backup: Backup) -> None:
    """A first run without an index on A."""
    with pytest.raises(errors.NotOnProvider, match=r"/\.mdbackup/index\.md5 does not exist"):
        backup.fetch()
    assert nothing_in(backup.dest)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[:-2] + lines[-1:], "truncated"),
        (lambda lines: [lines[0], b"rubbish\n", *lines[1:]], "line 2: it does not begin with"),
    ],
    ids=["truncated", "one malformed line"],
)
def test_spoiled_index_is_refused_and_changes_nothing(backup: Backup, spoil: Any, message: str) -> None:
    """One bad line refuses the whole index."""
    backup.put(b"one", b"1")
    backup.put(b"two", b"2")
    backup.build()
    path = backup.server.tree / ".mdbackup" / "index.md5"
    path.write_bytes(b"".join(spoil(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(errors.IndexRefused, match=message):
        backup.fetch()
    assert nothing_in(backup.dest)


def test_dest_of_another_provider_is_refused(backup: Backup) -> None:
    """Two providers never write into one tree."""
    backup.put(b"one", b"1")
    backup.run("manual__1")
    backup.common["provider"] = "srv2"
    with pytest.raises(errors.DestinationRefused, match="belongs to the provider 'srv1'"):
        backup.fetch()


def test_index_that_is_too_old_is_refused(backup: Backup) -> None:
    """So that a dead cron job on A is noticed."""
    backup.build()
    path = backup.server.tree / ".mdbackup" / "index.md5"
    os.utime(path, (0, 0))
    with pytest.raises(errors.IndexRefused, match="max_index_age"):
        backup.fetch(max_index_age=timedelta(hours=26))


def test_index_without_end_line_as_in_the_seed_is_taken_once_it_holds_still(backup: Backup) -> None:
    """Somebody's own md5sum job, one blank after the digest, in directory order."""
    backup.put(b"bravo", b"")
    backup.put(b"alpha", b"")
    prefix = backup.server.prefix.encode()
    digest = hashlib.md5(b"").hexdigest().encode()
    lines = [b"%s %s/backups/%s\n" % (digest, prefix, name) for name in (b"bravo", b"alpha")]
    (backup.server.tree / ".mdbackup" / "index.md5").write_bytes(b"".join(lines))
    assert backup.fetch()["files"] == 2
    assert [backup.pull(shard)["outcomes"] for shard in backup.diff()] == [{"pulled": 1, "copied": 1}]
    backup.archive()
    assert backup.commit()["files"] == 2


def test_named_subsystem_of_the_seed_is_used(tmp_path: Path, set_connection: SetConnection) -> None:
    """`sftp -s sftpi`: the connection's extra `subsystem` names it; the wrong name is told."""
    with ProviderServer(tmp_path / "server", subsystem="sftpi") as server:
        set_connection("backupop", server.sftp_connection())
        set_connection("index", server.ssh_connection())
        backup = Backup(server, tmp_path / "dest")
        backup.put(b"one", b"1")
        assert backup.run("manual__1")["files"] == 1


def test_a_dry_run_is_not_told_to_have_failed(backup: Backup) -> None:
    """It ends with the plan, and nobody waits for more; until then it is a run like any other."""
    backup.put(b"one", b"1")
    backup.run("manual__1")
    backup.run_id, backup.params = "manual__2", {"dry_run": True}
    mirror = Mirror(backup.dest, "srv1")
    backup.build()
    backup.fetch()
    assert check_health(mirror, None, datetime.now(UTC)).unfinished is not None
    with pytest.raises(AirflowSkipException):
        backup.diff()
    assert check_health(mirror, None, datetime.now(UTC)).unfinished is None


def test_fetch_judges_the_clocks_by_when_the_build_of_its_run_ended(backup: Backup) -> None:
    """Also one that comes hours after it."""
    index = backup.server.tree / ".mdbackup" / "index.md5"
    state = Mirror(backup.dest, "srv1").run(backup.run_id).state
    built = backup.build()

    def doubt(hours: float, built: dict[str, Any] | None) -> str | None:
        """Return what a fetch says of an index that is so many hours old."""
        written = time.time() - hours * 3600
        os.utime(index, (written, written))
        backup.fetch(built=built)
        return read_header(state)["index"]["clock"]

    assert doubt(0, built) is doubt(2, built | {"ended": built["ended"] - 2 * 3600}) is None
    assert "one of them is wrong" in (doubt(3, built) or "")
    assert doubt(3, None) is doubt(3, {}) is None  # such as an older BuildProviderIndex returned


def test_fetch_that_is_killed_ends_its_connection(backup: Backup) -> None:
    """While it waits whether an index without end line holds still."""
    path = backup.server.tree / ".mdbackup" / "index.md5"
    path.write_text(f"{hashlib.md5().hexdigest()}  {backup.server.prefix}/backups/one\n")
    path.chmod(0o644)
    operator = FetchIndex(task_id="fetch", **backup.common, sftp_conn_id="backupop", index=backup.index)
    threading.Timer(1, operator.on_kill).start()
    with pytest.raises(errors.ConnectionLost):
        backup._execute(operator)


@pytest.mark.parametrize("extra", [{}, {"compress": "true"}], ids=["plain", "compress"])
def test_transfer_by_asyncssh_uses_a_fast_cipher_and_no_compression(
    backup: Backup, set_connection: SetConnection, extra: dict[str, str]
) -> None:
    """Others would be slow; and compression, which has no bound there, is left to the program ssh."""
    from airflow_mdbackup.hooks.provider import ProviderHook

    set_connection("backupop", backup.server.sftp_connection(**extra))
    with ProviderHook("backupop") as hook:
        told = hook.connected()._connection.get_extra_info
        assert (told("recv_cipher"), told("send_cipher")) == ("aes128-gcm@openssh.com",) * 2
        assert told("recv_compression") == "none"


def test_provider_without_python_builds_its_index_with_the_shell(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """find and md5sum make the same index."""
    backup.put(b"one", b"1")
    backup.put(b"sub/two", b"22")
    python = backup.build()
    entries = list(_provider_entries(backup))
    monkeypatch.setattr(
        "airflow_mdbackup.provider_side.conversation.python_command", lambda: "exec /bin/sh -c 'exit 127'"
    )
    times = {name: pytest.approx(python[name], abs=300) for name in ("seconds", "ended")}
    assert backup.build() == python | times
    assert list(_provider_entries(backup)) == entries
    assert backup.run("manual__1")["files"] == 2


def _provider_entries(backup: Backup) -> Any:
    return sorted(read_entries(backup.server.tree / ".mdbackup" / "index.md5"))


def test_index_that_cannot_be_built_is_told_with_the_providers_own_words(backup: Backup) -> None:
    """Here its directory is not writable for the index account."""
    shutil.rmtree(backup.server.tree / ".mdbackup")
    (backup.server.tree / ".mdbackup").mkdir(mode=0o555)
    if not backup.server.chrooted:
        (backup.server.tree / ".mdbackup").chmod(0o555)
    with pytest.raises(errors.NotOnProvider, match=r"was not built: .*ermission"):
        backup.build()


def test_big_files_and_many_shards_arrive_whole(backup: Backup) -> None:
    """Larger than the window, in three shards, with equal content twice."""
    block = os.urandom(1 << 20)
    backup.put(b"big", block * 40)
    backup.put(b"same", block * 40)
    for number in range(300):
        backup.put(b"many/%d" % number, os.urandom(number * 10))
    backup.build()
    backup.fetch()
    shards = backup.diff(shards=3)
    assert len(shards) == 3
    pulled = [backup.pull(shard) for shard in shards]
    assert sum(p["outcomes"]["pulled"] for p in pulled) == 301
    assert sum(p["outcomes"].get("copied", 0) for p in pulled) == 1
    assert sum(p["bytes"] for p in pulled) < 42 << 20
    backup.archive()
    assert backup.commit()["files"] == 302
    assert backup.live(b"big").read_bytes() == backup.live(b"same").read_bytes() == block * 40
    assert backup.live(b"big").stat().st_ino != backup.live(b"same").stat().st_ino


@pytest.mark.parametrize("by_asyncssh", [False, True])
def test_pull_keeps_to_its_bandwidth_limit(
    backup: Backup, by_asyncssh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as in the configuration; over ssh, and over asyncssh, as where there is no ssh."""
    backup.put(b"big", os.urandom(3_000_000))
    if by_asyncssh:
        monkeypatch.setattr("airflow_mdbackup.hooks.provider.program_for", lambda account: None)
    backup.build()
    backup.fetch()
    (shard,) = backup.diff()
    summary = backup.pull(shard, bandwidth_limit=[{"rate": "2MB", "from": "00:00", "to": "23:59"}, "2MB"])
    assert summary["outcomes"] == {"pulled": 1}
    assert 1 < summary["seconds"] < 10
    backup.archive()
    assert backup.commit()["files"] == 1


def test_one_run_that_a_person_starts_can_override_the_guard(backup: Backup) -> None:
    """Only by hand, for that run alone, and also where a person would be asked."""
    backup.put(b"only", b"1")
    backup.run("manual__1")
    (backup.server.tree / "backups" / "only").unlink()
    backup.build()
    backup.run_id, backup.run_type = "scheduled__2", "scheduled"
    backup.params = {"override_guard": True}
    backup.fetch()
    with pytest.raises(errors.GuardTripped, match="override_guard"):
        backup.diff()
    backup.run_id, backup.run_type, backup.params = "manual__3", "manual", {"override_guard": False}
    backup.fetch()
    with pytest.raises(errors.GuardTripped):
        backup.diff()
    backup.diff(on_guard="approve")
    assert len(backup.task.pushed["guard"]) == 2
    backup.params = {"override_guard": True}
    backup.diff(on_guard="approve")
    assert backup.task.pushed["guard"] == []
    (shard,) = backup.diff()
    backup.pull(shard)
    backup.archive()
    assert backup.commit()["forgotten"] == 1
    assert list(read_entries(backup.dest / "index.md5")) == [] and backup.live(b"only").read_bytes() == b"1"
