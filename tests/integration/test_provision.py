"""The printed script, run for real as root on a machine of its own, and what the accounts can do then."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from airflow_mdbackup.account.bounded import BoundedTransport
from airflow_mdbackup.account.client import client_of
from airflow_mdbackup.cli.main import main
from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.hooks.provider import account as account_of
from airflow_mdbackup.provider_side.programs import python_program
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stream, Wanted
from demo.provisioned import COPIED, DEBIAN, EMPTY, WITHOUT_INCLUDE, ProvisionedServer, connections
from demo.sshd import _namespaces_allowed
from demo.sshd_files import new_key

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)

DROP_IN = "/etc/ssh/sshd_config.d/10-mdbackup-web.conf"
KEYS = "/etc/ssh/mdbackup/web"
MAIN = "/etc/ssh/sshd_config"
Provision = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def machine_itself_is_unchanged() -> Iterator[None]:
    """After all of these tests, accounts, SSH server and the rest of /etc are what they were."""

    def mounts() -> list[str]:
        points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        return [point for point in points if point.startswith((*COPIED, *EMPTY))]

    before = tree(Path("/etc")), os.listdir("/home"), mounts()
    yield
    assert (tree(Path("/etc")), os.listdir("/home"), mounts()) == before
    assert not Path("/usr/local/lib/mdbackup").exists()


@pytest.fixture
def provision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Provision:
    """A function that prints a script on B: for `web`, whose index B asks for, or `self`, which builds it."""
    providers = f"""
    providers:
      web: {{sftp_conn_id: web_backupop, ssh_conn_id: web_index, chroot: /home/backupop, source: /backups,
             dest: {tmp_path}/web}}
      self: {{sftp_conn_id: self_backupop, source: /backups, dest: {tmp_path}/self, exclude: ["it's *.tmp"]}}
    """
    (tmp_path / "providers.yaml").write_text(providers)
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))

    def provision(*words: str, host: str = "127.0.0.1") -> str:
        status = main(["provision", *words, "--host", host])
        told = capsys.readouterr()
        assert status == 0, told.err
        return told.out

    return provision


@pytest.fixture(params=[DEBIAN], ids=["debian"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ProvisionedServer]:
    """A machine with files to back up in /srv/www, and a running sshd."""
    with ProvisionedServer(tmp_path / "server", sshd_config=request.param) as server:
        (server.root / "srv/www").mkdir()
        (server.root / "srv/www/alpha").write_text("content of alpha\n")
        server.start_sshd()
        yield server


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, object]]:
    """A function that pastes the lines which the script printed."""

    def connect(output: str) -> dict[str, object]:
        found = connections(output)
        for connection_id, connection in found.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{connection_id.upper()}", json.dumps(connection))
        return dict(found)

    return connect


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what is in a folder, each path's mode, owner and content, without what useradd leaves behind."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # Copies of the account files before the last change, and locks.
        if re.fullmatch(r"(passwd|shadow|group|gshadow|subuid|subgid)-|\.pwd\.lock|.*\.lock", name):
            continue
        about = path.lstat()
        content: object = os.readlink(path) if path.is_symlink() else None
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
        found[name] = (oct(about.st_mode), about.st_uid, about.st_gid, content)
    return found


def machine(server: ProvisionedServer) -> dict[str, dict[str, tuple[object, ...]]]:
    """Return all that a script may have changed on a machine."""
    return {name: tree(server.root / name) for name in ("etc", "home", "srv", "usr/local/lib")}


def done(server: ProvisionedServer, script: str) -> str:
    """Run a script that must succeed, and return what it printed."""
    result = server.run_script(script)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(server: ProvisionedServer, script: str, because: str) -> None:
    """Run a script that must refuse, saying why in one line, without leaving any change."""
    before = machine(server)
    result = server.run_script(script)
    assert result.returncode == 1
    assert because in result.stderr
    assert machine(server) == before


def take_cron(server: ProvisionedServer) -> None:
    """Have a machine with the directory of cron's jobs, and without cron."""
    server.run("mkdir", "-p", "/etc/cron.d")
    for program in ("sbin/cron", "sbin/crond", "bin/cron", "bin/crond", "bin/crontab"):
        if (server.root / "usr" / program).exists():
            server.run("mount", "--bind", "/dev/null", f"/usr/{program}")


def give_cron(server: ProvisionedServer) -> None:
    """Have a machine with a program that is called like cron; none of its jobs is started."""
    server.run("mkdir", "-p", "/etc/cron.d")
    give = "cp -a /usr/sbin /run/sbin; rm -f /run/sbin/cron; cp /bin/true /run/sbin/cron"
    assert server.run("sh", "-ec", f"{give}; mount --bind /run/sbin /usr/sbin").stderr == ""


def read(connection_id: str, path: bytes) -> bytes:
    """Return a file of the provider, by the way that backups take."""
    with ProviderHook(connection_id) as hook:
        reader = hook.reader()
        reader.submit(Wanted(path, None, lambda _: Stream(len)))
        (fetched,) = reader.wait()
        assert isinstance(fetched, Fetched) and fetched.content is not None
        return fetched.content


def say(connection_id: str, command: str | None) -> str:
    """Return what an exec, or for None a shell, answers when it gets no input."""
    with client_of(account_of(connection_id), BoundedTransport) as client:
        transport = client.get_transport()
        assert transport is not None
        channel = transport.open_session()
        channel.settimeout(10)
        channel.set_combine_stderr(True)
        try:
            if command is None:
                channel.invoke_shell()
                channel.sendall(b"id\n")
            else:
                channel.exec_command(command)
            channel.shutdown_write()
            return channel.makefile("rb").read().decode(errors="replace")
        except (paramiko.SSHException, OSError) as error:
            return f"refused: {error}"


# --- what is promised of the whole ----------------------------------------------------------------


def test_machine_to_set_up_changes_nothing_outside(server: ProvisionedServer) -> None:
    """Neither in the directories that it has of its own, nor in any other but its folder."""
    name = f"mdbackup-{os.getpid()}"
    for directory in ("/etc", "/srv", "/tmp", "/run"):
        assert server.run("touch", f"{directory}/{name}").returncode == 0
        assert not Path(directory, name).exists()
    for directory in ("/", "/usr/bin", "/var/lib", "/root"):
        assert "Read-only file system" in server.run("touch", f"{directory}/{name}").stderr
    assert server.run("touch", server.folder / name).returncode == 0
    assert (server.folder / name).exists()


@pytest.mark.parametrize("options", [(), ("--sftpi",)], ids=["plain", "sftpi"])
@pytest.mark.parametrize("server", [DEBIAN, WITHOUT_INCLUDE], ids=["debian", "rhel8"], indirect=True)
def test_script_makes_both_accounts_and_can_be_undone(
    server: ProvisionedServer,
    provision: Provision,
    connect: Callable[[str], object],
    options: tuple[str, ...],
) -> None:
    """With the printed lines both accounts log in at once; a second run changes nothing; undo is complete."""
    untouched = machine(server)
    script = provision("web", "--bind", "/srv/www:/backups", *options)
    output = done(server, script)
    assert "sshd was sent SIGHUP" in output

    connect(output)
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    for command in ("id", None):
        for account in ("web_backupop", "web_index"):
            assert "uid=" not in say(account, command)

    once = machine(server)
    again = done(server, script)
    assert "Nothing to change: everything is already set up." in again
    assert "* " not in again
    assert machine(server) == once
    assert connections(again) == connections(output)

    assert "Undone." in done(server, provision("web", "--undo"))
    assert machine(server) == untouched
    with pytest.raises((AccessRefused, ConnectionLost)):
        read("web_backupop", b"/backups/alpha")
    assert "Nothing to undo." in done(server, provision("web", "--undo"))


@pytest.mark.parametrize("shell", ["dash", "bash --posix", "busybox sh"])
def test_any_posix_shell_runs_the_scripts(
    server: ProvisionedServer, provision: Provision, shell: str
) -> None:
    """Debian's sh is dash, that of RHEL bash."""
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"there is no {shell}")
    untouched = machine(server)
    words = ("web", "--bind", "/srv/www:/backups", "--sftpi", "--path-unit")
    for script in (provision(*words), provision("web", "--undo")):
        result = server.run_script(script, shell)
        assert (result.returncode, result.stderr) == (0, "")
    assert machine(server) == untouched


def test_script_that_was_cut_off_on_its_way_does_nothing(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Wherever it ends, as when it comes through a pipe that broke."""
    untouched = machine(server)
    script = provision("web", "--bind", "/srv/www:/backups")
    lines = script.splitlines(keepends=True)
    for kept in (10, len(lines) // 3, len(lines) // 2, len(lines) - 1):
        server.run_script("".join(lines[:kept]))
        assert machine(server) == untouched


def test_other_users_keep_shell_and_sftp(
    server: ProvisionedServer, provision: Provision, tmp_path: Path
) -> None:
    """With the named subsystem they write by sftp as before, and `backupop` has the named one."""
    key = new_key(tmp_path / "alice")
    server.run("useradd", "--create-home", "--password", "*", "alice")
    (server.root / "home/alice/.ssh").mkdir()
    (server.root / "home/alice/.ssh/authorized_keys").write_text(key + "\n")
    done(server, provision("web", "--sftpi"))
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(
            "127.0.0.1", server.port, "alice", key_filename=str(tmp_path / "alice"), allow_agent=False
        )
        assert b"alice" in client.exec_command("id")[1].read()
        with client.open_sftp() as sftp:
            sftp.chdir("/tmp")
            assert "alpha" not in sftp.listdir("/")
            assert "etc" in sftp.listdir("/")


def test_page_can_be_followed_by_hand_with_the_same_result(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object], tmp_path: Path
) -> None:
    """Its commands for A, one after the other, make what the script makes, whatever umask root has."""
    output = done(server, provision("web", "--bind", "/srv/www:/backups"))
    connect(output)
    by_script = {name: (server.root / name).read_text() for name in (DROP_IN[1:], "etc/mdbackup/web.json")}
    done(server, provision("web", "--undo"))

    page = (Path(__file__).parents[2] / "docs/provider-setup.md").read_text()
    by_hand = page.partition("\n## By hand\n")[2].partition("\n### Making it hold\n")[0]
    blocks = re.findall("^```sh\n(.*?)^```$", by_hand, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    on_a = "".join(block for block in blocks if "ssh-keygen" not in block and "python3 -c" not in block)
    for variable, key in (("BACKUPOP", "web_backupop"), ("INDEX", "web_index")):
        public = " ".join((tmp_path / "keys" / f"{key}.pub").read_text().split()[:2])
        on_a = on_a.replace(f"KEY_OF_{variable}='ssh-ed25519 AAAA...'", f"KEY_OF_{variable}='{public}'")
    (server.root / "srv/indexer.py").write_bytes(python_program())
    assert done(server, f"set -e\numask 027\ncd /srv\n{on_a.replace('192.0.2.7', '127.0.0.1')}") == ""
    server.stop_sshd()
    server.start_sshd()

    assert (server.root / DROP_IN[1:]).read_text() == by_script[DROP_IN[1:]]
    configuration = json.loads((server.root / "etc/mdbackup/web.json").read_text())
    assert configuration == json.loads(by_script["etc/mdbackup/web.json"])
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    assert "uid=" not in say("web_index", "id")


def test_page_tells_how_to_build_the_index_by_a_shell_account(
    server: ProvisionedServer,
    provision: Provision,
    connect: Callable[[str], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the account that reads; nothing of the indexer is installed for it."""
    found = connect(done(server, provision("self", "--bind", "/srv/www:/backups")))
    page = (Path(__file__).parents[2] / "docs/provider-setup.md").read_text()
    block = page.partition("\n### A shell account\n")[2].partition("```sh\n")[2].partition("```")[0]
    block = block.replace("ssh-ed25519 AAAA...", new_key(tmp_path / "shell")).replace(
        "192.0.2.7", "127.0.0.1"
    )
    lines = [line for line in block.splitlines() if not line.startswith("setfacl ")]  # all may read here
    assert len(lines) == 4
    assert done(server, "set -e\n" + "\n".join(lines)) == ""
    shell = {**found["self_backupop"], "conn_type": "ssh", "login": "indexer"}
    shell["extra"] = {**shell["extra"], "key_file": str(tmp_path / "shell")}
    monkeypatch.setenv("AIRFLOW_CONN_SHELL", json.dumps(shell))
    with IndexHook("shell") as hook:
        request = IndexRequest(b"/home/backupop", (b"/backups",), b"/.mdbackup/index.md5")
        assert hook.build_index(request).files == 1
    assert b"  /backups/alpha\n" in read("self_backupop", b"/.mdbackup/index.md5")


def test_files_that_cannot_be_read_are_shown_wherever_the_administrator_is(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As in root's own directory, into which neither account comes."""
    (server.root / "srv/www/secret").touch(mode=0o600)
    (server.root / "home/private").mkdir(mode=0o700)
    output = done(server, provision("web", "--bind", "/srv/www:/backups"))
    commands = re.findall("^ +(.*runuser .*)$", output, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        shown = server.run("sh", "-c", f"cd /home/private\n{command}")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout == "/home/backupop/backups/secret\n"


# --- the accounts ---------------------------------------------------------------------------------


def test_backupop_reads_and_nothing_else(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """No listing, no writing even where the file system would allow it, nothing outside of the chroot."""
    connect(done(server, provision("web", "--bind", "/srv/www:/backups")))
    (server.root / "home/backupop/open").mkdir()
    (server.root / "home/backupop/open").chmod(0o777)
    with ProviderHook("web_backupop") as hook:
        sftp = hook.get_conn()
        assert sftp.stat("/backups/alpha").st_size == 17
        for forbidden in (
            lambda: sftp.listdir("/"),
            lambda: sftp.open("/open/new", "w"),
            lambda: sftp.mkdir("/open/new"),
            lambda: sftp.symlink("/etc", "/open/new"),
            lambda: sftp.stat("/etc/passwd"),
            lambda: sftp.stat("/../../etc/passwd"),
        ):
            with pytest.raises(OSError):
                forbidden()
    assert os.listdir(server.root / "home/backupop/open") == []


def test_index_account_runs_the_indexer_whatever_is_asked(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """Also with arguments, without a command, and when the key's own restriction is gone."""
    connect(done(server, provision("web")))
    for command in ("id", "python3 -c 'print(1)'", "--config /dev/null"):
        assert say("web_index", command).startswith("mdbackup ready request\n")
    server.edit("/etc/ssh/mdbackup/web/mdbackup-index", "restrict,", "")
    key = (server.root / "etc/ssh/mdbackup/web/mdbackup-index").read_text()
    (server.root / "etc/ssh/mdbackup/web/mdbackup-index").write_text(
        re.sub('command="[^"]*"', "restrict", key)
    )
    assert say("web_index", "id").startswith("mdbackup ready request\n")


def test_index_account_builds_what_the_configuration_on_a_says(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """Through the forced command, without Python or anything else of the account's own."""
    connect(done(server, provision("web", "--bind", "/srv/www:/backups")))
    with IndexHook("web_index") as hook:
        standard_input, output, _ = hook.get_conn().exec_command("anything")
        request = {"id": None, "chroot": "/", "source": ["/etc"], "index": "/.mdbackup/index.md5"}
        standard_input.write(json.dumps(request) + "\n")
        standard_input.flush()
        assert "mdbackup done files=1 " in output.read().decode()
    assert read("web_backupop", b"/.mdbackup/index.md5").endswith(
        b"end format=1 files=1 unreadable=0 bytes=17\n"
    )


def test_accounts_can_change_neither_keys_nor_restrictions(
    server: ProvisionedServer, provision: Provision
) -> None:
    """All of it belongs to root; the index account owns the index's directory only."""
    done(server, provision("web", "--bind", "/srv/www:/backups"))
    places = "/etc/ssh /etc/mdbackup /usr/local/lib/mdbackup /home/backupop"
    for account, own in (("backupop", ""), ("mdbackup-index", "/home/backupop/.mdbackup\n")):
        found = server.run("runuser", "-u", account, "--", *f"find {places} -writable ! -type l".split())
        assert found.stdout == own
    shadow = (server.root / "etc/shadow").read_text()
    assert re.findall("^(backupop|mdbackup-index):([^:]*):", shadow, re.MULTILINE) == [
        ("backupop", "*"),
        ("mdbackup-index", "*"),
    ]


def test_key_is_of_use_from_the_given_addresses_only(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """`--from` takes networks too; and a run with other addresses replaces the old ones."""
    connect(done(server, provision("web", "--from", "192.0.2.0/24", "--from", "2001:db8::7")))
    with pytest.raises(AccessRefused):
        say("web_backupop", "id")
    done(server, provision("web", "--from", "127.0.0.0/8"))
    say("web_backupop", "id")


def test_new_key_replaces_the_old_one(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object], tmp_path: Path
) -> None:
    """Whoever has the old one is locked out."""
    connect(done(server, provision("web")))
    say("web_backupop", "id")
    done(server, provision("web", "--keys", str(tmp_path / "new")))
    with pytest.raises(AccessRefused):
        say("web_backupop", "id")


def test_server_that_lets_in_some_users_only_lets_in_these_two(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """`AllowUsers` and `AllowGroups` of the server stay as they are, for everybody else."""
    server.edit(MAIN, "UsePAM no", "UsePAM no\nAllowUsers root alice\nAllowGroups root")
    connect(done(server, provision("web", "--bind", "/srv/www:/backups")))
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    say("web_index", "id")


# --- what it refuses ------------------------------------------------------------------------------


def test_match_block_that_decides_otherwise_is_named_and_nothing_stays_changed(
    server: ProvisionedServer, provision: Provision
) -> None:
    """The first Match block wins: `sshd -T` shows what really holds, before sshd is reloaded."""
    (server.root / "etc/ssh/sshd_config.d/00-ours.conf").write_text("Match Group *\n    PermitTTY yes\n")
    untouched = tree(server.root / "etc/ssh")
    result = server.run_script(provision("web"))
    assert result.returncode == 1
    because = 'sshd does not apply "PermitTTY no" to backupop from 127.0.0.1, but: permittty yes'
    assert because in result.stderr
    assert "previous configuration of sshd was restored" in result.stderr
    now = tree(server.root / "etc/ssh")
    assert {name: now.get(name) for name in untouched} == untouched
    assert not (server.root / DROP_IN.lstrip("/")).exists()
    assert server.sshd_answers()


def test_match_block_that_decides_otherwise_for_one_of_several_addresses_is_named(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Each address that B may come from is tried; also when only some other address than A's own is met."""
    admins = server.root / "etc/ssh/sshd_config.d/05-admins.conf"
    admins.write_text("Match Address 10.0.0.0/8\n    ForceCommand none\n    PermitTTY yes\n")
    result = server.run_script(provision("web", "--from", "192.0.2.7", "--from", "10.1.2.3"))
    assert result.returncode == 1
    assert 'apply "ForceCommand internal-sftp' in result.stderr
    assert " to backupop from 10.1.2.3, but: forcecommand none" in result.stderr
    admins.write_text("Match Address *,!127.0.0.1\n    ForceCommand none\n")
    result = server.run_script(provision("web"))
    assert " to backupop from 192.0.2.1, but: forcecommand none" in result.stderr
    assert not (server.root / DROP_IN.lstrip("/")).exists()


@pytest.mark.parametrize("server", [DEBIAN, WITHOUT_INCLUDE], ids=["debian", "rhel8"], indirect=True)
def test_match_block_that_cannot_be_tried_is_told(server: ProvisionedServer, provision: Provision) -> None:
    """What it depends on is known only when B comes. Where the accounts are excluded, nothing is told."""
    main_file = server.root / MAIN.lstrip("/")
    plain = main_file.read_text()
    block = "Match %s\n    PermitTTY yes\nMatch all\n"
    told = "The restrictions are not verified for all connections. These earlier lines may override them"

    def told_of(match: str, *words: str) -> bool:
        if "Include" not in plain:
            main_file.write_text(plain + block % match)
        else:
            (server.root / "etc/ssh/sshd_config.d/05-ours.conf").write_text(block % match)
        output = done(server, provision("web", *words))
        done(server, provision("web", "--undo"))
        assert (told in output) == (f": Match {match}\n" in output)
        return told in output

    assert told_of("Address 10.0.0.0/8")
    assert told_of("Address 10.0.0.0/8", "--from", "192.0.2.0/24")
    assert not told_of("Address 10.0.0.0/8", "--from", "192.0.2.7", "--from", "2001:db8::7")
    assert told_of("LocalPort 2222", "--from", "192.0.2.7")
    assert told_of("User=alice host=*.example.org", "--from", "192.0.2.7")
    assert not told_of("Address 10.0.0.0/8 User *,!backupop,!mdbackup-index")
    assert told_of("Address 10.0.0.0/8 User *,!backupop")
    assert not told_of("User hosting")


@pytest.mark.parametrize(
    ("before", "after", "because"),
    [
        ("AcceptEnv *", "", ""),
        (
            "PermitRootLogin no",
            "Match all\n    AcceptEnv LD_PRELOAD LC_ALL\n",
            "LD_PRELOAD. Another Match block",
        ),
    ],
    ids=["server", "match"],
)
def test_variables_that_b_could_set_are_taken_from_it_or_named(
    server: ProvisionedServer, provision: Provision, before: str, after: str, because: str
) -> None:
    """`AcceptEnv` of our block takes the place of the server's own, but adds up with that of other blocks."""
    config = server.root / MAIN.lstrip("/")
    config.write_text(config.read_text().replace("AcceptEnv LANG LC_*", before) + after)
    result = server.run_script(provision("web"))
    assert (result.returncode, because in result.stderr) == (1 if because else 0, True)
    effective = server.run("sshd", "-T", "-C", "user=mdbackup-index,host=b,addr=192.0.2.7").stdout
    if not because:
        assert re.findall("^acceptenv .*$", effective, re.MULTILINE) == ["acceptenv LANG"]


def test_configuration_that_sshd_does_not_accept_is_taken_back(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As that of an sshd which does not know one of the lines."""
    script = provision("web").replace("    PermitTunnel no\n", "    PermitTunnelling no\n", 1)
    result = server.run_script(script)
    assert result.returncode == 1
    assert "PermitTunnelling" in result.stderr
    assert not (server.root / DROP_IN.lstrip("/")).exists()
    assert server.run("sshd", "-t").returncode == 0


def test_broken_sshd_config_is_refused_before_anything_changes(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Or the administrator could not tell who broke it."""
    (server.root / "etc/ssh/sshd_config.d/00-ours.conf").write_text("Nonsense yes\n")
    refused(server, provision("web"), "the current configuration of sshd is invalid")


def test_chroot_that_sshd_would_refuse_is_named_before_anything_changes(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Each directory on the way to it, with the command that corrects it."""
    script = provision("web")
    home = server.root / "home"
    home.chmod(0o775)
    refused(
        server,
        script,
        "users other than root can write to /home, and sshd refuses such a chroot: chmod go-w /home",
    )
    home.chmod(0o755)
    (home / "backupop").mkdir()
    os.chown(home / "backupop", 1234, 1234)
    refused(server, script, "/home/backupop is not owned by root")
    os.chown(home / "backupop", 0, 0)
    (home / "backupop").chmod(0o755)
    done(server, script)


@pytest.mark.parametrize(
    ("useradd", "because"),
    [
        ("--shell /bin/bash backupop", "the account backupop exists and has the shell /bin/bash"),
        (
            "--shell /bin/bash mdbackup-index",
            "the account mdbackup-index exists and belongs to a regular user",
        ),
        ("--system --shell /bin/false mdbackup-index", "has no shell, so sshd cannot run the indexer"),
        ("--non-unique --uid 0 --shell /bin/false backupop", "has user id 0, like root"),
        ("--system --shell /bin/sh --password $y$x mdbackup-index", "usermod -p '*' mdbackup-index"),
        (
            "--system --shell /bin/false --password $y$x backupop",
            "the account backupop exists and has a pass",
        ),
        ("--system --shell /bin/sh --groups shadow mdbackup-index", "gpasswd -d mdbackup-index shadow"),
    ],
)
def test_account_of_somebody_is_not_taken(
    server: ProvisionedServer, provision: Provision, useradd: str, because: str
) -> None:
    """The restrictions would lock its owner out, or be of no use."""
    assert server.run("useradd", "--no-create-home", *useradd.split()).returncode == 0
    refused(server, provision("web"), because)


def test_account_that_was_made_by_hand_is_taken_and_left_by_undo(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As the original scheme makes it: with the shell /bin/false."""
    server.run("useradd", "--no-create-home", "--shell", "/bin/false", "backupop")
    untouched = machine(server)
    done(server, provision("web"))
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


@pytest.mark.parametrize(
    ("prepare", "because"),
    [
        ("rm -r /srv/www", "/srv/www, which is to be mounted on /home/backupop/backups, is not a directory"),
        ("mkdir -p /home/backupop/backups/x", "is not empty, and the mount would hide its content"),
        ("mkdir -p /home/backupop; touch /home/backupop/backups", "is to be mounted, is not a directory"),
        (
            "mkdir -p /home/backupop; ln -s /srv /home/backupop/backups",
            "is a symbolic link, so /srv/www would",
        ),
        ("mkdir /home/real; ln -s real /home/backupop", "specify the chroot by its real path, /home/real"),
        (
            "mkdir -p /home/backupop/backups; mount --bind /srv /home/backupop/backups",
            "not by this script: umount /home/backupop/backups",
        ),
        (
            "mkdir -p /home/backupop/.mdbackup; chown daemon /home/backupop/.mdbackup",
            "/home/backupop/.mdbackup, which is to hold the index, is owned by daemon",
        ),
        (
            "mkdir -p /home/backupop; ln -s /srv/www /home/backupop/.mdbackup",
            "/home/backupop/.mdbackup is a symbolic link, and the owner of its target would be changed",
        ),
        ("ln -s /srv /etc/mdbackup", "/etc/mdbackup is a symbolic link"),
        ("echo DenyUsers alice 'back*' >>/etc/ssh/sshd_config", '"denyusers back*" in its configuration'),
        (
            "echo DenyGroups 'mdbackup-inde?' >>/etc/ssh/sshd_config",
            'denies mdbackup-index every login, because of "denyg',
        ),
        ("rm -r /etc/ssh/*.pub", "no host key with a readable public key"),
        ("sed -i /^Subsystem/d /etc/ssh/sshd_config", "has no subsystem sftp"),
    ],
)
def test_what_is_missing_is_named_before_anything_changes(
    server: ProvisionedServer, provision: Provision, prepare: str, because: str
) -> None:
    """With what to do."""
    server.run("sh", "-c", prepare)
    refused(server, provision("web", "--bind", "/srv/www:/backups"), because)
    server.run("umount", "/home/backupop/backups")


@pytest.mark.parametrize(
    ("prepare", "because"),
    [
        (
            "touch /etc/ssh/sshd_config.d/10-mdbackup-web.conf",
            "10-mdbackup-web.conf exists, but was not created by this script",
        ),
        (
            "printf 'Match User backupop\\n    PermitTTY no\\n' >>/etc/ssh/sshd_config",
            '/etc/ssh/sshd_config has a block "Match User backupop" that was not created by this script',
        ),
        (
            "echo '/srv/www /home/backupop/backups/ none bind,ro 0 0' >>/etc/fstab",
            "/etc/fstab has an entry for /home/backupop/backups that was not created by this script",
        ),
    ],
    ids=["drop-in", "block", "fstab"],
)
def test_set_up_by_hand_is_not_overwritten(
    server: ProvisionedServer, provision: Provision, prepare: str, because: str
) -> None:
    """Nor doubled: the two ways know nothing of each other."""
    server.run("sh", "-c", prepare)
    refused(server, provision("web", "--bind", "/srv/www:/backups"), because)


def test_set_up_by_hand_is_not_undone_by_the_script(server: ProvisionedServer, provision: Provision) -> None:
    """Of which it would take down half, and leave the rest."""
    for place in (DROP_IN, f"{KEYS}/backupop", "/etc/mdbackup/web.json", "/etc/cron.d/mdbackup-web"):
        file = server.root / place[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        refused(server, provision("web", "--undo"), "was not set up by `mdbackup provision`")
        if place.startswith(KEYS):
            shutil.rmtree(file.parent)
        else:
            file.unlink()


def test_cron_job_is_refused_where_nothing_would_start_it(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Though there is an /etc/cron.d, which other packages make, too."""
    take_cron(server)
    refused(server, provision("self", "--cron", "@daily"), "this server has no cron: install it, or")
    give_cron(server)
    done(server, provision("self", "--cron", "@daily"))


def test_damaged_program_is_not_installed(server: ProvisionedServer, provision: Provision) -> None:
    """One changed letter in the indexer, and its checksum is another."""
    script = provision("web")
    at = script.index("Build the provider index:")
    result = server.run_script(script[:at] + "b" + script[at + 1 :])
    assert result.returncode == 1
    assert "/usr/local/lib/mdbackup/indexer.py was damaged in transfer" in result.stderr
    assert not (server.root / "usr/local/lib/mdbackup/indexer.py").exists()


def test_another_user_than_root_is_told_so(server: ProvisionedServer, provision: Provision) -> None:
    """And nothing is tried."""
    file = server.root / "srv/script.sh"
    file.write_text(provision("web"))
    result = server.run("runuser", "-u", "nobody", "--", "sh", "/srv/script.sh")
    assert (result.returncode, result.stdout) == (1, "")
    assert "run it as root" in result.stderr


# --- several on one server ------------------------------------------------------------------------


def test_two_set_ups_on_one_server_do_not_disturb_each_other(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """They want accounts and a chroot of their own; what they share stays until the last one goes."""
    untouched = machine(server)
    web = provision("web", "--bind", "/srv/www:/backups", "--sftpi")
    connect(done(server, web))
    refused(server, provision("self", "--sftpi"), "the account backupop belongs to another setup")
    for chroot in ("/home/backupop", "/home/backupop/more", "/home"):
        theirs = provision("self", "--backupop", "backupop2", "--chroot", chroot)
        refused(server, theirs, ": choose another one")
    own = ("self", "--backupop", "backupop2", "--bind", "/srv/www:/backups", "--sftpi", "--cron", "@daily")
    give_cron(server)
    connect(done(server, provision(*own)))
    assert "Nothing to change" in done(server, web)
    for connection_id in ("web_backupop", "self_backupop"):
        assert read(connection_id, b"/backups/alpha") == b"content of alpha\n"
    done(server, provision("web", "--undo"))
    assert read("self_backupop", b"/backups/alpha") == b"content of alpha\n"
    done(server, provision("self", "--undo"))
    assert machine(server) == untouched


def test_consumers_that_call_the_provider_the_same_choose_other_names_on_a(
    server: ProvisionedServer, provision: Provision
) -> None:
    """By `--as`."""
    done(server, provision("web"))
    own = ("--backupop", "backupop2", "--index-account", "mdbackup-index2")
    refused(server, provision("web", "--as", "web2", *own), "backupop is, or is inside, that")
    done(server, provision("self", "--as", "web2", "--chroot", "/home/backupop2", *own))
    assert {path.name for path in (server.root / "etc/mdbackup").iterdir()} == {
        "web.json", "web.made", "web2.json", "web2.made",
    }  # fmt: skip


@pytest.mark.parametrize("server", [WITHOUT_INCLUDE], ids=["rhel8"], indirect=True)
def test_set_up_that_is_called_like_the_subsystem_keeps_its_restrictions(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Both are marked blocks of the same file."""
    script = provision("web", "--as", "sftpi", "--sftpi")
    done(server, script)
    assert "Nothing to change" in done(server, script)
    effective = server.run("sshd", "-T", "-C", "user=backupop,host=b,addr=192.0.2.7").stdout
    assert "subsystem sftpi internal-sftp\n" in effective
    done(server, provision("web", "--as", "sftpi"))
    own = ("--backupop", "backupop2", "--sftpi")
    done(server, provision("self", *own))
    done(server, provision("self", "--undo"))
    effective = server.run("sshd", "-T", "-C", "user=backupop,host=b,addr=192.0.2.7").stdout
    assert "forcecommand internal-sftp -R" in effective
    assert "subsystem sftpi" not in effective


@pytest.mark.parametrize("server", [DEBIAN + "Subsystem sftpi internal-sftp\n"], ids=["sftpi"], indirect=True)
def test_subsystem_that_is_there_already_is_used_and_left(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """As the original scheme has it."""
    untouched = machine(server)
    script = provision("web", "--bind", "/srv/www:/backups", "--sftpi")
    connect(done(server, script))
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    assert "Nothing to change" in done(server, script)
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


# --- mounts, indexer, schedules -------------------------------------------------------------------


def test_mounts_are_read_only_and_follow_the_options(server: ProvisionedServer, provision: Provision) -> None:
    """Not even root writes through them; one that is not asked for any more goes; data stays where it is."""
    done(server, provision("web", "--bind", "/srv/www:/backups/www", "--bind", "/etc:/backups/etc"))
    assert server.run("touch", "/home/backupop/backups/www/new").returncode == 1
    fstab = (server.root / "etc/fstab").read_text()
    assert "\n/srv/www /home/backupop/backups/www none bind,ro,nosuid,nodev,noexec,nofail 0 0\n" in fstab
    done(server, provision("web", "--bind", "/srv/www:/backups/www"))
    assert os.listdir(server.root / "home/backupop/backups/etc") == []
    # After a reboot it is fstab that mounts them.
    assert server.run("umount", "/home/backupop/backups/www").returncode == 0
    assert server.run("mount", "-a").returncode == 0
    assert os.listdir(server.root / "home/backupop/backups/www") == ["alpha"]
    assert server.run("touch", "/home/backupop/backups/www/new").returncode == 1


def test_another_source_takes_the_place_of_the_one_that_was_mounted(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Also if it has the same name, and is a directory that was made anew."""
    seen = server.root / "home/backupop/backups"
    server.run("mkdir", "/srv/other")
    done(server, provision("web", "--bind", "/srv/www:/backups"))
    done(server, provision("web", "--bind", "/srv/other:/backups"))
    assert os.listdir(seen) == []
    server.run("sh", "-c", "mv /srv/other /srv/old; mkdir /srv/other; touch /srv/other/beta")
    script = provision("web", "--bind", "/srv/other:/backups")
    done(server, script)
    assert os.listdir(seen) == ["beta"]
    assert "Nothing to change" in done(server, script)


def test_index_directory_is_readable_and_of_who_builds_the_index(
    server: ProvisionedServer, provision: Provision
) -> None:
    """However it was before; the files of the indexer go with it."""
    directory = server.root / "home/backupop/.mdbackup"
    directory.mkdir(parents=True, mode=0o700)
    for name in ("index.md5", ".index.md5.cache", "another"):
        (directory / name).touch()
    done(server, provision("web"))
    owner = directory.stat().st_uid
    assert (directory.stat().st_mode & 0o777, owner != 0) == (0o755, True)
    assert (directory / ".index.md5.cache").stat().st_uid == owner
    assert (directory / "another").stat().st_uid == 0


def test_undo_removes_no_data(server: ProvisionedServer, provision: Provision) -> None:
    """What somebody put into the chroot stays, beside the index too, and it says so."""
    done(server, provision("web"))
    for name in ("backups/kept", ".mdbackup/index.md5.kept", ".mdbackup/index.md5"):
        (server.root / "home/backupop" / name).parent.mkdir(exist_ok=True)
        (server.root / "home/backupop" / name).write_text("data")
    output = done(server, provision("web", "--undo"))
    assert "/home/backupop is not empty, so it is kept" in output
    assert (server.root / "home/backupop/backups/kept").read_text() == "data"
    assert os.listdir(server.root / "home/backupop/.mdbackup") == ["index.md5.kept"]


@pytest.mark.parametrize("python", [True, False], ids=["python", "sh"])
def test_undo_removes_the_index_and_what_the_indexer_keeps_beside_it(
    server: ProvisionedServer, provision: Provision, python: bool
) -> None:
    """Nothing is left that would belong to nobody; also what a build leaves that was killed."""
    if not python:
        server.run(
            "mount", "--bind", "/dev/null", server.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
        )
    untouched = machine(server)
    done(server, provision("web", "--bind", "/srv/www:/backups"))
    script = "index-web.sh" if not python else "indexer.py"
    words = f"/bin/sh /usr/local/lib/mdbackup/{script} --no-request"
    if python:
        words = f"/usr/bin/python3 -I /usr/local/lib/mdbackup/{script} --config /etc/mdbackup/web.json"
    assert server.run("runuser", "-u", "mdbackup-index", "--", *words.split()).returncode == 0
    directory = server.root / "home/backupop/.mdbackup"
    (directory / ".index.md5.7.1.tmp").touch()
    (directory / ".index.md5.lock.d").mkdir()
    (directory / ".index.md5.lock.d/holder").touch()
    (directory / ".index.md5.link").symlink_to("/srv/www/alpha")
    assert (directory / "index.md5").exists()
    assert "so it is kept" not in done(server, provision("web", "--undo"))
    assert machine(server) == untouched


def test_undo_leaves_an_index_in_a_directory_of_somebody(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Only what the script made is for it to empty."""
    (server.root / "home/backupop/.mdbackup").mkdir(parents=True)
    (server.root / "home/backupop/.mdbackup/index.md5").write_text("data")
    done(server, provision("web"))
    done(server, provision("web", "--undo"))
    assert (server.root / "home/backupop/.mdbackup/index.md5").read_text() == "data"


def test_server_without_python_gets_the_indexer_of_the_shell(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Python 3.6 is looked for by trying."""
    python = server.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
    server.run("mount", "--bind", "/dev/null", python)
    output = done(server, provision("web", "--bind", "/srv/www:/backups"))
    assert "no Python 3.6 or newer was found" in output
    forced = "ForceCommand /bin/sh /usr/local/lib/mdbackup/index-web.sh\n"
    assert forced in (server.root / DROP_IN.lstrip("/")).read_text()
    assert os.listdir(server.root / "usr/local/lib/mdbackup") == ["index-web.sh"]


def test_indexer_of_the_shell_is_run_by_the_account_and_by_cron(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """As the one in Python: what it is asked for does not matter."""
    python = server.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
    server.run("mount", "--bind", "/dev/null", python)
    give_cron(server)
    index = server.root / "home/backupop/.mdbackup/index.md5"
    connect(done(server, provision("web", "--bind", "/srv/www:/backups", "--cron", "@daily")))
    with IndexHook("web_index") as hook:
        standard_input, output, _ = hook.get_conn().exec_command("id")
        assert output.readline() == "mdbackup ready request\n"
        standard_input.write('{"id": null}\n')
        standard_input.flush()
        assert "mdbackup done files=1 " in output.read().decode()
    index.unlink()
    job = (server.root / "etc/cron.d/mdbackup-web").read_text().splitlines()[-1]
    command = job.removeprefix("@daily mdbackup-index ")
    built = server.run("runuser", "-u", "mdbackup-index", "--", "sh", "-c", command)
    assert (built.stdout, built.stderr, index.exists()) == ("", "", True)


def test_configuration_of_the_indexer_is_that_of_the_provider(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Patterns with blanks and quotes come through the shell as they are; only root can change the file."""
    options = ("--indexer", "jobs=2", "--indexer", "rehash=2.5%", "--indexer", "one_file_system=true")
    done(server, provision("self", *options))
    file = server.root / "etc/mdbackup/self.json"
    assert json.loads(file.read_text()) == {
        "chroot": "/home/backupop",
        "source": ["/backups"],
        "index": "/.mdbackup/index.md5",
        "exclude": ["it's *.tmp"],
        "nice": 10,
        "jobs": 2,
        "rehash": 2.5,
        "one_file_system": True,
    }
    assert (oct(file.stat().st_mode), file.stat().st_uid) == ("0o100644", 0)


def test_units_are_sound_and_start_at_boot(server: ProvisionedServer, provision: Provision) -> None:
    """Timer and path unit start the same service, which may read everything and write the index only."""
    output = done(server, provision("self", "--bind", "/srv/www:/backups", "--path-unit"))
    assert "systemd is not running: the next boot starts" in output
    units = server.root / "etc/systemd/system"
    found = {}
    for kind in ("service", "timer", "path"):
        found[kind] = configparser.ConfigParser(interpolation=None, strict=True)
        found[kind].optionxform = str  # type: ignore[assignment,method-assign]
        found[kind].read_string((units / f"mdbackup-index-self.{kind}").read_text())
    assert found["service"]["Service"]["User"] == "root"
    assert found["service"]["Service"]["CapabilityBoundingSet"] == "CAP_DAC_READ_SEARCH"
    assert found["service"]["Service"]["ReadWritePaths"] == "/home/backupop/.mdbackup"
    assert found["timer"]["Timer"]["OnCalendar"] == "hourly"
    assert found["service"]["Unit"]["RequiresMountsFor"] == "/home/backupop /home/backupop/backups"
    assert found["path"]["Path"]["PathChanged"] == "/home/backupop/backups"
    assert (units / "timers.target.wants/mdbackup-index-self.timer").is_symlink()
    assert (units / "multi-user.target.wants/mdbackup-index-self.path").is_symlink()
    if shutil.which("systemd-analyze"):
        for kind in found:
            unit = f"/etc/systemd/system/mdbackup-index-self.{kind}"
            judged = server.run("systemd-analyze", "verify", "--man=no", unit)
            assert "mdbackup" not in judged.stderr, judged.stderr
            assert judged.returncode == 0
    # Another choice takes the place of the first.
    done(server, provision("self", "--bind", "/srv/www:/backups", "--timer", "*:0/15"))
    assert not (units / "mdbackup-index-self.path").exists()
    assert "OnCalendar=*:0/15\n" in (units / "mdbackup-index-self.timer").read_text()
    refused(server, provision("self", "--timer", "someday"), "systemd rejects the calendar expression")


def test_service_and_cron_job_build_the_index(server: ProvisionedServer, provision: Provision) -> None:
    """Each by the very command that is written there; cron is silent while all is well."""
    index = server.root / "home/backupop/.mdbackup/index.md5"
    done(server, provision("self", "--bind", "/srv/www:/backups"))
    service = (server.root / "etc/systemd/system/mdbackup-index-self.service").read_text()
    built = server.run(*re.findall("^ExecStart=(.*)$", service, re.MULTILINE)[0].split())
    assert (built.returncode, index.exists()) == (0, True)
    index.unlink()
    give_cron(server)
    output = done(server, provision("self", "--bind", "/srv/www:/backups", "--cron", "30 2 * * *"))
    first = re.findall("^To build the first index: (.*)$", output, re.MULTILINE)[0]
    assert (server.run("sh", "-c", first).returncode, index.exists()) == (0, True)
    index.unlink()
    assert not (server.root / "etc/systemd/system/mdbackup-index-self.service").exists()
    job = (server.root / "etc/cron.d/mdbackup-self").read_text().splitlines()[-1]
    assert job.startswith("30 2 * * * root ")
    command = job.removeprefix("30 2 * * * root ")
    built = server.run("sh", "-c", command)
    assert (built.stdout, built.stderr, index.exists()) == ("", "", True)
    (server.root / "etc/mdbackup/self.json").write_text("damaged")
    assert "mdbackup error" in server.run("sh", "-c", command).stdout


@pytest.mark.parametrize("service", ["ssh", "sshd"])
def test_running_systemd_reloads_the_server_under_the_name_it_has(
    server: ProvisionedServer, provision: Provision, service: str
) -> None:
    """Debian calls it ssh, RHEL sshd; and a running systemd is told of new units and mounts."""
    stand_in = server.root / "srv/systemctl"
    stand_in.write_text(
        '#!/bin/sh\necho "$*" >>/srv/asked\n'
        f'case "$*" in "is-active --quiet {service}.service") exit 0 ;; is-*) exit 3 ;; esac\n'
    )
    stand_in.chmod(0o755)
    server.run("mount", "--bind", "/srv/systemctl", shutil.which("systemctl") or "/usr/bin/systemctl")
    server.run("mkdir", "-p", "/run/systemd/system")
    output = done(server, provision("self", "--bind", "/srv/www:/backups"))
    asked = (server.root / "srv/asked").read_text().splitlines()
    assert f"sshd was reloaded ({service}.service)" in output
    assert [line for line in asked if not line.startswith("is-")] == [
        "daemon-reload",
        f"reload {service}.service",
        "daemon-reload",
        "enable --quiet --now mdbackup-index-self.timer",
    ]


def test_reload_that_failed_is_tried_again(server: ProvisionedServer, provision: Provision) -> None:
    """Although there is nothing left to change."""
    stand_in = server.root / "srv/systemctl"
    stand_in.write_text(
        '#!/bin/sh\ncase "$*" in reload*) exec rm /srv/allowed ;; is-enabled*) exit 1 ;; esac\n'
    )
    stand_in.chmod(0o755)
    server.run("mount", "--bind", "/srv/systemctl", shutil.which("systemctl") or "/usr/bin/systemctl")
    server.run("mkdir", "-p", "/run/systemd/system")
    result = server.run_script(provision("web"))
    assert (result.returncode, "sshd could not be reloaded" in result.stderr) == (1, True)
    (server.root / "srv/allowed").touch()
    assert "sshd was reloaded" in done(server, provision("web"))
    assert "sshd was reloaded" not in done(server, provision("web"))


def test_run_that_was_killed_is_made_up_for_by_the_next(
    server: ProvisionedServer, provision: Provision
) -> None:
    """sshd has still to read what the killed one wrote, although nothing is left to change."""
    script = provision("web")
    killed = script.replace('    verify_restrictions "$backupop"\n', "    kill -KILL $$\n", 1)
    assert killed != script
    assert server.run_script(killed).returncode != 0
    assert (server.root / DROP_IN.lstrip("/")).exists()
    assert "sshd was sent SIGHUP" in done(server, script)
    assert "sshd was sent SIGHUP" not in done(server, script)
    assert not (server.root / "run/mdbackup-web.reload").exists()


def test_undo_leaves_an_account_that_somebody_made_after_the_script_could_not(
    server: ProvisionedServer, provision: Provision
) -> None:
    """What the script made is noted when it is made."""
    script = provision("web")
    failing = script.replace("    useradd --system", "    false --system")
    assert server.run_script(failing).returncode == 1
    by_hand = ("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "backupop")
    assert server.run(*by_hand).returncode == 0
    done(server, script)
    done(server, provision("web", "--undo"))
    assert server.run("getent", "passwd", "backupop").returncode == 0
    assert server.run("getent", "passwd", "mdbackup-index").returncode == 2


@pytest.mark.parametrize("server", [WITHOUT_INCLUDE], ids=["rhel8"], indirect=True)
def test_configuration_that_is_a_symbolic_link_stays_one(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As where the files of /etc are kept elsewhere."""
    server.run("sh", "-c", "mv /etc/ssh/sshd_config /srv/ours; ln -s /srv/ours /etc/ssh/sshd_config")
    untouched = machine(server)
    done(server, provision("web"))
    assert os.readlink(server.root / MAIN.lstrip("/")) == "/srv/ours"
    assert "Match User backupop\n" in (server.root / "srv/ours").read_text()
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


def test_directories_that_were_there_already_become_root_s_alone(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Who could rename files in them could put another program in the indexer's place."""
    places = ["etc/mdbackup", "etc/ssh/mdbackup", "etc/ssh/mdbackup/web", "usr/local/lib/mdbackup"]
    for number, place in enumerate(places):
        (server.root / place).mkdir()
        (server.root / place).chmod(0o777 if number % 2 else 0o700)
        os.chown(server.root / place, 1234, 1234)
    script = provision("web")
    done(server, script)
    for place in places:
        about = (server.root / place).stat()
        assert (about.st_uid, about.st_mode & 0o777) == (0, 0o755), place
    assert "Nothing to change" in done(server, script)


def test_account_that_gets_another_name_leaves_no_key_behind(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """The old account is let in no more, and undo removes both."""
    untouched = machine(server)
    connect(done(server, provision("web")))
    done(server, provision("web", "--backupop", "reader"))
    with pytest.raises(AccessRefused):
        say("web_backupop", "id")
    assert sorted(os.listdir(server.root / "etc/ssh/mdbackup/web")) == ["mdbackup-index", "reader"]
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


def test_lines_to_paste_pin_the_host_key_and_name_the_server(
    server: ProvisionedServer, provision: Provision, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key is the server's own; without `--host` and `--port` the script fills in what A calls itself."""
    output = done(server, provision("web", "--sftpi", "--host", "a.example.org", host="b.example.org"))
    key = (server.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    for connection in connections(output).values():
        assert connection["extra"]["host_key"] == " ".join(key)
        assert (connection["host"], connection["port"]) == ("b.example.org", server.port)
    assert connections(output)["web_backupop"]["extra"]["subsystem"] == "sftpi"
    assert main(["provision", "web"]) == 0
    output = done(server, capsys.readouterr().out)
    name = subprocess.run(["hostname", "-f"], capture_output=True, text=True).stdout.strip()
    assert connections(output)["web_index"]["host"] == name
    assert f"B must reach this server as {name}" in output
