"""What an Airflow connection says of an SSH account: parsed and checked once, for all that connect by it.

::

    the connection    host, port, login, password, and the extras of Airflow's SSH package
    ~/.ssh/config     of $HOME, for what the connection leaves open: HostName, Port, ProxyCommand, ProxyJump,
                      IdentityFile, algorithms
    the key           read here, with its passphrase, in any form that OpenSSH and OpenSSL write
    the host keys     the one that is pinned, or what known_hosts has: keys, authorities and revoked keys

Nothing is sent to a server before all of that is known to be of use. Errors name the connection, and the
extra that has to be corrected.

What this does not give: keys of an ssh-agent, which a worker has none of.

Sources: sshd(8) on known_hosts, ssh_config(5), Airflow's documentation of SSH connections.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import filter as filter_names
from pathlib import Path
from typing import Any, NamedTuple

import asyncssh
from asyncssh.encryption import get_encryption_algs
from asyncssh.kex import get_kex_algs
from asyncssh.mac import get_mac_algs
from asyncssh.public_key import (
    get_certificate_algs,
    get_default_certificate_algs,
    get_default_public_key_algs,
    get_public_key_algs,
)

from airflow_mdbackup.hooks import host_keys
from airflow_mdbackup.hooks.files import is_key_text, path_of, read
from airflow_mdbackup.hooks.host_keys import HostKeys, NoHostKey
from airflow_mdbackup.hooks.ssh_config import Reached, reached
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import AccessRefused

log = logging.getLogger(__name__)

# Nothing else is in a name or an address; an alias of ~/.ssh/config may be a little odder than these.
_HOST = re.compile(r"[\w.:%+][\w.:%+-]*")
_LONGEST = 86400  # seconds that a timeout may be
CONNECT = 30  # seconds for each of: TCP connection, and login
KEEPALIVE = 30
_FAST = "aes128-gcm@openssh.com,aes256-gcm@openssh.com"  # ciphers that today's processors are fast at
_KINDS = {
    "key_file": str,
    "private_key": str,
    "private_key_passphrase": str,
    "passphrase": str,
    "host_key": str,
    "known_hosts": str,
    "subsystem": str,
    "ciphers": list,
    "disabled_algorithms": dict,
}
_EXAMPLES = {
    list: 'a list, such as ["aes256-gcm@openssh.com"]',
    dict: 'an object, such as {"macs": ["hmac-md5"]}',
}
_SWITCHES = (
    "compress",
    "no_host_key_check",
    "ignore_hostkey_verification",
    "allow_host_key_change",
    "look_for_keys",
)
_OTHERS = ("conn_timeout", "cmd_timeout", "timeout")
# What paramiko, and so Airflow, calls the algorithms, and asyncssh does.
_ALGORITHMS = {
    "ciphers": "encryption_algs",
    "macs": "mac_algs",
    "kex": "kex_algs",
    "keys": "server_host_key_algs",
    "pubkeys": "signature_algs",
}


# What ssh_config(5) calls them.
_OPTIONS = {
    "Ciphers": "encryption_algs",
    "MACs": "mac_algs",
    "KexAlgorithms": "kex_algs",
    "HostKeyAlgorithms": "server_host_key_algs",
}
# Those that asyncssh has, by its options.
_ASYNCSSH: dict[str, Callable[[], list[bytes]]] = {
    "encryption_algs": get_encryption_algs,
    "mac_algs": get_mac_algs,
    "kex_algs": get_kex_algs,
    "server_host_key_algs": lambda: get_public_key_algs() + get_certificate_algs(),
    "signature_algs": lambda: get_public_key_algs() + get_certificate_algs(),
}
_ALGORITHM = re.compile(r"[\w.@*?-]+", re.ASCII)


class SshsList(list[str]):
    """Algorithms as ``ssh`` lists them, of which asyncssh need not have all."""


class Key(NamedTuple):
    """A private key, the passphrase that opened it, and the certificate beside it, if there are any."""

    key: asyncssh.SSHKey
    phrase: str | None
    certificate: asyncssh.SSHCertificate | None = None


@dataclass(frozen=True, slots=True)
class SshAccount:
    """An account on a server, and how it is reached.

    :ivar host: as the connection has it; ``address`` is what ~/.ssh/config makes of that.
    :ivar keys: private keys, decrypted, best first; none if a password is all there is.
    :ivar algorithms: which ones the connection or ~/.ssh/config asks for, by the names of asyncssh's options:
        a list, or a text that adds to the usual ones or takes from them, as ssh_config(5) has it.
    :ivar pinned: whether the connection itself has the host key.
    :ivar patience: seconds for the TCP connection.
    :ivar proxy: a line for the shell that makes the connection; ``jumps``: it is made of a ``ProxyJump``.
    :ivar options: for asyncssh, with all of this but the proxy.
    """

    conn_id: str
    host: str
    address: str
    port: int
    host_key_alias: str | None
    user: str
    password: str | None = field(repr=False)
    keys: tuple[Key, ...] = field(repr=False)
    algorithms: Mapping[str, str | list[str]]
    host_keys: HostKeys
    pinned: bool
    patience: int
    compress: bool
    subsystem: str
    proxy: str | None
    jumps: bool
    options: asyncssh.SSHClientConnectionOptions

    @property
    def proxy_command(self) -> list[str]:
        """What a ``proxy`` is run as."""
        return ["/bin/sh", "-c", f"exec {self.proxy}"]

    @property
    def known_by(self) -> str:
        """How the server is known to be the right one, for people."""
        return "its host key is the pinned one" if self.pinned else "known_hosts has its host key"

    @property
    def where(self) -> str:
        """Where it leads, for people."""
        by = "ProxyJump" if self.jumps else "ProxyCommand"
        through = f", through the {by} of ~/.ssh/config" if self.proxy else ""
        return f"{self.user}@{self.host}:{self.port} (connection {self.conn_id}{through})"

    def without_authorities(self) -> SshAccount:
        """Return the account of a server that is known by its key alone, whatever its certificate is."""
        keys = replace(self.host_keys, authorities=())
        asked = _host_key_algorithms(self, keys)
        options = asyncssh.SSHClientConnectionOptions(self.options, known_hosts=keys.for_asyncssh(), **asked)
        return replace(self, host_keys=keys, options=options)


def account_of(conn_id: str, connection: Any) -> SshAccount:
    """Return the account that an Airflow connection leads to.

    :raises AccessRefused: it is of no use as it is; the message names the connection, and what to correct.
    """
    try:
        account = _account_of(conn_id, connection)
    except (_Wrong, NoHostKey) as wrong:
        hint = f" ({odd})" if (odd := _unknown(connection)) else ""
        raise AccessRefused(f"the connection {conn_id} {wrong}{hint}") from wrong.__cause__
    if odd := _unknown(connection):
        log.warning("the connection %s: %s", conn_id, odd)
    return account


class _Wrong(Exception):
    """Why a connection is of no use, as a sentence that begins with it."""


def _account_of(conn_id: str, connection: Any) -> SshAccount:
    extra = _extra(connection)
    host, user = connection.host or "", connection.login or ""
    if not user.strip():
        raise _Wrong("has no login: write the name of the account on the server")
    _check_host(host)
    _check_text("a login", user, printable=True)
    _check_text("a password", connection.password or "", printable=False)
    reached = _reached(host, _port(connection.port), user)
    _check_host(reached.host, ", the HostName of ~/.ssh/config")
    keys, password = _secret(extra, connection, reached)
    account = SshAccount(
        conn_id=conn_id,
        host=host,
        address=reached.host.lower(),  # as ssh has it, for known_hosts and certificates
        port=reached.port,
        host_key_alias=reached.host_key_alias,
        user=user,
        password=password,
        keys=keys,
        algorithms=_algorithms(extra, reached),
        host_keys=_host_keys(extra, reached),
        pinned="host_key" in extra,
        patience=_seconds(extra, "conn_timeout", CONNECT),
        compress=_is_on(extra, "compress"),
        subsystem=extra.get("subsystem", "sftp"),
        proxy=reached.proxy,
        jumps=reached.jumps,
        options=asyncssh.SSHClientConnectionOptions(config=None, agent_path=None, known_hosts=None),
    )
    return replace(account, options=_options(account))


def _check_text(what: str, text: str, *, printable: bool) -> None:
    """Refuse characters that are none, and where they make no sense those that nobody sees."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"has {what} with half a character in it: write it anew") from None
    if printable and not text.isprintable():
        raise _Wrong(f"has {what} with a character that cannot be seen: write it anew")


def _check_host(host: str, source: str = "") -> None:
    try:
        host.encode("idna")  # as it is looked up
    except UnicodeError:
        is_host = False
    else:
        is_host = _HOST.fullmatch(host) is not None and host.count(":") != 1
    if not is_host:
        # Somebody may have written login and password before it.
        shown = to_text(re.sub(".*@", "...@", host, flags=re.DOTALL).encode("utf-8", "backslashreplace"))
        raise _Wrong(
            f"leads to no host ({shown!r}{source}): write its name or address alone. Login and port have"
            " fields of their own"
        )


def _port(port: Any) -> int | None:
    """Return the port of a connection; None if ~/.ssh/config is to say it."""
    if port in (None, ""):
        return None
    with suppress(ValueError):
        if 1 <= int(port) <= 65535:
            return int(port)
    raise _Wrong(f"has the port {port!r}: there are 1 to 65535")


def _extra(connection: Any) -> dict[str, Any]:
    """Return the extras, each of the kind that it should be."""
    try:
        extra = json.loads(connection.extra or "{}")
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"has an extra that is no JSON ({error}): write an object, such as {{}}") from error
    if not isinstance(extra, dict):
        twice = " It is encoded twice: write the object itself, and not a string." * isinstance(extra, str)
        raise _Wrong(f"has an extra that is no JSON object.{twice}")
    extra = {name: value for name, value in extra.items() if value not in (None, "")}
    _check_kinds(extra)
    for name in ("no_host_key_check", "ignore_hostkey_verification", "allow_host_key_change"):
        if _is_on(extra, name):
            raise _Wrong(
                f"sets {name}, which trusts any server. Remove that, and pin the key in its extra host_key"
            )
    if str(extra.get("known_hosts", "")).lower() == "none":
        raise _Wrong("sets known_hosts to none, which trusts any server. Pin the key in its extra host_key")
    _check_file(extra, "key_file", "move it to private_key")
    _check_file(extra, "known_hosts", "move it to host_key")
    return extra


def _check_kinds(extra: Mapping[str, Any]) -> None:
    for name, kind in _KINDS.items():
        value = extra.get(name)
        if value is not None and not isinstance(value, kind):
            # Airflow reads all that is in a URI as text, but for this one.
            uri = ". In a URI, write all extras as JSON into ?__extra__=" * isinstance(value, str)
            raise _Wrong(f"has an extra {name} that is not {_EXAMPLES.get(kind, 'a text')}{uri}")
        if isinstance(value, str):
            _check_text(f"an extra {name}", value, printable=name == "subsystem")
    if not all(isinstance(name, str) for name in extra.get("ciphers", ())):
        raise _Wrong(f"has an extra ciphers that is not {_EXAMPLES[list]}")
    for name in _SWITCHES:
        if str(extra.get(name, "false")).lower() not in ("true", "false"):
            raise _Wrong(f"has an extra {name} that is neither true nor false")


def _check_file(extra: Mapping[str, Any], name: str, cure: str) -> None:
    """Refuse what is no name of a file, and what has its reader wait. Whether it is there is seen later."""
    if (value := extra.get(name)) is None:
        return
    if is_key_text(value):  # which no message may quote
        raise _Wrong(f"has the key itself in its extra {name}: {cure}. {name} is the name of a file")
    try:
        path_of(value)
    except ValueError as error:
        raise _Wrong(f"has an extra {name} that is no name of a file: {error}") from error


def _unknown(connection: Any) -> str:
    """Return which extras nobody knows, and what they may have been meant to be; nothing if all are known."""
    try:
        extra = json.loads(connection.extra or "{}")
    except (ValueError, RecursionError):
        return ""
    known = {*_KINDS, *_SWITCHES, *_OTHERS}
    found = []
    for name in sorted(set(extra) - known) if isinstance(extra, dict) else ():
        meant = get_close_matches(name, known, 1)
        shown = to_text(name.encode("utf-8", "backslashreplace"))
        found.append(f"{shown}: {meant[0]}?" if meant else shown)
    return f"nobody knows its extra {', '.join(found)}" if found else ""


def _is_on(extra: Mapping[str, Any], name: str) -> bool:
    return str(extra.get(name, "false")).lower() == "true"


# --- what ~/.ssh/config says ------------------------------------------------------------------------


def _reached(host: str, port: int | None, user: str) -> Reached:
    """Return how a host is reached, by the connection and ~/.ssh/config."""
    try:
        return reached(host, port, user)
    except (ValueError, OSError) as error:
        raise _Wrong(f"cannot be used on this machine: {error}") from error


def _from(reached: Reached, option: str) -> list[str]:
    """Return what ~/.ssh/config says of an option that may be given more than once."""
    return reached.said.get(option, [])


# --- the key ----------------------------------------------------------------------------------------


def _secret(
    extra: Mapping[str, Any], connection: Any, reached: Reached
) -> tuple[tuple[Key, ...], str | None]:
    """Return the keys, best first, and the password to log in with, as far as there are any."""
    password = connection.password or None
    phrases = [None, extra.get("private_key_passphrase"), extra.get("passphrase"), password]
    if "private_key" in extra and "key_file" in extra:
        raise _Wrong("has a private_key and a key_file: remove one of them")
    if "private_key" in extra:
        found = [Key(*_key_in(extra["private_key"].encode(), phrases, "an extra private_key"))]
    elif "key_file" in extra:
        path = path_of(extra["key_file"])
        found = [_key_of(path, phrases, f"a key_file {path}")]
    else:
        found = list(_other_keys(extra, reached, phrases, has_password=password is not None))
    if any(key.phrase == password for key in found):
        password = None  # it was the passphrase
    if not found and password is None:
        raise _Wrong("has no key: name one in its extra key_file, or write it into private_key")
    return tuple(found), password


def _key_of(path: Path, phrases: Iterable[str | None], what: str) -> Key:
    try:
        content = read(path)
    except OSError as error:
        raise _Wrong(
            f"has {what} that cannot be read on this machine: {error.strerror}. Bring it"
            " here, or correct the path"
        ) from error
    key, phrase = _key_in(content, phrases, what)
    return Key(key, phrase, _certificate_beside(path, key))


def _other_keys(
    extra: Mapping[str, Any], reached: Reached, phrases: Sequence[str | None], *, has_password: bool
) -> Iterator[Key]:
    """Yield the keys that OpenSSH would try where the connection names none, but for those it cannot open."""
    named = _from(reached, "IdentityFile")
    if not named and (has_password or str(extra.get("look_for_keys", "true")).lower() == "false"):
        return
    for name in named or [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]:
        try:
            path = path_of(name)
            if path.is_file():
                yield _key_of(path, phrases, f"a key, {path},")
        except _Wrong as wrong:
            log.warning("A key is skipped: the connection %s", wrong)
        except ValueError as error:
            log.warning("A key is skipped: %s", error)


class _Encrypted(_Wrong):
    """The key's passphrase is missing, or another one."""


def _key_in(content: bytes, phrases: Iterable[str | None], what: str) -> tuple[asyncssh.SSHKey, str | None]:
    """Return a private key, and the passphrase that opened it."""
    # Forms of the UI, and Windows, bring about: the mark of UTF-8, other line ends, the last one's absence.
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").strip() + b"\n"
    phrases, wrong = [*dict.fromkeys(phrases)], ""
    for phrase in phrases:
        try:
            return asyncssh.import_private_key(content, phrase), phrase
        except asyncssh.KeyEncryptionError as error:
            wrong = str(error)
        except asyncssh.KeyImportError as error:
            # That is all there is to say of an encrypted key without its passphrase, too.
            if "assphrase" not in str(error) and "decrypt" not in str(error):
                raise _Wrong(f"has {what} that is no private key: {_hint(content, error)}") from error
            wrong = str(error)
    if not any(phrases):
        raise _Encrypted(
            f"has {what} that is encrypted, and no passphrase: write it into the extra private_key_passphrase"
        )
    # Of PKCS #8, some ways of encryption are unknown to asyncssh, which then says the same.
    other = ". If it is right, `ssh-keygen -p -f KEY` encrypts the key in a way that can be read here"
    raise _Encrypted(
        f"has {what} that is encrypted, and no passphrase of the connection opens it ({wrong}): correct its"
        f" extra private_key_passphrase{other * (b'BEGIN ENCRYPTED PRIVATE KEY' in content)}"
    )


def _hint(content: bytes, error: Exception) -> str:
    if content.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        return "that is the public key"
    if content.startswith(b"PuTTY"):
        return "PuTTY has written it; `puttygen KEY -O private-openssh -o NEW` converts it"
    if b"\n" not in content.strip() and content.startswith((b"/", b"~", b"./")):
        return "that is the name of a file: write it into key_file"
    if b"\\n" in content:
        return "its lines have to be real ones, not \\n"
    return f"{error}"


def _certificate_beside(path: Path, key: asyncssh.SSHKey) -> asyncssh.SSHCertificate | None:
    """Return the certificate that is in a file beside the key's, if any."""
    beside = path.with_name(path.name + "-cert.pub")
    try:
        certificate = asyncssh.import_certificate(read(beside))
    except FileNotFoundError:
        return None
    except (OSError, asyncssh.KeyImportError) as error:
        raise _Wrong(f"has a key with a certificate, {beside}, that cannot be read: {error}") from error
    if certificate.key.public_data != key.public_data:
        raise _Wrong(f"has a key with a certificate, {beside}, that is of another key: renew or remove it")
    return certificate


# --- the host keys ----------------------------------------------------------------------------------


def _host_keys(extra: Mapping[str, Any], reached: Reached) -> HostKeys:
    """Return the pinned key; else what known_hosts has."""
    revoked = host_keys.revoked(_from(reached, "RevokedHostKeys"))
    if "host_key" in extra:
        found = host_keys.pinned(extra["host_key"])
        return replace(found, revoked=revoked)
    files = (
        [extra["known_hosts"]]
        if "known_hosts" in extra
        else [
            *(_from(reached, "UserKnownHostsFile") or host_keys.OF_USER),
            *(_from(reached, "GlobalKnownHostsFile") or host_keys.OF_ALL),
        ]
    )
    found = host_keys.known(files, reached.host.lower(), reached.port, reached.host_key_alias)
    return replace(found, revoked=(*found.revoked, *revoked))


# --- for asyncssh -----------------------------------------------------------------------------------


def _options(account: SshAccount) -> asyncssh.SSHClientConnectionOptions:
    has_password = account.password is not None
    keys: list[Any] = [
        (each.key, each.certificate) if each.certificate else each.key for each in account.keys
    ]
    chosen = {**_for_asyncssh(account.algorithms), **_host_key_algorithms(account, account.host_keys)}
    try:
        return asyncssh.SSHClientConnectionOptions(
            config=None,
            agent_path=None,
            host=account.address,
            port=account.port,
            username=account.user,
            known_hosts=account.host_keys.for_asyncssh(),
            client_keys=keys or None,
            password=account.password,
            preferred_auth=["publickey", *["password", "keyboard-interactive"] * has_password],
            public_key_auth=bool(keys),
            password_auth=has_password,
            kbdint_auth=has_password,
            host_based_auth=False,
            gss_auth=False,
            gss_kex=False,
            compression_algs=["none"],  # what it is asked to decompress has no bound; see `ssh_program`
            connect_timeout=account.patience + CONNECT,  # which is for both in asyncssh
            login_timeout=CONNECT,
            keepalive_interval=KEEPALIVE,
            host_key_alias=account.host_key_alias,
            **chosen,
        )
    except ValueError as error:
        raise _Wrong(
            f"asks for an unknown algorithm: {error}. See its extras ciphers, disabled_algorithms"
        ) from error


def _for_asyncssh(algorithms: Mapping[str, str | list[str]]) -> dict[str, str | list[str]]:
    """Return the algorithms to use, but for those that asyncssh lacks, and that nobody named for a backup."""
    chosen = dict(algorithms)
    for option, names in algorithms.items():
        there = [name.decode() for name in _ASYNCSSH[option]()]
        if isinstance(names, SshsList):
            chosen[option] = [name for name in names if name in there] or names
        elif isinstance(names, str) and names.startswith("-"):
            known = [name for name in names[1:].split(",") if filter_names(there, name)]
            chosen[option] = "-" + ",".join(known)
            if not known:
                del chosen[option]
    return chosen


def _host_key_algorithms(account: SshAccount, keys: HostKeys) -> dict[str, Any]:
    """Return which kinds of host keys to ask for: of those that are trusted, or else any, to tell it."""
    if "server_host_key_algs" in account.algorithms:
        return {}
    signed = get_default_certificate_algs() if keys.authorities else []
    trusted = [name for key in keys.trusted for name in key.sig_algorithms]
    names = dict.fromkeys([*signed, *trusted, *get_default_public_key_algs()])
    return {"server_host_key_algs": [name.decode() for name in names]}


def _seconds(extra: Mapping[str, Any], name: str, default: int) -> int:
    with suppress(TypeError, ValueError, OverflowError):
        if 1 <= (seconds := int(extra.get(name, default))) <= _LONGEST:
            return seconds
    raise _Wrong(f"has an extra {name} that is no number of seconds from 1 to {_LONGEST}")


def _algorithms(extra: Mapping[str, Any], reached: Reached) -> dict[str, Any]:
    """Return which algorithms are to be used, where the connection or ~/.ssh/config says that."""
    chosen: dict[str, Any] = {
        option: SshsList(listed[0].split(","))
        for name, option in _OPTIONS.items()
        if (listed := _from(reached, name))
    }
    for name, without in extra.get("disabled_algorithms", {}).items():
        if (
            name not in (*_ALGORITHMS, "compression")
            or not isinstance(without, list)
            or not all(isinstance(each, str) and _ALGORITHM.fullmatch(each) for each in without)
        ):
            raise _Wrong(f"has an extra disabled_algorithms that is not {_EXAMPLES[dict]}")
        if without and name in _ALGORITHMS:  # which `compress` decides
            chosen[_ALGORITHMS[name]] = "-" + ",".join(without)
    if "ciphers" in extra:
        chosen["encryption_algs"] = extra["ciphers"]
    else:
        chosen.setdefault("encryption_algs", f"^{_FAST}")
    return chosen
