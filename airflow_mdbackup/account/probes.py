"""What both accounts of a provider are asked: each probe tries one thing that must not work.

What counts is what happened, not how the server answered: OpenSSH accepts a request for a shell, and then
runs what ``ForceCommand`` says instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import paramiko

from airflow_mdbackup.account.connection import Account, Unanswered, listen, output_of
from airflow_mdbackup.account.findings import Finding, Seen, Verdict
from airflow_mdbackup.account.sftp_requests import Requests
from airflow_mdbackup.scheme.common.paths import to_text

# Reasons of RFC 4254, section 5.1, for a channel that is not opened: refused before it was tried.
_PROHIBITED, _UNKNOWN_KIND = 1, 3
# What OpenSSH remarks when it refuses, from serverloop.c and channels.c: all but the last are settings.
_PORTS_CLOSED = b"Server has disabled port forwarding."
_SOCKETS_CLOSED = b"Server has disabled streamlocal forwarding."
_REFUSED = b"port forwarding refused"  # of one port, or of all sockets
_TUNNEL_CLOSED = b"Server has rejected tunnel device forwarding"
_TUNNEL_TRIED = b"Failed to open the tunnel device."
_QUIET = 1.5  # seconds after which what has not said a word waits for input
# How an indexer begins: one that was installed, and one that is sent first.
READY = (b"mdbackup ready request", b"mdbackup ready program")

# One where nothing listens, and those that PermitOpen most likely names.
_PORTS = (1, 22, 80, 3306, 5432, 6379, 8080)

# With any of these, who gets a file onto the server has what runs there do as it says.
_VARIABLES = ("LD_PRELOAD", "BASH_ENV", "PATH")

# Sockets that many machines have, and that an account which reaches them gains something by.
_SOCKETS = (
    b"/run/dbus/system_bus_socket",
    b"/run/systemd/journal/stdout",
    b"/run/docker.sock",
    b"/run/nscd/socket",
)

Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Check(Generic[Asked]):
    """One line of the table: what is proven, how, and what to change when it is not so.

    :ivar probe: raises :class:`Unanswered` when it cannot tell.
    """

    name: str
    probe: Callable[[Asked], Seen]
    change: str


def run(account: str, asked: Asked, checks: Iterable[Check[Asked]]) -> list[Finding]:
    """Make each check, and return what was found."""
    findings = []
    for check in checks:
        try:
            seen = check.probe(asked)
        except Unanswered as error:
            seen = Seen(Verdict.UNKNOWN, str(error))
        change = "" if seen.verdict is Verdict.TIGHT else seen.change or check.change
        findings.append(Finding(account, check.name, seen.verdict, seen.text, change))
    return findings


def match_block(lines: str) -> str:
    """Return the advice to have ``lines`` in the account's part of sshd_config."""
    return f"its Match block: {lines}"


def common_checks() -> list[Check[Account]]:
    """Return what must hold for either account."""
    return [
        Check("host key pinned", host_key, "its Airflow connection: the extra host_key"),
        Check("keys only", ways_in, match_block("AuthenticationMethods publickey")),
        Check("no PTY", terminal, match_block("PermitTTY no")),
        Check(
            "no local forwarding",
            lambda account: tcp(account, "127.0.0.1"),
            match_block("AllowTcpForwarding no"),
        ),
        # What `ssh -D` asks for, too: any host by its name.
        Check(
            "no dynamic forwarding",
            lambda account: tcp(account, "localhost"),
            match_block("AllowTcpForwarding no"),
        ),
        Check("no remote forwarding", remote_forwarding, match_block("AllowTcpForwarding no")),
        Check("no socket forwarding", sockets, match_block("AllowStreamLocalForwarding no")),
        Check("no agent forwarding", agent, match_block("AllowAgentForwarding no")),
        Check("no X11 forwarding", x11, match_block("X11Forwarding no")),
        Check("no tunnel", tunnel, match_block("PermitTunnel no")),
        Check(
            "no environment",
            environment,
            "sshd_config, wherever it has AcceptEnv: AcceptEnv LANG LC_* (Match blocks only add to it)",
        ),
    ]


# --- the connection itself --------------------------------------------------------------------------


def host_key(account: Account) -> Seen:
    """See by what the worker knew the server."""
    key = account.transport.get_remote_server_key()
    shown = f"{key.get_name()} {key.fingerprint}"
    if account.reached.pinned:
        return Seen(Verdict.TIGHT, f"pinned in the connection: {shown}")
    return Seen(Verdict.TIGHT, f"known_hosts of this worker has it: {shown}")


_LINES = {
    "none": "PermitEmptyPasswords no",
    "password": "PasswordAuthentication no",
    "keyboard-interactive": "KbdInteractiveAuthentication no",
    "gssapi-with-mic": "GSSAPIAuthentication no",
    "hostbased": "HostbasedAuthentication no",
}


def ways_in(account: Account) -> Seen:
    """See what the server would take for a proof."""
    offered = account.offered
    shown = ", ".join(to_text(name.encode("utf-8", "backslashreplace")) for name in offered) or "nothing"
    if offered == ("none",):
        return Seen(Verdict.LOOSER, "the account opens without any proof", match_block(_LINES["none"]))
    more = [name for name in offered if name != "publickey"]
    if not more:
        return Seen(Verdict.TIGHT, f"the server offers {shown}")
    lines = [_LINES[name] for name in more if name in _LINES]
    return Seen(Verdict.LOOSER, f"the server offers {shown}", match_block("; ".join(lines)) if lines else "")


# --- running something ------------------------------------------------------------------------------


class Token:
    """A word that comes only of running a command line, with or without a shell, and of no echo of it."""

    def __init__(self) -> None:
        number = secrets.token_hex(8)
        self.command = f"printf %s%s mdbackup-audit- {number}"
        self.word = f"mdbackup-audit-{number}".encode()


def said_to_command(account: Account, token: Token, more: str = "") -> bytes | None:
    """Return all that came when a command was asked for, None if the server refused the request.

    To its end, since what is asked for may run after something else did.

    :param more: what to add to the token's command.
    """
    with account.session() as channel:
        channel.set_combine_stderr(True)
        if not account.grants(channel, lambda: channel.exec_command(token.command + more)):
            return None
        with suppress(OSError, EOFError):  # it may have ended meanwhile
            channel.shutdown_write()
        return output_of(channel, until=(token.word,))


def said_to_shell(account: Account, token: Token, patience: float = _QUIET) -> bytes | None:
    """Return what came when a shell was asked for and told to say the word; None if it was refused.

    :param patience: seconds to wait for an indexer to begin; that must not get the line.
    """
    with account.session() as channel:
        channel.set_combine_stderr(True)
        if not account.grants(channel, channel.invoke_shell):
            return None
        said, ended = listen(channel, READY, patience)
        with suppress(OSError, EOFError):  # it may have ended meanwhile
            if not ended:
                channel.sendall(f"{token.command}\n".encode())
            channel.shutdown_write()
        return said + output_of(channel, until=(token.word,))


def ran(token: Token, said: bytes | None, instead: Sequence[bytes]) -> Seen:
    """Judge by what came whether the token's command ran.

    :param instead: what only that says which is to answer instead. Silence, or other words, may come of a
        program that does run some commands, or that says nothing of what it runs.
    """
    if said is None:
        return Seen(Verdict.TIGHT, "the server refuses the request")
    if token.word in said:
        return Seen(Verdict.LOOSER, "it ran what it was told")
    if any(words in said for words in instead):
        return Seen(Verdict.TIGHT, f"it did not run; the answer was {quoted(said)}")
    return Seen(
        Verdict.UNKNOWN,
        f"that did not run, but what answered may run something else; it said {quoted(said)}",
    )


def terminal(account: Account) -> Seen:
    """Ask for a terminal, and for nothing to run in it."""
    with account.session() as channel:
        granted = account.grants(channel, channel.get_pty)
    return _judged(granted, "the server gives one", "the server refuses the request")


def subsystem_start(account: Account, channel: paramiko.Channel, name: str) -> Requests | None:
    """Start an SFTP subsystem; None if the server has none of that name.

    :raises NoSftp: it has, but that is no SFTP server.
    """
    if not account.grants(channel, lambda: channel.invoke_subsystem(name)):
        return None
    return Requests(channel)


# --- forwarding -------------------------------------------------------------------------------------


def tcp(account: Account, host: str) -> Seen:
    """Ask for connections to where nothing, or something usual, listens: were they refused, or tried?

    The refusals of AllowTcpForwarding and of a PermitOpen that names other ports are the same.
    """
    for port in _PORTS:
        code = account.open_tcp(host, port)
        if code != _PROHIBITED:
            outcome = "connected" if code == 0 else "tried, without success"
            return Seen(Verdict.LOOSER, f"the server {outcome}: {host} port {port}")
    return Seen(
        Verdict.TIGHT,
        f"prohibited, to {host} ports {', '.join(map(str, _PORTS))}"
        " (what else a PermitOpen may name is not seen)",
    )


def remote_forwarding(account: Account) -> Seen:
    """Have the server listen on any port; PermitListen may forbid just this one."""
    granted, remarks = account.remarked(account.listens)
    if granted:
        return Seen(Verdict.LOOSER, "the server listens for us, on localhost")
    if _PORTS_CLOSED in remarks:
        return Seen(Verdict.TIGHT, "the server forwards no ports to us")
    return Seen(
        Verdict.UNKNOWN,
        f"the server refuses this port, but not forwarding as such: it may listen on others, if"
        f" PermitListen names any. It said {_last(remarks)}",
    )


def sockets(account: Account) -> Seen:
    """Have the server connect to sockets that machines usually have, and make one where it cannot.

    What sshd makes it does not remove: so it is asked for one in a directory that does not exist. OpenSSH
    says so when it is a setting that forbids it, and nothing when the directory is missing. A connection that
    is refused looks like one that failed.
    """
    for path in _SOCKETS:
        if account.open_socket(path) == 0:
            return Seen(Verdict.LOOSER, f"the server connected to {to_text(path)}")
    granted, remarks = account.remarked(lambda: account.listens_on_socket(nowhere()))
    if granted:
        return Seen(Verdict.LOOSER, "the server made a socket for us")
    if _SOCKETS_CLOSED in remarks or _REFUSED in remarks:
        return Seen(Verdict.TIGHT, f"the server makes none; none of {len(_SOCKETS)} usual ones reached")
    if account.is_openssh:
        return Seen(Verdict.LOOSER, "the server tried to make a socket for us, where there is no directory")
    return Seen(Verdict.UNKNOWN, f"the server made no socket, and may have tried; it said {_last(remarks)}")


def agent(account: Account) -> Seen:
    """Offer an agent, which sshd makes a socket for, and removes it when the connection ends."""
    with account.session() as channel:
        granted = account.grants_agent(channel)
    return _judged(granted, "the server would use our agent", "the server refuses the request")


def x11(account: Account) -> Seen:
    """Offer a display, which nothing then uses."""
    with account.session() as channel:
        granted = account.grants(
            channel, lambda: channel.request_x11(handler=lambda opened, _: opened.close())
        )
    return _judged(granted, "the server would use our display", "the server refuses the request")


def tunnel(account: Account) -> Seen:
    """Ask for a network device, which ends with the channel. Whether it may make one is up to the machine."""
    code, remarks = account.remarked(account.open_tunnel)
    if code == 0:
        return Seen(Verdict.LOOSER, "the server opened a network device")
    if _TUNNEL_TRIED in remarks:
        return Seen(Verdict.LOOSER, "the server tried to open a network device, without success")
    if _TUNNEL_CLOSED in remarks or code in (_PROHIBITED, _UNKNOWN_KIND):
        return Seen(Verdict.TIGHT, "the server opens none, nor does it try")
    return Seen(Verdict.UNKNOWN, f"the server opened none, and may have tried; it said {_last(remarks)}")


def environment(account: Account) -> Seen:
    """Ask for variables, of which nothing that runs has any: nothing does."""
    taken = []
    for name in _VARIABLES:
        with account.session() as channel:
            if account.grants_variable(channel, name):
                taken.append(name)
    return _judged(
        bool(taken),
        f"the server lets us set {', '.join(taken)} for what it runs",
        f"the server refuses {', '.join(_VARIABLES)}",
    )


def unique_name() -> bytes:
    """Return a name that nobody has given to anything."""
    return f".mdbackup-audit-{secrets.token_hex(8)}".encode()


def nowhere() -> bytes:
    """Return a path in a directory that does not exist: who would make something there looks in vain."""
    return b"/%b/x" % unique_name()


# --- words ------------------------------------------------------------------------------------------


def quoted(said: bytes, most: int = 100) -> str:
    """Return the beginning of what a server said."""
    text = to_text(said.strip()[:most]) + ("..." if len(said.strip()) > most else "")
    return f'"{text}"' if text else "nothing"


def _last(remarks: Sequence[bytes]) -> str:
    return quoted(b"".join(remarks[-1:]))


def _judged(granted: bool, loose: str, tight: str) -> Seen:
    return Seen(Verdict.LOOSER, loose) if granted else Seen(Verdict.TIGHT, tight)
