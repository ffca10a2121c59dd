"""How a provider's backup lies on the consumer's disk. The only module that knows.

::

    <dest>/files/<path>                          the mirror, live files
    <dest>/files/<dir>/.old/<name>.<UTC stamp>   versions
    <dest>/index.md5                             the consumer index
    <dest>/.mdbackup/provider-id                 marker: whose backup this is
    <dest>/.mdbackup/lock                        flock, held by whatever changes the mirror
    <dest>/.mdbackup/order                       how many runs have fetched an index
    <dest>/.mdbackup/bandwidth                   when what was received is within the bandwidth limit
    <dest>/.mdbackup/staging/<md5>               verified files that are not in the mirror yet
    <dest>/.mdbackup/staging/<md5>.part          a large file on its way here; its writer holds a flock on it
    <dest>/.mdbackup/runs/<run>/                 index, plan, results and archive records of one run
    <dest>/.mdbackup/history/<stamp>_<run>.jsonl what each commit changed
    <dest>/.mdbackup/committed.md5               the consumer index as the last commit left it: to show what
                                                 somebody changed in it by hand, and to restore it from
    <dest>/.mdbackup/upcoming.md5                the same of a commit that is not finished
    <dest>/.mdbackup/changing.jsonl              files that changed on the provider while they were pulled
    <dest>/.mdbackup/status.json                 last good run and last commit, and what is on the disk
    <dest>/.mdbackup/verified.json               where the next part of a verification begins
    <dest>/.mdbackup/forgetting.md5              the consumer index, while a command of a person needs it
    <dest>/.mdbackup/adopting.sqlite             what a command that takes over a tree has hashed so far
    <dest>/.mdbackup/verifying                   when what it has read is within its limit

``dest`` is created with mode 0700. Everything stored says its format, and a newer one is refused.
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

    :param queue: what had the work done on this machine; told to whoever must find out why it is not there.
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

    # --- whose it is --------------------------------------------------------------------------------

    def claim(self, *, known: bool = False, mount: str | None = None) -> None:
        """Make sure that ``dest`` is this provider's, setting it up if it is new.

        :param known: whether an earlier good run is known from elsewhere, so that ``dest`` cannot be new.
        :param mount: a path that must be a mount point.
        :raises DestinationRefused: it belongs to another provider, is not mounted, holds other things, or
            cannot be made.
        :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`translate_os_errors`.
        """
        with self.translate_os_errors():
            try:
                self._claim(known, mount)
            except (FileExistsError, NotADirectoryError) as error:
                raise DestinationRefused(
                    f"{self.provider}: {error.filename} is no directory. Name an empty or new one as dest."
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
        """Make sure that ``mount``, if there is one, is a mount point.

        :raises DestinationRefused: it is none.
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
                "begin anew, delete the state of the provider's asset in Airflow."
            )
        make_directory(self.dest, parents=True)
        self.check_new()
        self.make_directories()
        with self.lock("fetch_index, which sets it up"):
            self.mark()

    def is_marked(self) -> bool:
        """Whether ``dest`` has a marker, be it another provider's."""
        return self._marker.exists()

    def check_new(self) -> None:
        """Make sure that ``dest`` may be set up: that it holds nothing yet, or has just been set up.

        :raises DestinationRefused: it holds other things.
        """
        others = [self.files / entry.name for entry in self.files.glob("*")] + self.foreign()
        if others and not self._marker.exists():  # or else another run has just set it up
            raise DestinationRefused(
                f"{self.provider}: {self.dest} is not empty (it has {sorted(others)[0].name!r}) and holds no "
                "backup of ours. Name an empty or new directory as dest. If it has a tree that rsync or "
                "rclone made: `mdbackup adopt`."
            )

    def foreign(self) -> list[Path]:
        """Return what lies in ``dest`` and has no place in a new backup."""
        # A killed set-up leaves the state directory without its marker, which comes last.
        ours = ("lost+found", self._state.name, self.files.name)
        entries = self.dest.iterdir() if self.dest.exists() else ()
        return [entry for entry in entries if entry.name not in ours]

    def make_directories(self) -> None:
        """Make the directories of a backup, and their names durable. All but the marker."""
        make_directory(self.dest, parents=True)
        for directory in (self._state, self.staging, self._runs, self.history, self.files):
            make_directory(directory)
        # The marker says that all of them are there, whatever order the disk keeps.
        fsync_directory(self._state)
        fsync_directory(self.dest)

    def mark(self) -> None:
        """Say that ``dest`` is this provider's, if nobody has. Needs the lock."""
        if not self._marker.exists():
            write_state(self._marker, {"provider": self.provider})

    def check(self) -> None:
        """Make sure that ``dest`` holds this provider's backup.

        :raises DestinationRefused: it does not.
        :raises OSError: that cannot be told; see :meth:`translate_os_errors`.
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
                "of its own; after a renaming, change the name in provider-id there."
            )
        for directory in (self._state, self.staging, self._runs, self.history, self.files):
            if directory.is_symlink():
                raise DestinationRefused(
                    f"{self.provider}: {directory} is a symlink, and the backup never leaves {self.dest}. "
                    "Put a directory there; to keep the backup elsewhere, change dest."
                )

    def set_up_at(self) -> str:
        """Return when ``dest`` was set up, as a stamp: no commit was before, unless hands changed its marker.

        :raises FileNotFoundError: it was not.
        """
        return stamp_of_file(self._marker)

    def is_set_up(self) -> bool:
        """Whether ``dest`` holds a backup, whosever it is.

        :raises OSError: that cannot be told; see :meth:`translate_os_errors`.
        """
        return self._marker.exists()

    def _here(self) -> str:
        """Return what to call this machine in a message."""
        return socket.gethostname() + (f" (queue {self._queue!r})" if self._queue else "")

    @contextmanager
    def translate_os_errors(self) -> Iterator[None]:
        """Turn an error of the disk, or of the worker, into one that says what to do.

        :raises DestinationFull: the disk, or a quota on it, is full.
        :raises DestinationRefused: it is read-only, not ours to use, or no longer there.
        :raises DestinationBroken: it fails.
        :raises WorkerExhausted: open files or memory are used up.
        """
        try:
            yield
        except OSError as error:
            told = self._in_words(error)
            if told is None:
                raise
            try:
                raise told from error
            finally:
                del told  # or else it keeps this frame, which keeps it, and files stay open meanwhile

    def _in_words(self, error: OSError) -> BackupError | None:
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
        """Hold the lock on the mirror, waiting for whoever holds it. It ends with the process.

        :param who: what others are told about the holder.
        :param wait: seconds.
        :raises DestinationBusy: it was not free in time.
        """
        with locked(self._state / "lock", f"{self.provider}: {self.dest}", who, wait):
            yield

    def next_stamp(self) -> str:
        """Return a stamp like ``20261123T031500.123456Z``: now, and later than that of every commit.

        Needs the lock, until it is committed. It is kept nowhere else.

        :raises DestinationRefused: the clock, or a commit, is at the end of all stamps.
        """
        last = self.last_commit()
        now = now_stamp()
        stamp = now if now > last else stamp_beside(last, 1)
        if not is_stamp(stamp):
            raise DestinationRefused(
                f"{self.provider}: no commit can have the stamp {stamp}: set the clock of this machine, and "
                f"move away what {self.history} has of such a time"
            )
        return stamp

    def now(self) -> str:
        """Return what the clock of this machine says, as a stamp."""
        return now_stamp()

    def next_order(self) -> str:
        """Return a run's place among all, behind those of all runs before it. No clock is asked."""
        file = open_for_owner(self._state / "order", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = os.pread(file, _ORDER_DIGITS, 0)
            last = int(known) if len(known) == _ORDER_DIGITS and known.isdigit() else self._last_order()
            # Over the last one and of its length, so that there is no moment without one.
            write_all(file, b"%0*d" % (_ORDER_DIGITS, last + 1))
            os.fsync(file)
        finally:
            os.close(file)
        return f"n{last + 1:0{_ORDER_DIGITS}}"  # behind a stamp, which it was in older backups

    def _last_order(self) -> int:
        """Return the last place that is known to have been given out, where the count of them is lost."""
        orders = [of for _, of in self._runs_with_order()]
        newest = [name for name in self.names_in_history() if name.endswith(".jsonl")][-1:]
        for path in (self.status, *(self.history / name for name in newest)):
            with suppress(OSError, CorruptFile):
                orders.append(str(read_header(path).get("order", "")))
        return max((int(of[1:]) for of in orders if of[1:].isdigit() and of[0] == "n"), default=0)

    def last_commit(self) -> str:
        """Return the stamp of the last commit that changed anything, finished or not, or an empty text."""
        return max(map(stamp_in_name, self.names_in_history()), default="")

    # --- files --------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """Return the live files and versions, as a tree of the provider's paths."""
        return Tree(self.files)

    def open_staging(self) -> Staging:
        """Return the verified content that is not live yet."""
        return Staging(self.staging)

    # --- runs ---------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """Return the run directory of a DAG run, which may not exist yet."""
        return Run(self._runs / _encoded(run_id), run_id)

    def out_of_use(self) -> list[tuple[float, Run]]:
        """Return the runs that are finished, or can only be superseded, newest first, with their last change.

        Those are superseded since whose index a newer one was committed. Whose state cannot be read is left.
        """
        order = str(self.read_status().get("order", ""))
        found = [
            (run.folder.stat().st_mtime, run)
            for run, of in self._runs_with_order()
            if run.done.exists() or of < order
        ]
        return sorted(found, key=itemgetter(0), reverse=True)

    def last_finished(self) -> Run | None:
        """Return the last run that was finished, of those whose directory is there; None if there is none."""
        finished = [(of, run) for run, of in self._runs_with_order() if of and run.done.exists()]
        return max(finished, key=itemgetter(0))[1] if finished else None

    def last_begun(self) -> tuple[Run, dict[str, Any]] | None:
        """Return the run that has begun last, with what it said then, if it is not known to have ended well.

        That is the one with which nothing newer was committed, and which is not finished.

        :raises OSError, DestinationRefused: the status cannot be read.
        """
        begun = []
        for folder in self._run_folders():
            run = Run(folder, "")
            with suppress(OSError, DestinationRefused):  # none is told by it, and others may be
                told = read_header(run.begun)
                begun.append((str(told.get("order", "")), run, told))
        if not begun:
            return None
        order, run, told = max(begun, key=itemgetter(0))
        is_over = run.done.exists() or order <= str(self.read_status().get("order", ""))
        return None if is_over else (run, told)

    def in_use_since(self) -> float:
        """Return when the oldest run that may still be committed got its index, in Unix seconds; else now."""
        order = str(self.read_status().get("order", ""))
        since = [
            run.state.stat().st_mtime
            for run, of in self._runs_with_order()
            if of >= order and run.state.exists() and not run.done.exists()
        ]
        return min(since, default=time.time())

    def _runs_with_order(self) -> Iterator[tuple[Run, str]]:
        """Yield the runs that can be told of, each with its place among all."""
        for folder in self._run_folders():
            try:
                run, of = Run(folder, ""), ""  # one that never had an index that was accepted
                if run.state.exists():
                    state = read_header(run.state)
                    run, of = Run(folder, str(state["run_id"])), str(state["order"])
            except (OSError, KeyError, DestinationRefused) as error:
                log.info("Left alone: %s (%s)", folder, error)
            else:
                yield run, of

    def _run_folders(self) -> list[Path]:
        try:
            return [folder for folder in self._runs.iterdir() if not folder.name.startswith(REMOVED)]
        except FileNotFoundError:  # as on a disk that was rescued in part
            return []

    def removed_runs(self) -> Iterator[Path]:
        """Return what is left of runs that were removed."""
        return self._runs.glob(f"{REMOVED}*")

    def history_path(self, stamp: str, run_id: str) -> Path:
        """Return the name of the history file of a commit."""
        return self.history / f"{stamp}_{_encoded(run_id)}.jsonl"

    def names_in_history(self) -> list[str]:
        """Return the names of the files of history, also of commits that are not finished, oldest first.

        What else lies there, such as a copy that somebody made, is none of them; nor is what only has such a
        name (see :meth:`strange_in_history`).
        """
        return [name for name, is_ours in self._named_like_history() if is_ours]

    def strange_in_history(self) -> list[Path]:
        """Return what has the name of a file of history, and is no regular file, or of no possible time."""
        return [self.history / name for name, is_ours in self._named_like_history() if not is_ours]

    def _named_like_history(self) -> list[tuple[str, bool]]:
        try:
            with os.scandir(self.history) as entries:
                return sorted(
                    (entry.name, is_stamp(stamp_in_name(entry.name)) and entry.is_file(follow_symlinks=False))
                    for entry in entries
                    if _HISTORY.fullmatch(entry.name)
                )
        except FileNotFoundError:  # as on a disk that was rescued in part
            return []

    def has_committed(self, run: Run) -> bool:
        """Whether a commit of ``run`` has changed anything, or has begun to."""
        ending = self.history_path("", run.run_id).name  # if its directory has been taken away since
        is_told = any(name.endswith(ending) for name in self.names_in_history())
        return run.done.exists() or run.used.exists() or is_told

    def read_status(self) -> dict[str, Any]:
        """Return the last good run and the last commit; empty before the first."""
        try:
            return read_header(self.status)
        except FileNotFoundError:
            return {}


def find_mirror(dest: Path) -> Mirror:
    """Return the backup in a directory, whosever it is.

    :raises DestinationRefused: there is none.
    :raises OSError: that cannot be told.
    """
    try:
        provider = str(read_header(dest / ".mdbackup" / "provider-id").get("provider"))
    except (FileNotFoundError, NotADirectoryError):
        raise DestinationRefused(
            f"{dest} holds no backup: name the directory that has index.md5, files and .mdbackup"
        ) from None
    return Mirror(dest, provider)


# As history_path and whoever writes ahead name them.
_HISTORY = re.compile(
    r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z_[A-Za-z0-9.-]*-[0-9a-f]{12}\.jsonl(?:\.pending)?", re.ASCII
)


def _encoded(run_id: str) -> str:
    """Return a run id as a short file name that no other run id has."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", run_id).lstrip(".")[:60]
    return f"{plain}-{hashlib.sha256(run_id.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
