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

import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import asyncssh
from asyncssh.public_key import get_default_certificate_algs, get_default_public_key_algs

from airflow_mdbackup.scheme.errors import AccessRefused
from airflow_mdbackup.scheme.names import to_text

log = logging.getLogger(__name__)

_NAMES = re.compile(r"^\s*(@\S+\s+)?[^|@\s]\S*")  # for which a line of known_hosts is, unless they are hashed
_OF_ALL = ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"]
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
_SWITCHES = ("compress", "no_host_key_check", "allow_host_key_change", "look_for_keys")
_OTHERS = ("conn_timeout", "cmd_timeout", "ignore_hostkey_verification", "timeout")
# What paramiko, and so Airflow, calls the algorithms, and asyncssh does.
_ALGORITHMS = {
    "ciphers": "encryption_algs",
    "macs": "mac_algs",
    "kex": "kex_algs",
    "keys": "server_host_key_algs",
    "pubkeys": "signature_algs",
}


@dataclass(frozen=True, slots=True)
class HostKeys:
    """The keys that a server may have, or that sign its host certificate; and those that it must not have."""

    trusted: tuple[asyncssh.SSHKey, ...] = ()
    authorities: tuple[asyncssh.SSHKey, ...] = ()
    revoked: tuple[asyncssh.SSHKey, ...] = ()

    def lines(self, host: str) -> str:
        """Return them as a known_hosts file has them."""
        marked = [("", self.trusted), ("@cert-authority ", self.authorities), ("@revoked ", self.revoked)]
        return "".join(
            f"{marker}{host} {key.export_public_key().decode().strip()}\n"
            for marker, keys in marked
            for key in keys
        )

    def for_asyncssh(self) -> tuple[list[asyncssh.SSHKey], ...]:
        """Return them as its option ``known_hosts`` has them."""
        return list(self.trusted), list(self.authorities), list(self.revoked)


@dataclass(frozen=True, slots=True)
class SshAccount:
    """An account on a server, and how it is reached.

    :ivar host: as the connection has it; ``address`` is what ~/.ssh/config makes of that.
    :ivar key: the private key, decrypted; None if a password is all there is.
    :ivar certificate: of the key, in OpenSSH's form, if there is one beside it.
    :ivar algorithms: which ones the connection asks for, by the names of asyncssh's options: a list, or a
        text that adds to the usual ones or takes from them, as ssh_config(5) has it.
    :ivar pinned: whether the connection itself has the host key.
    :ivar patience: seconds for the TCP connection.
    :ivar options: for asyncssh, with all of this.
    :ivar config_copy: of ~/.ssh/config, which asyncssh reads again as it connects; it lasts as long as this.
    """

    conn_id: str
    host: str
    address: str
    port: int
    user: str
    password: str | None = field(repr=False)
    key: asyncssh.SSHKey | None
    certificate: asyncssh.SSHCertificate | None
    algorithms: Mapping[str, str | list[str]]
    host_keys: HostKeys
    pinned: bool
    patience: int
    compress: bool
    subsystem: str
    options: asyncssh.SSHClientConnectionOptions
    config_copy: object = None

    @property
    def known_by(self) -> str:
        """How the server is known to be the right one, for people."""
        return "its host key is the pinned one" if self.pinned else "known_hosts has its host key"

    @property
    def where(self) -> str:
        """Where it leads, for people."""
        options = self.options
        by = "ProxyCommand" if options.proxy_command else "ProxyJump" if options.tunnel else ""
        through = f", through the {by} of ~/.ssh/config" * bool(by)
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
        return _account_of(conn_id, connection)
    except _Wrong as wrong:
        raise AccessRefused(f"the connection {conn_id} {wrong}") from wrong.__cause__


class _Wrong(Exception):
    """Why a connection is of no use, as a sentence that begins with it."""


def _account_of(conn_id: str, connection: Any) -> SshAccount:
    extra = _extra(connection)
    host, user = connection.host or "", connection.login or ""
    if not user:
        raise _Wrong("has no login: write the name of the account on the server")
    if not host or host.startswith("-") or not host.isprintable() or " " in host:
        raise _Wrong(f"leads to no host ({to_text(host.encode())!r}): write its name or address")
    reached, copy = _reached(host, connection.port, user)
    key, certificate, password = _secret(extra, connection, reached)
    port = int(reached.port)
    account = SshAccount(
        conn_id=conn_id,
        host=host,
        address=reached.host,
        port=port,
        user=user,
        password=password,
        key=key,
        certificate=certificate,
        algorithms=_algorithms(extra, reached),
        host_keys=_host_keys(extra, reached),
        pinned="host_key" in extra,
        patience=_seconds(extra, "conn_timeout", CONNECT),
        compress=_is_on(extra, "compress"),
        subsystem=extra.get("subsystem", "sftp"),
        options=reached,
        config_copy=copy,
    )
    return replace(account, options=_options(account))


def _extra(connection: Any) -> dict[str, Any]:
    """Return the extras, each of the kind that it should be."""
    try:
        extra = json.loads(connection.extra or "{}")
    except ValueError as error:
        raise _Wrong(f"has an extra that is no JSON ({error}): write an object, such as {{}}") from error
    if not isinstance(extra, dict):
        twice = " It is encoded twice: write the object itself, and not a string." * isinstance(extra, str)
        raise _Wrong(f"has an extra that is no JSON object.{twice}")
    extra = {name: value for name, value in extra.items() if value not in (None, "")}
    for name, kind in _KINDS.items():
        value = extra.get(name)
        if value is not None and not isinstance(value, kind):
            raise _Wrong(f"has an extra {name} that is not {_EXAMPLES.get(kind, 'a text')}")
    if not all(isinstance(name, str) for name in extra.get("ciphers", ())):
        raise _Wrong(f"has an extra ciphers that is not {_EXAMPLES[list]}")
    for name in ("no_host_key_check", "ignore_hostkey_verification", "allow_host_key_change"):
        if _is_on(extra, name):
            raise _Wrong(
                f"sets {name}, which trusts any server. Remove that, and pin the key in its extra host_key"
            )
    if str(extra.get("known_hosts", "")).lower() == "none":
        raise _Wrong("sets known_hosts to none, which trusts any server. Pin the key in its extra host_key")
    return extra


def _is_on(extra: Mapping[str, Any], name: str) -> bool:
    return str(extra.get(name, "false")).lower() == "true"


# --- what ~/.ssh/config says ------------------------------------------------------------------------


def _reached(
    host: str, port: int | None, user: str
) -> tuple[asyncssh.SSHClientConnectionOptions, object | None]:
    """Return how a host is reached, by the connection and ~/.ssh/config, but for all keys.

    Also return the copy of that file, if there has to be one.
    """
    path = Path("~/.ssh/config").expanduser()
    try:
        config, copy = _readable_config(path)
        options = asyncssh.SSHClientConnectionOptions(
            host=host,
            port=port or (),
            username=user,
            config=config,
            known_hosts=None,
            client_keys=None,
            agent_path=None,
        )
        return options, copy
    except (ValueError, OSError) as error:
        raise _Wrong(f"cannot be used with {path} of this machine: {error}. Correct that file") from error


def _from(reached: asyncssh.SSHClientConnectionOptions, option: str) -> list[str]:
    """Return what ~/.ssh/config says of an option that may be given more than once."""
    found: Any = reached.config.get(option, ())
    return list(found)


def _readable_config(path: Path) -> tuple[list[str], object | None]:
    """Return where the file is, or a copy of it in UTF-8, which it need not be for OpenSSH."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return [], None
    try:
        text.decode()
    except UnicodeDecodeError:
        copy = NamedTemporaryFile("w", suffix=".ssh-config", encoding="utf-8")  # noqa: SIM115 - the caller's
        copy.write(text.decode("latin-1"))
        copy.flush()
        return [copy.name], copy
    return [str(path)], None


# --- the key ----------------------------------------------------------------------------------------


def _secret(
    extra: Mapping[str, Any], connection: Any, reached: asyncssh.SSHClientConnectionOptions
) -> tuple[asyncssh.SSHKey | None, asyncssh.SSHCertificate | None, str | None]:
    """Return the key, its certificate and the password to log in with, as far as there are any."""
    password = (connection.password or "").strip() or None
    phrases = [None, extra.get("private_key_passphrase"), extra.get("passphrase"), password]
    if "private_key" in extra and "key_file" in extra:
        raise _Wrong("has a private_key and a key_file: remove one of them")
    if "private_key" in extra:
        key, phrase = _key_in(extra["private_key"].encode(), phrases, "an extra private_key")
        return key, None, None if phrase is password else password
    for path in _key_files(extra, reached, has_password=password is not None):
        what = f"a key_file {path}" if "key_file" in extra else f"a key, {path},"
        try:
            key, phrase = _key_in(path.read_bytes(), phrases, what)
        except OSError as error:
            raise _Wrong(f"has {what} that cannot be read on this machine: {error.strerror}") from error
        except _Encrypted:
            if "key_file" in extra:
                raise
            continue
        return key, _certificate_beside(path), None if phrase is password else password
    if password is None:
        known = {*_KINDS, *_SWITCHES, *_OTHERS}
        odd = sorted(set(extra) - known)
        hint = f" (nobody knows its extra {', '.join(odd)})" if odd else ""
        raise _Wrong(f"has no key: name one in its extra key_file, or write it into private_key{hint}")
    return None, None, password


def _key_files(
    extra: Mapping[str, Any], reached: asyncssh.SSHClientConnectionOptions, *, has_password: bool
) -> list[Path]:
    """Return the files of the key, or those that OpenSSH would try."""
    if "key_file" in extra:
        return [Path(extra["key_file"]).expanduser()]
    named = _from(reached, "IdentityFile")
    if not named and (has_password or str(extra.get("look_for_keys", "true")).lower() == "false"):
        return []
    defaults = [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
    return [path for name in named or defaults if (path := Path(name).expanduser()).is_file()]


class _Encrypted(_Wrong):
    """The key's passphrase is missing, or another one."""


def _key_in(content: bytes, phrases: Iterable[str | None], what: str) -> tuple[asyncssh.SSHKey, str | None]:
    """Return a private key, and the passphrase that opened it."""
    # Windows' line ends, and the last one's absence, which forms of the UI bring about.
    content = content.replace(b"\r\n", b"\n").strip() + b"\n"
    wrong = ""
    for phrase in dict.fromkeys(phrases):
        try:
            return asyncssh.import_private_key(content, phrase), phrase
        except asyncssh.KeyEncryptionError as error:
            wrong = str(error)
        except asyncssh.KeyImportError as error:
            # That is all there is to say of an encrypted key without its passphrase, too.
            if "assphrase" not in str(error) and "decrypt" not in str(error):
                raise _Wrong(f"has {what} that is no private key: {_hint(content, error)}") from error
            wrong = str(error)
    raise _Encrypted(
        f"has {what} that is encrypted, and no passphrase that opens it ({wrong}): write it into the extra "
        "private_key_passphrase"
    )


def _hint(content: bytes, error: Exception) -> str:
    if content.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        return "that is the public key"
    if content.startswith(b"PuTTY"):
        return "PuTTY has written it; `puttygen KEY -O private-openssh -o NEW` converts it"
    if b"\\n" in content:
        return "its lines have to be real ones, not \\n"
    return f"{error}"


def _certificate_beside(path: Path) -> asyncssh.SSHCertificate | None:
    beside = path.with_name(path.name + "-cert.pub")
    try:
        return asyncssh.read_certificate(beside)
    except FileNotFoundError:
        return None
    except (OSError, asyncssh.KeyImportError) as error:
        raise _Wrong(f"has a key with a certificate, {beside}, that cannot be read: {error}") from error


# --- the host keys ----------------------------------------------------------------------------------


def _host_keys(extra: Mapping[str, Any], reached: asyncssh.SSHClientConnectionOptions) -> HostKeys:
    """Return the pinned key; else what known_hosts has."""
    if "host_key" in extra:
        return HostKeys(trusted=(_pinned(extra["host_key"]),))
    known = asyncssh.SSHKnownHosts()
    for path in _known_hosts_files(extra, reached):
        _load(known, path)
    name = reached.host_key_alias or reached.host
    names = [name] if reached.host_key_alias or reached.port == 22 else [f"[{name}]:{reached.port}", name]
    revoked: list[asyncssh.SSHKey] = []
    for name in names:
        trusted, authorities, also_revoked, *_ = known.match(name.lower(), "", None)
        revoked += also_revoked
        if trusted or authorities:
            break
    if not trusted and not authorities:
        raise _Wrong(
            "leads to a server whose host key is unknown. Pin it in its extra host_key (ssh-keyscan shows it;"
            " compare it with the server's own), or add it to known_hosts"
        )
    return HostKeys(tuple(trusted), tuple(authorities), tuple(revoked))


def _pinned(text: str) -> asyncssh.SSHKey:
    words = text.split()
    for start in (
        " ".join(words),
        f"ssh-rsa {text.strip()}",
        " ".join(words[1:]),
    ):  # a line of known_hosts, too
        with suppress(asyncssh.KeyImportError, ValueError):
            return asyncssh.import_public_key(start)
    raise _Wrong('has an extra host_key that is no public key: it must look like "ssh-ed25519 AAAA..."')


def _known_hosts_files(extra: Mapping[str, Any], reached: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    if "known_hosts" in extra:
        return [Path(extra["known_hosts"]).expanduser()]
    of_user = _from(reached, "UserKnownHostsFile") or ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"]
    of_all = _from(reached, "GlobalKnownHostsFile") or _OF_ALL
    return [Path(name).expanduser() for name in (*of_user, *of_all)]


def _load(known: asyncssh.SSHKnownHosts, path: Path) -> None:
    """Take in the lines of a file; what cannot be understood is skipped, as OpenSSH does."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _Wrong(f"needs {path}, which cannot be read on this machine: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        # Its names in lower case, as OpenSSH compares them; others than ASCII are in comments.
        text = _NAMES.sub(lambda found: found[0].lower(), line.decode("ascii", "backslashreplace"))
        try:
            known.load(text)
        except ValueError as error:
            log.warning("%s, line %s, is skipped: %s", path, number, to_text(str(error).encode()))


# --- for asyncssh -----------------------------------------------------------------------------------


def _options(account: SshAccount) -> asyncssh.SSHClientConnectionOptions:
    has_password = account.password is not None
    client_key = (account.key, account.certificate) if account.certificate is not None else account.key
    chosen = {**account.algorithms, **_host_key_algorithms(account, account.host_keys)}
    try:
        return asyncssh.SSHClientConnectionOptions(
            account.options,
            known_hosts=account.host_keys.for_asyncssh(),
            client_keys=None if client_key is None else [client_key],
            password=account.password,
            preferred_auth=["publickey", *["password", "keyboard-interactive"] * has_password],
            public_key_auth=account.key is not None,
            password_auth=has_password,
            kbdint_auth=has_password,
            host_based_auth=False,
            gss_auth=False,
            gss_kex=False,
            compression_algs=["none"],  # what it is asked to decompress has no bound; see `ssh_program`
            connect_timeout=account.patience + CONNECT,  # which is for both in asyncssh
            login_timeout=CONNECT,
            keepalive_interval=KEEPALIVE,
            **_proxy(account.options),
            **chosen,
        )
    except ValueError as error:
        raise _Wrong(
            f"asks for what there is not: {error}. See its extras ciphers, disabled_algorithms"
        ) from error


def _host_key_algorithms(account: SshAccount, keys: HostKeys) -> dict[str, Any]:
    """Return which kinds of host keys to ask for: of those that are trusted, or else any, to tell it."""
    if "server_host_key_algs" in account.algorithms or account.options.config.get("HostKeyAlgorithms"):
        return {}
    signed = get_default_certificate_algs() if keys.authorities else []
    trusted = [name for key in keys.trusted for name in key.sig_algorithms]
    names = dict.fromkeys([*signed, *trusted, *get_default_public_key_algs()])
    return {"server_host_key_algs": [name.decode() for name in names]}


def _proxy(reached: asyncssh.SSHClientConnectionOptions) -> dict[str, Any]:
    """Return the ProxyCommand, if any: a line for the shell, as for ssh; asyncssh would split it at blanks.

    What it writes to standard error would be taken for words of the server, and its end for that of the
    connection: so it stays open, elsewhere.
    """
    line = reached.config.get("ProxyCommand")
    return {} if line is None else {"proxy_command": ["/bin/sh", "-c", f"exec 3>&2 2>/dev/null; exec {line}"]}


def _seconds(extra: Mapping[str, Any], name: str, default: int) -> int:
    try:
        return int(extra.get(name, default))
    except (TypeError, ValueError):
        raise _Wrong(f"has an extra {name} that is no number of seconds") from None


def _algorithms(extra: Mapping[str, Any], reached: asyncssh.SSHClientConnectionOptions) -> dict[str, Any]:
    """Return which algorithms are to be used, where the connection says that."""
    chosen: dict[str, Any] = {}
    for name, without in extra.get("disabled_algorithms", {}).items():
        if (
            name not in _ALGORITHMS
            or not isinstance(without, list)
            or not all(isinstance(a, str) for a in without)
        ):
            raise _Wrong(f"has an extra disabled_algorithms that is not {_EXAMPLES[dict]}")
        if without:
            chosen[_ALGORITHMS[name]] = "-" + ",".join(without)
    if "ciphers" in extra:
        chosen["encryption_algs"] = extra["ciphers"]
    elif not reached.config.get("Ciphers"):
        chosen.setdefault("encryption_algs", f"^{_FAST}")
    return chosen
