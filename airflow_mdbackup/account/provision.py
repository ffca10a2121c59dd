"""The script that turns a server into a provider: two accounts, their restrictions, the indexer.

    setup = Setup(name=..., backupop=Account(...), chroot=..., source=..., ...)    # validates everything
    script(setup)                     # for the administrator of A, who reads it and runs it as root
    undo_script(setup.name)           # removes the setup; needs only its name

Nothing is contacted or changed from here. The scripts are templates next to this file: ``provision.sh.j2``
and ``undo.sh.j2``, which share ``common.sh.j2``, and the systemd service ``index.service.j2``.

The values end up in six formats with different quoting rules: shell, sshd_config, authorized_keys, fstab,
systemd units and crontab. So that none of them needs quoting, paths may contain plain characters only.
``source`` and ``exclude``, which go into the indexer's JSON, may contain anything printable.
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
"""Options of internal-sftp that allow only what is needed to read files by name: sftp-server(8)."""

_LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
_PLAIN = "._/+@=~,-"
_HOST = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9.:_-]{0,252}[A-Za-z0-9])?")
_PUBLIC_KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]+={0,3}")
_CALENDAR = re.compile(r"[A-Za-z0-9*][A-Za-z0-9*:,./~ _+-]*")
_CRON_FIELD = r"[0-9A-Za-z*][0-9A-Za-z*,/-]*"
_CRON = re.compile(rf"@(?:hourly|daily|weekly|monthly)|{_CRON_FIELD}(?: {_CRON_FIELD}){{4}}")
_ADDRESS = re.compile(r"[0-9A-Fa-f.:]+(/[0-9]+)?")
# To check without B's address: localhost, and two examples of any other (RFC 5737, RFC 3849).
_SAMPLE_ADDRESSES = ("127.0.0.1", "192.0.2.1", "2001:db8::1")
# It contains sshd's private keys, which sshd refuses if they have an ACL.
_SSHD_KEYS = "/etc/ssh"
# Placeholders, which the script replaces on A.
_HOST_KEY, _HOST_NAME, _PORT = "@HOST_KEY@", "@HOST@", "@PORT@"


class CannotProvision(ValueError):
    """A value cannot be written into the script. The message says what to change."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account on A, and how B connects to it.

    :param login: its name on A.
    :param connection_id: B's Airflow connection.
    :param key_file: path of the private key on B.
    :param public_key: the public key, ``ssh-ed25519 AAAA...``; may be empty until `script` is called.
    """

    login: str
    connection_id: str
    key_file: str
    public_key: str = ""


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory of A that is mounted read-only where `backupop` sees it. Both are paths on A."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Setup:
    """The setup of A. The constructor refuses values that cannot be written into the script safely.

    :param provider: the provider's name on B.
    :param name: its name on A, used for files and systemd units.
    :param backupop: the account that reads.
    :param indexer: the account that builds the index when B asks; None if A builds it itself.
    :param chroot: the directory on A that `backupop` sees as ``/``.
    :param source: the paths to index, as `backupop` sees them.
    :param index: the path of the index, as `backupop` sees it.
    :param exclude: gitignore patterns.
    :param binds: each `target` must be below `chroot`.
    :param subsystem: ``sftp``, which sshd already has, or ``sftpi``, which is added.
    :param addresses: the addresses or networks from which B may connect; empty: any.
    :param timer: a calendar expression of systemd.time(7), or None.
    :param path_unit: build whenever files are added to one of the sources. It needs `timer`, too.
    :param cron: when cron builds the index, in the five fields of crontab(5), or None.
    :param indexer_options: further keys of the indexer's configuration.
    :param host: A's name for B; None: A's own host name.
    :param port: A's SSH port; None: the one on which A's sshd listens.
    :raises CannotProvision: a value is malformed.
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
        _check_name(self.name)
        self._check_accounts()
        if self.chroot == "/":
            raise CannotProvision(
                "the chroot is `/`, so `backupop` would see the whole server: create a directory, such as"
                " /home/backupop, and mount into it what is to be backed up"
            )
        _check_printable("provider", self.provider)
        for path in (*self.source, *self.exclude):
            _check_printable("source or exclude", path)
        if self.host is not None:
            _check_form("host", self.host, _HOST, "is not a host name or address")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise CannotProvision(f"port {self.port} is not from 1 to 65535")
        _check_plain("chroot", self.chroot)
        _check_plain("index", self.index)
        for path in self.source if self.path_unit else ():
            _check_plain("source", path)
        self._check_index()
        self._check_binds()
        self._check_schedule()
        for address in self.addresses:
            _check_address(address)

    @property
    def _accounts(self) -> tuple[Account, ...]:
        return (self.backupop, self.indexer) if self.indexer else (self.backupop,)

    @property
    def index_directory(self) -> str:
        """The directory of the index, as a path on A."""
        return (self.chroot + self.index.rpartition("/")[0]).rstrip("/")

    @property
    def source_paths(self) -> tuple[str, ...]:
        """The sources, as paths on A."""
        return tuple((self.chroot + path).rstrip("/") for path in self.source)

    @property
    def real_paths(self) -> tuple[str, ...]:
        """The real directories of the sources' files: those that are mounted, or in the chroot."""
        found: dict[str, None] = {}
        for path in self.source_paths:
            inside = [bind.source for bind in self.binds if _below(bind.target, path)]
            around = [
                bind.source + path[len(bind.target) :] for bind in self.binds if _below(path, bind.target)
            ]
            found |= dict.fromkeys(inside or around or [path])
        return tuple(found)

    @property
    def test_addresses(self) -> tuple[str, ...]:
        """The addresses for which A's sshd is checked: of each network, the first and last."""
        networks = [ipaddress.ip_network(address) for address in self.addresses]
        ends = [str(network[end]) for network in networks for end in (0, -1)]
        return tuple(dict.fromkeys(ends)) or _SAMPLE_ADDRESSES

    @property
    def addresses_are_exact(self) -> bool:
        """Whether B's keys are restricted to single addresses, so that all of them can be checked."""
        networks = [ipaddress.ip_network(address) for address in self.addresses]
        return bool(networks) and all(network.num_addresses == 1 for network in networks)

    def _check_accounts(self) -> None:
        for account in self._accounts:
            why = "must be at most 31 lowercase letters, digits, `_` and `-`"
            _check_form("account", account.login, _LOGIN, why)
            if account.public_key:
                _check_form(
                    "public key", account.public_key, _PUBLIC_KEY, "is not of the form `ssh-ed25519 AAAA...`"
                )
            _check_printable("connection", account.connection_id)
            _check_printable("key file", account.key_file)
            if account.login == "root":
                raise CannotProvision("the account `root` cannot be restricted: choose another name")
        if self.indexer and self.indexer.login == self.backupop.login:
            raise CannotProvision("the two accounts must have different names")
        if self.indexer and self.indexer.connection_id == self.backupop.connection_id:
            raise CannotProvision(
                f"both accounts would use the connection {self.backupop.connection_id!r}: choose a separate"
                " one for each, by `sftp_conn_id` and `ssh_conn_id`"
            )

    def _check_index(self) -> None:
        if self.indexer and self.index_directory == self.chroot:
            raise CannotProvision(
                f"the index {self.index} would be in the chroot itself, where only root can write: choose a"
                " separate directory, as in `index: /.mdbackup/index.md5`"
            )
        if self.index_directory in self.source_paths and self.path_unit:
            raise CannotProvision(
                f"the index {self.index} is in a source, and writing it would start the next build: choose a"
                " separate directory, or --timer"
            )
        if self.indexer and any(_below(path, self.index_directory) for path in self.source_paths):
            raise CannotProvision(
                f"the index {self.index} is in a directory with files to back up, which the index account"
                " could change: choose a separate directory, as in `index: /.mdbackup/index.md5`"
            )

    def _check_binds(self) -> None:
        targets: list[str] = []
        for bind in self.binds:
            for path in (bind.source, bind.target):
                _check_plain("bind", path)
            if not bind.target.startswith(self.chroot + "/"):
                raise CannotProvision(f"{bind.target} is not below the chroot {self.chroot}")
            for other in targets:
                if _below(bind.target, other) or _below(other, bind.target):
                    raise CannotProvision(
                        f"{bind.target} and {other} are the same, or one is inside the other"
                    )
            if _below(self.index_directory, bind.target):
                raise CannotProvision(
                    f"the index {self.index} would be in {bind.target}, which is mounted read-only"
                )
            targets.append(bind.target)

    def _check_schedule(self) -> None:
        if self.path_unit and self.timer is None:
            raise CannotProvision("a path unit misses some changes, so it needs a timer as well")
        if self.cron and self.timer:
            raise CannotProvision("choose either cron or a systemd timer")
        if self.timer is not None:
            _check_form(
                "calendar", self.timer, _CALENDAR, "is not a calendar expression, such as `daily` or `*:0/15`"
            )
        if self.cron is not None:
            _check_form(
                "cron", self.cron, _CRON, "does not have the five fields of cron, such as `30 2 * * *`"
            )


def script(setup: Setup) -> str:
    """Return the script that sets A up, in POSIX sh, for the account root.

    :raises CannotProvision: an account has no key yet.
    """
    if not all(account.public_key for account in setup._accounts):
        raise CannotProvision("an account without a key of B cannot be used")
    return _templates().get_template("provision.sh.j2").render(_context(setup))


def _context(setup: Setup) -> dict[str, object]:
    """Return the values for the template."""
    python_indexer = python_program().decode()
    shell_indexer = shell_program(_index_request(setup)).decode()
    return {
        "version": __version__,
        "provider": setup.provider,
        "name": setup.name,
        "backupop": setup.backupop,
        "indexer": setup.indexer,
        "chroot": setup.chroot,
        "index_directory": setup.index_directory,
        "index_name": setup.index.rpartition("/")[2],
        "source_paths": setup.source_paths,
        "mounts": [setup.chroot, *(bind.target for bind in setup.binds)],
        "binds": setup.binds,
        "granted": [path for path in setup.real_paths if not _below(_SSHD_KEYS, path)],
        "not_granted": [path for path in setup.real_paths if _below(_SSHD_KEYS, path)],
        "subsystem": setup.subsystem,
        "test_addresses": setup.test_addresses,
        "addresses_are_exact": setup.addresses_are_exact,
        "timer": setup.timer,
        "path_unit": setup.path_unit,
        "cron": setup.cron,
        "host": setup.host or _HOST_NAME,
        "port": str(setup.port or _PORT),
        "sftp_options": SFTP_OPTIONS,
        "key_options": "restrict" + (f',from="{",".join(setup.addresses)}"' if setup.addresses else ""),
        "indexer_config": _indexer_config(setup),
        "connection_lines": _connection_lines(setup),
        "python_indexer": python_indexer,
        "python_indexer_sum": hashlib.sha256(python_indexer.encode()).hexdigest(),
        "python_delimiter": _delimiter(python_indexer),
        "shell_indexer": shell_indexer,
        "shell_indexer_sum": hashlib.sha256(shell_indexer.encode()).hexdigest(),
        "shell_delimiter": _delimiter(shell_indexer),
    }


def undo_script(name: str) -> str:
    """Return the script that undoes the setup of `script` with this name.

    :raises CannotProvision: the name is malformed.
    """
    _check_name(name)
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
    config: dict[str, object] = {
        "chroot": setup.chroot,
        "source": list(setup.source),
        "index": setup.index,
        "exclude": list(setup.exclude),
        "nice": 10,
    }
    return json.dumps({**config, **setup.indexer_options}, indent=2)


def _index_request(setup: Setup) -> IndexRequest:
    """Return the JSON of `_indexer_config` as a request, for the shell, which cannot parse it."""
    config = json.loads(_indexer_config(setup))
    for key in ("chroot", "index"):
        config[key] = config[key].encode()
    config["source"] = tuple(path.encode() for path in config["source"])
    config["exclude"] = tuple(config["exclude"])
    return IndexRequest(**config)


def _connection_lines(setup: Setup) -> list[str]:
    """Return the commands for B. The script fills in A's host key, and its name and port if unknown."""
    lines = []
    for account in setup._accounts:
        extra = {"key_file": account.key_file, "host_key": _HOST_KEY}
        if account is setup.backupop and setup.subsystem != "sftp":
            extra["subsystem"] = setup.subsystem
        words = ["airflow", "connections", "add", account.connection_id]
        words += ["--conn-type", "sftp" if account is setup.backupop else "ssh"]
        words += ["--conn-host", setup.host or _HOST_NAME, "--conn-port", str(setup.port or _PORT)]
        words += ["--conn-login", account.login, "--conn-extra", json.dumps(extra)]
        lines.append(shlex.join(words))
    return lines


def _delimiter(program: str) -> str:
    """Return a delimiter for the here-document with ``program``: a line that is not in it."""
    delimiter = "END_OF_PROGRAM"
    while delimiter in program.splitlines():
        delimiter += "_"
    return delimiter


def _below(path: str, directory: str) -> bool:
    return f"{path}/".startswith(directory.rstrip("/") + "/")


def _check_name(name: str) -> None:
    _check_form("name", name, _NAME, "must consist of lowercase letters, digits, `_` and `-`")


def _check_form(what: str, value: str, form: re.Pattern[str], why: str) -> None:
    if not form.fullmatch(value):
        raise CannotProvision(f"{what} {value!r} {why}")


def _check_printable(what: str, value: str) -> None:
    if not value.isprintable() or "@HOST" in value or "@PORT@" in value:
        raise CannotProvision(
            f"{what} {value!r} has characters that cannot be written into a script: rename it"
        )


def _check_plain(what: str, path: str) -> None:
    """Refuse a path that sshd_config, fstab, systemd or a here-document would not take literally."""
    if not path.startswith("/") or not all(letter.isalnum() or letter in _PLAIN for letter in path):
        raise CannotProvision(
            f"{what} {path!r} cannot be written into the configuration of sshd, fstab and systemd: it must be"
            f" absolute, of letters, digits and {' '.join(_PLAIN)}. Rename it, or mount it elsewhere"
        )
    try:
        check_path(path)
    except ValueError as error:
        raise CannotProvision(f"{what} {error}") from error


def _check_address(address: str) -> None:
    # Python accepts any zone of an IPv6 address, and sshd none.
    _check_form(
        "address",
        address,
        _ADDRESS,
        "is not an address or network. Names do not work here, since sshd does not look them up",
    )
    try:
        ipaddress.ip_network(address)
    except ValueError as error:
        raise CannotProvision(f"address {address!r} is not an address or network: {error}") from error
