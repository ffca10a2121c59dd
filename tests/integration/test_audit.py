"""The audit of a provider's accounts: all tight on strict ones, and each setting that is loosened is caught.

Each server here has one layer of defence only, so that there is something to see when one setting goes: for
the backup account sshd_config, for the index account the options of its key.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mdbackup.account.connection import Account, Unanswered
from airflow_mdbackup.cli.audit import run
from airflow_mdbackup.cli.main import main
from airflow_mdbackup.operators import AuditProvider
from demo.processes import CLOSED_PORT
from demo.sshd import STRICT_SFTP_OPTIONS, ProviderServer, _namespaces_allowed

SetConnection = Callable[[str, dict[str, Any]], None]

pytestmark = pytest.mark.skipif(
    not _namespaces_allowed(),
    reason="needs root and namespaces: accounts and a chroot as the design has them",
)

STRICT_SSHD = {
    "ForceCommand": f"internal-sftp {STRICT_SFTP_OPTIONS}",
    "ChrootDirectory": "{chroot}",
    "AllowTcpForwarding": "no",
    "AllowStreamLocalForwarding": "no",
    "AllowAgentForwarding": "no",
    "X11Forwarding": "no",
    "PermitTTY": "no",
    "PermitTunnel": "no",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
}

# What an installed indexer does at first; it keeps each line that it gets, and none must ever come.
STAND_IN = """\
#!/bin/sh
if [ $# != 0 ]; then echo "usage: indexer, without arguments"; exit 2; fi
echo "mdbackup ready request"
if read -r line; then echo "$line" >> INDEX_FOLDER/requests; fi
"""
STRICT_KEY = 'restrict,command="/etc/ssh/stand-in"'


@dataclass
class SetUp:
    """How a server and the connections to it differ from the strict ones; None: that setting is left out."""

    backupop: Mapping[str, str | None] = field(default_factory=dict)
    index: Mapping[str, str | None] = field(default_factory=dict)
    index_key: str = STRICT_KEY
    stand_in: str = STAND_IN
    shell: str = "/bin/false"
    subsystem: str = "sftp"
    everywhere: str = ""
    tmp_in_chroot: bool = False
    empty_password: bool = False
    sftp_extra: Mapping[str, Any] = field(default_factory=dict)
    ssh_extra: Mapping[str, Any] = field(default_factory=dict)


class Server(ProviderServer):
    """A server that is set up in a certain way."""

    def __init__(self, folder: Path, set_up: SetUp) -> None:
        super().__init__(folder, subsystem=set_up.subsystem, way="namespace")
        self.set_up = set_up

    def _write_server_files(self, *, seen_as: Path) -> None:
        super()._write_server_files(seen_as=seen_as)
        set_up = self.set_up
        common, _, _ = (self._ssh / "sshd_config").read_text().partition("Match User")
        lines = [
            line
            for line in common.splitlines()
            if not line.startswith(("AuthenticationMethods", "PasswordAuthentication"))
        ]
        if set_up.everywhere:
            lines = [set_up.everywhere, *[line for line in lines if not line.startswith("Subsystem")]]
        keys_only = {name: value for name, value in STRICT_SSHD.items() if name.endswith("Authentication")}
        for user, settings in (
            (self.backupop, STRICT_SSHD | set_up.backupop),
            (self.index_user, keys_only | set_up.index),
        ):
            lines.append(f"Match User {user}")
            for name, value in settings.items():
                if value is not None:
                    lines.append(f"{name} {value.format(chroot=self.chroot)}")
        (self._ssh / "sshd_config").write_text("\n".join(lines) + "\n")

        for user, options in ((self.backupop, ""), (self.index_user, set_up.index_key)):
            file = self._ssh / "authorized_keys" / user
            key = file.read_text().removeprefix("restrict ")
            file.write_text(f"{options} {key}".lstrip())
        stand_in = self._ssh / "stand-in"
        stand_in.write_text(set_up.stand_in.replace("INDEX_FOLDER", f"{self.chroot}/.mdbackup"))
        stand_in.chmod(0o755)
        if set_up.empty_password:
            shadow = self.folder / "etc" / "shadow"
            shadow.write_text(shadow.read_text().replace(f"{self.backupop}:*:", f"{self.backupop}::"))
        passwd = self.folder / "etc" / "passwd"
        passwd.write_text(passwd.read_text().replace("::/:/bin/false", f"::/:{set_up.shell}"))

    def fill(self) -> None:
        (self.tree / "backups").mkdir()
        (self.tree / "backups" / "xauth").write_text("#!/bin/sh\n")
        (self.tree / "backups" / "xauth").chmod(0o755)
        if self.set_up.tmp_in_chroot:
            (self.tree / "tmp").mkdir()
            (self.tree / "tmp").chmod(0o1777)

    def state(self) -> list[tuple[str, int]]:
        """What is in the tree, with its modes."""
        return sorted((str(path), path.lstat().st_mode) for path in self.tree.rglob("*"))

    def connections(self) -> int:
        """How many TCP connections there were."""
        return self.log_text().count("Connection from")


@dataclass
class Audited:
    """What an audit came to."""

    status: int
    document: dict[str, Any]
    connections: int
    seconds: float
    left: list[str]  # in the tree, and in the server's /tmp

    def of(self, verdict: str) -> set[str]:
        short = {"backup account": "backupop", "index account": "index"}
        return {
            f"{short[found['account']]}: {found['check']}"
            for found in self.document["findings"]
            if found["verdict"] == verdict
        }

    def seen(self, account: str, check: str) -> str:
        (found,) = [
            found
            for found in self.document["findings"]
            if found["account"] == account and found["check"] == check
        ]
        return str(found["seen"])


@contextmanager
def serving(
    set_up: SetUp, folder: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server, and a provider `web` that is configured for it."""
    with Server(folder / "server", set_up) as server:
        server.fill()
        set_connection("backupop", server.sftp_connection(**set_up.sftp_extra))
        set_connection("index", server.ssh_connection(**set_up.ssh_extra))
        file = folder / "providers.yaml"
        file.write_text(
            "providers:\n  web:\n    sftp_conn_id: backupop\n    ssh_conn_id: index\n"
            f"    chroot: {server.chroot}\n    source: /backups\n    dest: {folder}/dest\n"
        )
        monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(file))
        yield server


@pytest.fixture
def audited(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[SetUp], Audited]:
    """A function that audits a server which is set up in a certain way."""

    def audited(set_up: SetUp) -> Audited:
        with serving(set_up, tmp_path, set_connection, monkeypatch) as server:
            before, connections, began = server.state(), server.connections(), time.monotonic()
            status = run(argparse.Namespace(provider="web", format="json"))
            seconds = time.monotonic() - began
            document = json.loads(capsys.readouterr().out)
            left = [path for path, _ in set(server.state()) - set(before)]
            left += map(str, server.tmp.glob(".mdbackup-audit-*"))
            assert not set(before) - set(server.state())
            return Audited(status, document, server.connections() - connections, seconds, left)

    return audited


def test_strict_accounts_are_tight_and_stay_as_they_are(audited: Callable[[SetUp], Audited]) -> None:
    """Over one connection per account, in seconds, without an index, and without a request to build one."""
    audit = audited(SetUp())
    assert audit.of("looser") == audit.of("unknown") == set()
    assert len(audit.of("tight")) == 42
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    assert all(f"`{found['check']}`" in page for found in audit.document["findings"])
    assert (audit.status, audit.document["tight"]) == (0, True)
    assert audit.connections == 2
    assert audit.seconds < 20
    assert audit.left == []


FORWARDING = {"no local forwarding", "no dynamic forwarding", "no remote forwarding"}
CHANGES = {
    *("no write", "no create", "no mkdir", "no rename", "no delete", "no chmod", "no symlink"),
    "no hardlink",
}
SEEING = {"no listing", "no other requests"}
RUNNING = {"no shell", "no exec"}
ESCAPES = {"no escape by ..", "no escape by an absolute path", "no escape by a symlink"}


def backupop(*checks: str) -> set[str]:
    return {f"backupop: {check}" for check in checks}


def index(*checks: str) -> set[str]:
    return {f"index: {check}" for check in checks}


SERVER = f"exec /usr/lib/openssh/sftp-server {STRICT_SFTP_OPTIONS}"

# What each set-up is looser at, and what it leaves unproven.
# fmt: off
LOOSENED: dict[str, tuple[SetUp, set[str], set[str]]] = {
    # sshd_config, for the backup account
    "a shell, and nothing forced": (
        SetUp({"ForceCommand": None, "ChrootDirectory": None}, shell="/bin/sh"),
        backupop(*RUNNING, *SEEING, *CHANGES, *ESCAPES), set()),
    "no ForceCommand": (
        SetUp({"ForceCommand": None}), backupop(*SEEING, *CHANGES), backupop(*RUNNING)),
    "neither -R nor -p": (
        SetUp({"ForceCommand": "internal-sftp"}), backupop(*SEEING, *CHANGES), set()),
    "no -R": (
        SetUp({"ForceCommand": f"internal-sftp {STRICT_SFTP_OPTIONS.removeprefix('-R ')}"}),
        backupop("no write", "no create"), set()),
    "no -p": (
        SetUp({"ForceCommand": "internal-sftp -R"}), backupop(*SEEING), set()),
    "-P instead of -p": (
        SetUp({"ForceCommand": "internal-sftp -R -P opendir,readdir"}),
        backupop("no other requests"), set()),
    "a command that looks at what it is told": (
        SetUp({"ChrootDirectory": None, "ForceCommand":
               f'case "$SSH_ORIGINAL_COMMAND" in cat*) sh -c "$SSH_ORIGINAL_COMMAND";; *) {SERVER};; esac'},
              shell="/bin/sh"),
        backupop(*ESCAPES), backupop(*RUNNING)),
    "commands whose output goes nowhere": (
        SetUp({"ChrootDirectory": None, "ForceCommand":
               f'case "$SSH_ORIGINAL_COMMAND" in internal*) {SERVER};; *) '
               'sh -c "$SSH_ORIGINAL_COMMAND" > /dev/null;; esac'},
              shell="/bin/sh"),
        backupop(*ESCAPES), backupop(*RUNNING)),
    "no ChrootDirectory": (
        SetUp({"ChrootDirectory": None}), backupop(*ESCAPES), set()),
    "no ChrootDirectory, and no stat": (
        SetUp({"ChrootDirectory": None,
               "ForceCommand": "internal-sftp -R -p open,close,read,fstat,realpath,limits"}),
        backupop(*ESCAPES), set()),
    "another ChrootDirectory": (
        SetUp({"ChrootDirectory": "/usr"}), set(), backupop(*ESCAPES)),
    "AllowTcpForwarding yes": (
        SetUp({"AllowTcpForwarding": "yes"}), backupop(*FORWARDING), set()),
    "AllowTcpForwarding local": (
        SetUp({"AllowTcpForwarding": "local"}),
        backupop("no local forwarding", "no dynamic forwarding"), set()),
    "AllowTcpForwarding remote": (
        SetUp({"AllowTcpForwarding": "remote"}), backupop("no remote forwarding"), set()),
    "PermitOpen and PermitListen of some": (
        SetUp({"AllowTcpForwarding": "yes", "PermitOpen": "127.0.0.1:5432", "PermitListen": "38080"}),
        backupop("no local forwarding"), backupop("no remote forwarding")),
    "AllowAgentForwarding yes": (
        SetUp({"AllowAgentForwarding": "yes"}, tmp_in_chroot=True),
        backupop("no agent forwarding"), set()),
    "X11Forwarding yes": (
        SetUp({"X11Forwarding": "yes"},
              everywhere="XAuthLocation /backups/xauth\nSubsystem sftp internal-sftp"),
        backupop("no X11 forwarding"), set()),
    "PermitTunnel yes": (
        SetUp({"PermitTunnel": "yes", "DisableForwarding": "yes"}, index={"PermitTunnel": "yes"}),
        backupop("no tunnel") | index("no tunnel"), set()),
    "PermitTTY yes": (
        SetUp({"PermitTTY": "yes"}), backupop("no PTY"), set()),
    "PasswordAuthentication yes": (
        SetUp({"PasswordAuthentication": "yes"}), backupop("keys only"), set()),
    "KbdInteractiveAuthentication yes": (
        SetUp({"KbdInteractiveAuthentication": "yes"}), backupop("keys only"), set()),
    "PermitEmptyPasswords yes, and an empty one": (
        SetUp({"PasswordAuthentication": "yes", "PermitEmptyPasswords": "yes"}, empty_password=True),
        backupop("keys only"), set()),
    "AcceptEnv *": (
        SetUp(everywhere="AcceptEnv *\nSubsystem sftp internal-sftp"),
        backupop("no environment") | index("no environment"), set()),
    "a second subsystem, without ForceCommand": (
        SetUp({"ForceCommand": None}, subsystem="sftpi", everywhere=(
            f"Subsystem sftpi internal-sftp {STRICT_SFTP_OPTIONS}\nSubsystem sftp internal-sftp")),
        backupop("only the expected subsystem"), backupop(*RUNNING)),
    "a second subsystem, which neither lists nor creates": (
        SetUp({"ForceCommand": None}, subsystem="sftpi", everywhere=(
            f"Subsystem sftpi internal-sftp {STRICT_SFTP_OPTIONS}\n"
            "Subsystem sftp internal-sftp -P opendir,readdir,open")),
        backupop("only the expected subsystem"), backupop(*RUNNING)),
    # the key of the index account
    "no command": (
        SetUp(index_key="restrict"),
        index("only its forced command", "arguments ignored", "no shell", "no subsystem"), set()),
    "arguments passed on": (
        SetUp(index_key='restrict,command="/etc/ssh/stand-in $SSH_ORIGINAL_COMMAND"'),
        index("only its forced command", "arguments ignored"), set()),
    "words passed on to a shell": (
        SetUp(index_key='restrict,command="eval \\"$SSH_ORIGINAL_COMMAND\\" || /etc/ssh/stand-in"'),
        index("only its forced command", "arguments ignored"), index("no shell")),
    "words passed on to a shell after the indexer": (
        SetUp(index_key='restrict,command="/etc/ssh/stand-in; eval \\"$SSH_ORIGINAL_COMMAND\\""'),
        index("only its forced command", "arguments ignored"), set()),
    "words run without a shell after the indexer": (
        SetUp(index_key='restrict,command="/etc/ssh/stand-in; $SSH_ORIGINAL_COMMAND"'),
        index("only its forced command", "arguments ignored"), set()),
    "words passed on to a shell after much output": (
        SetUp(stand_in=f'{STAND_IN}head -c 70000 /dev/zero; eval "$SSH_ORIGINAL_COMMAND"\n'),
        set(), index("only its forced command", "arguments ignored", "no shell")),
    "a command that runs what it is sent": (
        SetUp(stand_in='#!/bin/sh\necho "mdbackup ready program"\nread -r size\n'),
        index("only its forced command", "arguments ignored"), set()),
    "port-forwarding": (
        SetUp(index_key=f"{STRICT_KEY},port-forwarding"),
        index("no socket forwarding", *FORWARDING), set()),
    "port-forwarding, for some": (
        SetUp(index={"AllowStreamLocalForwarding": "no"}, index_key=(
            f'{STRICT_KEY},port-forwarding,permitopen="[::1]:9",permitlisten="localhost:38080"')),
        set(), index("no remote forwarding")),
    "agent-forwarding": (
        SetUp(index_key=f"{STRICT_KEY},agent-forwarding"), index("no agent forwarding"), set()),
    "pty": (
        SetUp(index_key=f"{STRICT_KEY},pty"), index("no PTY"), set()),
    "neither restrict nor command": (
        SetUp(index_key=""),
        index("only its forced command", "arguments ignored", "no shell", "no subsystem", "no PTY",
              "no socket forwarding", "no agent forwarding", *FORWARDING), set()),
    "passwords for the index account": (
        SetUp(index={"PasswordAuthentication": "yes"}), index("keys only"), set()),
}
# fmt: on


@pytest.mark.parametrize("name", LOOSENED)
def test_each_loosened_setting_is_caught_alone(name: str, audited: Callable[[SetUp], Audited]) -> None:
    """What was loosened is told, with what to change, nothing else is, and nothing is left behind."""
    set_up, looser, unknown = LOOSENED[name]
    audit = audited(set_up)
    assert (audit.of("looser"), audit.of("unknown")) == (looser, unknown)
    assert audit.status == 1
    assert all(found["change"] for found in audit.document["findings"] if found["verdict"] != "tight")
    assert audit.connections == 2
    assert audit.left == []


@pytest.mark.parametrize("account", ["sftp_extra", "ssh_extra"])
def test_connection_that_trusts_any_server_is_not_audited(
    audited: Callable[[SetUp], Audited], account: str
) -> None:
    """It is refused, with what to change; what an audit found over it would prove nothing."""
    trusting = {account: {"host_key": None, "no_host_key_check": True}}
    audit = audited(SetUp(**trusting))
    assert audit.status == 3
    assert "sets no_host_key_check, which trusts any server" in audit.document["error"]


@pytest.mark.parametrize(
    ("set_up", "account"),
    [
        (SetUp(index_key=""), "index account"),
        (
            SetUp(
                {
                    "AllowTcpForwarding": "yes",
                    "PermitOpen": "none",
                    "PermitListen": "none",
                    "AllowStreamLocalForwarding": "yes",
                },
                tmp_in_chroot=True,
            ),
            "backup account",
        ),
    ],
    ids=["an account that could remove it", "one that could not"],
)
def test_nothing_is_left_of_sockets_that_an_account_could_make(
    audited: Callable[[SetUp], Audited], set_up: SetUp, account: str
) -> None:
    """sshd leaves what it makes, so that it is not made to."""
    audit = audited(set_up)
    assert "tried to create a socket" in audit.seen(account, "no socket forwarding")
    assert audit.left == []


def test_socket_of_the_machine_that_can_be_reached_is_caught(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Forwarding to a socket is forwarding, too."""
    set_up = SetUp({"AllowTcpForwarding": "local", "AllowStreamLocalForwarding": "local"})
    with (
        serving(set_up, tmp_path, set_connection, monkeypatch) as server,
        socket.socket(socket.AF_UNIX) as bus,
    ):
        path = server.tree / "run" / "dbus" / "system_bus_socket"
        path.parent.mkdir(parents=True)
        with chdir(path.parent):  # the whole path may be too long for a socket
            bus.bind(path.name)
        path.chmod(0o666)
        bus.listen()
        assert run(argparse.Namespace(provider="web", format="json")) == 1
    assert "the server connected to /run/dbus/system_bus_socket" in capsys.readouterr().out


def test_settings_without_effect_are_not_complained_about(audited: Callable[[SetUp], Audited]) -> None:
    """What counts is what they all come to: without ports sshd forwards no sockets, and so on."""
    audit = audited(
        SetUp(
            {
                "AllowStreamLocalForwarding": "yes",
                "PasswordAuthentication": "yes",
                "AuthenticationMethods": "publickey",
                "DisableForwarding": "yes",
                "AllowTcpForwarding": "yes",
            }
        )
    )
    assert audit.status == 0


def test_command_that_never_answers_is_no_proof(audited: Callable[[SetUp], Audited]) -> None:
    """Nor does it keep the audit for ever; what it is told might run in the end."""
    audit = audited(SetUp(stand_in="#!/bin/sh\nexec sleep 60\n"))
    expected = index("only its forced command", "arguments ignored", "no shell", "no subsystem")
    assert (audit.of("unknown"), audit.of("looser")) == (expected, set())
    assert audit.status == 1
    assert audit.seconds < 40


def test_command_that_takes_programs_is_told_as_such(audited: Callable[[SetUp], Audited]) -> None:
    """It is no shell, and yet B could run anything."""
    audit = audited(SetUp(stand_in='#!/bin/sh\necho "mdbackup ready program"\nread -r size\n'))
    assert audit.seen("index account", "only its forced command") == "it runs any program that is sent to it"


def test_server_that_allows_one_session_at_a_time_is_judged_as_well(
    audited: Callable[[SetUp], Audited],
) -> None:
    """The server needs a moment to be rid of the session before."""
    assert audited(SetUp({"MaxSessions": "1"}, index={"MaxSessions": "1"})).status == 0


def test_command_that_repeats_what_it_is_told_does_not_run_it(audited: Callable[[SetUp], Audited]) -> None:
    """An echo is told from a shell, which would have taken the quotes away."""
    key = 'restrict,command="echo $SSH_ORIGINAL_COMMAND; exec /etc/ssh/stand-in"'
    assert audited(SetUp(index_key=key)).status == 0


def test_connection_that_ends_on_the_way_is_not_taken_for_a_refusal(
    audited: Callable[[SetUp], Audited],
) -> None:
    """Asked for a shell, all processes of the index account end, the server's part of the connection too."""
    end = '[ -n "$SSH_ORIGINAL_COMMAND" ] || kill -9 -1'
    audit = audited(SetUp(stand_in=STAND_IN.replace("#!/bin/sh", f"#!/bin/sh\n{end}")))
    assert (audit.of("unknown"), audit.of("looser")) == (index("no shell", "no subsystem"), set())
    assert audit.seen("index account", "no shell") == "the connection ended"
    assert audit.status == 1


def test_connection_that_breaks_while_something_is_asked_is_no_answer(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where paramiko does not know of it yet, what it raises then is neither a proof nor the audit's end."""

    def broken(_: object) -> None:
        raise EOFError

    def in_a_session(account: Account) -> None:
        with account.session():
            monkeypatch.setattr(account.transport.packetizer, "send_message", broken)

    with serving(SetUp(), tmp_path, set_connection, monkeypatch):
        for ask in (Account.listens, lambda account: account.listens_on_socket(b"/x/y"), in_a_session):
            with Account("index") as account:
                if ask is not in_a_session:
                    monkeypatch.setattr(account.transport.packetizer, "send_message", broken)
                with pytest.raises(Unanswered, match="the connection ended"):
                    ask(account)


def test_account_without_an_indexer_is_no_proof(audited: Callable[[SetUp], Audited]) -> None:
    """It may be closed, but nothing shows that the forced command is ours."""
    audit = audited(SetUp(stand_in="#!/bin/sh\necho This account is not available.\nexit 1\n"))
    assert audit.of("unknown") == index("only its forced command", "arguments ignored", "no shell")
    assert "This account is not available." in audit.seen("index account", "arguments ignored")
    assert audit.status == 1


def test_subsystem_that_does_not_start_leaves_its_checks_unjudged(
    audited: Callable[[SetUp], Audited],
) -> None:
    """Nothing is proven about files that nobody could ask for."""
    audit = audited(SetUp(sftp_extra={"subsystem": "other"}))
    files = {*CHANGES, *ESCAPES, *SEEING}
    assert audit.of("unknown") == backupop(*files)
    assert "does not start the subsystem other" in audit.seen("backup account", "no write")


def test_words_of_a_server_neither_act_on_a_terminal_nor_as_markup(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are shown for what they are."""
    stand_in = "#!/bin/sh\nprintf '\\033]0;owned\\007[red]x[/nonsense]'\n"
    with serving(SetUp(stand_in=stand_in), tmp_path, set_connection, monkeypatch):
        assert run(argparse.Namespace(provider="web", format="text")) == 1
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\x07" not in output
    assert "\\x1b]0;owned\\x07[red]x" in output


def test_table_tells_verdicts_and_what_to_change(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line to change stands below the tables once more, in one piece, so that it can be copied."""
    with serving(SetUp({"PermitTTY": "yes"}), tmp_path, set_connection, monkeypatch):
        assert run(argparse.Namespace(provider="web", format="text")) == 1
    output = capsys.readouterr().out
    assert "web: backup account backupop (in sshd_config: Match User backupop)" in output
    assert "no PTY" in output and "looser" in output
    assert "- backup account: its Match block: PermitTTY no (no PTY)\n" in output


def test_provider_that_indexes_itself_has_one_account(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one connection is made."""
    with serving(SetUp(), tmp_path, set_connection, monkeypatch) as server:
        file = tmp_path / "providers.yaml"
        file.write_text(file.read_text().replace("    ssh_conn_id: index\n", ""))
        connections = server.connections()
        assert run(argparse.Namespace(provider="web", format="json")) == 0
        assert server.connections() - connections == 1
    assert list(json.loads(capsys.readouterr().out)["accounts"]) == ["backup account"]


def test_server_that_known_hosts_has_is_pinned(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As good as the connection's own host_key, on this worker."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pinned = {"host_key": None}
    with serving(SetUp(sftp_extra=pinned, ssh_extra=pinned), tmp_path, set_connection, monkeypatch) as server:
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {server.host_key}\n")
        assert run(argparse.Namespace(provider="web", format="json")) == 0
    assert "in known_hosts of this worker" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "mail",
            "providers: {web: {sftp_conn_id: a, source: /b, dest: /d}}",
            "there is no provider 'mail' in ",
        ),
        ("web", "providers: {web: {sftp_conn_id: a, source: b, dest: /d}}", "source"),
        ("web", "providers: [", "providers.yaml"),
    ],
)
def test_provider_that_is_not_configured_is_a_mistake_of_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    told: str,
) -> None:
    """Exit status 2, and the reason on standard error."""
    file = tmp_path / "providers.yaml"
    file.write_text(content)
    monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(file))
    assert main(["audit", name]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert told in output.err


@pytest.mark.parametrize(
    ("connection", "told"),
    [
        ({"port": CLOSED_PORT}, f"127.0.0.1:{CLOSED_PORT}"),
        ({"login": "mdbackup-index"}, "refuses the account's key"),
    ],
    ids=["nothing listens", "not its key"],
)
def test_account_that_cannot_be_reached_has_a_status_of_its_own(
    tmp_path: Path,
    set_connection: SetConnection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connection: dict[str, Any],
    told: str,
) -> None:
    """Nothing was found out, neither good nor bad."""
    with serving(SetUp(), tmp_path, set_connection, monkeypatch) as server:
        set_connection("backupop", server.sftp_connection() | connection)
        assert run(argparse.Namespace(provider="web", format="text")) == 3
    assert told in capsys.readouterr().err


def test_connections_kept_in_the_database_of_airflow_are_found(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most are there, and Airflow looks there for its services and its own commands only."""
    airflow = [sys.executable, "-m", "airflow"]
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    with serving(SetUp(), tmp_path, set_connection, monkeypatch) as server:
        monkeypatch.delenv("AIRFLOW_CONN_BACKUPOP")
        connection = json.dumps(server.sftp_connection())
        for command in (["db", "migrate"], ["connections", "add", "backupop", "--conn-json", connection]):
            subprocess.run([*airflow, *command], check=True, capture_output=True)
        code = (
            "import argparse, sys; from airflow_mdbackup.cli.audit import run;"
            "sys.exit(run(argparse.Namespace(provider='web', format='json')))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tight"] is True


class TaskInstance:
    """What the operator uses of one."""

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def audit_task(source: list[str] | str = "/backups") -> AuditProvider:
    return AuditProvider(
        task_id="audit",
        provider="web",
        sftp_conn_id="backupop",
        ssh_conn_id="index",
        source=source,
    )


def test_operator_returns_counts_where_all_is_tight(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small summary; the table is in the log."""
    with serving(SetUp(), tmp_path, set_connection, monkeypatch):
        result = audit_task().execute({"ti": TaskInstance()})  # type: ignore[arg-type]
    assert result == {"tight": 42, "looser": 0, "unknown": 0, "loose": []}


def test_operator_fails_without_retry_and_tells_what_is_loose(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is there all the same."""
    task = TaskInstance()
    with (
        serving(SetUp({"PermitTTY": "yes"}), tmp_path, set_connection, monkeypatch),
        pytest.raises(AirflowFailException, match="PermitTTY no"),
    ):
        audit_task().execute({"ti": task})  # type: ignore[arg-type]
    loose = ["backup account: no PTY"]
    assert task.pushed == {"return_value": {"tight": 41, "looser": 1, "unknown": 0, "loose": loose}}


@pytest.mark.parametrize("source", ["/backups", ["/backups"]], ids=["one path", "a list"])
def test_operator_given_one_path_excuses_nothing_else(
    tmp_path: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch, source: list[str] | str
) -> None:
    """A path is not taken for its letters, of which `/` would excuse the whole machine."""
    with (
        serving(SetUp(), tmp_path, set_connection, monkeypatch) as server,
        pytest.raises(AirflowFailException, match="ChrootDirectory"),
    ):
        (server.tree / "etc").mkdir()
        (server.tree / "etc" / "shadow").write_text("")
        audit_task(source).execute({"ti": TaskInstance()})  # type: ignore[arg-type]


def test_operator_refuses_what_is_no_absolute_path() -> None:
    """Before it connects anywhere; a list that a template turned into text is one of these."""
    with pytest.raises(AirflowFailException, match="absolute"):
        audit_task("['/backups']").execute({"ti": TaskInstance()})  # type: ignore[arg-type]
