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
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from airflow_mdbackup.scheme.disk import in_words
from airflow_mdbackup.scheme.errors import BackupError, DestinationBusy, DestinationRefused, RunIncomplete
from airflow_mdbackup.scheme.index import MAX_COMPONENT
from airflow_mdbackup.scheme.records import Damaged, read_header, write_state
from airflow_mdbackup.scheme.tree import (
    Folder,
    Tree,
    concerns_one_file,
    fsync_directory,
    make_directory,
    not_followed,
    open_for_owner,
    rename_if_free,
    write_all,
)

log = logging.getLogger(__name__)

OLD = b".old"
_ORDER_DIGITS = 12
_REMOVED = ".removed-"  # no run's directory begins with a full stop
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
LOCK_WAIT = 3600.0  # seconds that a task waits for another run before it gives up
PERSON_WAIT = 60.0  # seconds that a command of a person does


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
        self.upcoming = self._state / "upcoming.md5"
        self.changing = self._state / "changing.jsonl"
        self.bandwidth = self._state / "bandwidth"
        self.verified = self._state / "verified.json"
        self.verifying = self._state / "verifying"
        self.forgetting = self._state / "forgetting.md5"
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
        :raises DestinationFull, DestinationBroken, WorkerExhausted: see :meth:`told_plainly`.
        """
        with self.told_plainly():
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
        :raises OSError: that cannot be told; see :meth:`told_plainly`.
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

        :raises OSError: that cannot be told; see :meth:`told_plainly`.
        """
        return self._marker.exists()

    def _here(self) -> str:
        """Return what to call this machine in a message."""
        return socket.gethostname() + (f" (queue {self._queue!r})" if self._queue else "")

    @contextmanager
    def told_plainly(self) -> Iterator[None]:
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
        return in_words(error, self.provider, self.dest)

    # --- lock and stamps ----------------------------------------------------------------------------

    @contextmanager
    def lock(self, who: str, wait: float = LOCK_WAIT) -> Iterator[None]:
        """Hold the lock on the mirror, waiting for whoever holds it. It ends with the process.

        :param who: what others are told about the holder.
        :param wait: seconds.
        :raises DestinationBusy: it was not free in time.
        """
        with _locked(self._state / "lock", f"{self.provider}: {self.dest}", who, wait):
            yield

    def next_stamp(self) -> str:
        """Return a stamp like ``20261123T031500.123456Z``: now, and later than that of every commit.

        Needs the lock, until it is committed. It is kept nowhere else.

        :raises DestinationRefused: the clock, or a commit, is at the end of all stamps.
        """
        last = self.last_commit()
        now = _now()
        stamp = now if now > last else stamp_beside(last, 1)
        if not is_stamp(stamp):
            raise DestinationRefused(
                f"{self.provider}: no commit can have the stamp {stamp}: set the clock of this machine, and "
                f"move away what {self.history} has of such a time"
            )
        return stamp

    def now(self) -> str:
        """Return what the clock of this machine says, as a stamp."""
        return _now()

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
            with suppress(OSError, Damaged):
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
            return [folder for folder in self._runs.iterdir() if not folder.name.startswith(_REMOVED)]
        except FileNotFoundError:  # as on a disk that was rescued in part
            return []

    def removed_runs(self) -> Iterator[Path]:
        """Return what is left of runs that were removed."""
        return self._runs.glob(f"{_REMOVED}*")

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


class Staging(Folder):
    """Verified content that is not in the mirror yet, by md5. For one thread.

    Whatever has an md5 as its name was whole and verified when it got that. After a crash of the machine it
    need not be any more, unless a durable result tells of it.
    """

    def store(self, md5: bytes, content: bytes, folder: Folder, name: bytes) -> None:
        """Stage small content, in one step, unless another task just has.

        :param folder: where it is written, as ``name``, which nobody else uses.
        :raises OSError: the disk is full or broken.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = open_for_owner(name, flags, directory=folder.descriptor)
        try:
            write_all(descriptor, content)
        finally:
            os.close(descriptor)
        self._take_in(folder, name, md5)

    def _take_in(self, folder: Folder, name: bytes, md5: bytes) -> None:
        """Give verified content its md5 as name; not over what another task's results tell of.

        Where a name cannot be taken only if it is free, it is taken all the same: what was there is hashed
        before use, since no result tells of this file. An empty placeholder might pass for content.
        """
        try:
            if rename_if_free(folder.descriptor, name, self.descriptor, md5):
                return
        except FileExistsError:
            if self.has(md5):
                folder.remove(name)
                return
        os.rename(name, md5, src_dir_fd=folder.descriptor, dst_dir_fd=self.descriptor)

    def status(self, name: bytes) -> os.stat_result | None:
        """Return what is known of a file; None if it is not there, as when a commit has just taken it."""
        try:
            return os.lstat(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None

    def holds(self, md5: bytes, inode: int | None, changed: int | None) -> bool:
        """Whether content is staged that was that inode, last changed then, in nanoseconds.

        What was staged since, and not brought onto the disk, a power cut may have spoilt. So a durable result
        vouches for the very file of which it tells.
        """
        staged = self.status(md5)
        return staged is not None and (staged.st_ino, staged.st_ctime_ns) == (inode, changed)

    def parts(self) -> set[bytes]:
        """Return the md5s of which a part is there."""
        names = map(os.fsencode, os.listdir(self.descriptor))
        return {name.removesuffix(b".part") for name in names if name.endswith(b".part")}

    def part(self, md5: bytes) -> os.stat_result | None:
        """Return what is known of what has come of content; None if nothing has."""
        return self.status(md5 + b".part")

    def is_being_written(self, md5: bytes) -> bool:
        """Whether some task is at a part now. Of what cannot be opened that is not known."""
        try:
            part = os.open(md5 + b".part", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.descriptor)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return False
        try:
            fcntl.flock(part, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(part)
        return False

    def lacks(self, md5: bytes, size: int) -> int:
        """Return how many of the ``size`` bytes of content that is not staged have not come yet."""
        part = self.part(md5)
        return size if part is None else max(0, size - part.st_size)

    def lock_part(self, md5: bytes) -> int | None:
        """Return a descriptor of what has come of content, locked; None if another task is at it.

        What is there may be of any length, and is proven by nothing yet.

        :raises OSError: there is one, but not for us.
        """
        name = md5 + b".part"
        while True:
            part = open_for_owner(name, os.O_RDWR | os.O_CREAT, directory=self.descriptor)
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last writer may have renamed or removed it between our open and our lock.
                if os.path.samestat(os.fstat(part), os.stat(name, dir_fd=self.descriptor)):
                    return part
                os.close(part)
            except FileNotFoundError:
                os.close(part)
            except BlockingIOError:
                os.close(part)
                return None
            except BaseException:
                os.close(part)
                raise

    def keep_part(self, md5: bytes) -> None:
        """Stage content that is whole and verified now, unless another task has. Its part must be locked."""
        self._take_in(self, md5 + b".part", md5)

    def drop_part(self, md5: bytes) -> None:
        """Take away what has come of content, if it is there. It must be locked."""
        self.remove(md5 + b".part")


class Run:
    """The directory of one DAG run, made by FetchIndex. A retried or cleared task finds it again."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        self.begun = folder / "begun.json"
        self.state = folder / "run.json"
        self.received = folder / "received.md5"
        self.index = folder / "provider.md5"
        self.plan = folder / "plan.json"
        self.space = folder / "space.json"
        self.items = folder / "items.jsonl"
        self.forget = folder / "forget.jsonl"
        self.stamp = folder / "stamp.json"
        self.archived = folder / "archived.jsonl"
        self.changes = folder / "changes.jsonl"
        self.used = folder / "used.json"
        self.done = folder / "done.json"
        self.copies = folder / "copies"
        self.names = folder / "names"
        self.override = folder / "override.json"

    def pulls(self, shard: int) -> Path:
        """Return the part of the plan that one shard pulls."""
        return self.folder / f"pull-{shard:03}.jsonl"

    def consumer(self, shard: int) -> Path:
        """Return where one shard has the consumer index in canonical form, if it was edited."""
        return self.folder / f"consumer-{shard:03}.md5"

    def arriving(self, shard: int) -> bytes:
        """Return the name, in the run's folder, of a small file while it is written."""
        return b"arriving-%03d" % shard

    def results(self, shard: int) -> Path:
        """Return what became of the entries of one shard."""
        return self.folder / f"results-{shard:03}.jsonl"

    @contextmanager
    def lock(
        self,
        step: str,
        provider: str,
        wait: float = LOCK_WAIT,
        *,
        shared: bool = False,
        make: bool = False,
    ) -> Iterator[None]:
        """Hold the lock on the run's own files, so that no step of it begins before another one ended.

        A task that is thought dead may go on beside its retry, tasks may be cleared while others run, and two
        Airflow installations may give their runs the same id.

        :param step: what others are told about the holder.
        :param wait: seconds.
        :param shared: hold it together with others who share it, as the shards of one step do.
        :param make: make the run's directory, if it is not there.
        :raises DestinationBusy: it was not free in time.
        :raises DestinationRefused: a symlink has its name.
        :raises RunIncomplete: the run has no directory.
        """
        path, what = self.folder / "run.lock", f"{provider}: the run {self.run_id}"
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            if make:
                make_directory(self.folder)
            elif not self.folder.exists():
                raise RunIncomplete(
                    f"run {self.run_id!r} has no directory {self.folder}: clear its task fetch_index and "
                    "those after it"
                )
            with ExitStack() as held, suppress(FileNotFoundError):
                file = held.enter_context(_locked(path, what, step, wait, kind))
                # It may have been taken away, directory and all, before we had the lock.
                if os.path.samestat(os.fstat(file), path.stat()):
                    held = held.pop_all()
                    break
        with held:
            yield

    @contextmanager
    def unused(self) -> Iterator[bool]:
        """Hold the lock on the run's files if no step of it is at work now; yield whether that is so."""
        with open(self.folder / "run.lock", "a+", opener=not_followed) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def is_at_work(self) -> bool:
        """Whether a step of it is at work now, as far as that shows from here. Changes nothing."""
        try:
            file = os.open(self.folder / "run.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # as on NFS, where that needs a file that may be written
            return False
        finally:
            os.close(file)
        return False

    @contextmanager
    def shard_lock(self, shard: int, provider: str, wait: float = LOCK_WAIT) -> Iterator[None]:
        """Hold the lock on one shard, so that a task that is thought dead does not pull beside its retry.

        :param wait: seconds.
        :raises DestinationBusy: it was not free in time.
        """
        path = self.folder / f"pull-{shard:03}.lock"
        with _locked(path, f"{provider}: shard {shard} of {self.run_id}", f"shard {shard}", wait):
            yield

    @contextmanager
    def space_lock(self, provider: str) -> Iterator[None]:
        """Hold the lock on judging for all shards whether the disk has room for the run.

        :raises DestinationBusy: it was not free in time.
        """
        what = f"{provider}: the judgement of free space for {self.run_id}"
        with _locked(self.folder / "space.lock", what, "a shard", LOCK_WAIT):
            yield

    def size(self) -> int:
        """Return the bytes of the files in the run's directory, in which a cleared task may be at work."""
        size = 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                size += path.lstat().st_size
        return size

    def remove(self) -> None:
        """Take the run's directory out of sight, in one step; its files can go then, one by one."""
        self.folder.rename(self.folder.with_name(f"{_REMOVED}{self.folder.name}-{_now()}"))

    def begin_again(self) -> None:
        """Take back an earlier plan: until there is a new one, later steps have nothing to go on from."""
        self.plan.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)

    def end_with_plan(self) -> None:
        """End a dry run: no later step has anything to go on from, and nobody waits for its end."""
        self.begin_again()
        self.begun.unlink(missing_ok=True)

    def made_by(self, path: Path) -> int:
        """Return which try has made one of the run's states with which it goes on; 0 if none has."""
        if self.done.exists():
            return 0
        try:
            return int(read_header(path).get("attempt", 0))
        except (FileNotFoundError, Damaged):  # a crash came before, or spoilt it
            return 0

    def comes_late(self, provider: str, done: str, attempt: int, later: int) -> DestinationBusy:
        """Return the error for a try that was thought dead, and goes on once a later one has ended."""
        return DestinationBusy(
            f"{provider}: try {later} of {self.run_id} has {done}, and this one, try {attempt}, came after "
            "it. Nothing was changed. If there is no such try any more, as when Airflow's database was made "
            f"anew, remove {self.folder}"
        )

    @property
    def round_trip(self) -> float | None:
        """Seconds of a round trip to the provider, as FetchIndex found; None if it is not known."""
        return read_header(self.state).get("round_trip") if self.state.exists() else None

    def require(self, path: Path, step: str) -> dict[str, Any]:
        """Return the header of a file that an earlier step of this run has made.

        :raises RunIncomplete: it is not there.
        """
        try:
            return read_header(path)
        except FileNotFoundError:
            raise RunIncomplete(
                f"run {self.run_id!r} has no {path.name} in {self.folder}: clear its task {step} and "
                "those after it"
            ) from None


@contextmanager
def _locked(path: Path, what: str, who: str, wait: float, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a flock on ``path``, telling whoever waits for it ``who`` does. Yields its descriptor."""
    with _lock_file(path, what) as file:
        deadline = time.monotonic() + wait
        told = -60.0
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(500).strip("\0") or "another task"
            if time.monotonic() > deadline:
                raise DestinationBusy(f"{what} has been locked for {wait:.0f} s by {holder}")
            if time.monotonic() - told >= 60:
                log.info("Waiting for the lock on %s, held by %s", what, holder)
                told = time.monotonic()
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{who} (process {os.getpid()} on {socket.gethostname()}, since {_now()})")
        file.flush()
        try:
            yield file.fileno()
        finally:
            if kind == fcntl.LOCK_EX:
                # Others may hold it without saying who they are, as flock(1) does.
                file.truncate(0)


def _lock_file(path: Path, what: str) -> TextIO:
    try:
        # After a crash anything may be in it.
        return open(path, "a+", encoding="utf-8", errors="replace", opener=not_followed)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DestinationRefused(f"{what}: {path} is a symlink: remove it, and try again") from None


def version_path(path: bytes, stamp: str, attempt: int = 0) -> bytes:
    """Return where the version of ``path`` displaced at ``stamp`` lies: in ``.old`` beside it.

    :param attempt: counts on when the name is taken.
    """
    directory, _, name = path.rpartition(b"/")
    suffix = b"." + stamp.encode() + (b".%d" % attempt if attempt else b"")
    if len(name) + len(suffix) > MAX_COMPONENT:
        known_by = b"~" + _known_by(name)
        cut = MAX_COMPONENT - len(suffix) - len(known_by)
        # Some filesystems take no name that is not UTF-8, so that no character may be cut in two.
        cut -= next((n for n in range(4) if name[cut - n] & 0xC0 != 0x80), 0)
        name = name[:cut] + known_by
    return b"/".join((directory, OLD, name + suffix))


def displaced_at(version: bytes) -> str:
    """Return the stamp in the name of a version."""
    found = _VERSION.fullmatch(version)
    return found[2].decode() if found else ""


def versions_on_disk(tree: Tree, path: bytes) -> list[bytes]:
    """Return what lies in ``.old`` under a version name of ``path``, the oldest first, by its name alone."""
    directory, _, name = path.rpartition(b"/")
    old = directory + b"/" + OLD
    return sorted(old + b"/" + other for other in tree.names_in(old) if _is_version(other, name))


def _is_version(other: bytes, name: bytes) -> bool:
    version = _VERSION.fullmatch(other)
    if version is None or version[1] == name:
        return version is not None
    shortened = _SHORTENED.fullmatch(version[1])
    return shortened is not None and name.startswith(shortened[1]) and _known_by(name) == shortened[2]


class Displaced(NamedTuple):
    """What a version name tells: ``path`` was displaced at ``stamp``, and lay at ``version`` from then on."""

    path: bytes
    version: bytes
    stamp: str


def displaced(place: bytes) -> tuple[bytes, list[Displaced]] | None:
    """Return which path a file of the mirror belongs to, and what of it went to ``.old``, the oldest first.

    If the first of these is not that path itself, a directory above it went there as a whole.

    :returns: None where names do not tell: one was shortened, or is none of ours.
    """
    path, found = b"", list[Displaced]()
    components = iter(place.split(b"/")[1:])
    for component in components:
        if component == OLD:
            name = _VERSION.fullmatch(next(components, b""))
            if name is None or not is_stamp(name[2].decode()) or _SHORTENED.fullmatch(name[1]):
                return None
            version = b"/".join((path, OLD, name[0]))
            component = name[1]
            found.insert(0, Displaced(path + b"/" + component, version, name[2].decode()))
        path += b"/" + component
    return path, found


_VERSION = re.compile(rb"(.+)\.([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)(?:\.[0-9]+)?", re.DOTALL)
_SHORTENED = re.compile(rb"(.+)~([0-9a-f]{12})", re.DOTALL)


_NO_STAMP = "9999"  # with which none begins, so that there is always a later time


# As history_path and whoever writes ahead name them.
_HISTORY = re.compile(
    r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z_[A-Za-z0-9.-]*-[0-9a-f]{12}\.jsonl(?:\.pending)?", re.ASCII
)


def _known_by(name: bytes) -> bytes:
    """Return what tells apart names that are too long for a version name of theirs."""
    return hashlib.md5(name, usedforsecurity=False).hexdigest()[:12].encode()


def _encoded(run_id: str) -> str:
    """Return a run id as a short file name that no other run id has."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", run_id).lstrip(".")[:60]
    return f"{plain}-{hashlib.sha256(run_id.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def _now() -> str:
    return _format(datetime.now(UTC))


def _format(moment: datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%S.%fZ")


def is_stamp(text: str) -> bool:
    """Whether a text is a stamp as :meth:`Mirror.next_stamp` gives them."""
    return bool(text) and _stamp_in(text.encode(errors="replace")) == text


def stamp_in_name(name: str) -> str:
    """Return the stamp with which the name of a file of history begins."""
    return name[: len("20261123T031500.123456Z")]


def stamp_beside(stamp: str, microseconds: int) -> str:
    """Return the stamp so much later; earlier if it is negative."""
    return _format(_parse(stamp) + timedelta(microseconds=microseconds))


def stamp_of_file(path: Path) -> str:
    """Return when a file was written last, as a stamp."""
    return _format(datetime.fromtimestamp(path.stat().st_mtime, UTC))


def _stamp_in(text: bytes) -> str:
    """Return the stamp that ``text`` is, or an empty text if a crash has spoilt it."""
    try:
        stamp = text.decode("ascii")
        return stamp if _format(_parse(stamp)) == stamp < _NO_STAMP else ""
    except ValueError:
        return ""


def _parse(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp).astimezone(UTC)
