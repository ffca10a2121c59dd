"""An entry to pull becomes a verified file in staging, with an outcome.

::

    what does not fit on the disk fails before it comes (see space)
    for each item of the shard, in path order, many at a time:
        another run has brought it since  superseded: nothing to do
        its content is staged already     verify it where no durable result vouches for it
        a live file may already be it     hash it: adopted
        a live file should have its bytes copy it to staging, hashing: copied
        another item brings its content   wait for that one: copied
        an earlier try did not come to it ask first whether it is a regular file still: else failed
        else                              fetch it, hashing: pulled; a large one goes on where it was cut off
            md5 is not the index's        fetch once more; then changed, or corrupt
    make all that durable at once (syncfs), then write the results

The results are written in path order, whole or not at all, also when the connection is lost on the way; then
the error goes on to the caller. A retry keeps what is good and takes up the rest.

What this does not give: staging may hold files that no result vouches for (after a kill). They are hashed
again before use.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from airflow_mdbackup.scheme.backup.concurrent_runs import CommittedByOthers, ContentOfOthers, committed_since
from airflow_mdbackup.scheme.backup.free_space import SkippedForSpace, judge_room, room_left
from airflow_mdbackup.scheme.backup.local_content import LocalContent
from airflow_mdbackup.scheme.backup.plan import Plan, PlanItem, read_plan
from airflow_mdbackup.scheme.backup.pull_progress import PullProgress, PullSummary
from airflow_mdbackup.scheme.backup.ransomware import HEAD, SuspectContents
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.units import format_size
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
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Code, Refusal

log = logging.getLogger(__name__)

_REMEMBERED = 50_000  # md5s of staged content
_WAITING = 20_000  # results that may wait for one before them, so that memory stays bounded


_REFUSALS: dict[int, Outcome] = {
    Code.NO_SUCH_FILE: Outcome.VANISHED,
    Code.PERMISSION_DENIED: Outcome.DENIED,
}


def pull(
    mirror: Mirror,
    run: Run,
    shard: int,
    connect: Callable[[], Reader],
    max_file_size: int | None = None,
) -> PullSummary:
    """Bring the content of the items of one shard into staging, and write what became of each.

    :param connect: gives a reader; only called if something has to come from the provider.
    :param max_file_size: bytes; what is larger fails, and no other file for it.
    :raises ConnectionLost: the connection broke; results of what was done are written.
    :raises DestinationFull: the disk became full on the way, and what is staged stays.
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.translate_os_errors`.
    :raises RunIncomplete: the run has no plan.
    :raises DestinationBusy: an earlier try of the same shard does not end, or another task has begun to write
        what this one needs, and does not get on.
    """
    with (
        mirror.translate_os_errors(),
        run.lock("pull_changed", mirror.provider, shared=True),
        run.shard_lock(shard, mirror.provider),
        _others_left_alone(),
    ):
        return _pull(mirror, run, shard, read_plan(run), connect, max_file_size)


@contextmanager
def _others_left_alone() -> Iterator[None]:
    """Keep the garbage collector from going through all that Airflow has loaded, again and again.

    What is made meanwhile is collected as ever. It is a fifth of the time of small files.
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
        log.warning("Stopped after %s", puller.progress())
        raise
    finally:
        puller.close()
    if puller.error is not None:
        raise puller.error
    puller.summary.seconds = round(time.monotonic() - started, 3)
    puller.summary.telltale = puller.contents.told()
    return puller.summary


def _earlier(run: Run, shard: int, plan: str) -> Iterator[Result | None]:
    """Yield what an earlier try found for each item, in the same order; None for all if there was none."""
    path = run.results(shard)
    if path.exists() and read_header(path)["plan"] == plan:
        yield from read_records(path, Result)
    while True:
        yield None


@dataclass(slots=True, eq=False)
class _Slot:
    """An item on its way to a result. Slots leave in the order in which they came."""

    item: PlanItem
    earlier: Result | None
    result: Result | None = None
    part: PartialFile | None = None  # where a large file goes
    first: Fetched | None = None  # a first transfer with the wrong md5
    outcome: Outcome = Outcome.PULLED  # if the attributes that were asked for arrive
    staged: os.stat_result | None = None  # the file that has its content
    odd: str | None = None  # why that has no place in staging
    waiting: tuple[int, float] = -1, 0.0  # how much another task had written of it, and since when
    probed: bool = False  # its attributes were asked for, to open it only if it is a regular file that fits


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
        self._brought = ContentOfOthers(committed)
        self._committed = mirror.has_committed(run)
        self._arriving = run.arriving(shard)
        self._provider_time = plan.provider_time
        self._connect = connect
        self._max_file_size = max_file_size
        self._judge_room = partial(judge_room, mirror, run, plan, committed, self._connected, max_file_size)
        self._left_out = SkippedForSpace()
        self._reader: Reader | None = None
        self._slots: deque[_Slot] = deque()
        self._ready: deque[_Slot] = deque()  # to be begun, again or before new items
        self._postponed: deque[_Slot] = deque()  # another task writes the same content
        self._fetching: dict[bytes, list[_Slot]] = {}  # by md5: who waits for content that is on its way
        self._staged: dict[
            bytes, None
        ] = {}  # md5s of what this task knows to be staged, as far as remembered

    def results(self, items: Iterator[PlanItem], earlier: Iterator[Result | None]) -> Iterator[Result]:
        """Yield the result of each item in order; at the end all that they tell of is durable."""
        pairs = zip(items, earlier, strict=False)
        try:
            self._left_out = self._judge_room()
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
            more = self._take_up(pairs, more)
            while self._slots and (result := self._slots[0].result) is not None:
                self._slots.popleft()
                yield self._progress.count(result)
            self._turn()
            self._tell()

    def _take_up(self, pairs: Iterator[tuple[PlanItem, Result | None]], more: bool) -> bool:
        """Begin as many items as there is room for, and return whether there may be more."""
        while self._reader is None or self._reader.room:
            if self._ready:
                self._begin(self._ready.popleft())
            elif more and len(self._slots) < _WAITING:
                pair = next(pairs, None)
                if pair is None:
                    return False
                slot = _Slot(*pair)
                self._slots.append(slot)
                if self._brought.has(slot.item):
                    self._progress.spared += 1
                    slot.result = self._by_whom(slot)
                else:
                    self._begin(slot)
            else:
                break
            self._tell()
        return more

    def _turn(self) -> None:
        """Take in what has arrived."""
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
                (self._postponed if self._waits(slot) else self._ready).append(slot)

    # --- one item -----------------------------------------------------------------------------------

    def _by_whom(self, slot: _Slot) -> Result:
        """Return the result of what has been committed since the plan was made."""
        item, earlier = slot.item, slot.earlier
        if self._committed and earlier is not None and Outcome(earlier.outcome).good:
            return earlier  # by this very run, whose task was cleared
        return Result(item.path, item.md5, item.replaces, Outcome.SUPERSEDED)

    def _begin(self, slot: _Slot) -> None:
        item, earlier = slot.item, slot.earlier
        if item.md5 in self._fetching:
            self._fetching[item.md5].append(slot)
        elif earlier is not None and self._still_staged(earlier):
            self._remember(item.md5)
            self._progress.spared += 1
            slot.result = earlier
        elif item.md5 in self._staged and (why := self._no_room_for_copy(item)):
            slot.result = _failed(item, why)
        elif item.md5 in self._staged:
            self._have(slot, Outcome.COPIED)
        elif self._local.is_staged(item.md5):
            self._have(slot, Outcome.PULLED)
        elif (item.adopt or earlier) and (live := self._local.adoptable(item)):
            self._progress.spared += 1
            slot.result = live
        elif item.source and (why := self._no_room_for_copy(item)):
            slot.result = _failed(item, why)
        elif item.source and self._local.copy(item):
            self._have(slot, Outcome.COPIED)
        else:
            self._fetch(slot)

    def _have(self, slot: _Slot, outcome: Outcome) -> None:
        """The content is staged; only the attributes of this path are missing."""
        self._remember(slot.item.md5)
        slot.outcome = outcome
        slot.staged = self._staging.status(slot.item.md5)
        self._connected().submit_stat(slot.item.path, slot)

    def _no_room_for_copy(self, item: PlanItem) -> str | None:
        """Return why a file may not come whose content is staged, or is that of a live file."""
        if not self._left_out:
            return None
        staged = self._staging.status(item.md5)
        size = staged.st_size if staged is not None else self._local.live_size(item.source)
        return self._left_out.why(item.md5, size, is_copy=True)

    def _remember(self, md5: bytes) -> None:
        """Keep in mind that content is staged, so that it need not be proven again for a while."""
        self._staged[md5] = None
        if len(self._staged) > _REMEMBERED:
            del self._staged[next(iter(self._staged))]

    def _still_staged(self, earlier: Result) -> bool:
        """Whether an earlier try's durable result vouches for content that is there."""
        brought = earlier.outcome in (Outcome.PULLED, Outcome.COPIED)
        return brought and self._staging.holds(earlier.md5, earlier.inode, earlier.changed)

    def _unreached(self, item: PlanItem, earlier: Result | None, error: Exception) -> Result:
        """Return what is known of an item that this try does not come to."""
        if earlier is not None and (earlier.outcome == Outcome.ADOPTED or self._still_staged(earlier)):
            return earlier
        return _failed(item, f"not reached: {error}")

    # --- from the provider --------------------------------------------------------------------------

    def _connected(self) -> Reader:
        if self._reader is None:
            self._reader = self._connect()
        return self._reader

    def _fetch(self, slot: _Slot) -> None:
        """Have the content come.

        If a named pipe was put in the place of a file, whoever opens it waits for its other end, and the
        server answers nothing more. The try that meets it is lost; the next one must not be. Where there is
        no room for all, its size tells whether it may come.
        """
        self._fetching.setdefault(slot.item.md5, [])
        if self._left_out or (slot.earlier is not None and slot.earlier.outcome == Outcome.FAILED):
            slot.probed = True
            self._connected().submit_stat(slot.item.path, slot)
        else:
            self._submit(slot)

    def _submit(self, slot: _Slot) -> None:
        self._connected().submit(Wanted(slot.item.path, slot.item.md5, partial(self._part, slot), slot))

    def _part(self, slot: _Slot, attributes: Attributes) -> PartialFile | None:
        """Return where a large file goes; None if it is too large, or another task writes it, or just has."""
        if slot.part is None:
            slot.odd = self._too_large(attributes.size)
            if slot.odd is not None:
                return None
            try:
                descriptor = self._staging.lock_part(slot.item.md5)
            except OSError as error:
                if not concerns_one_file(error) or self._staging.part(slot.item.md5) is None:
                    raise
                slot.odd = (
                    f"{self._part_name(slot)} cannot be written: {error.strerror}. See whose it is, "
                    "and remove it"
                )
                return None
            if descriptor is not None and self._staging.has(slot.item.md5):
                # Another task has finished it since this one looked.
                self._staging.drop_part(slot.item.md5)
                os.close(descriptor)
            elif descriptor is not None:
                room = min(room_left(self._mirror), self._max_file_size or NO_LIMIT)
                slot.part = PartialFile(descriptor, attributes.size or 0, room)
                if slot.part.resumed:
                    log.info(
                        "%s: going on behind %s",
                        to_text(slot.item.path),
                        f"{slot.part.position / 1e6:,.1f} MB",
                    )
        return slot.part

    def _too_large(self, size: int | None) -> str | None:
        """Return why a file of this size may not come; None if it may."""
        most = self._max_file_size
        if most is None or size is None or size <= most:
            return None
        return f"it has {format_size(size)}, more than the allowed {format_size(most)} (max_file_size)"

    def _too_long(self, part: PartialFile) -> str:
        why = "that max_file_size allows" if part.room == self._max_file_size else "there is room for"
        return (
            f"the server says that it has {format_size(part.size)}, but it goes on behind the "
            f"{format_size(part.room or 0)} {why}"
        )

    def _waits(self, slot: _Slot) -> bool:
        """Whether another task is still at the content of an item.

        :raises DestinationBusy: it does not get on.
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
                f"{self._mirror.provider}: {to_text(slot.item.path)} is written by another task, which has "
                f"not got on for {LOCK_WAIT:.0f} s. See which one has {self._part_name(slot)} open (lsof) on "
                "its worker, and end it; a retry goes on from there."
            )
        return True

    def _part_name(self, slot: _Slot) -> str:
        return f"{self._mirror.staging}/{slot.item.md5.decode()}.part"

    def _on_fetched(self, fetched: Fetched) -> None:
        slot: _Slot = fetched.wanted.key
        md5, part = slot.item.md5, slot.part
        if fetched.refusal is None:
            if fetched.md5 != md5 and (slot.first is None or (part is not None and part.resumed)):
                self._fetch_again(slot, fetched)
                return
            if (too_large := self._too_large(fetched.size)) is not None:  # small, or it grew meanwhile
                slot.result = _failed(slot.item, too_large)
            elif fetched.md5 == md5:
                self._stage(slot, fetched)
            else:
                slot.result = self._judge(slot, fetched)
        elif slot.odd is not None:
            slot.result = _failed(slot.item, slot.odd)
        elif fetched.refusal.code == Code.UNWANTED:
            self._postponed.append(slot)
        elif fetched.refusal.code == Code.TOO_LONG and part is not None:
            slot.result = _failed(slot.item, self._too_long(part))
        else:
            slot.result = _refused(slot.item, fetched.refusal)
        if part is not None:
            is_wrong = (
                fetched.md5 != md5 if fetched.refusal is None else fetched.refusal.code == Code.TOO_LONG
            )
            if is_wrong or fetched.content is not None:
                self._staging.drop_part(md5)
            part.close()
            slot.part = None
        self._ready.extend(self._fetching.pop(md5))

    def _stage(self, slot: _Slot, fetched: Fetched) -> None:
        md5 = slot.item.md5
        if slot.item.replaces is not None:
            self.contents.look(slot.item.path, _head(slot, fetched))
        try:
            if fetched.content is None:
                self._staging.keep_part(md5)
            else:
                self._staging.store(md5, fetched.content, self._folder, self._arriving)
        except IsADirectoryError:
            slot.result = _failed(
                slot.item, f"{self._mirror.staging}/{md5.decode()} is a directory: see whose it is, remove it"
            )
            return
        if fetched.content is not None and md5 in self._local.parts:  # of an earlier try, as a larger file
            self._local.parts.discard(md5)
            self._local.drop_part(md5)
        self._remember(md5)
        slot.staged = self._staging.status(md5)
        slot.result = _arrived(slot, fetched.before, fetched.size)

    def _fetch_again(self, slot: _Slot, fetched: Fetched) -> None:
        """Fetch the whole of a file that came with the wrong md5."""
        if slot.part is not None:
            if not slot.part.resumed:
                slot.first = fetched
            slot.part.restart()
        else:
            slot.first = fetched
        self._connected().submit(fetched.wanted)

    def _judge(self, slot: _Slot, second: Fetched) -> Result:
        """Tell a file that changed on the provider from one that arrives wrong."""
        assert slot.first is not None
        told = [a for f in (slot.first, second) for a in (f.before, f.after) if a is not None]
        moved = len({(a.size, a.mtime) for a in told}) > 1
        newer = any(a.mtime is not None and a.mtime >= self._provider_time for a in told)
        outcome = Outcome.CHANGED if moved or newer else Outcome.CORRUPT
        detail = f"arrived with md5 {second.md5.decode()}, the index has {slot.item.md5.decode()}"
        return Result(slot.item.path, slot.item.md5, slot.item.replaces, outcome, detail=detail)

    def _on_stated(self, stated: Stated) -> None:
        slot: _Slot = stated.key
        if stated.refusal is not None:
            slot.result = _refused(slot.item, stated.refusal)
            if slot.probed:
                self._ready.extend(self._fetching.pop(slot.item.md5))
        elif slot.probed:
            slot.probed = False
            self._on_probed(slot, stated.attributes)
        elif (why := self._two_of_one_md5(slot, stated.attributes)) is not None:
            item = slot.item
            slot.result = Result(item.path, item.md5, item.replaces, Outcome.CHANGED, detail=why)
        else:
            slot.result = _arrived(slot, stated.attributes, slot.staged and slot.staged.st_size)

    def _on_probed(self, slot: _Slot, attributes: Attributes | None) -> None:
        """Have the content come of what is a regular file, if there is room for it."""
        size = attributes.size if attributes is not None else None
        why = self._too_large(size) or self._left_out.why(slot.item.md5, size or 0)
        if why is None:
            self._submit(slot)
        else:
            slot.result = _failed(slot.item, why)
            self._ready.extend(self._fetching.pop(slot.item.md5))

    def _two_of_one_md5(self, slot: _Slot, attributes: Attributes | None) -> str | None:
        """Return why content that is here is not that of a file with its md5; None if it may be.

        One that changed since the index was built may have any size.
        """
        if attributes is None or slot.staged is None or attributes.size in (None, slot.staged.st_size):
            return None
        if attributes.mtime is None or attributes.mtime >= self._provider_time:
            return None
        here = slot.staged.st_size
        return (
            f"it has {attributes.size:,} bytes, and what the backup has with its md5 {here:,}: it was "
            "replaced since the index was built, or somebody has made two files with one md5"
        )

    # --- telling ------------------------------------------------------------------------------------

    @property
    def summary(self) -> PullSummary:
        return self._progress.summary

    def progress(self) -> str:
        """Return one line about how far this shard has come."""
        done = sum(slot.result is not None for slot in self._slots)
        parts = [slot.part for slot in self._slots if slot.part is not None]
        return self._progress.line(done, parts) + self._whom_it_waits_for()

    def _whom_it_waits_for(self) -> str:
        if not self._postponed or (self._reader is not None and self._reader.busy):
            return ""
        return f", waiting for another task that writes {to_text(self._postponed[0].item.path)}"

    def _tell(self) -> None:
        if self._progress.due():
            log.info("%s", self.progress())

    def close(self) -> None:
        """Let go of files. Parts that are incomplete stay, for the next try."""
        self._opened.close()
        for slot in self._slots:
            if slot.part is not None:
                slot.part.close()


def _arrived(slot: _Slot, attributes: Attributes | None, size: int | None) -> Result:
    """Return the result of content that is staged; ``size`` is how much came, which need not be as told."""
    assert attributes is not None
    item = slot.item
    told = attributes.size if size is None else size, attributes.mtime, attributes.mode
    staged = (None, None) if slot.staged is None else (slot.staged.st_ino, slot.staged.st_ctime_ns)
    inode, changed = staged
    return Result(*(item.path, item.md5, item.replaces, slot.outcome, *told), inode=inode, changed=changed)


def _head(slot: _Slot, fetched: Fetched) -> bytes:
    """Return how a file begins that has come."""
    if fetched.content is not None:
        return fetched.content[:HEAD]
    assert slot.part is not None
    return slot.part.head(HEAD)


def _refused(item: PlanItem, refusal: Refusal) -> Result:
    outcome = _REFUSALS.get(refusal.code, Outcome.FAILED)
    return Result(item.path, item.md5, item.replaces, outcome, detail=refusal.message)


def _failed(item: PlanItem, why: str) -> Result:
    return Result(item.path, item.md5, item.replaces, Outcome.FAILED, detail=why)
