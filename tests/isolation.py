"""What a run of the tests has to itself, and each of its processes: so they neither disturb each other nor
leave anything behind, however they end.

A run is one `pytest` command with all its worker processes (pytest-xdist). It has two directories: one in
memory, where there is room and time is short, and one on the disk, for tests that are about disks (marked
`real_disk`). Both are held by a lock that the kernel releases when the run ends, so that a
later run knows which directories nobody uses any more, and removes them.

Each process that runs tests, if it may, has mounts of its own, a copy of /etc, and an empty /srv: what is
mounted and the accounts that are made in there are seen by nobody else, and gone when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.torture import LONG

PREFIX = "mdbackup-tests-"
ROOM = 6 << 30
"""Bytes of memory that must be free for the tests to write there: they use some 2 GiB of it, and a few
Airflows run beside them."""

_MEMORY = Path("/dev/shm")  # see shm_overview(7)
_PROJECT = Path(__file__).resolve().parents[1]
_VARIABLE = "MDBACKUP_TESTS"  # names both directories to the worker processes of a run
_CLONE_NEWNS, _PR_SET_PDEATHSIG = 0x00020000, 1  # see unshare(2), prctl(2)


class Scratch:
    """The two directories of this run of the tests.

    :ivar quick: in memory, if there is room for it. TMPDIR of this process and of those that it starts.
    :ivar disk: on a disk. The same as `quick` if there is no other place.
    """

    def __init__(self) -> None:
        self._locks: list[int] = []
        if _VARIABLE in os.environ:  # a worker process
            self.quick, self.disk = map(Path, os.environ[_VARIABLE].split(os.pathsep))
        else:
            disk = Path(os.environ.get("TMPDIR", "/var/tmp"))  # /tmp is often in memory
            quick = _MEMORY if _has_room() and "TMPDIR" not in os.environ and not LONG else disk
            remove_abandoned({quick, disk, _MEMORY})
            self.quick = self._make(quick)
            self.disk = self.quick if quick == disk else self._make(disk)
            os.environ[_VARIABLE] = os.pathsep.join(map(str, (self.quick, self.disk)))
        os.environ["TMPDIR"] = str(self.quick)
        tempfile.tempdir = None

    @property
    def is_ours(self) -> bool:
        """Whether this process has made the directories, and so is not a worker."""
        return bool(self._locks)

    def remove(self) -> None:
        """Remove the directories; only the process that made them does so."""
        if self.is_ours:
            remove(self.quick)
            remove(self.disk)

    def _make(self, parent: Path) -> Path:
        """Make a directory that others may enter, as the SSH servers' accounts must, and hold its lock."""
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        folder.chmod(0o755)
        lock = os.open(folder / "new-lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(folder / "new-lock", folder / "lock")  # whoever finds it, finds it held
        self._locks.append(lock)
        return folder


def remove_abandoned(parents: set[Path]) -> None:
    """Remove the directories of runs that have ended without doing it, because they failed or were killed."""
    for folder in (folder for parent in parents for folder in parent.glob(f"{PREFIX}*")):
        try:
            lock = os.open(folder / "lock", os.O_RDWR)
        except OSError:  # it is just being made or removed, or somebody else's
            continue
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
        os.close(lock)


def isolate_process() -> None:
    """End this process with the one that started it, and give it mounts, /etc and /srv of its own if it may.

    Only for a process that runs tests: threads that it has already keep the mounts of before.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        end_with_parent()
    if os.geteuid() != 0 or not enter_private_mounts():
        return
    etc = Path(tempfile.mkdtemp(prefix="etc-"))
    subprocess.run(["cp", "-a", "/etc/.", etc], check=True)
    subprocess.run(["mount", "--bind", etc, "/etc"], check=True)
    # Empty: what is there may be large, such as backups. But tests, Python and programs must still be found.
    needed = (_PROJECT, Path(tempfile.gettempdir()), Path(sys.prefix), Path(sys.base_prefix))
    if os.path.isdir("/srv") and not any(path.is_relative_to("/srv") for path in needed):
        srv = Path(tempfile.mkdtemp(prefix="srv-"))
        srv.chmod(0o755)
        subprocess.run(["mount", "--bind", srv, "/srv"], check=True)


def may_isolate() -> bool:
    """Return whether processes of this user may have mounts of their own."""
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode == 0
    return False


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends; children do not inherit that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def enter_private_mounts() -> bool:
    """Let this thread, and what it starts, mount and unmount unseen by others; return whether it may."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        return False
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    return True


def _has_room() -> bool:
    if not _MEMORY.is_dir() or not os.access(_MEMORY, os.W_OK):
        return False
    if os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC:  # some tests write programs
        return False
    words = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()
    available = int(words[0]) << 10 if words else 0  # it counts in KiB
    return min(available, shutil.disk_usage(_MEMORY).free) >= ROOM


def remove(folder: Path) -> None:
    """Remove a directory, also where its owner may not read it, and however deep it is."""
    subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
    subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
