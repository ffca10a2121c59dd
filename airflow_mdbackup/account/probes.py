"""What both accounts of a provider are asked: each probe tries one thing that must not work.

What counts is what happened, not how the server answered: OpenSSH accepts a request for a shell, and then
runs what ``ForceCommand`` says instead.
"""

from __future__ import annotations

import os
import posixpath
import secrets
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import paramiko

from airflow_mdbackup.account.connection import Account, Unanswered, listen, output_of
from airflow_mdbackup.account.findings import Finding, Seen, Verdict
from airflow_mdbackup.account.sftp_requests import NO_SUCH_FILE, OK, Requests
from airflow_mdbackup.scheme.names import to_text

_PROHIBITED = 1  # SSH_OPEN_ADMINISTRATIVELY_PROHIBITED of RFC 4254: refused before it was tried
_QUIET = 1.5  # seconds after which what has not said a word waits for input
# How an indexer begins: one that was installed, and one that is sent first.
READY = (b"mdbackup ready request", b"mdbackup ready program")
STILL_THERE = "WHICH IS STILL THERE: please remove it"

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


def common_checks(places: Sequence[bytes]) -> list[Check[Account]]:
    """Return what must hold for either account.

    :param places: directories as the account sees them, in which it could try to make a socket.
    """
    return [
        Check("host key pinned", host_key, "its Airflow connection: the extra host_key"),
        Check("keys only", ways_in, match_block("AuthenticationMethods publickey")),
        Check("no PTY", terminal, match_block("PermitTTY no")),
        Check(
            "no local forwarding",
            lambda account: tcp(account, "127.0.0.1", 1),
            match_block("AllowTcpForwarding no"),
        ),
        # What `ssh -D` asks for, too: any host by its name.
        Check(
            "no dynamic forwarding",
            lambda account: tcp(account, "localhost", 9),
            match_block("AllowTcpForwarding no"),
        ),
        Check("no remote forwarding", remote_forwarding, match_block("AllowTcpForwarding no")),
        Check(
            "no socket forwarding",
            lambda it: sockets(it, places),
            match_block("AllowStreamLocalForwarding no"),
        ),
        Check("no agent forwarding", agent, match_block("AllowAgentForwarding no")),
        Check("no X11 forwarding", x11, match_block("X11Forwarding no")),
        Check("no tunnel", tunnel, match_block("PermitTunnel no")),
    ]


# --- the connection itself --------------------------------------------------------------------------


def host_key(account: Account) -> Seen:
    """See by what the worker knew the server."""
    hook = account.hook
    key = account.transport.get_remote_server_key()
    shown = f"{key.get_name()} {key.fingerprint}"
    if hook.host_key is not None:
        return Seen(Verdict.TIGHT, f"pinned in the connection: {shown}")
    if hook.no_host_key_check:
        pin = f'"host_key": "{key.get_name()} {key.get_base64()}"'
        return Seen(
            Verdict.LOOSER,
            "the connection says no_host_key_check: any server is believed to be this one",
            f"its Airflow connection {hook.ssh_conn_id}: instead of no_host_key_check, and compared with the"
            f" server's own key, {pin}",
        )
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
    """A word that only a shell makes of a command line, so that an echo of the line is told from it."""

    def __init__(self) -> None:
        number = secrets.token_hex(8)
        self.command = f"echo mdbackup-au''dit-{number}"
        self.word = f"mdbackup-audit-{number}".encode()


def said_to_command(account: Account, token: Token, command: str = "") -> bytes | None:
    """Return what came when a command was asked for, None if the server refused the request.

    :param command: it must say the token's word; by default the token's own.
    """
    with account.session() as channel:
        channel.set_combine_stderr(True)
        if not account.grants(channel, lambda: channel.exec_command(command or token.command)):
            return None
        with suppress(OSError, EOFError):  # it may have ended meanwhile
            channel.shutdown_write()
        return output_of(channel, until=(token.word, *READY))


def said_to_shell(account: Account, token: Token, patience: float = _QUIET) -> bytes | None:
    """Return what came when a shell was asked for and told to say the word; None if it was refused.

    :param patience: seconds to wait for an indexer to begin; that must not get the line.
    """
    with account.session() as channel:
        channel.set_combine_stderr(True)
        if not account.grants(channel, channel.invoke_shell):
            return None
        said, ended = listen(channel, READY, patience)
        if ended:
            return said
        with suppress(OSError, EOFError):  # it may have ended meanwhile
            channel.sendall(f"{token.command}\n".encode())
            channel.shutdown_write()
        return said + output_of(channel, until=(token.word,))


def ran(token: Token, said: bytes | None) -> Seen:
    """Judge by what came whether a shell ran the token's command."""
    if said is None:
        return Seen(Verdict.TIGHT, "the server refuses the request")
    if token.word in said:
        return Seen(Verdict.LOOSER, "a shell ran what it was told")
    return Seen(Verdict.TIGHT, f"it did not run; the answer was {quoted(said)}")


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


def tcp(account: Account, host: str, port: int) -> Seen:
    """Ask for a connection to where nothing listens: was it refused, or tried?"""
    code = account.open_tcp(host, port)
    if code == _PROHIBITED:
        return Seen(Verdict.TIGHT, f"prohibited, to {host} port {port}")
    outcome = "connected" if code == 0 else "tried, without success"
    return Seen(Verdict.LOOSER, f"the server {outcome}: {host} port {port}")


def remote_forwarding(account: Account) -> Seen:
    """Have the server listen on any port."""
    return _judged(
        account.listens(), "the server listens for us, on localhost", "the server refuses the request"
    )


def sockets(account: Account, places: Sequence[bytes]) -> Seen:
    """Have the server make a socket, and connect to those that machines usually have.

    A refusal looks like a failure here, so that only what works is evidence. What sshd makes, it does not
    remove: where it seems about to make one, we first see that we can.
    """
    for path in _SOCKETS:
        if account.open_socket(path) == 0:
            return Seen(Verdict.LOOSER, f"the server connected to {to_text(path)}")
    if account.listens() and not _removed(account, posixpath.join(places[0], unique_name())):
        return Seen(Verdict.UNKNOWN, "not tried, because we could not remove the socket that sshd leaves")
    for place in places:
        path = posixpath.join(place, unique_name())
        if account.listens_on_socket(path):
            left = "removed again" if _removed(account, path) else STILL_THERE
            return Seen(Verdict.LOOSER, f"the server made the socket {to_text(path)}, {left}")
    tried = ", ".join(map(to_text, places))
    return Seen(Verdict.TIGHT, f"none made in {tried}; none of {len(_SOCKETS)} usual ones reached")


def _removed(account: Account, path: bytes) -> bool:
    """Remove a file by SFTP or by a shell, and tell whether it is gone, or never was there."""
    with suppress(Unanswered), account.session() as channel:
        requests = subsystem_start(account, channel, account.hook.subsystem)
        if requests is not None and requests.remove(path).code in (OK, NO_SUCH_FILE):
            return True
    token = Token()
    command = f"rm -f {shlex.quote(os.fsdecode(path))} && {token.command}"
    with suppress(Unanswered):
        return token.word in (said_to_command(account, token, command) or b"")
    return False


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
    """Ask for a network device, which ends with the channel."""
    opened = account.open_tunnel() == 0
    return _judged(opened, "the server opened a network device", "the server opens none")


def unique_name() -> bytes:
    """Return a name that nobody has given to anything."""
    return f".mdbackup-audit-{secrets.token_hex(8)}".encode()


# --- words ------------------------------------------------------------------------------------------


def quoted(said: bytes, most: int = 100) -> str:
    """Return the beginning of what a server said."""
    text = to_text(said.strip()[:most]) + ("..." if len(said.strip()) > most else "")
    return f'"{text}"' if text else "nothing"


def _judged(granted: bool, loose: str, tight: str) -> Seen:
    return Seen(Verdict.LOOSER, loose) if granted else Seen(Verdict.TIGHT, tight)
