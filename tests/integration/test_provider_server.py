"""The throw-away OpenSSH server keeps what the scheme expects of server A, whichever way it is set up."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  looked up by sockets, when an ordinary user may not read it any more
import os
import pwd
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo import sshd_files
from demo.sshd import ProviderServer, _namespaces_allowed
from demo.sshd_files import ProviderServerError
from tests.isolation import enter_private_mounts
from tests.waiting import until

AM_ROOT = os.geteuid() == 0
CHROOTED_WAYS = [*(["namespace"] if _namespaces_allowed() else []), "users"] if AM_ROOT else []
WAYS = CHROOTED_WAYS or ["own"]
ACCOUNT_FILES = [Path("/etc/passwd"), Path("/etc/group")] + ([Path("/etc/shadow")] if AM_ROOT else [])


@pytest.fixture(scope="module", params=WAYS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProviderServer]:
    """A server for each way that this user can take, with one file to read."""
    with ProviderServer(tmp_path_factory.mktemp(request.param), way=request.param) as server:
        offer_a_file(server)
        yield server


def offer_a_file(server: ProviderServer) -> None:
    (server.tree / "backups").mkdir()
    (server.tree / "backups" / "alpha").write_text("content of alpha\n")


def sftp(
    server: ProviderServer, commands: str, *, options: tuple[str, ...] = (), key: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `commands` as backupop; {} in them is the prefix that this account sees before the tree."""
    command = [
        *client("sftp", server, key or server.backupop_key),
        "-P",
        str(server.port),
        *options,
        "-b",
        "-",
    ]
    return finish([*command, f"{server.backupop}@127.0.0.1"], commands.format(server.prefix))


def ssh(
    server: ProviderServer, command: str, *, user: str | None = None, key: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a shell command, as the index account unless told otherwise."""
    login = f"{user or server.index_user}@127.0.0.1"
    return finish([*client("ssh", server, key or server.index_key), "-p", str(server.port), login, command])


def client(program: str, server: ProviderServer, key: Path) -> list[str]:
    known_hosts = server.folder / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{server.port} {server.host_key}\n")
    options = {"UserKnownHostsFile": known_hosts, "BatchMode": "yes", "IdentitiesOnly": "yes"}
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [program, "-F", "/dev/null", "-i", str(key), *settings]


def finish(command: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=30)


def tree_as_index_account(server: ProviderServer) -> str:
    return server.chroot.rstrip("/") + server.prefix


def test_backupop_reads_a_file_it_can_name(server: ProviderServer, tmp_path: Path) -> None:
    """A file of the tree arrives whole over SFTP."""
    answer = sftp(server, f"get {{}}/backups/alpha {tmp_path}/alpha")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "alpha").read_text() == "content of alpha\n"


def test_backupop_may_not_list_a_directory(server: ProviderServer) -> None:
    """Listing is denied: the index is the only way to learn what there is."""
    answer = sftp(server, "ls {}/backups")
    assert "Permission denied" in answer.stderr
    assert "alpha" not in answer.stdout.replace("ls ", "")


@pytest.mark.parametrize(
    "command",
    ["put /etc/hostname {}/backups/new", "rm {}/backups/alpha", "mkdir {}/d", "chmod 777 {}/backups"],
)
def test_backupop_may_not_change_anything(server: ProviderServer, command: str) -> None:
    """Each kind of change is denied, and the tree is what it was."""
    before = sorted((path, path.stat().st_mode) for path in server.tree.rglob("*"))
    answer = sftp(server, command)
    assert answer.returncode != 0
    assert "Permission denied" in answer.stderr
    assert sorted((path, path.stat().st_mode) for path in server.tree.rglob("*")) == before


def test_backupop_has_no_shell(server: ProviderServer) -> None:
    """A command is answered with the hint that only SFTP is offered."""
    answer = ssh(server, "echo shell; id", user=server.backupop, key=server.backupop_key)
    assert answer.returncode != 0
    assert "shell" not in answer.stdout
    assert "This service allows sftp connections only" in answer.stdout + answer.stderr


def test_backupop_may_not_forward_ports(server: ProviderServer) -> None:
    """The server opens no connection for backupop to elsewhere."""
    command = client("ssh", server, server.backupop_key)
    forward = ["-p", str(server.port), "-W", f"127.0.0.1:{server.port}", f"{server.backupop}@127.0.0.1"]
    answer = finish([*command, *forward])
    assert "administratively prohibited" in answer.stderr
    assert "SSH-2.0" not in answer.stdout


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../../etc/passwd"])
@pytest.mark.parametrize("server", CHROOTED_WAYS, indirect=True)
def test_chroot_hides_the_machine(server: ProviderServer, tmp_path: Path, path: str) -> None:
    """Nothing outside of the tree can be read, by no way of naming it."""
    answer = sftp(server, f"get {path} {tmp_path}/stolen")
    assert "not found" in answer.stderr
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize("server", CHROOTED_WAYS, indirect=True)
def test_symlink_out_of_the_tree_leads_nowhere(server: ProviderServer, tmp_path: Path) -> None:
    """A link to /etc/passwd points into the chroot, where there is no such file."""
    link = server.tree / "backups" / "link"
    link.symlink_to("/etc/passwd")
    answer = sftp(server, f"get /backups/link {tmp_path}/stolen")
    link.unlink()
    assert answer.returncode != 0
    assert not (tmp_path / "stolen").exists()


def test_index_account_sees_the_same_tree_and_writes_its_directory(server: ProviderServer) -> None:
    """What the index account writes to /.mdbackup is what lies in the tree."""
    root = tree_as_index_account(server)
    answer = ssh(server, f"cat {root}/backups/alpha; echo written > {root}/.mdbackup/index.md5")
    assert (answer.returncode, answer.stdout) == (0, "content of alpha\n"), answer.stderr
    assert (server.tree / ".mdbackup" / "index.md5").read_text() == "written\n"


@pytest.mark.parametrize("path", ["new", "backups/new", "backups/alpha"])
@pytest.mark.parametrize("server", CHROOTED_WAYS, indirect=True)
def test_index_account_writes_nothing_else_in_the_tree(server: ProviderServer, path: str) -> None:
    """/.mdbackup is the only place of the tree that the index account can change."""
    answer = ssh(server, f"echo changed >> {tree_as_index_account(server)}/{path}")
    assert answer.returncode != 0
    assert "Permission denied" in answer.stderr
    assert (server.tree / "backups" / "alpha").read_text() == "content of alpha\n"


def test_unknown_key_is_refused(server: ProviderServer, tmp_path: Path) -> None:
    """A key that is not authorised opens neither account, however often it is tried."""
    sshd_files.new_key(tmp_path / "other")
    for _ in range(10):
        answer = sftp(server, "pwd", key=tmp_path / "other")
        assert "Permission denied (publickey)" in answer.stderr
    assert "Permission denied (publickey)" in ssh(server, "id", key=tmp_path / "other").stderr
    assert sftp(server, "pwd").returncode == 0


@pytest.mark.parametrize("server", CHROOTED_WAYS, indirect=True)
def test_key_of_backupop_does_not_open_the_index_account(server: ProviderServer) -> None:
    """Each key opens one account only."""
    assert "Permission denied (publickey)" in ssh(server, "id", key=server.backupop_key).stderr
    assert "Permission denied (publickey)" in sftp(server, "pwd", key=server.index_key).stderr


def test_named_subsystem_of_the_original_scheme_is_the_only_one(tmp_path: Path) -> None:
    """`sftp -s sftpi` works where sftpi is what the server offers, plain `sftp` does not."""
    with ProviderServer(tmp_path / "server", subsystem="sftpi") as server:
        offer_a_file(server)
        named = sftp(server, f"get {{}}/backups/alpha {tmp_path}/alpha", options=("-s", "sftpi"))
        assert named.returncode == 0, named.stderr
        assert "subsystem request failed" in sftp(server, "pwd").stderr
        assert server.sftp_connection()["extra"]["subsystem"] == "sftpi"


@pytest.mark.skipif(WAYS == ["own"], reason="only root has accounts to make")
def test_accounts_made_on_the_machine_do_not_disturb_a_running_server(tmp_path: Path) -> None:
    """They replace /etc/passwd, and with it whatever was mounted on that very file."""
    with ProviderServer(tmp_path / "server", way=WAYS[0]) as server:
        with ProviderServer(tmp_path / "other", way="users"):
            pass
        assert ssh(server, "true").returncode == 0


def test_empty_tree_leaves_just_the_index_directory(tmp_path: Path) -> None:
    """Also odd names and links go, with nothing behind them, and the index account can write again."""
    with ProviderServer(tmp_path / "server") as server:
        offer_a_file(server)
        (server.tree / os.fsdecode(b"\xff\n")).write_text("odd")
        (server.tree / "link").symlink_to("/etc")
        server.empty_tree()
        assert [path.name for path in server.tree.rglob("*")] == [".mdbackup"]
        assert ssh(server, f"touch {tree_as_index_account(server)}/.mdbackup/index.md5").returncode == 0
    assert Path("/etc/passwd").exists()


@pytest.mark.parametrize("way", WAYS)
def test_stop_leaves_nothing_behind(tmp_path: Path, way: str) -> None:
    """After stop, accounts, mounts and /srv are what they were, and the processes of open logins are gone."""
    before = machine_state()
    server = ProviderServer(tmp_path / "server", way=way)
    server.start()
    if way == "namespace":
        assert machine_state() == before, "not even a running server changes the machine"
    marker = f"864{server.port}"
    login = [
        *client("ssh", server, server.index_key),
        "-p",
        str(server.port),
        f"{server.index_user}@127.0.0.1",
    ]
    command = [*login, f"sleep {marker} & sleep {marker}"]
    session = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        until(lambda: len(processes_with(f"sleep\0{marker}")) == 2)
        server.stop()
        assert session.wait(10) != 0
    finally:
        session.kill()
        session.wait()
    assert processes_with(marker) == []
    assert processes_with(str(server.folder)) == []
    assert machine_state() == before


@pytest.mark.skipif(WAYS == ["own"], reason="only root has accounts to make")
def test_users_of_a_server_that_was_killed_go_when_the_next_one_starts(tmp_path: Path) -> None:
    """Also the directory that it had outside of its folder; not those of a server that is running."""
    before = machine_state()
    child = os.fork()
    if child == 0:
        ProviderServer(tmp_path / "killed", way="users").start()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert machine_state() != before
    with ProviderServer(tmp_path / "first", way="users") as first:
        running = machine_state()
        assert pwd.getpwnam(first.backupop)
        with ProviderServer(tmp_path / "second", way="users"):
            pass
        assert machine_state() == running
    assert machine_state() == before


@pytest.mark.parametrize("way", WAYS)
def test_server_that_cannot_start_says_why_and_leaves_nothing_behind(tmp_path: Path, way: str) -> None:
    """The error has the words of sshd, and users made for it are removed again."""
    before = machine_state()
    with pytest.raises(ProviderServerError, match=r"(?s)does not answer.*subsystem"):
        ProviderServer(tmp_path / "server", way=way, subsystem="").start()
    assert machine_state() == before
    assert processes_with(str(tmp_path)) == []


def test_missing_sshd_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sshd the error names the packages."""
    monkeypatch.setattr(sshd_files, "SERVER_PROGRAMS_PATH", str(tmp_path))
    with pytest.raises(ProviderServerError, match=r"sshd is missing.*openssh-server"):
        ProviderServer(tmp_path / "server").start()


def test_server_of_an_ordinary_user_works_without_chroot(tmp_path: Path) -> None:
    """Not root: the same accounts and restrictions, but for the chroot, as the user who calls."""

    def check(folder: Path) -> None:
        with ProviderServer(folder / "server") as server:
            assert (server.way, server.chrooted, server.chroot) == ("own", False, "/")
            assert server.prefix == str(server.tree)
            offer_a_file(server)
            test_backupop_reads_a_file_it_can_name(server, folder)
            test_backupop_may_not_list_a_directory(server)
            test_backupop_may_not_change_anything(server, "put /etc/hostname {}/backups/new")
            test_backupop_has_no_shell(server)
            test_index_account_sees_the_same_tree_and_writes_its_directory(server)
            test_unknown_key_is_refused(server, folder)
            (server.tree / "closed").mkdir(mode=0o000)
            server.empty_tree()
            assert [path.name for path in server.tree.rglob("*")] == [".mdbackup"]

    if AM_ROOT:
        as_ordinary_user(check, tmp_path)
    else:
        check(tmp_path)
    assert processes_with(str(tmp_path)) == []


def as_ordinary_user(check: Callable[[Path], None], folder: Path) -> None:
    """Call `check` with `folder` in a child process, as a user whom only that child's /etc/passwd knows."""
    number = 65533
    account = f"ordinary:x:{number}:{number}::{folder}:/bin/sh\n"
    (folder / "passwd").write_text(Path("/etc/passwd").read_text() + account)
    os.chown(folder, number, number)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert enter_private_mounts()
            subprocess.run(["mount", "--bind", folder / "passwd", "/etc/passwd"], check=True)
            # The parents of pytest's folders are closed to others.
            subprocess.run(["mount", "--bind", folder, "/mnt"], check=True)
            os.setgroups([])
            os.setgid(number)
            os.setuid(number)
            check(Path("/mnt"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "see the traceback of the child"


def machine_state() -> tuple[object, ...]:
    accounts = [path.read_bytes() for path in ACCOUNT_FILES]
    shown = [sorted(path.iterdir()) if path.exists() else None for path in (Path("/srv"), Path("/run/sshd"))]
    return accounts, sorted(user.pw_name for user in pwd.getpwall()), Path("/proc/mounts").read_text(), shown


def processes_with(text: str) -> list[int]:
    """Return the processes with `text` in their command line; its words are separated by NUL bytes."""
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if text.encode() in command_line.read_bytes():
                found.append(int(command_line.parent.name))
    return found
