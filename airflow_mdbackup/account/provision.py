"""The script that makes a server a provider: two accounts, their restrictions, the indexer.

    setup = Setup(name=..., backupop=Account(...), chroot=..., source=..., ...)    # refuses what it must
    script(setup)                     # for the administrator of A, who reads it and runs it as root
    undo_script(setup.name)           # the reverse; needs no more than the name

Nothing is contacted or changed from here. The texts are the templates beside this file: ``provision.sh.j2``
and ``undo.sh.j2``, which share ``common.sh.j2``, and the systemd service ``index.service.j2``.

Six kinds of text have their own rules of quoting: shell, sshd_config, authorized_keys, fstab, systemd units
and crontab. So that each of them takes a value as it is, the paths that stand in them may have plain
characters only; what goes into the indexer's JSON, ``source`` and ``exclude``, may be anything printable.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from airflow_mdbackup import __version__
from airflow_mdbackup.config.value_types import check_path
from airflow_mdbackup.provider_side.programs import python_program, shell_program
from airflow_mdbackup.provider_side.request import IndexRequest

SFTP_OPTIONS = "-R -p open,close,read,fstat,stat,lstat,realpath,limits"
"""Options of internal-sftp that leave just what reading named files takes: sftp-server(8)."""

_LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
_PLAIN = "._/+@=~,-"
_HOST = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9.:_-]{0,252}[A-Za-z0-9])?")
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]+={0,3}")
_CALENDAR = re.compile(r"[A-Za-z0-9*][A-Za-z0-9*:,./~ _+-]*")
_CRON_FIELD = r"[0-9A-Za-z*][0-9A-Za-z*,/-]*"
_CRON = re.compile(rf"@(?:hourly|daily|weekly|monthly)|{_CRON_FIELD}(?: {_CRON_FIELD}){{4}}")
_ADDRESS = re.compile(r"[0-9A-Fa-f.:]+(/[0-9]+)?")
# Without B's address: this machine's own, and two that stand for any other (RFC 5737, RFC 3849).
_ANY_ADDRESS = ("127.0.0.1", "192.0.2.1", "2001:db8::1")
# sshd refuses its private keys, which are in there, if an ACL is on them.
_SSHD_KEYS = "/etc/ssh"
_HOST_KEY, _SOME_HOST, _SOME_PORT = "@HOST_KEY@", "@HOST@", "@PORT@"


class CannotProvision(ValueError):
    """What is asked for cannot be written into the script; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account on A, and how B comes to it.

    :param login: its name on A.
    :param connection_id: B's Airflow connection.
    :param key_file: where the private key is on B.
    :param public_key: the public key, ``ssh-ed25519 AAAA...``; may be empty until `script` is called.
    """

    login: str
    connection_id: str
    key_file: str
    public_key: str = ""


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory of A, mounted read-only where `backupop` sees it; both are paths of A."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Setup:
    """What there is to be on A. Anything that cannot be written down safely is refused when this is made.

    :param provider: the provider's name on B.
    :param name: its name on A, in the names of files and systemd units.
    :param backupop: the account that reads.
    :param indexer: the account that builds the index when B asks; None if A builds it itself.
    :param chroot: the directory that `backupop` sees as ``/``.
    :param source: what is indexed, as `backupop` sees it.
    :param index: the index, as `backupop` sees it.
    :param exclude: gitignore patterns.
    :param binds: `target` as a path of A, below `chroot`.
    :param subsystem: ``sftp``, which sshd has already, or ``sftpi``, which is made beside it.
    :param addresses: where B may come from, as addresses or networks; empty: from anywhere.
    :param timer: a calendar expression of systemd.time(7), or None.
    :param path_unit: build whenever files are added to one of the sources. Wants `timer` too.
    :param cron: when cron builds the index, or None.
    :param indexer_options: further keys of the indexer's configuration.
    :param host: A's name for B; None: what A calls itself.
    :param port: None: what A's sshd listens on.
    :raises CannotProvision: a value is not of its form.
    """

    provider: str
    name: str
    backupop: Account
    indexer: Account | None
    chroot: str
    source: tuple[str, ...]
    index: str = "/.mdbackup/index.md5"
    exclude: tuple[str, ...] = ()
    binds: tuple[Bind, ...] = ()
    subsystem: str = "sftp"
    addresses: tuple[str, ...] = ()
    timer: str | None = None
    path_unit: bool = False
    cron: str | None = None
    indexer_options: Mapping[str, object] = field(default_factory=dict)
    host: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        _matching("name", self.name, _NAME, "is made of lowercase letters, digits, `_` and `-`")
        for account in self._accounts:
            why = "must be lowercase letters, digits, `_` and `-`, at most 31 of them"
            _matching("account", account.login, _LOGIN, why)
            if account.public_key:
                _matching(
                    "public key", account.public_key, _PUBLIC_KEY, "is not of the form `ssh-ed25519 AAAA...`"
                )
            _printable("connection", account.connection_id)
            _printable("key file", account.key_file)
            if account.login == "root":
                raise CannotProvision("the account `root` cannot be restricted: choose another name")
        if self.indexer and self.indexer.login == self.backupop.login:
            raise CannotProvision("the two accounts must have different names")
        if self.indexer and self.indexer.connection_id == self.backupop.connection_id:
            raise CannotProvision(
                f"both accounts would have the connection {self.backupop.connection_id!r}: give each"
                " one of its own, by `sftp_conn_id` and `ssh_conn_id`"
            )
        if self.chroot == "/":
            raise CannotProvision(
                "the chroot is `/`, so that `backupop` would see the whole server: make a directory, such as"
                " /home/backupop, and mount into it what is backed up"
            )
        _printable("provider", self.provider)
        for path in (*self.source, *self.exclude):
            _printable("source or exclude", path)
        if self.host is not None:
            _matching("host", self.host, _HOST, "is no host name or address")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise CannotProvision(f"port {self.port} is not from 1 to 65535")
        _plain("chroot", self.chroot)
        _plain("index", self.index)
        for path in self.source if self.path_unit else ():
            _plain("source", path)
        self._check_index()
        self._check_binds()
        self._check_times()
        for address in self.addresses:
            _check_address(address)

    @property
    def _accounts(self) -> tuple[Account, ...]:
        return (self.backupop, self.indexer) if self.indexer else (self.backupop,)

    @property
    def index_directory(self) -> str:
        """The directory of the index, as a path of A."""
        return (self.chroot + self.index.rpartition("/")[0]).rstrip("/")

    @property
    def watched(self) -> tuple[str, ...]:
        """The sources, as paths of A."""
        return tuple((self.chroot + path).rstrip("/") for path in self.source)

    @property
    def origins(self) -> tuple[str, ...]:
        """Where the files of the sources really are: directories that are mounted, or in the chroot."""
        found: dict[str, None] = {}
        for path in self.watched:
            inside = [bind.source for bind in self.binds if _below(bind.target, path)]
            around = [
                bind.source + path[len(bind.target) :] for bind in self.binds if _below(path, bind.target)
            ]
            found |= dict.fromkeys(inside or around or [path])
        return tuple(found)

    @property
    def tried_addresses(self) -> tuple[str, ...]:
        """From where A's sshd is asked what it does: B's addresses, of networks the first and the last."""
        networks = [ipaddress.ip_network(address) for address in self.addresses]
        ends = [str(network[end]) for network in networks for end in (0, -1)]
        return tuple(dict.fromkeys(ends)) or _ANY_ADDRESS

    @property
    def addresses_known(self) -> bool:
        """Whether these are all from which B's keys are let in."""
        networks = [ipaddress.ip_network(address) for address in self.addresses]
        return bool(networks) and all(network.num_addresses == 1 for network in networks)

    def _check_index(self) -> None:
        if self.indexer and self.index_directory == self.chroot:
            raise CannotProvision(
                f"the index {self.index} would lie in the chroot itself, where only root may write: give it"
                " a directory of its own, as `index: /.mdbackup/index.md5` does"
            )
        if self.index_directory in self.watched and self.path_unit:
            raise CannotProvision(
                f"the index {self.index} lies in a source, and writing it would start the next build: give it"
                " a directory of its own, or choose --timer"
            )
        if self.indexer and any(_below(path, self.index_directory) for path in self.watched):
            raise CannotProvision(
                f"the index {self.index} lies where backed up files do, and the index account could change"
                " these: give it a directory of its own, as `index: /.mdbackup/index.md5` does"
            )

    def _check_binds(self) -> None:
        targets: list[str] = []
        for bind in self.binds:
            for path in (bind.source, bind.target):
                _plain("bind", path)
            if not bind.target.startswith(self.chroot + "/"):
                raise CannotProvision(f"{bind.target} is not below the chroot {self.chroot}")
            for other in targets:
                if _below(bind.target, other) or _below(other, bind.target):
                    raise CannotProvision(f"{bind.target} and {other} are one, or one is inside the other")
            if _below(self.index_directory, bind.target):
                raise CannotProvision(
                    f"the index {self.index} would lie in {bind.target}, which is mounted read-only"
                )
            targets.append(bind.target)

    def _check_times(self) -> None:
        if self.path_unit and self.timer is None:
            raise CannotProvision("a path unit does not see everything, and wants a timer beside it")
        if self.cron and self.timer:
            raise CannotProvision("cron and a systemd timer are one too many: choose one of them")
        if self.timer is not None:
            _matching(
                "calendar", self.timer, _CALENDAR, "is no calendar expression, such as `daily` or `*:0/15`"
            )
        if self.cron is not None:
            _matching("cron", self.cron, _CRON, "has not the five fields of cron, such as `30 2 * * *`")


def script(setup: Setup) -> str:
    """Return the script that sets A up, in POSIX sh, for the account root.

    :raises CannotProvision: an account has no key yet.
    """
    if not all(account.public_key for account in setup._accounts):
        raise CannotProvision("an account without a key of B is of no use")
    python_indexer = python_program().decode()
    shell_indexer = shell_program(_index_request(setup)).decode()
    context = {
        "version": __version__,
        "provider": setup.provider,
        "name": setup.name,
        "backupop": setup.backupop,
        "indexer": setup.indexer,
        "chroot": setup.chroot,
        "index_directory": setup.index_directory,
        "index_name": setup.index.rpartition("/")[2],
        "watched": setup.watched,
        "mounts": [setup.chroot, *(bind.target for bind in setup.binds)],
        "binds": setup.binds,
        "granted": [path for path in setup.origins if not _below(_SSHD_KEYS, path)],
        "not_granted": [path for path in setup.origins if _below(_SSHD_KEYS, path)],
        "subsystem": setup.subsystem,
        "tried": setup.tried_addresses,
        "addresses_known": setup.addresses_known,
        "timer": setup.timer,
        "path_unit": setup.path_unit,
        "cron": setup.cron,
        "host": setup.host or _SOME_HOST,
        "port": str(setup.port or _SOME_PORT),
        "sftp_options": SFTP_OPTIONS,
        "key_options": "restrict" + (f',from="{",".join(setup.addresses)}"' if setup.addresses else ""),
        "indexer_config": _indexer_config(setup),
        "connection_lines": _connection_lines(setup),
        "python_indexer": python_indexer,
        "python_indexer_sum": hashlib.sha256(python_indexer.encode()).hexdigest(),
        "python_mark": _mark(python_indexer),
        "shell_indexer": shell_indexer,
        "shell_indexer_sum": hashlib.sha256(shell_indexer.encode()).hexdigest(),
        "shell_mark": _mark(shell_indexer),
    }
    return _templates().get_template("provision.sh.j2").render(context)


def undo_script(name: str) -> str:
    """Return the script that takes back what `script` set up under this name.

    :raises CannotProvision: it is no such name.
    """
    _matching("name", name, _NAME, "is made of lowercase letters, digits, `_` and `-`")
    return _templates().get_template("undo.sh.j2").render(name=name)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701  shell is made here, not HTML
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["specifiers"] = lambda text: text.replace("%", "%%")
    return environment


def _indexer_config(setup: Setup) -> str:
    wanted: dict[str, object] = {
        "chroot": setup.chroot,
        "source": list(setup.source),
        "index": setup.index,
        "exclude": list(setup.exclude),
        "nice": 10,
    }
    return json.dumps({**wanted, **setup.indexer_options}, indent=2)


def _index_request(setup: Setup) -> IndexRequest:
    """Return what the JSON of `_indexer_config` says, for the shell, which cannot read that."""
    wanted = json.loads(_indexer_config(setup))
    for key in ("chroot", "index"):
        wanted[key] = wanted[key].encode()
    wanted["source"] = tuple(path.encode() for path in wanted["source"])
    wanted["exclude"] = tuple(wanted["exclude"])
    return IndexRequest(**wanted)


def _connection_lines(setup: Setup) -> list[str]:
    """Return the commands for B; A fills in its host key, and its name and port where they are not known."""
    lines = []
    for account in setup._accounts:
        extra = {"key_file": account.key_file, "host_key": _HOST_KEY}
        if account is setup.backupop and setup.subsystem != "sftp":
            extra["subsystem"] = setup.subsystem
        words = ["airflow", "connections", "add", account.connection_id]
        words += ["--conn-type", "sftp" if account is setup.backupop else "ssh"]
        words += ["--conn-host", setup.host or _SOME_HOST, "--conn-port", str(setup.port or _SOME_PORT)]
        words += ["--conn-login", account.login, "--conn-extra", json.dumps(extra)]
        lines.append(shlex.join(words))
    return lines


def _mark(program: str) -> str:
    """Return a line that ends the here-document with ``program``: one that is not in it."""
    mark = "END_OF_PROGRAM"
    while mark in program.splitlines():
        mark += "_"
    return mark


def _below(path: str, directory: str) -> bool:
    return f"{path}/".startswith(directory.rstrip("/") + "/")


def _matching(what: str, value: str, form: re.Pattern[str], why: str) -> None:
    if not form.fullmatch(value):
        raise CannotProvision(f"{what} {value!r} {why}")


def _printable(what: str, value: str) -> None:
    if not value.isprintable() or "@HOST" in value or "@PORT@" in value:
        raise CannotProvision(f"{what} {value!r} has characters that no script should hold: rename it")


def _plain(what: str, path: str) -> None:
    """Refuse a path that sshd_config, fstab, systemd or a here-document would read as something else."""
    if not path.startswith("/") or not all(letter.isalnum() or letter in _PLAIN for letter in path):
        raise CannotProvision(
            f"{what} {path!r} cannot be written into the configuration of sshd, fstab and systemd alike: it"
            f" must be absolute, of letters, digits and {' '.join(_PLAIN)}. Rename it, or mount it elsewhere"
        )
    try:
        check_path(path)
    except ValueError as error:
        raise CannotProvision(f"{what} {error}") from error


def _check_address(address: str) -> None:
    # Python takes any text for the zone of an IPv6 address, and sshd none.
    _matching(
        "address", address, _ADDRESS, "is no address or network. Names do not work here: sshd looks none up"
    )
    try:
        ipaddress.ip_network(address)
    except ValueError as error:
        raise CannotProvision(f"address {address!r} is no address or network: {error}") from error
