"""Free space on the disk of ``dest``, and messages for its errors.

Source: errno(3), statvfs(3).
"""

from __future__ import annotations

import errno
import os
import pwd
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.errors import (
    BackupError,
    DestinationBroken,
    DestinationFull,
    DestinationRefused,
    WorkerExhausted,
)

NO_LIMIT = sys.maxsize
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)
_BROKEN = (
    *(errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO),
    *(errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),  # on network and FUSE file systems
)
_MISTAKEN = {
    errno.EISDIR: "is a directory, where the backup has a file. (Docker makes a directory where a file that"
    " it is to mount is missing.)",
    errno.ENOTDIR: "is not a directory, where the backup has one.",
}
_FILES = (errno.EMFILE, errno.ENFILE)


class Space(NamedTuple):
    """Space on a disk, needed or free."""

    size: int
    files: int

    def __str__(self) -> str:
        return format_size(self.size) + (f" and {self.files:,} inodes" if self.files < NO_LIMIT else "")

    def holds(self, need: Space) -> bool:
        """Whether ``need`` fits."""
        return need.size <= self.size and need.files <= self.files


def free_space(directory: Path) -> Space:
    """Return the free space on the disk of ``directory``; not every disk counts its bytes or files."""
    disk = os.statvfs(directory)
    size = disk.f_bavail * disk.f_frsize if disk.f_blocks else NO_LIMIT
    return Space(size, disk.f_favail if disk.f_files else NO_LIMIT)


def explain_os_error(error: OSError, provider: str, dest: Path) -> BackupError | None:
    """Return what an error of ``dest`` or of the worker means and what to do; None for other errors.

    It must not be about a single file of the backup: such files fail alone, and the others arrive.
    """
    here = f"{dest} on {socket.gethostname()}"
    number = error.errno
    if number in _FULL:
        return DestinationFull(
            f"{provider}: the disk of {here} is full: {error} ({_free_now(dest)}). Pulled files "
            "stay staged. Free some space, or enlarge the disk (or the quota); a retry, or else the next "
            "run, continues from there."
        )
    if number == errno.EROFS:
        return DestinationRefused(
            f"{provider}: the disk of {here} is mounted read-only: {error}. Unless that is "
            "intended, the kernel did it after an error: see its log (dmesg), check the file system, mount "
            "it for writing, and clear the failed task."
        )
    if number in _BROKEN:
        return DestinationBroken(
            f"{provider}: the disk of {here} fails: {error}. Files that are complete there stay. "
            "See the kernel's log (dmesg) and whether the disk is still mounted; a retry, or else the next "
            "run, continues from there."
        )
    if number in _FILES:
        return WorkerExhausted(
            f"{provider}: {socket.gethostname()} cannot open more files for {dest}: {error}. Raise the limit "
            "of the worker (ulimit -n, LimitNOFILE) or of the machine (fs.file-max), or run fewer tasks at "
            "once; a retry, or else the next run, continues from there."
        )
    if number == errno.ENOMEM:
        return WorkerExhausted(
            f"{provider}: {socket.gethostname()} has no memory left for {dest}: {error}. Give it more, or "
            "run fewer tasks at once; a retry, or else the next run, continues from there."
        )
    if number in _MISTAKEN:
        return DestinationRefused(
            f"{provider}: {_name(error)} on {socket.gethostname()} {_MISTAKEN[number]} Move it away; a "
            "retry, or else the next run, continues from there."
        )
    if number in _DENIED:
        return DestinationRefused(
            f"{provider}: {dest} cannot be used by {_user()} on {socket.gethostname()}: {error.strerror}: "
            f"{_name(error)}. As root: {_give(dest)}"
        )
    return None


def _free_now(dest: Path) -> str:
    try:
        return f"{free_space(dest)} are free"
    except OSError:
        return "free space unknown"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _give(dest: Path) -> str:
    """Return the command that gives us access to ``dest``."""
    command = f"chown -R {_user()}" if os.path.exists(dest) else f"install -d -o {_user()} -m 700"
    return f"{command} {dest}"


def _name(error: OSError) -> str:
    name = error.filename if error.filename2 is None else error.filename2  # the target, of a rename
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
