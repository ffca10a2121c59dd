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
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from functools import partial

from airflow_mdbackup.scheme.diff import Item, Plan, read_plan
from airflow_mdbackup.scheme.disk import NO_LIMIT, amount
from airflow_mdbackup.scheme.errors import BackupError, DestinationBusy
from airflow_mdbackup.scheme.mirror import LOCK_WAIT, Mirror, Run
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.part import Part
from airflow_mdbackup.scheme.progress import Pace
from airflow_mdbackup.scheme.records import Record, RecordWriter, read_header, read_records
from airflow_mdbackup.scheme.sftp import Attributes, Code, Fetched, Reader, Refusal, Stated, Wanted
from airflow_mdbackup.scheme.since import Brought, Committed, committed_since
from airflow_mdbackup.scheme.space import LeftOut, judge_room, room_left
from airflow_mdbackup.scheme.telltale import HEAD, Contents
from airflow_mdbackup.scheme.tree import Folder, concerns_one_file, copy_of, md5_of

log = logging.getLogger(__name__)

_SHOWN = 50  # paths that the log names
_REMEMBERED = 50_000  # md5s of staged content
_LONGEST = 1e9  # seconds that are told to be left
_WAITING = 20_000  # results that may wait for one before them, so that memory stays bounded


class Outcome(StrEnum):
    """What became of one entry."""

    PULLED = "pulled"
    COPIED = "copied"
    ADOPTED = "adopted"
    SUPERSEDED = "superseded"
    CHANGED = "changed"
    VANISHED = "vanished"
    DENIED = "denied"
    CORRUPT = "corrupt"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    ROTTEN = "rotten"

    @property
    def good(self) -> bool:
        """Whether the entry is where it should be."""
        return self in (Outcome.PULLED, Outcome.COPIED, Outcome.ADOPTED, Outcome.SUPERSEDED)

    @property
    def failure(self) -> bool:
        """Whether the run fails for it. What is neither good nor a failure is a warning."""
        return not self.good and self not in (Outcome.CHANGED, Outcome.VANISHED)


_REFUSALS: dict[int, Outcome] = {
    Code.NO_SUCH_FILE: Outcome.VANISHED,
    Code.PERMISSION_DENIED: Outcome.DENIED,
}


class Result(Record, frozen=True):
    """What became of one item.

    :ivar inode: of the live file that was adopted, ``modified`` its time in nanoseconds; or of the staged
        file, ``changed`` when that was last given a name, or attributes.
    """

    path: bytes
    md5: bytes
    replaces: bytes | None
    outcome: str
    size: int | None = None
    mtime: int | None = None
    mode: int | None = None
    inode: int | None = None
    modified: int | None = None
    changed: int | None = None
    detail: str | None = None


@dataclass(slots=True)
class PullSummary:
    """What became of the items of a shard.

    :ivar transferred: bytes, from the provider.
    :ivar telltale: what ransomware would look like, if it is anything.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    transferred: int = 0
    seconds: float = 0.0
    telltale: str | None = None

    def count(self, outcome: Outcome) -> None:
        """Note that an item had an outcome."""
        self.outcomes[outcome.value] = self.outcomes.get(outcome.value, 0) + 1


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
    :raises DestinationRefused, DestinationBroken, WorkerExhausted: see :meth:`.Mirror.told_plainly`.
    :raises RunIncomplete: the run has no plan.
    :raises DestinationBusy: an earlier try of the same shard does not end, or another task has begun to write
        what this one needs, and does not get on.
    """
    with (
        mirror.told_plainly(),
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
    items = read_records(run.pulls(shard), Item)
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

    item: Item
    earlier: Result | None
    result: Result | None = None
    part: Part | None = None  # where a large file goes
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
        committed: Committed,
        connect: Callable[[], Reader],
        max_file_size: int | None = None,
    ) -> None:
        self.summary = PullSummary()
        self.error: Exception | None = None
        self.contents = Contents()
        self._mirror = mirror
        with ExitStack() as opened:
            self._tree = opened.enter_context(mirror.tree())
            self._staging = opened.enter_context(mirror.open_staging())
            self._folder = opened.enter_context(Folder(run.folder))
            self._parts = self._staging.parts()
            self._opened = opened.pop_all()
        self._brought = Brought(committed)
        self._committed = mirror.has_committed(run)
        self._arriving = run.arriving(shard)
        self._provider_time = plan.provider_time
        self._connect = connect
        self._max_file_size = max_file_size
        self._judge_room = partial(judge_room, mirror, run, plan, committed, self._connected, max_file_size)
        self._left_out = LeftOut()
        self._total = sum(plan.shards[shard : shard + 1])
        self._reader: Reader | None = None
        self._slots: deque[_Slot] = deque()
        self._ready: deque[_Slot] = deque()  # to be begun, again or before new items
        self._postponed: deque[_Slot] = deque()  # another task writes the same content
        self._fetching: dict[bytes, list[_Slot]] = {}  # by md5: who waits for content that is on its way
        self._staged: dict[
            bytes, None
        ] = {}  # md5s of what this task knows to be staged, as far as remembered
        self._done = 0
        self._spared = 0  # items that an earlier try, or the mirror, had already
        self._troubles = 0
        self._started = time.monotonic()
        self._pace = Pace()

    def results(self, items: Iterator[Item], earlier: Iterator[Result | None]) -> Iterator[Result]:
        """Yield the result of each item in order; at the end all that they tell of is durable."""
        pairs = zip(items, earlier, strict=False)
        try:
            self._left_out = self._judge_room()
            yield from self._run(pairs)
        except (BackupError, OSError) as error:
            self.error = error
            for slot in self._slots:
                yield self._counted(slot.result or self._unreached(slot.item, slot.earlier, error))
            for item, result in pairs:
                yield self._counted(self._unreached(item, result, error))
        self._staging.sync()

    def _run(self, pairs: Iterator[tuple[Item, Result | None]]) -> Iterator[Result]:
        more = True
        while more or self._slots:
            more = self._take_up(pairs, more)
            while self._slots and (result := self._slots[0].result) is not None:
                self._slots.popleft()
                yield self._counted(result)
            self._turn()
            self._tell()

    def _take_up(self, pairs: Iterator[tuple[Item, Result | None]], more: bool) -> bool:
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
                    self._spared += 1
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
            self.summary.transferred = self._reader.received
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
            self._spared += 1
            slot.result = earlier
        elif item.md5 in self._staged and (why := self._no_room_for_copy(item)):
            slot.result = _failed(item, why)
        elif item.md5 in self._staged:
            self._have(slot, Outcome.COPIED)
        elif self._verified(item.md5):
            self._have(slot, Outcome.PULLED)
        elif (item.adopt or earlier) and (live := self._adoptable(item)):
            self._spared += 1
            slot.result = live
        elif item.source and (why := self._no_room_for_copy(item)):
            slot.result = _failed(item, why)
        elif item.source and self._copied(item):
            self._have(slot, Outcome.COPIED)
        else:
            self._fetch(slot)

    def _have(self, slot: _Slot, outcome: Outcome) -> None:
        """The content is staged; only the attributes of this path are missing."""
        self._remember(slot.item.md5)
        slot.outcome = outcome
        slot.staged = self._staging.status(slot.item.md5)
        self._connected().submit_stat(slot.item.path, slot)

    def _no_room_for_copy(self, item: Item) -> str | None:
        """Return why a file may not come whose content is staged, or is that of a live file."""
        if not self._left_out:
            return None
        staged = self._staging.status(item.md5)
        size = staged.st_size if staged is not None else self._live_size(item.source)
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

    def _unreached(self, item: Item, earlier: Result | None, error: Exception) -> Result:
        """Return what is known of an item that this try does not come to."""
        if earlier is not None and (earlier.outcome == Outcome.ADOPTED or self._still_staged(earlier)):
            return earlier
        return _failed(item, f"not reached: {error}")

    def _verified(self, md5: bytes) -> bool:
        """Whether staging has the content, taking away what only looks like it."""
        if not self._staging.has(md5):
            return False
        try:
            if self._staging.is_whole(md5, md5):
                return True
        except OSError as error:
            if not concerns_one_file(error):
                raise
        self._staging.remove(md5)
        return False

    def _adoptable(self, item: Item) -> Result | None:
        """Return the result if the live file has the wanted bytes already."""
        try:
            with self._tree.opened(item.path) as descriptor:
                status = os.fstat(descriptor)
                if md5_of(descriptor) != item.md5:
                    return None
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None
        return Result(
            *(item.path, item.md5, item.replaces, Outcome.ADOPTED),
            size=status.st_size,
            inode=status.st_ino,
            modified=status.st_mtime_ns,
        )

    def _copied(self, item: Item) -> bool:
        """Copy the content from a live file that should have it; false if it does not.

        What has come from the provider already is not given up for that.
        """
        assert item.source is not None
        part = self._lock_part(item.md5)
        if part is None:
            return False
        try:
            if os.fstat(part).st_size:
                return False
            self._parts.discard(item.md5)
            if self._staging.has(item.md5):  # another task has just staged it
                self._staging.drop_part(item.md5)
                return self._verified(item.md5)
            if self._copy(item.source, part) == item.md5:
                self._staging.keep_part(item.md5)
                return True
            self._staging.drop_part(item.md5)
            return False
        finally:
            os.close(part)

    def _copy(self, source: bytes, part: int) -> bytes | None:
        """Copy a live file and return the md5 of what was copied; None if it cannot be read."""
        try:
            with self._tree.opened(source) as live:
                return copy_of(live, part)
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return None

    def _live_size(self, path: bytes | None) -> int:
        """Return the bytes of a live file; 0 if there is none, or it cannot be read."""
        if path is None:
            return 0
        try:
            with self._tree.opened(path) as live:
                return os.fstat(live).st_size
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return 0

    def _lock_part(self, md5: bytes) -> int | None:
        """Return a part, locked; None if another task is at it, or if it is not for us."""
        try:
            return self._staging.lock_part(md5)
        except OSError as error:
            if not concerns_one_file(error) or self._staging.part(md5) is None:
                raise
            return None

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

    def _part(self, slot: _Slot, attributes: Attributes) -> Part | None:
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
                slot.part = Part(descriptor, attributes.size or 0, room)
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
        return f"it has {amount(size)}, more than the allowed {amount(most)} (max_file_size)"

    def _too_long(self, part: Part) -> str:
        by_limit = part.room == self._max_file_size
        return (
            f"the server says that it has {amount(part.size)}, but it goes on behind the "
            f"{amount(part.room or 0)} {'that max_file_size allows' if by_limit else 'there is room for'}"
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
        if fetched.content is not None and md5 in self._parts:  # of an earlier try, as a larger file
            self._parts.discard(md5)
            self._drop_part(md5)
        self._remember(md5)
        slot.staged = self._staging.status(md5)
        slot.result = _arrived(slot, fetched.before, fetched.size)

    def _drop_part(self, md5: bytes) -> None:
        """Take away what has come of content that is staged now, unless another task is at it."""
        part = self._lock_part(md5)
        if part is not None:
            self._staging.drop_part(md5)
            os.close(part)

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

    def _counted(self, result: Result) -> Result:
        self._done += 1
        outcome = Outcome(result.outcome)
        self.summary.count(outcome)
        if not outcome.good:
            self._troubles += 1
            if self._troubles <= _SHOWN:
                log.warning("%s: %s (%s)", outcome, to_text(result.path), result.detail)
            elif self._troubles == _SHOWN + 1:
                log.warning("There are more; commit_backup sums up")
        return result

    def progress(self) -> str:
        """Return one line about how far this shard has come."""
        # Those that wait for one before them are done too.
        done = self._done + sum(slot.result is not None for slot in self._slots)
        seconds = max(time.monotonic() - self._started, 0.001)
        megabytes = self.summary.transferred / 1e6
        return (
            f"{done:,} of {self._total:,} files, {megabytes:,.1f} MB in {seconds:,.0f} s "
            f"({(done - self._spared) / seconds:,.0f} files/s, {megabytes / seconds:,.1f} MB/s)"
            f"{self._left(done, seconds)}{self._whom_it_waits_for()}"
        )

    def _whom_it_waits_for(self) -> str:
        if not self._postponed or (self._reader is not None and self._reader.busy):
            return ""
        return f", waiting for another task that writes {to_text(self._postponed[0].item.path)}"

    def _left(self, done: int, seconds: float) -> str:
        """Say how long the rest may take: by the files, or by the bytes, whichever takes longer."""
        parts = [slot.part for slot in self._slots if slot.part is not None]
        known = sum(max(part.size - part.position, 0) for part in parts)
        came = self.summary.transferred
        waiting = self._total - done - len(parts)
        brought = done - self._spared
        unknown = waiting * (came - sum(part.position for part in parts)) / max(brought, 1)
        by_files = waiting / brought * seconds if brought else 0.0
        by_bytes = (known + max(unknown, 0)) / came * seconds if came else 0.0
        left = min(max(by_files, by_bytes), _LONGEST)  # a size is what the provider says it is
        return f", about {timedelta(seconds=round(left))} left" if left else ""

    def _tell(self) -> None:
        if self._pace.due():
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


def _refused(item: Item, refusal: Refusal) -> Result:
    outcome = _REFUSALS.get(refusal.code, Outcome.FAILED)
    return Result(item.path, item.md5, item.replaces, outcome, detail=refusal.message)


def _failed(item: Item, why: str) -> Result:
    return Result(item.path, item.md5, item.replaces, Outcome.FAILED, detail=why)
