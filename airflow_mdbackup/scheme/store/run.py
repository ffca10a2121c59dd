"""The directory of one run: its files, its locks and its state."""

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
    """The directory of one DAG run, created by FetchIndex. A retried or cleared task finds it again."""

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
        """Return the path of the part of the plan that one shard pulls."""
        return self.folder / f"pull-{shard:03}.jsonl"

    def consumer(self, shard: int) -> Path:
        """Return the path of one shard's canonical consumer index, written if the index was edited."""
        return self.folder / f"consumer-{shard:03}.md5"

    def arriving(self, shard: int) -> bytes:
        """Return the name, in the run's folder, of a small file that is being written."""
        return b"arriving-%03d" % shard

    def results(self, shard: int) -> Path:
        """Return the path of one shard's results."""
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
        """Hold the lock on the run's own files, so that its steps do not overlap.

        A task thought dead may still be running beside its retry, tasks may be cleared while others run, and
        two Airflow installations may give their runs the same id.

        :param step: the holder, as others see it.
        :param wait: seconds to wait for the lock.
        :param shared: hold it together with others who share it, like the shards of one step.
        :param make: create the run's directory if it is missing.
        :raises DestinationBusy: it was not free in time.
        :raises DestinationRefused: the lock file is a symlink.
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
                # The directory may have been removed before we had the lock.
                if os.path.samestat(os.fstat(file), path.stat()):
                    held = held.pop_all()
                    break
        with held:
            yield

    @contextmanager
    def unused(self) -> Iterator[bool]:
        """Hold the lock on the run's files if none of its steps is running; yield whether it is held."""
        with open(self.folder / "run.lock", "a+", opener=not_followed) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def is_at_work(self) -> bool:
        """Whether one of its steps is running, as far as can be seen here. Changes nothing."""
        try:
            file = os.open(self.folder / "run.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # as on NFS, where it needs a writable file
            return False
        finally:
            os.close(file)
        return False

    @contextmanager
    def shard_lock(self, shard: int, provider: str, wait: float = LOCK_WAIT) -> Iterator[None]:
        """Hold the lock on one shard, so that a task thought dead does not pull beside its retry.

        :param wait: seconds.
        :raises DestinationBusy: it was not free in time.
        """
        path = self.folder / f"pull-{shard:03}.lock"
        with locked(path, f"{provider}: shard {shard} of {self.run_id}", f"shard {shard}", wait):
            yield

    @contextmanager
    def space_lock(self, provider: str) -> Iterator[None]:
        """Hold the lock under which one shard checks, for all of them, that the disk has room for the run.

        :raises DestinationBusy: it was not free in time.
        """
        what = f"{provider}: the free space check of {self.run_id}"
        with locked(self.folder / "space.lock", what, "a shard", LOCK_WAIT):
            yield

    def size(self) -> int:
        """Return the size of the run's directory in bytes. A cleared task may be writing to it."""
        size = 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                size += path.lstat().st_size
        return size

    def remove(self) -> None:
        """Rename the run's directory out of the way, in one step; its files can be deleted afterwards."""
        self.folder.rename(self.folder.with_name(f"{REMOVED}{self.folder.name}-{now_stamp()}"))

    def begin_again(self) -> None:
        """Discard an earlier plan: later steps cannot start until there is a new one."""
        self.plan.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)

    def end_with_plan(self) -> None:
        """End a dry run: later steps cannot start, and the run counts as ended."""
        self.begin_again()
        self.begun.unlink(missing_ok=True)

    def made_by(self, path: Path) -> int:
        """Return which try wrote one of the states of this unfinished run; 0 if none did."""
        if self.done.exists():
            return 0
        try:
            return int(read_header(path).get("attempt", 0))
        except (FileNotFoundError, CorruptFile):  # not written yet, or damaged by a crash
            return 0

    def comes_late(self, provider: str, done: str, attempt: int, later: int) -> DestinationBusy:
        """Return the error for a try that was thought dead, and continues after a later one has ended."""
        return DestinationBusy(
            f"{provider}: try {later} of {self.run_id} has {done}, and this one, try {attempt}, came after "
            "it. Nothing was changed. If that try no longer exists, as when Airflow's database was created "
            f"again, remove {self.folder}"
        )

    @property
    def round_trip(self) -> float | None:
        """Seconds of a round trip to the provider, as FetchIndex measured; None if unknown."""
        return read_header(self.state).get("round_trip") if self.state.exists() else None

    def require(self, path: Path, step: str) -> dict[str, Any]:
        """Return the header of a file that an earlier step of this run wrote.

        :raises RunIncomplete: it is missing.
        """
        try:
            return read_header(path)
        except FileNotFoundError:
            raise RunIncomplete(
                f"run {self.run_id!r} has no {path.name} in {self.folder}: clear its task {step} and "
                "those after it"
            ) from None
