"""TODO"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.errors import DestinationBusy, RunIncomplete
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header
from airflow_mdbackup.scheme.files.syscalls import make_directory, not_followed
from airflow_mdbackup.scheme.store.locks import LOCK_WAIT, locked
from airflow_mdbackup.scheme.store.version_names import now_stamp

REMOVED = ".removed-"  # no run's directory begins with a full stop


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
        self.consumer_index = folder / "consumer.md5"  # in canonical form, as a step found it
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
                file = held.enter_context(locked(path, what, step, wait, kind))
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
        with locked(path, f"{provider}: shard {shard} of {self.run_id}", f"shard {shard}", wait):
            yield

    @contextmanager
    def space_lock(self, provider: str) -> Iterator[None]:
        """Hold the lock on judging for all shards whether the disk has room for the run.

        :raises DestinationBusy: it was not free in time.
        """
        what = f"{provider}: the judgement of free space for {self.run_id}"
        with locked(self.folder / "space.lock", what, "a shard", LOCK_WAIT):
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
        self.folder.rename(self.folder.with_name(f"{REMOVED}{self.folder.name}-{now_stamp()}"))

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
        except (FileNotFoundError, CorruptFile):  # a crash came before, or spoilt it
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
