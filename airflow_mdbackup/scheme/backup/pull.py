"""An entry to pull becomes a verified file in staging, with an outcome.

::

    skip what does not fit on the disk (see free_space)
    for each item of the shard, in path order, many at a time:
        another run has committed it          nothing to do: superseded
        its content is already staged         verify it, unless a durable result vouches for it
        a live file may already have it       hash that: adopted
        another live file should have it      copy that to staging, hashing: copied
        another item has the same content     wait for that one: copied
        an earlier try failed to reach it     check first that it is a regular file, else failed
        else                                  fetch it, hashing: pulled; a large one is resumed
            the md5 is not the index's        fetch it once more; then changed, or corrupt
    make all of it durable at once (syncfs, step 1), then write the results

The results are written in path order, all or nothing, even if the connection is lost; the error is then
raised. A retry keeps what is good and does the rest.

Limitations: after a kill, staging may contain files that no result vouches for. They are hashed again before
they are used.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from airflow_mdbackup.scheme.backup.concurrent_runs import CommittedByOthers, ContentOfOthers, committed_since
from airflow_mdbackup.scheme.backup.free_space import SkippedForSpace, check_free_space, room_left
from airflow_mdbackup.scheme.backup.local_content import LocalContent
from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem, read_plan
from airflow_mdbackup.scheme.backup.pull_item import (
    Slot,
    changed,
    failed,
    mismatched,
    refused,
    succeeded,
    why_not_same,
    why_too_large,
    why_too_long,
)
from airflow_mdbackup.scheme.backup.pull_progress import PullProgress, PullSummary
from airflow_mdbackup.scheme.backup.ransomware import HEAD, SuspectContents
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import BackupError, DestinationBusy
from airflow_mdbackup.scheme.files.disk import NO_LIMIT
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.jsonl import RecordWriter, read_header, read_records
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.store.locks import LOCK_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.partial_file import PartialFile
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stated, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Code

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 50_000  # md5s of staged content
_MAX_WAITING = 20_000  # results that wait for an earlier one: bounds memory


def pull(
    mirror: Mirror,
    run: Run,
    shard: int,
    connect: Callable[[], Reader],
    max_file_size: int | None = None,
) -> PullSummary:
    """Bring the content of the items of one shard into staging, and write their results.

    :param connect: returns a reader; only called if something must be requested from the provider.
    :param max_file_size: bytes; a larger file fails, without affecting others.
    :raises ConnectionLost: the connection broke; the results so far are written.
    :raises DestinationFull: the disk became full; what is staged stays.
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    :raises RunIncomplete: the run has no plan.
    :raises DestinationBusy: an earlier try of the same shard does not end, or another task is writing a file
        that this one needs, and makes no progress.
    """
    with (
        mirror.translate_os_errors(),
        run.lock("pull_changed", mirror.provider, shared=True),
        run.shard_lock(shard, mirror.provider),
        _existing_objects_frozen(),
    ):
        return _pull(mirror, run, shard, read_plan(run), connect, max_file_size)


@contextmanager
def _existing_objects_frozen() -> Iterator[None]:
    """Keep the garbage collector from traversing all that Airflow has loaded, again and again.

    New objects are collected as usual. This saves a fifth of the time for small files.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pull(
    mirror: Mirror,
    run: Run,
    shard: int,
    plan: Plan,
    connect: Callable[[], Reader],
    max_file_size: int | None,
) -> PullSummary:
    started = time.monotonic()
    committed = committed_since(mirror, run, shard, plan)
    puller = _Puller(mirror, run, shard, plan, committed, connect, max_file_size)
    items = read_records(run.pulls(shard), PlanItem)
    try:
        with RecordWriter[Result](run.results(shard), plan=plan.digest) as writer:
            for result in puller.results(items, _earlier(run, shard, plan.digest)):
                writer.add(result)
    except BaseException:
        log.warning("Stopped after %s", puller.describe_progress())
        raise
    finally:
        puller.close()
    if puller.error is not None:
        raise puller.error
    puller.summary.seconds = round(time.monotonic() - started, 3)
    puller.summary.telltale = puller.contents.warning()
    return puller.summary


def _earlier(run: Run, shard: int, plan: str) -> Iterator[Result | None]:
    """Yield the result of an earlier try for each item, in order; endless Nones if there is none."""
    path = run.results(shard)
    if path.exists() and read_header(path)["plan"] == plan:
        yield from read_records(path, Result)
    while True:
        yield None


class _Puller:
    def __init__(
        self,
        mirror: Mirror,
        run: Run,
        shard: int,
        plan: Plan,
        committed: CommittedByOthers,
        connect: Callable[[], Reader],
        max_file_size: int | None = None,
    ) -> None:
        self._progress = PullProgress(sum(plan.shards[shard : shard + 1]))
        self.error: Exception | None = None
        self.contents = SuspectContents()
        self._mirror = mirror
        with ExitStack() as opened:
            self._tree = opened.enter_context(mirror.tree())
            self._staging = opened.enter_context(mirror.open_staging())
            self._folder = opened.enter_context(Folder(run.folder))
            self._local = LocalContent(self._tree, self._staging)
            self._opened = opened.pop_all()
        self._others = ContentOfOthers(committed)
        self._has_committed = mirror.has_committed(run)
        self._arriving = run.arriving(shard)
        self._provider_time = plan.provider_time
        self._connect = connect
        self._max_file_size = max_file_size
        self._check_space = partial(
            check_free_space, mirror, run, plan, committed, self._connected, max_file_size
        )
        self._skipped = SkippedForSpace()
        self._reader: Reader | None = None
        self._slots: deque[Slot] = deque()
        self._ready: deque[Slot] = deque()  # to be begun again, before new items
        self._postponed: deque[Slot] = deque()  # another task is writing the same content
        self._fetching: dict[bytes, list[Slot]] = {}  # by md5 in transfer: other items that wait for it
        self._staged: dict[bytes, None] = {}  # md5s known to be staged; the oldest are forgotten

    def results(self, items: Iterator[PlanItem], earlier: Iterator[Result | None]) -> Iterator[Result]:
        """Yield the result of each item in order; when exhausted, their content is durable."""
        pairs = zip(items, earlier, strict=False)
        try:
            self._skipped = self._check_space()
            yield from self._run(pairs)
        except (BackupError, OSError) as error:
            self.error = error
            for slot in self._slots:
                yield self._progress.count(slot.result or self._unreached(slot.item, slot.earlier, error))
            for item, result in pairs:
                yield self._progress.count(self._unreached(item, result, error))
        self._staging.sync()

    def _run(self, pairs: Iterator[tuple[PlanItem, Result | None]]) -> Iterator[Result]:
        more = True
        while more or self._slots:
            more = self._begin_items(pairs, more)
            while self._slots and (result := self._slots[0].result) is not None:
                self._slots.popleft()
                yield self._progress.count(result)
            self._process()
            self._report()

    def _begin_items(self, pairs: Iterator[tuple[PlanItem, Result | None]], more: bool) -> bool:
        """Begin as many items as there is room for; return whether there may be more."""
        while self._reader is None or self._reader.room:
            if self._ready:
                self._begin(self._ready.popleft())
            elif more and len(self._slots) < _MAX_WAITING:
                pair = next(pairs, None)
                if pair is None:
                    return False
                slot = Slot(*pair)
                self._slots.append(slot)
                if self._others.has(slot.item):
                    self._progress.reused += 1
                    slot.result = self._committed_result(slot)
                else:
                    self._begin(slot)
            else:
                break
            self._report()
        return more

    def _process(self) -> None:
        """Process what has arrived."""
        if self._reader is not None and self._reader.busy:
            for answer in self._reader.take_turn():
                if isinstance(answer, Fetched):
                    self._on_fetched(answer)
                else:
                    self._on_stated(answer)
            self._progress.summary.transferred = self._reader.received
        elif self._postponed:
            time.sleep(0.2)
            for _ in range(len(self._postponed)):
                slot = self._postponed.popleft()
                (self._postponed if self._is_blocked(slot) else self._ready).append(slot)

    # --- one item -----------------------------------------------------------------------------------

    def _committed_result(self, slot: Slot) -> Result:
        """Return the result of an item that has been committed since the plan was made."""
        item, earlier = slot.item, slot.earlier
        if self._has_committed and earlier is not None and Outcome(earlier.outcome).good:
            return earlier  # by this run itself, whose task was cleared
        return Result(item.path, item.md5, item.replaces, Outcome.SUPERSEDED)

    def _begin(self, slot: Slot) -> None:
        item, earlier = slot.item, slot.earlier
        if item.md5 in self._fetching:
            self._fetching[item.md5].append(slot)
        elif earlier is not None and self._still_staged(earlier):
            self._remember(item.md5)
            self._progress.reused += 1
            slot.result = earlier
        elif item.md5 in self._staged and (why := self._no_room_for_copy(item)):
            slot.result = failed(item, why)
        elif item.md5 in self._staged:
            self._use_staged(slot, Outcome.COPIED)
        elif self._local.is_staged(item.md5):
            self._use_staged(slot, Outcome.PULLED)
        elif (item.adopt or earlier) and (live := self._local.adopt(item)):
            self._progress.reused += 1
            slot.result = live
        elif item.source and (why := self._no_room_for_copy(item)):
            slot.result = failed(item, why)
        elif item.source and self._local.copy(item):
            self._use_staged(slot, Outcome.COPIED)
        else:
            self._fetch(slot)

    def _use_staged(self, slot: Slot, outcome: Outcome) -> None:
        """The content is staged: only the attributes of this path are needed."""
        self._remember(slot.item.md5)
        slot.outcome = outcome
        slot.staged = self._staging.status(slot.item.md5)
        self._connected().submit_stat(slot.item.path, slot)

    def _no_room_for_copy(self, item: PlanItem) -> str | None:
        """Return why there is no room for a copy of content that is staged or live; None if there is."""
        if not self._skipped:
            return None
        staged = self._staging.status(item.md5)
        size = staged.st_size if staged is not None else self._local.size_of_live(item.source)
        return self._skipped.why(item.md5, size, is_copy=True)

    def _remember(self, md5: bytes) -> None:
        """Remember that content is staged, so that it need not be verified again."""
        self._staged[md5] = None
        if len(self._staged) > _MAX_REMEMBERED:
            del self._staged[next(iter(self._staged))]

    def _still_staged(self, earlier: Result) -> bool:
        """Whether the durable result of an earlier try vouches for staged content."""
        return Outcome(earlier.outcome).is_staged and self._staging.holds(
            earlier.md5, earlier.inode, earlier.changed
        )

    def _unreached(self, item: PlanItem, earlier: Result | None, error: Exception) -> Result:
        """Return the result of an item that this try does not reach."""
        if earlier is not None and (earlier.outcome == Outcome.ADOPTED or self._still_staged(earlier)):
            return earlier
        return failed(item, f"not reached: {error}")

    # --- from the provider --------------------------------------------------------------------------

    def _connected(self) -> Reader:
        if self._reader is None:
            self._reader = self._connect()
        return self._reader

    def _fetch(self, slot: Slot) -> None:
        """Request the content, or its attributes first.

        If a file was replaced by a named pipe, a server that opens it blocks until the other end is opened,
        and answers nothing more. The try that meets it is lost; the next one must not be. The size is also
        needed first if there is no room for everything.
        """
        self._fetching.setdefault(slot.item.md5, [])
        if self._skipped or (slot.earlier is not None and slot.earlier.outcome == Outcome.FAILED):
            slot.probing = True
            self._connected().submit_stat(slot.item.path, slot)
        else:
            self._submit(slot)

    def _submit(self, slot: Slot) -> None:
        self._connected().submit(Wanted(slot.item.path, slot.item.md5, partial(self._open_sink, slot), slot))

    def _open_sink(self, slot: Slot, attributes: Attributes) -> PartialFile | None:
        """Return the sink of a large file; None if it is too large, or another task writes it or has."""
        if slot.part is None:
            slot.error = why_too_large(attributes.size, self._max_file_size)
            if slot.error is not None:
                return None
            try:
                descriptor = self._staging.lock_part(slot.item.md5)
            except OSError as error:
                if not concerns_one_file(error) or self._staging.part(slot.item.md5) is None:
                    raise
                slot.error = (
                    f"{self._part_name(slot)} cannot be written: {error.strerror}. Find out whose it is, "
                    "and remove it"
                )
                return None
            if descriptor is not None and self._staging.has(slot.item.md5):
                # Another task has completed it meanwhile.
                self._staging.drop_part(slot.item.md5)
                os.close(descriptor)
            elif descriptor is not None:
                room = min(room_left(self._mirror), self._max_file_size or NO_LIMIT)
                slot.part = PartialFile(descriptor, attributes.size or 0, room)
                if slot.part.resumed:
                    log.info(
                        "%s: resuming at %s",
                        to_text(slot.item.path),
                        f"{slot.part.position / 1e6:,.1f} MB",
                    )
        return slot.part

    def _is_blocked(self, slot: Slot) -> bool:
        """Whether another task is still writing the content of an item.

        :raises DestinationBusy: it makes no progress.
        """
        md5 = slot.item.md5
        if not self._staging.is_being_written(md5):
            return False
        part, now = self._staging.part(md5), time.monotonic()
        written = part.st_size if part is not None else 0
        if written != slot.waiting[0]:
            slot.waiting = written, now
        elif now - slot.waiting[1] > LOCK_WAIT:
            raise DestinationBusy(
                f"{self._mirror.provider}: {to_text(slot.item.path)} is being written by another task, which "
                f"has made no progress for {LOCK_WAIT:.0f} s. Find the process on its worker that has "
                f"{self._part_name(slot)} open (lsof), and end it; a retry resumes from there."
            )
        return True

    def _part_name(self, slot: Slot) -> str:
        return f"{self._mirror.staging}/{slot.item.md5.decode()}.part"

    def _on_fetched(self, fetched: Fetched) -> None:
        slot: Slot = fetched.wanted.key
        md5, part = slot.item.md5, slot.part
        if fetched.refusal is None:
            if fetched.md5 != md5 and (slot.first is None or (part is not None and part.resumed)):
                self._fetch_again(slot, fetched)
                return
            if (why := why_too_large(fetched.size, self._max_file_size)) is not None:  # small, or it grew
                slot.result = failed(slot.item, why)
            elif fetched.md5 == md5:
                self._stage(slot, fetched)
            else:
                slot.result = mismatched(slot, fetched, self._provider_time)
        elif slot.error is not None:
            slot.result = failed(slot.item, slot.error)
        elif fetched.refusal.code == Code.UNWANTED:
            self._postponed.append(slot)
        elif fetched.refusal.code == Code.TOO_LONG and part is not None:
            slot.result = failed(slot.item, why_too_long(part, self._max_file_size))
        else:
            slot.result = refused(slot.item, fetched.refusal)
        if part is not None:
            self._close_part(slot, fetched)
        self._ready.extend(self._fetching.pop(md5))

    def _close_part(self, slot: Slot, fetched: Fetched) -> None:
        assert slot.part is not None
        if fetched.refusal is None:
            is_wrong = fetched.md5 != slot.item.md5
        else:
            is_wrong = fetched.refusal.code == Code.TOO_LONG
        if is_wrong or fetched.content is not None:
            self._staging.drop_part(slot.item.md5)
        slot.part.close()
        slot.part = None

    def _stage(self, slot: Slot, fetched: Fetched) -> None:
        md5 = slot.item.md5
        if slot.item.replaces is not None:
            self.contents.inspect(slot.item.path, self._head(slot, fetched))
        try:
            if fetched.content is None:
                self._staging.keep_part(md5)
            else:
                self._staging.store(md5, fetched.content, self._folder, self._arriving)
        except IsADirectoryError:
            slot.result = failed(
                slot.item,
                f"{self._mirror.staging}/{md5.decode()} is a directory: find out whose it is, and remove it",
            )
            return
        if fetched.content is not None and md5 in self._local.parts:  # it was larger in an earlier try
            self._local.parts.discard(md5)
            self._local.drop_part(md5)
        self._remember(md5)
        slot.staged = self._staging.status(md5)
        slot.result = succeeded(slot, fetched.before, fetched.size)

    @staticmethod
    def _head(slot: Slot, fetched: Fetched) -> bytes:
        """Return the beginning of a file that has arrived."""
        if fetched.content is not None:
            return fetched.content[:HEAD]
        assert slot.part is not None
        return slot.part.head(HEAD)

    def _fetch_again(self, slot: Slot, fetched: Fetched) -> None:
        """Fetch a whole file that arrived with the wrong md5 again."""
        if slot.part is not None:
            if not slot.part.resumed:
                slot.first = fetched
            slot.part.restart()
        else:
            slot.first = fetched
        self._connected().submit(fetched.wanted)

    def _on_stated(self, stated: Stated) -> None:
        slot: Slot = stated.key
        if stated.refusal is not None:
            slot.result = refused(slot.item, stated.refusal)
            if slot.probing:
                self._ready.extend(self._fetching.pop(slot.item.md5))
        elif slot.probing:
            slot.probing = False
            self._on_probed(slot, stated.attributes)
        elif (why := why_not_same(slot, stated.attributes, self._provider_time)) is not None:
            slot.result = changed(slot.item, why)
        else:
            slot.result = succeeded(slot, stated.attributes, slot.staged and slot.staged.st_size)

    def _on_probed(self, slot: Slot, attributes: Attributes | None) -> None:
        """Request the content of a regular file, if there is room for it."""
        size = attributes.size if attributes is not None else None
        why = why_too_large(size, self._max_file_size) or self._skipped.why(slot.item.md5, size or 0)
        if why is None:
            self._submit(slot)
        else:
            slot.result = failed(slot.item, why)
            self._ready.extend(self._fetching.pop(slot.item.md5))

    # --- progress -----------------------------------------------------------------------------------

    @property
    def summary(self) -> PullSummary:
        return self._progress.summary

    def describe_progress(self) -> str:
        """Return the progress of this shard in one line."""
        done = sum(slot.result is not None for slot in self._slots)
        parts = [slot.part for slot in self._slots if slot.part is not None]
        return self._progress.describe(done, parts) + self._describe_wait()

    def _describe_wait(self) -> str:
        if not self._postponed or (self._reader is not None and self._reader.busy):
            return ""
        return f", waiting for another task to write {to_text(self._postponed[0].item.path)}"

    def _report(self) -> None:
        if self._progress.due():
            log.info("%s", self.describe_progress())

    def close(self) -> None:
        """Close all files. Incomplete parts stay for the next try."""
        self._opened.close()
        for slot in self._slots:
            if slot.part is not None:
                slot.part.close()
