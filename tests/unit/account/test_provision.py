"""What `mdbackup provision` prints and makes on B, and what it refuses to write."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.account import provision as provision_module
from airflow_mdbackup.account.provision import Account, Bind, CannotProvision, Setup, script, undo_script
from airflow_mdbackup.cli.main import main
from airflow_mdbackup.config.provider import Indexer

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3a6yokEkRaAhfgIsXab5pd8oK9n1enHdtMO90CUYwu"
SHELLS = [shell for shell in ("dash", "bash --posix", "busybox sh") if shutil.which(shell.split()[0])]


def a_setup(**changes: Any) -> Setup:
    """Return a set-up with everything in it."""
    return Setup(
        **{
            "provider": "web",
            "name": "web",
            "backupop": Account("backupop", "web_backupop", "/keys/web_backupop", KEY),
            "indexer": Account("mdbackup-index", "web_index", "/keys/web_index", KEY),
            "chroot": "/home/backupop",
            "source": ("/backups",),
            "binds": (Bind("/srv/www", "/home/backupop/backups"),),
            "addresses": ("192.0.2.7", "2001:db8::/32"),
            "timer": "daily",
        }
        | changes
    )


def here_document(text: str, mark: str) -> str:
    """Return what a script has between a here-document's beginning and its end."""
    return text.split(f"<<'{mark}'\n")[1].split(f"\n{mark}\n")[0]


# --- the text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"indexer": None, "path_unit": True, "subsystem": "sftpi"},
        {"timer": None, "cron": "30 2 * * 1-5", "binds": (), "addresses": ()},
        {
            "source": ('/it\'s `here`; $(x) & "there"', "/Bücher", "/END_OF_PROGRAM"),
            "exclude": ("*.tmp", "'\\''"),
        },
        {"host": "a.example.org", "port": 2222},
    ],
    ids=["all", "path", "cron", "names", "host"],
)
def test_script_is_what_every_posix_shell_understands(changes: dict[str, Any], shell: str) -> None:
    """Whatever the choices, and whatever is in the names of what is backed up."""
    for text in (script(a_setup(**changes)), undo_script("web")):
        done = subprocess.run([*shell.split(), "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert text.startswith("#!/bin/sh\n")
        assert text.endswith("\nmain\n")


def test_configuration_of_the_indexer_keeps_every_name() -> None:
    """As JSON, in a here-document that the shell takes as it stands."""
    names = ("/it's `here`; $(x)", "/Bücher", '/"\\')
    text = script(a_setup(source=names, indexer_options={"rehash": 1.5, "nice": 0}))
    assert json.loads(here_document(text, "EOF_CONFIG")) == {
        "chroot": "/home/backupop",
        "source": list(names),
        "index": "/.mdbackup/index.md5",
        "exclude": [],
        "nice": 0,
        "rehash": 1.5,
    }


def test_program_cannot_end_its_own_here_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mark is taken if the program has such a line."""
    program = "echo one\nEND_OF_PROGRAM\nEND_OF_PROGRAM_\nrm -rf /\n"
    assert provision_module._delimiter(program) == "END_OF_PROGRAM__"
    assert provision_module._delimiter("true\n") == "END_OF_PROGRAM"


def test_lines_to_paste_are_one_command_each_whatever_the_names() -> None:
    """The shell of B gives `airflow` the very JSON."""
    key_file = '/keys of $HOME/it\'s "one"'
    setup = a_setup(backupop=Account("backupop", "web backupop", key_file, KEY), subsystem="sftpi")
    line = here_document(script(setup), "EOF_CONNECTIONS").splitlines()[0]
    words = shlex.split(line)
    assert words[:4] == ["airflow", "connections", "add", "web backupop"]
    assert json.loads(words[words.index("--conn-extra") + 1]) == {
        "key_file": key_file,
        "host_key": "@HOST_KEY@",
        "subsystem": "sftpi",
    }


def test_keys_are_restricted_and_bound_to_addresses_and_command() -> None:
    """`restrict` also covers what later versions of OpenSSH may add."""
    text = script(a_setup())
    options = 'restrict,from="192.0.2.7,2001:db8::/32"'
    assert f"\n{options} {KEY}\n" in text
    assert f'\n{options},command="$serve" {KEY}\n' in text
    assert f"\nrestrict {KEY}\n" in script(a_setup(addresses=()))


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"name": "../x"}, "name '../x'"),
        ({"name": "Web"}, "name 'Web'"),
        ({"provider": "web\nrm"}, "provider"),
        ({"backupop": Account("backupop; id", "c", "/k", KEY)}, "account 'backupop; id'"),
        ({"backupop": Account("back*", "c", "/k", KEY)}, r"account 'back\*'"),
        ({"backupop": Account("root", "c", "/k", KEY)}, "the account `root`"),
        ({"backupop": Account("mdbackup-index", "c", "/k", KEY)}, "must have different names"),
        ({"backupop": Account("backupop", "c", "/k", KEY + "\nssh-ed25519 AAAA")}, "public key"),
        ({"backupop": Account("backupop", "c", "/k\n", KEY)}, "key file"),
        ({"backupop": Account("backupop", "a\x1b[2J", "/k", KEY)}, "connection"),
        ({"chroot": "/"}, "the chroot is `/`"),
        ({"chroot": "//"}, "empty component"),
        ({"chroot": "/home/.."}, "has `.` or `..` as a component"),
        ({"chroot": "/home/backupop/"}, "none at the end"),
        ({"chroot": "/home/%u"}, "chroot '/home/%u' cannot be written"),
        ({"chroot": "/home/back up"}, "chroot '/home/back up' cannot be written"),
        ({"chroot": '/home/"x'}, "cannot be written"),
        ({"chroot": "/home/x\n"}, "cannot be written"),
        ({"index": "/.md backup/index"}, "index '/.md backup/index' cannot be written"),
        ({"index": "/index.md5"}, "would be in the chroot itself"),
        ({"index": "/backups/index.md5", "binds": (), "path_unit": True}, "writing it would start the next"),
        ({"index": "/backups/index.md5", "binds": ()}, "which the index account could change"),
        ({"index": "/a/index.md5", "source": ("/a/b",), "binds": ()}, "which the index account could change"),
        ({"index": "/backups/x/index.md5"}, "which is mounted read-only"),
        ({"source": ("/a\nb",)}, "source or exclude"),
        ({"exclude": ("a\x00",)}, "source or exclude"),
        ({"source": ("/with blank",), "path_unit": True}, "source '/with blank' cannot be written"),
        ({"binds": (Bind("/srv/a b", "/home/backupop/a"),)}, "bind '/srv/a b' cannot be written"),
        ({"binds": (Bind("/srv/a", "/home/other/a"),)}, "is not below the chroot"),
        ({"binds": (Bind("/srv/a", "/home/backupop/../x"),)}, "has `.` or `..` as a component"),
        ({"binds": (Bind("/srv/../a", "/home/backupop/a"),)}, "has `.` or `..` as a component"),
        ({"indexer": Account("ix", "web_backupop", "/k", KEY)}, "both accounts would use the connection"),
        ({"binds": (Bind("/a", "/home/backupop/a"), Bind("/b", "/home/backupop/a/b"))}, "inside the other"),
        ({"addresses": ("b.example.org",)}, "is not an address or network"),
        ({"addresses": ('1.2.3.4" command="id',)}, "is not an address or network"),
        ({"addresses": ("fe80::1%a\nid\n#",)}, "is not an address or network"),
        ({"addresses": ("fe80::1%eth0",)}, "is not an address or network"),
        ({"addresses": ("10.0.0.1/8",)}, "has host bits set"),
        ({"timer": "daily\nExecStart=id"}, "calendar"),
        ({"timer": "%h"}, "calendar"),
        ({"timer": "--version"}, "calendar"),
        ({"timer": None, "cron": "-5 2 * * *"}, "five fields"),
        ({"port": -5}, "port -5 is not from 1 to 65535"),
        ({"port": 65536}, "port 65536 is not from 1 to 65535"),
        ({"timer": None, "cron": "* * * * * root id"}, "five fields"),
        ({"timer": None, "cron": "30 2 * * *\n"}, "five fields"),
        ({"timer": None, "cron": "30 2 * * %"}, "five fields"),
        ({"cron": "@daily"}, "choose either cron or a systemd timer"),
        ({"timer": None, "path_unit": True}, "needs a timer as well"),
        ({"host": "a b"}, "host 'a b'"),
        ({"host": "$(id)"}, "host"),
    ],
)  # fmt: skip
def test_what_one_of_the_files_would_read_as_something_else_is_refused(
    changes: dict[str, Any], because: str
) -> None:
    """With the value, and a way out; nothing is ever escaped in the hope that all six kinds of file agree."""
    with pytest.raises(CannotProvision, match=because):
        a_setup(**changes)


@pytest.mark.parametrize(
    ("addresses", "tried", "known"),
    [
        ((), ("127.0.0.1", "192.0.2.1", "2001:db8::1"), False),
        (("192.0.2.7", "2001:db8::7/128"), ("192.0.2.7", "2001:db8::7"), True),
        (("192.0.2.7", "10.1.0.0/16"), ("192.0.2.7", "10.1.0.0", "10.1.255.255"), False),
    ],
)
def test_sshd_is_asked_what_it_does_for_each_address_of_b(
    addresses: tuple[str, ...], tried: tuple[str, ...], known: bool
) -> None:
    """Of a network for its ends, which proves nothing of what is between them."""
    setup = a_setup(addresses=addresses)
    assert (setup.test_addresses, setup.addresses_are_exact) == (tried, known)
    assert f"\naddresses={shlex.quote(' '.join(tried))} " in script(setup)


def test_no_word_in_a_path_is_taken_for_a_place_of_the_script() -> None:
    """Whatever the template uses for what is known on A only."""
    chroot = "/srv/@SERVE@/@BUILD@"
    text = script(a_setup(chroot=chroot, binds=(), path_unit=True))
    assert f"\n    ChrootDirectory {chroot}\n" in text
    shell = text.partition("\nrestrictions() {")[2].partition("\n}\n")[0]
    shown = subprocess.run(
        ["sh", "-c", f"serve=SERVES; restrictions() {{{shell}\n}}; restrictions"],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert f"ChrootDirectory {chroot}\n" in shown
    assert "ForceCommand SERVES\n" in shown


def test_account_without_key_is_refused() -> None:
    """An empty line of authorized_keys would be an account that nobody can use."""
    with pytest.raises(CannotProvision, match="without a key"):
        script(a_setup(backupop=replace(a_setup().backupop, public_key="")))


def test_access_is_to_be_given_to_the_files_themselves() -> None:
    """An ACL cannot be set through a read-only mount."""
    binds = (Bind("/srv/www", "/home/backupop/backups/www"), Bind("/var/lib", "/home/backupop/lib"))
    setup = a_setup(binds=binds, source=("/backups", "/lib/mysql", "/own"))
    assert setup.real_paths == ("/srv/www", "/var/lib/mysql", "/home/backupop/own")


@pytest.mark.parametrize("private", ["/", "/etc", "/etc/ssh"])
def test_no_acl_is_advised_on_what_holds_the_private_keys_of_sshd(private: str) -> None:
    """With one, sshd refuses them, and lets in nobody any more."""
    binds = (Bind(private, "/home/backupop/backups/all"), Bind("/srv/www", "/home/backupop/backups/www"))
    hints = here_document(script(a_setup(binds=binds)), "EOF_HINTS")
    granted = re.findall("^    setfacl .* (/.*)$", hints, re.MULTILINE)
    assert granted == ["/srv/www", "/srv/www"]
    assert f"Do not set an ACL on all of {private}:" in hints
    hints = here_document(script(a_setup(binds=binds[:1])), "EOF_HINTS")
    assert "setfacl" not in hints
    assert "Do not set an ACL" not in here_document(script(a_setup()), "EOF_HINTS")


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `mdbackup provision` and returns status, standard output and standard error."""
    providers = f"""
    providers:
      web: {{sftp_conn_id: web_backupop, ssh_conn_id: web_index, chroot: /home/backupop,
             source: [/backups, /etc], dest: {tmp_path}/web}}
      self: {{sftp_conn_id: self_backupop, source: /backups, dest: {tmp_path}/self}}
      wrong: {{sftp_conn_id: self_backupop, source: backups, dest: {tmp_path}/wrong}}
    """
    (tmp_path / "providers.yaml").write_text(providers)
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(tmp_path / "providers.yaml"))

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["provision", *words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_standard_output_is_the_script_and_nothing_else(run: Run) -> None:
    """What to do with it, and what may have been forgotten, is on standard error."""
    status, text, told = run("web", "--bind", "/srv/www:/backups")
    assert (status, text.startswith("#!/bin/sh\n"), text.endswith("\nmain\n")) == (0, True, True)
    assert "1. Review the script, copy it to A, and run it there as root" in told
    assert "3. Prove that the accounts are restricted: airflow mdbackup audit web" in told
    assert "Note: nothing is mounted at /etc" in told
    assert "Note: nothing is mounted at /backups" not in told


def test_key_pairs_are_made_once_and_never_overwritten(run: Run, tmp_path: Path) -> None:
    """Ed25519, without passphrase, readable for their owner only; the script has the public halves."""
    run("web")
    made = {path.name: path.read_text() for path in (tmp_path / "keys").iterdir()}
    assert sorted(made) == ["web_backupop", "web_backupop.pub", "web_index", "web_index.pub"]
    for name in ("web_backupop", "web_index"):
        file = tmp_path / "keys" / name
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        kind = subprocess.run(["ssh-keygen", "-lf", file], capture_output=True, text=True, check=True).stdout
        assert kind.endswith("(ED25519)\n")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    (tmp_path / "keys" / "web_index.pub").unlink()
    status, text, told = run("web")
    assert (status, "Created the key pair" in told) == (0, False)
    for name in ("web_backupop", "web_index"):
        assert (tmp_path / "keys" / name).read_text() == made[name]
        assert " ".join(made[f"{name}.pub"].split()[:2]) in text


def test_no_key_is_made_for_what_is_refused(run: Run, tmp_path: Path) -> None:
    """The arguments are judged first."""
    status, text, told = run("web", "--from", "b.example.org")
    assert (status, text) == (2, "")
    assert "b.example.org" in told
    assert not (tmp_path / "keys").exists()


def test_half_of_a_key_pair_is_told(run: Run, tmp_path: Path) -> None:
    """A public key without its private one, or a private one that wants a passphrase."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/web_backupop.pub").write_text(KEY)
    status, _, told = run("web")
    assert (status, "exists without its private key" in told) == (2, True)
    (tmp_path / "keys/web_backupop.pub").unlink()
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "keys/web_backupop"]
    subprocess.run(make, check=True)
    (tmp_path / "keys/web_backupop.pub").unlink()
    status, _, told = run("web")
    assert (status, "ssh-keygen failed" in told) == (2, True)


def test_connections_that_exist_decide_login_host_port_and_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a provider that is set up already can be set up again; and arguments win."""
    key = tmp_path / "there"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    connection = {"conn_type": "sftp", "host": "a.example.org", "port": 2222, "login": "reader"}
    monkeypatch.setenv(
        "AIRFLOW_CONN_WEB_BACKUPOP", json.dumps(connection | {"extra": {"key_file": str(key)}})
    )
    status, text, told = run("web")
    assert status == 0
    assert "\nMatch User reader\n" in text
    line = here_document(text, "EOF_CONNECTIONS").splitlines()[0]
    assert "--conn-host a.example.org --conn-port 2222 --conn-login reader" in line
    assert str(key) in line
    assert "airflow connections delete web_backupop" in told
    assert "\nMatch User other\n" in run("web", "--backupop", "other")[1]
    key.unlink()
    status, _, told = run("web")
    assert (status, "which is not on this machine" in told) == (2, True)
    text = "-----BEGIN OPENSSH PRIVATE KEY-----"
    monkeypatch.setenv("AIRFLOW_CONN_WEB_BACKUPOP", json.dumps(connection | {"extra": {"key_file": text}}))
    status, _, told = run("web")
    assert (status, "has the key itself in its extra key_file" in told, text in told) == (2, True, False)
    assert run("web", "--keys", str(tmp_path / "keys"))[0] == 0


@pytest.mark.parametrize(
    ("connection", "because"),
    [
        ('{"conn_type": bad', "EnvironmentVariablesBackend: Expecting value"),
        ('{"conn_type": "sftp", "extra": [1, 2]}', "EnvironmentVariablesBackend: "),
        ('{"conn_type": "sftp", "port": "x"}', "EnvironmentVariablesBackend: "),
    ],
)
def test_connection_that_is_malformed_is_no_missing_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connection: str, because: str
) -> None:
    """Else the script would be for another account than the connection's, and there would be a new key."""
    monkeypatch.setenv("AIRFLOW_CONN_WEB_BACKUPOP", connection)
    status, text, told = run("web")
    assert (status, text) == (2, "")
    assert "the connection web_backupop cannot be read" in told
    assert because in told
    assert not (tmp_path / "keys").exists()


def test_database_that_does_not_answer_is_no_missing_connection(run: Run, tmp_path: Path) -> None:
    """In a process of its own, since Airflow opens its database once."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow_mdbackup", "provision", "web"],
        env=os.environ | {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/missing/airflow.db"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "unable to open database file" in done.stderr
    assert not (tmp_path / "keys").exists()


def test_airflow_that_is_not_set_up_yet_knows_no_connections_and_is_told(run: Run) -> None:
    """A provider may be set up first."""
    status, _, told = run("web")
    assert (status, "Note: Airflow's database is not set up here" in told) == (0, True)


def test_script_is_utf_8_whatever_the_terminal_takes(run: Run) -> None:
    """A reads it, and not the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow_mdbackup", "provision", "web", "--bind", "/srv/ü:/backups"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\n/srv/ü /home/backupop/backups\n".encode() in done.stdout


def test_slash_at_the_end_of_a_directory_does_not_matter(run: Run) -> None:
    """A shell that completes the name leaves one."""
    plain = run("self", "--chroot", "/srv/op", "--bind", "/srv/www:/backups")
    assert run("self", "--chroot", "/srv/op/", "--bind", "/srv/www/:/backups/")[:2] == plain[:2]
    status, text, told = run("self", "--chroot", "//")
    assert (status, text, "the chroot is `/`" in told) == (2, "", True)


@pytest.mark.parametrize(
    ("words", "has", "has_not"),
    [
        ("web", ["Match User mdbackup-index"], ["OnCalendar", "PathChanged", "EOF_CRON"]),
        ("self", ["OnCalendar=daily"], ["Match User mdbackup-index", "PathChanged", "EOF_CRON"]),
        ("self --path-unit", ["OnCalendar=hourly", "PathChanged=/home/backupop/backups"], []),
        ("self --cron @daily", ["@daily root output="], ["OnCalendar"]),
        ("self --backupop op", ["chroot=/home/op "], []),
        (
            "self --index-account ix",
            ["Match User ix\n", "airflow connections add self_index"],
            ["OnCalendar"],
        ),
        ("web --as web2", ["name=web2\n"], ["name=web\n"]),
        ("web --sftpi", ["subsystem sftpi"], []),
    ],
)
def test_what_is_not_said_is_what_suits_most(
    run: Run, words: str, has: list[str], has_not: list[str]
) -> None:
    """B asks A for the index where it can; else a timer builds it."""
    status, text, _ = run(*words.split())
    assert status == 0
    assert [part for part in has if part not in text] == []
    assert [part for part in has_not if part in text] == []


@pytest.mark.parametrize(
    ("words", "because"),
    [
        ("nobody", "there is no provider 'nobody'"),
        ("nobody", "(known: web, self)"),
        ("wrong", "the configuration must be corrected first"),
        ("web --chroot /srv", "change that, and remove --chroot"),
        ("web --bind www", "must be two absolute paths"),
        ("web --bind /a:/b:/c", "must be two absolute paths"),
        ("web --indexer threads=2", "`threads` is not a key; did you mean `rehash`?"),
        ("web --indexer nice=20", "`nice` must be at most 19"),
        ("web --indexer jobs=1024", "`jobs` must be at most 256"),
        ("web --indexer limit=50000000", "such as `500KB`, `20MB`"),
        ("web --indexer rehash=101%", "write `0%` to `100%`"),
        ("web --indexer rehash=%", "must be a percentage"),
        ("web --port 0", "port 0 is not from 1 to 65535"),
        ("web --cron @daily --timer daily", "choose either cron or a systemd timer"),
        ("../x --undo", "name '../x'"),
    ],
)
def test_wrong_words_get_status_2_and_a_way_out(run: Run, words: str, because: str) -> None:
    """And no script, so that `> web.sh` is empty."""
    status, text, told = run(*words.split())
    assert (status, text) == (2, "")
    assert because in told


def test_indexer_on_a_heeds_the_arguments_and_else_the_configuration(run: Run, tmp_path: Path) -> None:
    """In the same words, from the same ranges; where neither says anything, the script does not either."""

    def settings(*words: str) -> dict[str, object]:
        configuration = json.loads(here_document(run("kind", *words)[1], "EOF_CONFIG"))
        return {key: value for key, value in configuration.items() if key in Indexer.model_fields}

    file = tmp_path / "providers.yaml"
    plain = file.read_text()
    provider = "  kind: {sftp_conn_id: kind, source: /backups, dest: " + f"{tmp_path}/kind"
    file.write_text(f"{plain}\n    {provider}}}\n")
    assert settings() == {"nice": 10}
    file.write_text(f"{plain}\n    {provider}, indexer: {{limit: 50MB, rehash: 1%, jobs: 2}}}}\n")
    assert settings() == {"nice": 10, "limit": 50_000_000, "rehash": 1.0, "jobs": 2}
    words = ("jobs=4", "limit=1.5GB", "rehash=100%", "nice=19", "one_file_system=true")
    assert settings(*(part for word in words for part in ("--indexer", word))) == {
        "jobs": 4,
        "limit": 1_500_000_000,
        "rehash": "all",
        "nice": 19,
        "one_file_system": True,
    }


@pytest.mark.parametrize("words", ["--timer daily", "--path-unit", "--cron @daily"])
def test_index_that_is_built_twice_is_told(run: Run, words: str) -> None:
    """By A itself, though each run asks for it."""
    assert "Note: each run rebuilds the index on A" in run("web", *words.split())[2]
    assert "Note: each run" not in run("web")[2] + run("self", *words.split())[2]


def test_key_pair_is_called_like_its_connection(run: Run, tmp_path: Path) -> None:
    """So that the public halves can be told from each other."""
    run("web")
    for name in ("web_backupop", "web_index"):
        assert (tmp_path / "keys" / f"{name}.pub").read_text().split()[2] == name


def test_undo_tells_what_is_left_on_b(run: Run) -> None:
    """Nothing of that is removed from here."""
    told = run("web", "--undo")[2]
    assert [word for word in ("DAG", "entry", "connections delete", "key pairs") if word not in told] == []


def test_keys_that_the_configuration_lacks_are_told(run: Run) -> None:
    """Where an index account is asked for, and the provider does not use one yet."""
    told = run("self", "--index-account", "mdbackup-index")[2]
    assert "`ssh_conn_id: self_index` and `chroot: /home/backupop`" in told


def test_undo_needs_no_configuration(run: Run, tmp_path: Path) -> None:
    """The provider may be gone from it already."""
    (tmp_path / "providers.yaml").unlink()
    status, text, _ = run("gone", "--undo")
    assert (status, "\nname=gone\n" in text) == (0, True)
    assert "\nname=other\n" in run("gone", "--undo", "--as", "other")[1]
