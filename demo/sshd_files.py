"""What the throw-away OpenSSH server of `demo.sshd` reads: keys, account files and configuration."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SERVER_PROGRAMS_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


class ProviderServerError(RuntimeError):
    """The throw-away OpenSSH server cannot be started or removed; the message says what to do."""


def program(name: str) -> str:
    """Return the path of an installed program, looking where servers are kept too.

    :raises ProviderServerError: it is not installed.
    """
    path = shutil.which(name, path=SERVER_PROGRAMS_PATH)
    if path is None:
        raise ProviderServerError(
            f"The program {name} is missing. `make system-packages` installs what is needed as root; "
            "otherwise ask for the OpenSSH server and client (Debian: openssh-server openssh-client)."
        )
    return path


def run(command: Sequence[str | Path]) -> None:
    """Run `command` to its end.

    :raises ProviderServerError: it is not installed, or failed; with what it wrote to stderr.
    """
    name, *arguments = map(str, command)
    done = subprocess.run([program(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ProviderServerError(f"`{' '.join([name, *arguments])}` failed: {done.stderr.strip()}")


def new_key(path: Path) -> str:
    """Make an ed25519 key pair at `path`, and return its public half as `ssh-ed25519 AAAA...`."""
    public = Path(f"{path}.pub")
    for old in (path, public):
        old.unlink(missing_ok=True)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path])
    return public.read_text().strip()


def write_private_accounts(folder: Path, backupop: str, index_user: str) -> tuple[int, int]:
    """Copy the machine's passwd, group and shadow into `folder`, with two accounts added.

    Accounts of the same names that the machine may have are left out of the copies.

    :return: the user id and the group id of the index account, free on this machine.
    """
    taken = {account.pw_uid for account in pwd.getpwall()} | {group.gr_gid for group in grp.getgrall()}
    first, second = [number for number in range(59000, 60000) if number not in taken][:2]
    added = {
        "passwd": [
            f"{backupop}:x:{first}:{first}::/:/bin/false",
            f"{index_user}:x:{second}:{second}::/:/bin/sh",
        ],
        "group": [f"{backupop}:x:{first}:", f"{index_user}:x:{second}:"],
        # Without PAM, sshd refuses an account locked with "!"; "*" merely is no password's hash.
        "shadow": [f"{name}:*:20000:0:99999:7:::" for name in (backupop, index_user)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in added.items():
        original, private = Path("/etc", name), folder / name
        kept = [
            line
            for line in original.read_text().splitlines()
            if line.split(":")[0] not in (backupop, index_user)
        ]
        private.touch(mode=0o600)
        private.write_text("\n".join([*kept, *lines]) + "\n")
        private.chmod(original.stat().st_mode & 0o777)
    return second, second


def write_authorized_keys(folder: Path, keys: Sequence[tuple[str, str]]) -> None:
    """Write `folder`/<user> with a line for each (user, line) of `keys`; two lines may be of one user."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for user in {user for user, _ in keys}:
        file = folder / user
        file.write_text("".join(f"{line}\n" for owner, line in keys if owner == user))
        file.chmod(0o644)


def configuration(
    *, folder: Path, port: int, users: Sequence[str], subsystem: str, strict_modes: bool
) -> list[str]:
    """Return the lines of an sshd_config for key logins of `users` on 127.0.0.1.

    :param folder: where sshd sees its host_key and authorized_keys/<user>.
    """
    settings = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f'HostKey "{folder}/host_key"',
        f'AuthorizedKeysFile "{folder}/authorized_keys/%u"',
        "AuthenticationMethods publickey",
        "PasswordAuthentication no",
        "UsePAM no",
        "UseDNS no",
        "PermitRootLogin no",
        f"StrictModes {'yes' if strict_modes else 'no'}",
        f"AllowUsers {' '.join(users)}",
        "PidFile none",
        "LogLevel VERBOSE",
        "MaxStartups 100:30:200",
        f"Subsystem {subsystem} internal-sftp",
    ]
    if _knows_option("PerSourcePenalties"):
        # All clients come from 127.0.0.1, which tests of wrong keys would soon shut out.
        settings.insert(0, "PerSourcePenalties no")
    return settings


def chroot_settings(*, user: str, chroot: str, sftp_options: str) -> list[str]:
    """Return the lines of an sshd_config that leave `user` nothing but SFTP inside `chroot`."""
    return [
        f"Match User {user}",
        f"ChrootDirectory {chroot}",
        f"ForceCommand internal-sftp {sftp_options}",
        "DisableForwarding yes",
        "PermitTTY no",
    ]


def _knows_option(option: str) -> bool:
    probe = [program("sshd"), "-t", "-f", "/dev/null", "-o", f"{option}=no"]
    answer = subprocess.run(probe, capture_output=True, text=True)
    return "Bad configuration option" not in answer.stderr
