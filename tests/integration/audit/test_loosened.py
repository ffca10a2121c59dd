"""The audit of a provider's accounts: all tight on strict ones, and each loosened setting is caught."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from airflow_mdbackup.cli.audit import run
from demo.sshd import STRICT_SFTP_OPTIONS, _namespaces_allowed
from tests.integration.audit.loose_server import STAND_IN, STRICT_KEY, Audited, SetConnection, SetUp, serving

pytestmark = pytest.mark.skipif(
    not _namespaces_allowed(),
    reason="needs root and namespaces: accounts and a chroot as the design has them",
)


def test_strict_accounts_are_tight_and_stay_as_they_are(audited: Callable[[SetUp], Audited]) -> None:
    """Over one connection per account, in seconds, without an index, and without a request to build one."""
    audit = audited(SetUp())
    assert audit.of("looser") == audit.of("unknown") == set()
    assert len(audit.of("tight")) == 42
    page = (Path(__file__).parents[3] / "docs" / "audit.md").read_text()
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
