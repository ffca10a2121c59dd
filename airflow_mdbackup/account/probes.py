"""Probes for both accounts of a provider. Each tries one thing that must not work.

What counts is the effect, not the server's reply: OpenSSH accepts a request for a shell, and then runs its
``ForceCommand`` instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import paramiko

from airflow_mdbackup.account.connection import Account, Unanswered, read_for, read_output
from airflow_mdbackup.account.findings import Finding, Observation, Verdict
from airflow_mdbackup.account.sftp_requests import Requests
from airflow_mdbackup.scheme.common.paths import to_text

# Reason codes of RFC 4254, section 5.1, with which a server refuses a channel without trying to open it.
_PROHIBITED, _UNKNOWN_CHANNEL_TYPE = 1, 3
# OpenSSH's debug messages on a refusal, from serverloop.c and channels.c. All but the last mean a setting.
_PORT_FORWARDING_DISABLED = b"Server has disabled port forwarding."
_SOCKET_FORWARDING_DISABLED = b"Server has disabled streamlocal forwarding."
_FORWARDING_REFUSED = b"port forwarding refused"  # of one port, or of all sockets
_TUNNEL_REJECTED = b"Server has rejected tunnel device forwarding"
_TUNNEL_TRIED = b"Failed to open the tunnel device."
_SILENCE = 1.5  # seconds of silence after which a program is assumed to wait for input
# The first output of an indexer: an installed one, and one that expects to be sent its program.
READY = (b"mdbackup ready request", b"mdbackup ready program")

# A port where nothing listens, and the ones that PermitOpen most likely allows.
_PORTS = (1, 22, 80, 3306, 5432, 6379, 8080)

# With any of these, whoever can put a file on the server controls what its programs do.
_VARIABLES = ("LD_PRELOAD", "BASH_ENV", "PATH")

# Sockets that exist on many machines and are worth something to an attacker.
_SOCKETS = (
    b"/run/dbus/system_bus_socket",
    b"/run/systemd/journal/stdout",
    b"/run/docker.sock",
    b"/run/nscd/socket",
)

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class Check(Generic[Subject]):
    """One line of the table: what is to be proven, how, and what to change if it does not hold.

    :ivar probe: raises :class:`Unanswered` if it cannot decide.
    """

    name: str
    probe: Callable[[Subject], Observation]
    change: str


def run_checks(account: str, subject: Subject, checks: Iterable[Check[Subject]]) -> list[Finding]:
    """Run each check on the subject, and return the findings.

    :param account: the account's name in the findings.
    """
    findings = []
    for check in checks:
        try:
            observed = check.probe(subject)
        except Unanswered as error:
            observed = Observation(Verdict.UNKNOWN, str(error))
        change = "" if observed.verdict is Verdict.TIGHT else observed.change or check.change
        findings.append(Finding(account, check.name, observed.verdict, observed.text, change))
    return findings


def match_block(lines: str) -> str:
    """Return the advice to add ``lines`` to the account's Match block in sshd_config."""
    return f"its Match block: {lines}"


def common_checks() -> list[Check[Account]]:
    """Return the checks that apply to both accounts."""
    return [
        Check("host key pinned", probe_host_key, "its Airflow connection: the extra host_key"),
        Check("keys only", probe_login_methods, match_block("AuthenticationMethods publickey")),
        Check("no PTY", probe_terminal, match_block("PermitTTY no")),
        Check(
            "no local forwarding",
            lambda account: probe_tcp_forwarding(account, "127.0.0.1"),
            match_block("AllowTcpForwarding no"),
        ),
        # `ssh -D` opens the same channels, to any host by its name.
        Check(
            "no dynamic forwarding",
            lambda account: probe_tcp_forwarding(account, "localhost"),
            match_block("AllowTcpForwarding no"),
        ),
        Check("no remote forwarding", probe_remote_forwarding, match_block("AllowTcpForwarding no")),
        Check("no socket forwarding", probe_socket_forwarding, match_block("AllowStreamLocalForwarding no")),
        Check("no agent forwarding", probe_agent_forwarding, match_block("AllowAgentForwarding no")),
        Check("no X11 forwarding", probe_x11_forwarding, match_block("X11Forwarding no")),
        Check("no tunnel", probe_tunnel, match_block("PermitTunnel no")),
        Check(
            "no environment",
            probe_environment,
            "sshd_config, wherever it has AcceptEnv: AcceptEnv LANG LC_* (Match blocks only add to it)",
        ),
    ]


# --- the connection itself --------------------------------------------------------------------------


def probe_host_key(account: Account) -> Observation:
    """Show how the worker recognised the server."""
    key = account.transport.get_remote_server_key()
    shown = f"{key.get_name()} {key.fingerprint}"
    if account.ssh_account.pinned:
        return Observation(Verdict.TIGHT, f"pinned in the connection: {shown}")
    return Observation(Verdict.TIGHT, f"in known_hosts of this worker: {shown}")


# The setting that disables each login method.
_DISABLING = {
    "none": "PermitEmptyPasswords no",
    "password": "PasswordAuthentication no",
    "keyboard-interactive": "KbdInteractiveAuthentication no",
    "gssapi-with-mic": "GSSAPIAuthentication no",
    "hostbased": "HostbasedAuthentication no",
}


def probe_login_methods(account: Account) -> Observation:
    """Check that the server accepts nothing but keys."""
    offered = account.login_methods
    shown = ", ".join(to_text(name.encode("utf-8", "backslashreplace")) for name in offered) or "nothing"
    if offered == ("none",):
        return Observation(
            Verdict.LOOSER, "the account needs no authentication", match_block(_DISABLING["none"])
        )
    others = [name for name in offered if name != "publickey"]
    if not others:
        return Observation(Verdict.TIGHT, f"the server offers {shown}")
    lines = [_DISABLING[name] for name in others if name in _DISABLING]
    change = match_block("; ".join(lines)) if lines else ""
    return Observation(Verdict.LOOSER, f"the server offers {shown}", change)


# --- running something ------------------------------------------------------------------------------


class Token:
    """A word that is printed only if a command line is run, with or without a shell, not if it is echoed."""

    def __init__(self) -> None:
        number = secrets.token_hex(8)
        self.command = f"printf %s%s mdbackup-audit- {number}"
        self.word = f"mdbackup-audit-{number}".encode()


def output_of_command(account: Account, token: Token, more: str = "") -> bytes | None:
    """Request a command, and return all output; None if the server refused the request.

    It reads to the end, since the command may run after something else.

    :param more: what to append to the token's command.
    """
    with account.session() as channel:
        channel.set_combine_stderr(True)
        if not account.grants(channel, lambda: channel.exec_command(token.command + more)):
            return None
        with suppress(OSError, EOFError):  # it may already have ended
            channel.shutdown_write()
        return read_output(channel, until=(token.word,))


def output_of_shell(account: Account, token: Token, patience: float = _SILENCE) -> bytes | None:
    """Request a shell, send it the token's command, and return all output; None if it was refused.

    :param patience: seconds to wait for an indexer to start, which must not receive the command.
    """
    with account.session() as channel:
        channel.set_combine_stderr(True)
        if not account.grants(channel, channel.invoke_shell):
            return None
        output, ended = read_for(channel, READY, patience)
        with suppress(OSError, EOFError):  # it may already have ended
            if not ended:
                channel.sendall(f"{token.command}\n".encode())
            channel.shutdown_write()
        return output + read_output(channel, until=(token.word,))


def judge_execution(token: Token, output: bytes | None, expected: Sequence[bytes]) -> Observation:
    """Judge by the output whether the token's command ran.

    :param expected: what only the forced program prints. Silence, or any other output, may come from a
        program that runs some commands, or runs them without printing anything.
    """
    if output is None:
        return Observation(Verdict.TIGHT, "the server refuses the request")
    if token.word in output:
        return Observation(Verdict.LOOSER, "the server ran the command")
    if any(words in output for words in expected):
        return Observation(Verdict.TIGHT, f"the command did not run; the answer was {quote_output(output)}")
    return Observation(
        Verdict.UNKNOWN,
        "the command did not run, but the program that answered may run others; it printed"
        f" {quote_output(output)}",
    )


def probe_terminal(account: Account) -> Observation:
    """Request a terminal, without running anything in it."""
    with account.session() as channel:
        granted = account.grants(channel, channel.get_pty)
    return _judge_request(granted, "the server allocates a terminal", "the server refuses the request")


def start_subsystem(account: Account, channel: paramiko.Channel, name: str) -> Requests | None:
    """Start an SFTP subsystem; None if the server does not have one of that name.

    :raises NoSftp: it starts, but is not an SFTP server.
    """
    if not account.grants(channel, lambda: channel.invoke_subsystem(name)):
        return None
    return Requests(channel)


# --- forwarding -------------------------------------------------------------------------------------


def probe_tcp_forwarding(account: Account, host: str) -> Observation:
    """Request connections to usual ports and to an unused one. Were they prohibited, or tried?

    AllowTcpForwarding and a PermitOpen that allows other ports refuse a port in the same way.
    """
    for port in _PORTS:
        code = account.open_tcp(host, port)
        if code != _PROHIBITED:
            outcome = "connected" if code == 0 else "tried to connect, without success"
            return Observation(Verdict.LOOSER, f"the server {outcome}: {host} port {port}")
    return Observation(
        Verdict.TIGHT,
        f"prohibited, to {host} ports {', '.join(map(str, _PORTS))}"
        " (a PermitOpen for other ports would not show)",
    )


def probe_remote_forwarding(account: Account) -> Observation:
    """Ask the server to listen on any port. PermitListen may forbid just this one."""
    granted, remarks = account.with_remarks(account.listens)
    if granted:
        return Observation(Verdict.LOOSER, "the server listens for us, on localhost")
    if _PORT_FORWARDING_DISABLED in remarks:
        return Observation(Verdict.TIGHT, "the server forwards no ports to us")
    return Observation(
        Verdict.UNKNOWN,
        "the server refuses this port, but has not disabled forwarding: it may listen on ports that"
        f" PermitListen allows. Its debug message: {_quote_last(remarks)}",
    )


def probe_socket_forwarding(account: Account) -> Observation:
    """Ask the server to connect to usual sockets, and to create one where that must fail.

    sshd does not remove sockets that it has created, so the one requested is in a directory that does not
    exist. OpenSSH sends a debug message if a setting forbids it, and none if the directory is missing. A
    refused connection looks like a failed one.
    """
    for path in _SOCKETS:
        if account.open_socket(path) == 0:
            return Observation(Verdict.LOOSER, f"the server connected to {to_text(path)}")
    granted, remarks = account.with_remarks(lambda: account.listens_on_socket(nonexistent_path()))
    if granted:
        return Observation(Verdict.LOOSER, "the server created a socket for us")
    if _SOCKET_FORWARDING_DISABLED in remarks or _FORWARDING_REFUSED in remarks:
        return Observation(
            Verdict.TIGHT, f"the server creates none, and none of {len(_SOCKETS)} usual ones could be reached"
        )
    if account.is_openssh:
        return Observation(
            Verdict.LOOSER, "the server tried to create a socket for us, and failed only on the directory"
        )
    return Observation(
        Verdict.UNKNOWN,
        f"the server created no socket, but may have tried. Its debug message: {_quote_last(remarks)}",
    )


def probe_agent_forwarding(account: Account) -> Observation:
    """Offer an agent. sshd creates a socket for it, and removes that when the connection ends."""
    with account.session() as channel:
        granted = account.grants_agent(channel)
    return _judge_request(granted, "the server would use our agent", "the server refuses the request")


def probe_x11_forwarding(account: Account) -> Observation:
    """Offer a display, which nothing then uses."""
    with account.session() as channel:
        granted = account.grants(
            channel, lambda: channel.request_x11(handler=lambda opened, _: opened.close())
        )
    return _judge_request(granted, "the server would use our display", "the server refuses the request")


def probe_tunnel(account: Account) -> Observation:
    """Request a network device, which ends with the channel. Without the right to create one, sshd fails."""
    code, remarks = account.with_remarks(account.open_tunnel)
    if code == 0:
        return Observation(Verdict.LOOSER, "the server opened a network device")
    if _TUNNEL_TRIED in remarks:
        return Observation(Verdict.LOOSER, "the server tried to open a network device, without success")
    if _TUNNEL_REJECTED in remarks or code in (_PROHIBITED, _UNKNOWN_CHANNEL_TYPE):
        return Observation(Verdict.TIGHT, "the server does not try to open one")
    return Observation(
        Verdict.UNKNOWN,
        f"the server opened none, but may have tried. Its debug message: {_quote_last(remarks)}",
    )


def probe_environment(account: Account) -> Observation:
    """Ask to set environment variables, on a channel that runs nothing."""
    accepted = []
    for name in _VARIABLES:
        with account.session() as channel:
            if account.grants_variable(channel, name):
                accepted.append(name)
    return _judge_request(
        bool(accepted),
        f"the server lets us set {', '.join(accepted)} for what it runs",
        f"the server refuses {', '.join(_VARIABLES)}",
    )


def unique_name() -> bytes:
    """Return a file name that does not exist anywhere."""
    return f".mdbackup-audit-{secrets.token_hex(8)}".encode()


def nonexistent_path() -> bytes:
    """Return a path in a directory that does not exist, so that nothing can be created there."""
    return b"/%b/x" % unique_name()


# --- texts ------------------------------------------------------------------------------------------


def quote_output(output: bytes, most: int = 100) -> str:
    """Return the beginning of a server's output, printable and in quotes.

    :param most: bytes.
    """
    text = to_text(output.strip()[:most]) + ("..." if len(output.strip()) > most else "")
    return f'"{text}"' if text else "nothing"


def _quote_last(remarks: Sequence[bytes]) -> str:
    return quote_output(b"".join(remarks[-1:])) if remarks else "none"


def _judge_request(granted: bool, loose: str, tight: str) -> Observation:
    return Observation(Verdict.LOOSER, loose) if granted else Observation(Verdict.TIGHT, tight)
