"""A server that is strict but for what a test loosens, and what an audit of it came to.

Each server here has one layer of defence only, so that there is something to see when one setting goes: for
the backup account sshd_config, for the index account the options of its key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from demo.sshd import STRICT_SFTP_OPTIONS, ProviderServer

SetConnection = Callable[[str, dict[str, Any]], None]

STRICT_SSHD = {
    "ForceCommand": f"internal-sftp {STRICT_SFTP_OPTIONS}",
    "ChrootDirectory": "{chroot}",
    "AllowTcpForwarding": "no",
    "AllowStreamLocalForwarding": "no",
    "AllowAgentForwarding": "no",
    "X11Forwarding": "no",
    "PermitTTY": "no",
    "PermitTunnel": "no",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
}

# What an installed indexer does at first; it keeps each line that it gets, and none must ever come.
STAND_IN = """\
#!/bin/sh
if [ $# != 0 ]; then echo "usage: indexer, without arguments"; exit 2; fi
echo "mdbackup ready request"
if read -r line; then echo "$line" >> INDEX_FOLDER/requests; fi
"""
STRICT_KEY = 'restrict,command="/etc/ssh/stand-in"'


@dataclass
class SetUp:
    """How a server and the connections to it differ from the strict ones; None: that setting is left out."""

    backupop: Mapping[str, str | None] = field(default_factory=dict)
    index: Mapping[str, str | None] = field(default_factory=dict)
    index_key: str = STRICT_KEY
    stand_in: str = STAND_IN
    shell: str = "/bin/false"
    subsystem: str = "sftp"
    everywhere: str = ""
    tmp_in_chroot: bool = False
    empty_password: bool = False
    sftp_extra: Mapping[str, Any] = field(default_factory=dict)
    ssh_extra: Mapping[str, Any] = field(default_factory=dict)


class Server(ProviderServer):
    """A server that is set up in a certain way."""

    def __init__(self, folder: Path, set_up: SetUp) -> None:
        super().__init__(folder, subsystem=set_up.subsystem, way="namespace")
        self.set_up = set_up

    def _write_server_files(self, *, seen_as: Path) -> None:
        super()._write_server_files(seen_as=seen_as)
        set_up = self.set_up
        common, _, _ = (self._ssh / "sshd_config").read_text().partition("Match User")
        lines = [
            line
            for line in common.splitlines()
            if not line.startswith(("AuthenticationMethods", "PasswordAuthentication"))
        ]
        if set_up.everywhere:
            lines = [set_up.everywhere, *[line for line in lines if not line.startswith("Subsystem")]]
        keys_only = {name: value for name, value in STRICT_SSHD.items() if name.endswith("Authentication")}
        for user, settings in (
            (self.backupop, STRICT_SSHD | set_up.backupop),
            (self.index_user, keys_only | set_up.index),
        ):
            lines.append(f"Match User {user}")
            for name, value in settings.items():
                if value is not None:
                    lines.append(f"{name} {value.format(chroot=self.chroot)}")
        (self._ssh / "sshd_config").write_text("\n".join(lines) + "\n")

        for user, options in ((self.backupop, ""), (self.index_user, set_up.index_key)):
            file = self._ssh / "authorized_keys" / user
            key = file.read_text().removeprefix("restrict ")
            file.write_text(f"{options} {key}".lstrip())
        stand_in = self._ssh / "stand-in"
        stand_in.write_text(set_up.stand_in.replace("INDEX_FOLDER", f"{self.chroot}/.mdbackup"))
        stand_in.chmod(0o755)
        if set_up.empty_password:
            shadow = self.folder / "etc" / "shadow"
            shadow.write_text(shadow.read_text().replace(f"{self.backupop}:*:", f"{self.backupop}::"))
        passwd = self.folder / "etc" / "passwd"
        passwd.write_text(passwd.read_text().replace("::/:/bin/false", f"::/:{set_up.shell}"))

    def fill(self) -> None:
        (self.tree / "backups").mkdir()
        (self.tree / "backups" / "xauth").write_text("#!/bin/sh\n")
        (self.tree / "backups" / "xauth").chmod(0o755)
        if self.set_up.tmp_in_chroot:
            (self.tree / "tmp").mkdir()
            (self.tree / "tmp").chmod(0o1777)

    def state(self) -> list[tuple[str, int]]:
        """What is in the tree, with its modes."""
        return sorted((str(path), path.lstat().st_mode) for path in self.tree.rglob("*"))

    def connections(self) -> int:
        """How many TCP connections there were."""
        return self.log_text().count("Connection from")


@dataclass
class Audited:
    """What an audit came to."""

    status: int
    document: dict[str, Any]
    connections: int
    seconds: float
    left: list[str]  # in the tree, and in the server's /tmp

    def of(self, verdict: str) -> set[str]:
        short = {"backup account": "backupop", "index account": "index"}
        return {
            f"{short[found['account']]}: {found['check']}"
            for found in self.document["findings"]
            if found["verdict"] == verdict
        }

    def seen(self, account: str, check: str) -> str:
        (found,) = [
            found
            for found in self.document["findings"]
            if found["account"] == account and found["check"] == check
        ]
        return str(found["seen"])


@contextmanager
def serving(
    set_up: SetUp, folder: Path, set_connection: SetConnection, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server, and a provider `web` that is configured for it."""
    with Server(folder / "server", set_up) as server:
        server.fill()
        set_connection("backupop", server.sftp_connection(**set_up.sftp_extra))
        set_connection("index", server.ssh_connection(**set_up.ssh_extra))
        file = folder / "providers.yaml"
        file.write_text(
            "providers:\n  web:\n    sftp_conn_id: backupop\n    ssh_conn_id: index\n"
            f"    chroot: {server.chroot}\n    source: /backups\n    dest: {folder}/dest\n"
        )
        monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(file))
        yield server
