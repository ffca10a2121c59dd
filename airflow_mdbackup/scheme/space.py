"""Whether a run fits on the disk is judged before its first byte comes, once for all its shards.

::

    by the index    its end line tells the bytes of all files: where even those would fit, nothing is asked
    by the plan     else the sizes of what is planned are asked for, many at a time, and summed up
    it fits         no shard judges again, nor a retry, which would count against itself what it has staged
    all but some    of the largest contents: these fail, named, and all else comes; judged again once there is
                    more room, so that no one file keeps all others from being backed up
    it does not     each shard and retry compares what was needed with what is free by then, and asks nothing
                    unless another run was committed meanwhile

Counted are content to pull and to copy, in whole blocks, and what is written beside it: records, indexes,
history. Not so what is staged, the beginnings that earlier tries left, what is to be adopted, what another
run has brought since the plan was made, and copies that share the blocks of their original.

What this does not give: the room is not kept free. Other runs and other programs may take it, a user's quota
may end before the disk does, and files that grow on the provider need more; :mod:`.disk` has words for that.
Versions are hard links and need no room; where links do not work, their copies are not counted. Neither are
new directories. On a filesystem that compresses, a run may be refused that would have fitted.

Source: statvfs(3).
"""

from __future__ import annotations

import heapq
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from airflow_mdbackup.scheme.diff import Item, Plan
from airflow_mdbackup.scheme.disk import NO_LIMIT, Room, amount, free
from airflow_mdbackup.scheme.errors import DestinationFull
from airflow_mdbackup.scheme.mirror import Mirror, Run
from airflow_mdbackup.scheme.progress import Pace
from airflow_mdbackup.scheme.records import read_header, read_records, write_state
from airflow_mdbackup.scheme.seen import Seen
from airflow_mdbackup.scheme.sftp import Fetched, Reader, Stated
from airflow_mdbackup.scheme.since import Brought, Committed
from airflow_mdbackup.scheme.tree import shares_blocks

log = logging.getLogger(__name__)

_RESERVE = 64 << 20
_RESERVED_FILES = 100
_BLOCK = 4096  # not what statvfs tells, which on NFS is the size of a transfer
_BESIDE = 1024  # of each file: its inode, and its lines in results, archive records and history
_MOST_LEFT = 1000  # contents without which a run may go on


def make_sure_of_room(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: Committed,
    connect: Callable[[], Reader],
    max_file_size: int | None = None,
) -> dict[bytes, int]:
    """Make sure that what the plan brings fits on the disk, before anything is transferred.

    :param committed: see :func:`.since.committed_since`.
    :param connect: gives a reader, the same one each time; only called if sizes must be asked for.
    :param max_file_size: bytes; what is larger does not come, and needs no room.
    :return: the md5s of contents without which all else fits, with what they need in bytes; mostly none.
    :raises DestinationFull: it does not fit, not even without the largest of them.
    :raises ConnectionLost: the connection broke while sizes were asked for.
    :raises DestinationBusy: another shard takes too long to judge.
    """
    if sum(plan.shards) == plan.adopt:
        return {}
    with run.space_lock(mirror.provider):
        judged = read_header(run.space) if run.space.exists() else {}
        has = free(mirror.staging)
        left = {md5.encode(): int(size) for md5, size in judged.get("left", ())}
        known = judged.get("plan") == plan.digest
        if known and judged["fits"] and (not left or has.size <= judged["free"]):
            return left
        need, left = Room(judged.get("size", 0), judged.get("files", 0)), {}
        as_before = has.holds(need) or has.size <= judged.get("free", 0)
        if not (
            known
            and not judged["fits"]
            and judged.get("committed") == mirror.last_commit()
            and judged.get("max_file_size") == max_file_size
            and as_before
        ):
            needed = _needed(mirror, run, plan, committed, has, connect, max_file_size)
            need, left = needed.without_largest(has)
        fits = has.holds(need)
        of = {"plan": plan.digest, "committed": committed.stamp, "free": has.size}
        of |= {"max_file_size": max_file_size}
        of |= {"left": [[md5.decode(), size] for md5, size in left.items()]}
        write_state(run.space, {**of, "fits": fits, **need._asdict()})
    if not fits:
        raise DestinationFull(
            f"{mirror.provider}: {mirror.dest} on {socket.gethostname()} has too little room for this run, "
            f"which {_lack(need, has)}. Nothing was changed. Free some room or enlarge the disk, and clear "
            "pull_changed; or exclude some of its files, if only for a while, and clear diff_indexes."
        )
    if left:
        log.warning(
            "%s: %s on %s has no room for the largest of what is new, which need %s. These fail, and all else"
            " is backed up",
            *(mirror.provider, mirror.dest, socket.gethostname(), amount(sum(left.values()))),
        )
    return left


def room_left(mirror: Mirror) -> int:
    """Return how many bytes a file may have of whose size its server told nothing, or too little."""
    return max(free(mirror.staging).size - _RESERVE, 0)


@dataclass(slots=True)
class _Needed:
    """What a run needs.

    :ivar largest: what the largest contents need of that, in bytes, by their md5s.
    """

    size: int = 0
    files: int = 0
    largest: dict[bytes, int] = field(default_factory=dict)

    def add(self, md5: bytes, size: int) -> None:
        """Count a content in, or a copy of it."""
        self.size += size
        self.largest[md5] = self.largest.get(md5, 0) + size
        if len(self.largest) > 2 * _MOST_LEFT:
            self.largest = _largest(self.largest)

    def without_largest(self, has: Room) -> tuple[Room, dict[bytes, int]]:
        """Return what is needed without as many of the largest contents as it takes to fit, and these.

        Without any, if that does not help, or nothing would be left to come.
        """
        size, left = self.size, {}
        for md5, of_it in sorted(_largest(self.largest).items(), key=lambda item: item[1], reverse=True):
            if size <= has.size:
                break
            left[md5] = of_it
            size -= of_it
        if size > has.size or self.files > has.files or len(left) == len(self.largest):
            return self.room, {}
        return Room(min(size, NO_LIMIT), self.files), left

    @property
    def room(self) -> Room:
        return Room(min(self.size, NO_LIMIT), self.files)


def _largest(sizes: Mapping[bytes, int]) -> dict[bytes, int]:
    return dict(heapq.nlargest(_MOST_LEFT, sizes.items(), key=lambda item: item[1]))


def _needed(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: Committed,
    has: Room,
    connect: Callable[[], Reader],
    max_file_size: int | None,
) -> _Needed:
    """Return how much room the run needs, or the most that it can need if that is free."""
    beside = _RESERVE + 2 * run.index.stat().st_size  # consumer index and its copy, each beside the old one
    files = sum(plan.shards) - plan.adopt
    told = read_header(run.state)["index"]["size"]
    if told is not None:
        most = Room(told + files * (_BLOCK + _BESIDE) + beside, files + _RESERVED_FILES)
        if has.holds(most):
            return _Needed(*most)
    needed = _asked(mirror, run, plan, committed, connect, max_file_size)
    needed.size += needed.files * _BESIDE + beside
    needed.files += _RESERVED_FILES
    log.info("%s: this run needs %s, and %s are free", mirror.provider, needed.room, has)
    return needed


def _asked(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: Committed,
    connect: Callable[[], Reader],
    max_file_size: int | None,
) -> _Needed:
    """Return what the content takes that the plan brings, by the sizes that the provider tells.

    What it refuses to tell counts as empty: pulling it will be refused too.
    """
    copies_are_free = shares_blocks(mirror.staging)
    seen = Seen(sum(plan.shards))
    needed, asked = _Needed(), 0
    reader: Reader | None = None
    pace = Pace()
    with mirror.open_staging() as staging:

        def take(answers: list[Fetched | Stated]) -> None:
            for answer in answers:
                assert isinstance(answer, Stated)
                size = (answer.attributes.size or 0) if answer.attributes is not None else 0
                if max_file_size is None or size <= max_file_size:
                    md5, is_copy = answer.key
                    lacking = size if is_copy else staging.lacks(md5, size)
                    needed.add(md5, -(-lacking // _BLOCK) * _BLOCK)

        for item in _items(run, plan, committed):
            if item.adopt:
                continue
            # What is staged, or has partly come, goes to the first of equal files; the others are copies.
            is_copy = seen.comes_again(item.md5)
            if not is_copy and staging.has(item.md5):
                continue
            needed.files += 1
            if (is_copy or item.source) and copies_are_free:
                continue
            reader = reader or connect()
            while not reader.room:
                take(reader.wait())
            reader.submit_stat(item.path, (item.md5, is_copy))
            asked += 1
            if pace.due():
                log.info("%s sizes asked for so far", f"{asked:,}")
        while reader is not None and reader.busy:
            take(reader.wait())
    return needed


def _items(run: Run, plan: Plan, committed: Committed) -> Iterator[Item]:
    """Yield the items of all shards, but for those that another run has brought."""
    for shard in range(len(plan.shards)):
        brought = Brought(committed)
        yield from (item for item in read_records(run.pulls(shard), Item) if not brought.has(item))


def _lack(need: Room, has: Room) -> str:
    """Return what is needed, and what of it is free, of whatever does not suffice."""
    told = []
    if need.size > has.size:
        told.append(f"needs {amount(need.size)} where {amount(has.size)} are free")
    if need.files > has.files:
        told.append(f"needs {need.files:,} inodes where {has.files:,} are free")
    return " and ".join(told)
