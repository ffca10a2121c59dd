"""The errors of connections: what a server, a proxy or this side did, and what to do about it.

Each is an :class:`.AccessRefused`, which no retry can heal, or a :class:`.ConnectionLost`, which one may.
"""

from __future__ import annotations

import asyncssh

from airflow_mdbackup.hooks.connection import CONNECT, SshAccount
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost


class NoCommonAlgorithm(AccessRefused):
    """The server and asyncssh have no algorithm in common. The program ssh may have one."""


def last_lines(output: bytes) -> str:
    """Return the last two lines of a program's messages, as printable text."""
    lines = [to_text(words) for line in output.splitlines() if (words := line.strip(b" @"))]
    return " / ".join(lines[-2:])[-2000:]


def lost(account: SshAccount, why: str) -> AccessRefused | ConnectionLost:
    """Return the error for a connection that failed; it is final if a jump host refuses the login."""
    if account.jumps and ("Permission denied" in why or "Host key verification failed" in why):
        return AccessRefused(
            f"{account.where}: the jump host refuses the login ({why}). Only ~/.ssh/config says how to reach"
            " it: check its Host there (User, IdentityFile) and known_hosts, and try plain ssh to it"
        )
    if account.proxy is not None:
        why = f"the proxy does not connect to the server ({why})"
    return ConnectionLost(f"{account.where}: {why}")


def hint(error: Exception) -> str:
    """Return the likely cause where the server does not give one, and what to do."""
    if "timeout" in message_of(error).lower():
        return f": it accepts the connection, but no login within {CONNECT} seconds. Is that an SSH port?"
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError | EOFError):
        return (
            ": the server closed the connection before the login. Is that an SSH port? If so, it may be"
            " blocking this address for a while: check its log, MaxStartups and PerSourcePenalties of sshd,"
            " fail2ban, and firewalls on the way"
        )
    return ""


def mismatch(account: SshAccount, fingerprint: str) -> str:
    """Return which host key a server has, and which one was expected."""
    trusted = " or ".join(key.get_fingerprint() for key in account.host_keys.trusted[:3])
    source = "the connection's host_key" if account.pinned else "known_hosts"
    expected = trusted or "a certificate of a trusted authority"
    return f"it has {fingerprint}, {source} expects {expected}"


def wrong_host_key(account: SshAccount, why: str) -> AccessRefused:
    """Return the error for a server that has another host key than the trusted ones."""
    correct = "correct the connection's extra host_key" if account.pinned else "correct known_hosts"
    return AccessRefused(
        f"{account.where}: the server's host key is not the expected one ({why}). This may be an attack. If"
        f" the server really has a new key, {correct}: ssh-keyscan shows the key, and `ssh-keygen -lf"
        " /etc/ssh/ssh_host_ed25519_key.pub` on the server prints the fingerprint to compare it with"
    )


def refused(account: SshAccount, why: str) -> AccessRefused:
    """Return the error for an account whose login the server refuses."""
    if not account.keys:
        return AccessRefused(
            f"{account.where}: the server refuses the account's password ({why}). Check login and password of"
            " the connection, and whether the server allows passwords (PasswordAuthentication). The backup"
            " accounts of `provision` take keys only: name one in the connection's extra key_file"
        )
    return AccessRefused(
        f"{account.where}: the server refuses the account's key ({why}). Check login and key_file of the"
        " connection, the AuthorizedKeysFile on the server, and whether from= of the key there includes this"
        " machine's address as the server sees it. The server's log has the reason"
    )


def ended_here(account: SshAccount) -> ConnectionLost:
    """Return the error for callers that wait on a connection that has been closed on this side."""
    return ConnectionLost(f"{account.where}: the connection was closed on this side")


def message_of(error: BaseException) -> str:
    """Return the message of an error as printable text, since it may quote the server."""
    return to_text(str(error).encode("utf-8", "backslashreplace")) or type(error).__name__
