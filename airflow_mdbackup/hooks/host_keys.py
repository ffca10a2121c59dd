"""Which keys a server may have: the one that a connection pins, or those in known_hosts.

A server's key is compared with them in three places::

    asyncssh     ``connection`` hands them to it; ``login.Client`` gets a key that is not trusted
    ``ssh``      ``ssh_program`` writes them to a file for it, with StrictHostKeyChecking
    paramiko     for audits only: ``account.client``

Lines are parsed as OpenSSH does, and what it skips is skipped: markers count in lower case only, networks
such as ``192.0.2.0/24`` are not names, ``*`` and ``?`` are wildcards. A server at a port other than 22 is
looked up as ``[host]:port``. If that has no keys, they are looked up as ``host``; authorities always are. A
key that is trusted with the port cannot be revoked without it.

Sources: sshd(8) on known_hosts; OpenSSH's hostfile.c, match.c and sshconnect.c.
"""

from __future__ import annotations

import hmac
import logging
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from airflow_mdbackup.hooks.files import path_of, read
from airflow_mdbackup.hooks.invalid_connection import InvalidConnection
from airflow_mdbackup.scheme.common.paths import to_text

log = logging.getLogger(__name__)

USER_FILES = ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"]
GLOBAL_FILES = ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"]
_MARKERS = ("", "@cert-authority", "@revoked")
_HASHED = "|1|"


@dataclass(frozen=True, slots=True)
class HostKeys:
    """The keys that a server may have, that may sign its host certificate, and that it must not have."""

    trusted: tuple[asyncssh.SSHKey, ...] = ()
    authorities: tuple[asyncssh.SSHKey, ...] = ()
    revoked: tuple[asyncssh.SSHKey, ...] = ()

    def lines(self, host: str) -> str:
        """Return them as lines of known_hosts."""
        marked = [("", self.trusted), ("@cert-authority ", self.authorities), ("@revoked ", self.revoked)]
        return "".join(
            f"{marker}{host} {key.export_public_key().decode().strip()}\n"
            for marker, keys in marked
            for key in keys
        )

    def for_asyncssh(self) -> tuple[list[asyncssh.SSHKey], ...]:
        """Return them in the form of asyncssh's option ``known_hosts``."""
        return list(self.trusted), list(self.authorities), list(self.revoked)


def pinned_key(text: str) -> HostKeys:
    """Return the key that a connection pins: a public key, a line of known_hosts, or Airflow's bare base64.

    :raises InvalidConnection: it is not a public key.
    """
    words = text.split()
    if text.strip().startswith("@"):
        raise InvalidConnection(
            f"has an extra host_key that starts with {words[0]}: write the server's own key only"
        )
    for start in (" ".join(words), f"ssh-rsa {text.strip()}", " ".join(words[1:])):
        with suppress(asyncssh.KeyImportError, ValueError):
            return HostKeys(trusted=(asyncssh.import_public_key(start),))
    raise InvalidConnection(
        'has an extra host_key that is not a public key: it must look like "ssh-ed25519 AAAA..."'
    )


def keys_in_known_hosts(files: Iterable[str], host: str, port: int, alias: str | None = None) -> HostKeys:
    """Return the keys that known_hosts files have for a server.

    :param alias: the name to look up instead of host and port.
    :raises InvalidConnection: they have neither a key nor an authority, or one of them cannot be read.
    """
    names = [alias] if alias else [host] if port == 22 else [f"[{host}]:{port}", host]
    try:
        paths = [path_of(file) for file in files]
    except ValueError as error:
        raise InvalidConnection(
            f"needs a known_hosts file that cannot be read on this machine: {error}"
        ) from error
    lines = [line for path in paths for line in _lines(path)]
    trusted: list[asyncssh.SSHKey] = []
    authorities: list[asyncssh.SSHKey] = []
    revoked: list[asyncssh.SSHKey] = []
    for name in names:
        found = _found(lines, name.lower())
        revoked += [key for key in found["@revoked"] if key not in trusted + authorities]
        trusted = trusted or found[""]
        authorities += found["@cert-authority"]
    if not trusted and not authorities:
        raise InvalidConnection(
            f"leads to a server whose host key is unknown: no line for {' or '.join(names)} in"
            f" {_described(paths)}. Pin it in its extra host_key (ssh-keyscan shows it; compare it with the"
            " server's own), or add it to known_hosts"
        )
    return HostKeys(*(tuple(dict.fromkeys(keys)) for keys in (trusted, authorities, revoked)))


def revoked_keys(files: Iterable[str]) -> tuple[asyncssh.SSHKey, ...]:
    """Return the keys in files of revoked keys, which are never trusted.

    :raises InvalidConnection: one of them cannot be read, or is not a list of public keys.
    """
    found: list[asyncssh.SSHKey] = []
    for name in files:
        if name == "none":
            continue
        try:
            lines = read(path_of(name)).splitlines()
            keys = [line for line in lines if line.strip() and not line.startswith(b"#")]
            found += map(asyncssh.import_public_key, keys)
        except (OSError, ValueError) as error:
            raise InvalidConnection(
                f"needs {name}, the RevokedHostKeys of ~/.ssh/config, which is not a list of public keys"
                f" ({to_text(str(error).encode())}). OpenSSH's binary lists (KRL) are not read here"
            ) from error
    return tuple(found)


def _described(paths: list[Path]) -> str:
    """Return the files that exist, or else all of them as missing, for messages."""
    there = [f"{path}" for path in paths if path.exists()]
    return ", ".join(there or [f"{path} (no such file)" for path in paths])


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of known_hosts.

    :ivar where: file and line number, for messages.
    :ivar names: the servers it is for: patterns, or the hash of one name.
    :ivar key: not parsed, since most lines are for other servers.
    """

    where: str
    marker: str
    names: str
    key: str


def _found(lines: Iterable[_Line], name: str) -> dict[str, list[asyncssh.SSHKey]]:
    """Return the keys of a name, by marker. Those of a type that asyncssh does not support are skipped."""
    found: dict[str, list[asyncssh.SSHKey]] = {marker: [] for marker in _MARKERS}
    for line in lines:
        if _is_among(name, line.names):
            try:
                found[line.marker].append(asyncssh.import_public_key(line.key))
            except ValueError as error:
                _skip(line.where, error)
    return found


def _skip(where: str, error: ValueError) -> None:
    log.warning("Skipping %s: %s", where, to_text(str(error).encode()))


def _is_among(name: str, names: str) -> bool:
    if names.startswith(_HASHED):
        salt, _, digest = names.removeprefix(_HASHED).partition("|")
        return hmac.digest(b64decode(salt), name.encode(), "sha1") == b64decode(digest)
    if "*" not in names and "?" not in names and "!" not in names:
        return name in names.lower().split(",")
    matching = [each for each in names.lower().split(",") if _pattern(each.removeprefix("!")).fullmatch(name)]
    return bool(matching) and not any(each.startswith("!") for each in matching)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", ".*").replace(r"\?", "."))


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the parsed lines of a file, except those that OpenSSH skips as well."""
    try:
        content = read(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidConnection(
            f"needs {path}, which cannot be read on this machine: {error.strerror}"
        ) from error
    for number, raw in enumerate(content.split(b"\n"), 1):
        line = raw.decode("ascii", "backslashreplace").strip()  # the rest is in comments
        if line and not line.startswith("#"):
            where = f"{path}, line {number}"
            try:
                yield _parsed(line, where)
            except ValueError as error:
                _skip(where, error)


def _parsed(line: str, where: str) -> _Line:
    """Parse a line.

    :raises ValueError: OpenSSH cannot parse it either.
    """
    has_marker = line.startswith("@")
    words = line.split(maxsplit=1 + has_marker)
    marker = words.pop(0) if has_marker else ""
    if marker not in _MARKERS:
        raise ValueError(f"{marker} is not a marker")
    if len(words) < 2:
        raise ValueError("it has no key")
    if words[0].startswith("|"):
        _is_among("", words[0])
    return _Line(where, marker, *words)
