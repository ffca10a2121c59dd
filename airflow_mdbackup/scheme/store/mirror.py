"""The layout of a provider's backup on the consumer's disk.

::

    <dest>/files/<path>                          the mirror, live files
    <dest>/files/<dir>/.old/<name>.<UTC stamp>   versions
    <dest>/index.md5                             the consumer index
    <dest>/.mdbackup/provider-id                 marker: whose backup this is
    <dest>/.mdbackup/lock                        flock, held by whatever changes the mirror
    <dest>/.mdbackup/order                       how many runs have fetched an index
    <dest>/.mdbackup/bandwidth                   when the bandwidth limit allows more
    <dest>/.mdbackup/staging/<md5>               verified files that are not in the mirror yet
    <dest>/.mdbackup/staging/<md5>.part          a large file being received; its writer holds a flock on it
    <dest>/.mdbackup/runs/<run>/                 index, plan, results and archive records of one run
    <dest>/.mdbackup/history/<stamp>_<run>.jsonl what each commit changed
    <dest>/.mdbackup/committed.md5               the consumer index as the last commit left it, to detect
                                                 manual edits, and to restore it from
    <dest>/.mdbackup/upcoming.md5                the same of an unfinished commit
    <dest>/.mdbackup/changing.jsonl              files that changed on the provider while they were pulled
    <dest>/.mdbackup/status.json                 last good run and last commit, and what is on the disk
    <dest>/.mdbackup/verified.json               where the next partial verification begins
    <dest>/.mdbackup/forgetting.md5              the consumer index, while a command of an operator needs it
    <dest>/.mdbackup/adopting.sqlite             what an adoption or import has hashed so far
    <dest>/.mdbackup/verifying                   when its limit allows it to read more

``dest`` is created with mode 0700. Every stored file states its format, and a newer one is refused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.errors import BackupError, DestinationRefused
from airflow_mdbackup.scheme.files.content import write_all
from airflow_mdbackup.scheme.files.disk import explain_os_error
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, write_state
from airflow_mdbackup.scheme.files.syscalls import fsync_directory, make_directory, open_for_owner
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.store.locks import LOCK_WAIT, locked
from airflow_mdbackup.scheme.store.run import REMOVED, Run
from airflow_mdbackup.scheme.store.staging import Staging
from airflow_mdbackup.scheme.store.version_names import (
    is_stamp,
    now_stamp,
    stamp_beside,
    stamp_in_name,
    stamp_of_file,
)

log = logging.getLogger(__name__)
_ORDER_DIGITS = 12
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class Mirror:
    """The backup of one provider below ``dest``.

    :param queue: of the worker, for messages about a backup that is missing on this machine.
    """

    def __init__(self, dest: str | os.PathLike[str], provider: str, queue: str | None = None) -> None:
        self.dest = Path(dest)
        self.provider = provider
        self._queue = queue
        self.files = self.dest / "files"
        self.index = self.dest / "index.md5"
        self._state = self.dest / ".mdbackup"
        self.staging = self._state / "staging"
        self.history = self._state / "history"
        self.status = self._state / "status.json"
        self.committed = self._state / "committed.md5"
        self.next_committed = self._state / "upcoming.md5"
        self.changing = self._state / "changing.jsonl"
        self.bandwidth = self._state / "bandwidth"
        self.verified = self._state / "verified.json"
        self.verifying = self._state / "verifying"
        self.scratch_index = self._state / "forgetting.md5"
        self.adopting = self._state / "adopting.sqlite"
        self._runs = self._state / "runs"
        self._marker = self._state / "provider-id"

    # --- ownership ----------------------------------------------------------------------------------

    def claim(self, *, known: bool = False, mount: str | None = None) -> None:
        """Make sure that ``dest`` is this provider's; set it up if it is new.

        :param known: whether a good run is known from elsewhere, so that ``dest`` cannot be new.
        :param mount: a path that must be a mount point.
        :raises DestinationRefused: it belongs to another provider, is not mounted, contains other things, or
            cannot be created.
        :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`translate_os_errors`.
        """
        with self.translate_os_errors():
            try:
                self._claim(known, mount)
            except (FileExistsError, NotADirectoryError) as error:
                raise DestinationRefused(
                    f"{self.provider}: {error.filename} is not a directory. Set dest to an empty or new one."
                ) from error

    def _claim(self, known: bool, mount: str | None) -> None:
        self.check_mount(mount)
        if not self._marker.exists():
            self._set_up(known)
        self.check()
        if self.staging.stat().st_dev != self.files.stat().st_dev:
            raise DestinationRefused(
                f"{self.provider}: {self.files} and {self.staging} are on different filesystems, so that "
                "files cannot be moved between them in one step. Mount one filesystem at dest."
            )

    def check_mount(self, mount: str | None) -> None:
        """Make sure that ``mount``, if given, is a mount point.

        :raises DestinationRefused: it is not.
        """
        if mount is not None and not os.path.ismount(mount):
            raise DestinationRefused(
                f"{self.provider}: {mount} is not a mount point on {self._here()}. Mount the disk, or pin "
                "the provider to the worker that has it (queue)."
            )

    def _set_up(self, known: bool) -> None:
        if known:
            raise DestinationRefused(
                f"{self.provider}: {self.dest} on {self._here()} has no backup, but one succeeded before. "
                "Is the disk not mounted, or is this the wrong worker (queue)? If the backup is really to "
                "start again, delete the state of the provider's asset in Airflow."
            )
        make_directory(self.dest, parents=True)
        self.check_new()
        self.make_directories()
        with self.lock("fetch_index, which sets it up"):
            self.mark()

    def is_marked(self) -> bool:
        """Whether ``dest`` has a marker, even another provider's."""
        return self._marker.exists()

    def check_new(self) -> None:
        """Make sure that ``dest`` may be set up: it is empty, or has just been set up.

        :raises DestinationRefused: it contains other things.
        """
        others = [self.files / entry.name for entry in self.files.glob("*")] + self.foreign()
        if others and not self._marker.exists():  # otherwise another run has just set it up
            raise DestinationRefused(
                f"{self.provider}: {self.dest} is not empty (it has {sorted(others)[0].name!r}) and holds no "
                "backup of ours. Set dest to an empty or new directory. If it has a tree that rsync or "
                "rclone made: `mdbackup adopt`."
            )

    def foreign(self) -> list[Path]:
        """Return what is in ``dest`` and does not belong to a new backup."""
        # A set-up that was killed leaves the state directory without the marker, which is written last.
        ours = ("lost+found", self._state.name, self.files.name)
        entries = self.dest.iterdir() if self.dest.exists() else ()
        return [entry for entry in entries if entry.name not in ours]

    def make_directories(self) -> None:
        """Create the directories of a backup, durably, but not the marker."""
        make_directory(self.dest, parents=True)
        for directory in (self._state, self.staging, self._runs, self.history, self.files):
            make_directory(directory)
        # They must be durable before the marker, which says that they exist.
        fsync_directory(self._state)
        fsync_directory(self.dest)

    def mark(self) -> None:
        """Write the marker that ``dest`` is this provider's, unless there is one. Needs the lock."""
        if not self._marker.exists():
            write_state(self._marker, {"provider": self.provider})

    def check(self) -> None:
        """Make sure that ``dest`` has this provider's backup.

        :raises DestinationRefused: it does not.
        :raises OSError: that cannot be checked; see :meth:`translate_os_errors`.
        """
        try:
            owner = read_header(self._marker).get("provider")
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise DestinationRefused(
                f"{self.provider}: {self.dest} on {self._here()} holds no backup ({self._marker}: "
                f"{error.strerror}). Is the disk not mounted, or is this the wrong worker (queue)?"
            ) from None
        if owner != self.provider:
            raise DestinationRefused(
                f"{self.provider}: {self.dest} belongs to the provider {owner!r}. Give each provider a dest "
                "of its own; if it was renamed, change the name in provider-id there."
            )
        for directory in (self._state, self.staging, self._runs, self.history, self.files):
            if directory.is_symlink():
                raise DestinationRefused(
                    f"{self.provider}: {directory} is a symlink, and the backup never leaves {self.dest}. "
                    "Put a directory there; to keep the backup elsewhere, change dest."
                )

    def set_up_at(self) -> str:
        """Return when ``dest`` was set up, as a stamp: all commits are later, unless the marker was edited.

        :raises FileNotFoundError: it was not set up.
        """
        return stamp_of_file(self._marker)

    def is_set_up(self) -> bool:
        """Whether ``dest`` has a backup, of any provider.

        :raises OSError: that cannot be checked; see :meth:`translate_os_errors`.
        """
        return self._marker.exists()

    def _here(self) -> str:
        """Return the name of this machine for messages."""
        return socket.gethostname() + (f" (queue {self._queue!r})" if self._queue else "")

    @contextmanager
    def translate_os_errors(self) -> Iterator[None]:
        """Turn an error of the disk or of the worker into one that says what to do.

        :raises DestinationFull: the disk, or a quota on it, is full.
        :raises DestinationRefused: it is read-only, not accessible, or missing.
        :raises DestinationBroken: it fails.
        :raises WorkerExhausted: open files or memory are used up.
        """
        try:
            yield
        except OSError as error:
            translated = self._translate(error)
            if translated is None:
                raise
            try:
                raise translated from error
            finally:
                del translated  # it refers to this frame: the cycle would keep files open

    def _translate(self, error: OSError) -> BackupError | None:
        if isinstance(error, FileNotFoundError):
            try:
                self.check()
            except DestinationRefused as refused:
                return refused
            except OSError as why:
                error = why
        return explain_os_error(error, self.provider, self.dest)

    # --- lock and stamps ----------------------------------------------------------------------------

    @contextmanager
    def lock(self, who: str, wait: float = LOCK_WAIT) -> Iterator[None]:
        """Hold the lock on the mirror. It ends with the process.

        :param who: the holder, as others see it.
        :param wait: seconds to wait for it.
        :raises DestinationBusy: it was not free in time.
        """
        with locked(self._state / "lock", f"{self.provider}: {self.dest}", who, wait):
            yield

    def next_stamp(self) -> str:
        """Return a stamp like ``20261123T031500.123456Z``: now, and later than that of every commit.

        Needs the lock until it is committed, because it is stored nowhere else.

        :raises DestinationRefused: the clock or a commit is past the last possible stamp.
        """
        last = self.last_commit()
        now = now_stamp()
        stamp = now if now > last else stamp_beside(last, 1)
        if not is_stamp(stamp):
            raise DestinationRefused(
                f"{self.provider}: no commit can have the stamp {stamp}: set the clock of this machine, and "
                f"move away the files in {self.history} with such a time"
            )
        return stamp

    def now(self) -> str:
        """Return the time of this machine's clock as a stamp."""
        return now_stamp()

    def next_order(self) -> str:
        """Return the position of a new run among all runs, after all earlier ones. Uses no clock."""
        file = open_for_owner(self._state / "order", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = os.pread(file, _ORDER_DIGITS, 0)
            last = int(known) if len(known) == _ORDER_DIGITS and known.isdigit() else self._last_order()
            # Overwrites a number of the same length, so the file always has one.
            write_all(file, b"%0*d" % (_ORDER_DIGITS, last + 1))
            os.fsync(file)
        finally:
            os.close(file)
        return f"n{last + 1:0{_ORDER_DIGITS}}"  # sorts after a stamp, which it was in older backups

    def _last_order(self) -> int:
        """Return the last known position, if the counter file is lost."""
        orders = [of for _, of in self._runs_with_order()]
        newest = [name for name in self.names_in_history() if name.endswith(".jsonl")][-1:]
        for path in (self.status, *(self.history / name for name in newest)):
            with suppress(OSError, CorruptFile):
                orders.append(str(read_header(path).get("order", "")))
        return max((int(of[1:]) for of in orders if of[1:].isdigit() and of[0] == "n"), default=0)

    def last_commit(self) -> str:
        """Return the stamp of the last commit, finished or not; empty if there is none."""
        return max(map(stamp_in_name, self.names_in_history()), default="")

    # --- files --------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """Return the live files and versions as a tree of the provider's paths."""
        return Tree(self.files)

    def open_staging(self) -> Staging:
        """Open the staging area."""
        return Staging(self.staging)

    # --- runs ---------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """Return the run directory of a DAG run, which may not exist yet."""
        return Run(self._runs / _encoded(run_id), run_id)

    def out_of_use(self) -> list[tuple[float, Run]]:
        """Return the runs that are finished or superseded, newest first, each with its modification time.

        A run is superseded if a newer index has been committed. Runs with an unreadable state are left out.
        """
        order = str(self.read_status().get("order", ""))
        found = [
            (run.folder.stat().st_mtime, run)
            for run, of in self._runs_with_order()
            if run.done.exists() or of < order
        ]
        return sorted(found, key=itemgetter(0), reverse=True)

    def last_finished(self) -> Run | None:
        """Return the last finished run whose directory still exists; None if there is none."""
        finished = [(of, run) for run, of in self._runs_with_order() if of and run.done.exists()]
        return max(finished, key=itemgetter(0))[1] if finished else None

    def last_begun(self) -> tuple[Run, dict[str, Any]] | None:
        """Return the run that began last and its ``begun.json``, if it is not finished or superseded.

        :raises OSError, DestinationRefused: the status cannot be read.
        """
        begun = []
        for folder in self._run_folders():
            run = Run(folder, "")
            with suppress(OSError, DestinationRefused):  # an unreadable one is skipped
                header = read_header(run.begun)
                begun.append((str(header.get("order", "")), run, header))
        if not begun:
            return None
        order, run, header = max(begun, key=itemgetter(0))
        is_over = run.done.exists() or order <= str(self.read_status().get("order", ""))
        return None if is_over else (run, header)

    def in_use_since(self) -> float:
        """Return when the oldest run that may still commit got its index, in Unix seconds; else now."""
        order = str(self.read_status().get("order", ""))
        since = [
            run.state.stat().st_mtime
            for run, of in self._runs_with_order()
            if of >= order and run.state.exists() and not run.done.exists()
        ]
        return min(since, default=time.time())

    def _runs_with_order(self) -> Iterator[tuple[Run, str]]:
        """Yield the runs with a readable state, each with its position among all."""
        for folder in self._run_folders():
            try:
                run, of = Run(folder, ""), ""  # it never had an accepted index
                if run.state.exists():
                    state = read_header(run.state)
                    run, of = Run(folder, str(state["run_id"])), str(state["order"])
            except (OSError, KeyError, DestinationRefused) as error:
                log.info("Skipping unreadable run directory %s (%s)", folder, error)
            else:
                yield run, of

    def _run_folders(self) -> list[Path]:
        try:
            return [folder for folder in self._runs.iterdir() if not folder.name.startswith(REMOVED)]
        except FileNotFoundError:  # for example, on a partly rescued disk
            return []

    def removed_runs(self) -> Iterator[Path]:
        """Return the remains of removed runs."""
        return self._runs.glob(f"{REMOVED}*")

    def history_path(self, stamp: str, run_id: str) -> Path:
        """Return the path of the history file of a commit."""
        return self.history / f"{stamp}_{_encoded(run_id)}.jsonl"

    def names_in_history(self) -> list[str]:
        """Return the names of the history files, including those of unfinished commits, oldest first.

        Other files there, such as copies that somebody made, are left out; so is what only has such a name
        (see :meth:`strange_in_history`).
        """
        return [name for name, is_ours in self._named_like_history() if is_ours]

    def strange_in_history(self) -> list[Path]:
        """Return what is named like a history file but is not a regular file, or has an impossible time."""
        return [self.history / name for name, is_ours in self._named_like_history() if not is_ours]

    def _named_like_history(self) -> list[tuple[str, bool]]:
        try:
            with os.scandir(self.history) as entries:
                return sorted(
                    (entry.name, is_stamp(stamp_in_name(entry.name)) and entry.is_file(follow_symlinks=False))
                    for entry in entries
                    if _HISTORY.fullmatch(entry.name)
                )
        except FileNotFoundError:  # for example, on a partly rescued disk
            return []

    def has_committed(self, run: Run) -> bool:
        """Whether a commit of ``run`` has changed anything, or has begun to."""
        ending = self.history_path("", run.run_id).name  # its directory may have been removed since
        in_history = any(name.endswith(ending) for name in self.names_in_history())
        return run.done.exists() or run.used.exists() or in_history

    def read_status(self) -> dict[str, Any]:
        """Return the status: last good run, last commit, disk usage; empty before the first run."""
        try:
            return read_header(self.status)
        except FileNotFoundError:
            return {}


def find_mirror(dest: Path) -> Mirror:
    """Return the backup in a directory, of any provider.

    :raises DestinationRefused: there is none.
    :raises OSError: that cannot be checked.
    """
    try:
        provider = str(read_header(dest / ".mdbackup" / "provider-id").get("provider"))
    except (FileNotFoundError, NotADirectoryError):
        raise DestinationRefused(
            f"{dest} has no backup: give the directory that has index.md5, files and .mdbackup"
        ) from None
    return Mirror(dest, provider)


# The names of finished and pending history files.
_HISTORY = re.compile(
    r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z_[A-Za-z0-9.-]*-[0-9a-f]{12}\.jsonl(?:\.pending)?", re.ASCII
)


def _encoded(run_id: str) -> str:
    """Return a short, unique file name for a run id."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", run_id).lstrip(".")[:60]
    return f"{plain}-{hashlib.sha256(run_id.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
