"""Whether a run fits on the disk is judged before its first byte comes, once for all its shards.

::

    by the index    its end line tells the bytes of all files: where even those would fit, nothing is asked
    by the plan     else the sizes of what is planned are asked for, many at a time, and summed up
    it fits         no shard judges again, nor a retry, which would count against itself what it has staged
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

import logging
import socket
from collections.abc import Callable, Iterator

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


def make_sure_of_room(
    mirror: Mirror, run: Run, plan: Plan, committed: Committed, connect: Callable[[], Reader]
) -> None:
    """Make sure that what the plan brings fits on the disk, before anything is transferred.

    :param committed: see :func:`.since.committed_since`.
    :param connect: gives a reader, the same one each time; only called if sizes must be asked for.
    :raises DestinationFull: it does not fit.
    :raises ConnectionLost: the connection broke while sizes were asked for.
    :raises DestinationBusy: another shard takes too long to judge.
    """
    if sum(plan.shards) == plan.adopt:
        return
    with run.space_lock(mirror.provider):
        judged = read_header(run.space) if run.space.exists() else {}
        has = free(mirror.staging)
        known = judged.get("plan") == plan.digest
        if known and judged["fits"]:
            return
        if known and judged.get("committed") == mirror.last_commit():
            need = Room(judged["size"], judged["files"])
        else:
            need = _needed(mirror, run, plan, committed, has, connect)
        fits = has.holds(need)
        of = {"plan": plan.digest, "committed": committed.stamp}
        write_state(run.space, {**of, "fits": fits, **need._asdict()})
    if not fits:
        raise DestinationFull(
            f"{mirror.provider}: {mirror.dest} on {socket.gethostname()} has too little room for this run, "
            f"which {_lack(need, has)}. Nothing was changed. Free some room or enlarge the disk, and clear "
            "pull_changed; or exclude some of its files, if only for a while, and clear diff_indexes."
        )


def _needed(
    mirror: Mirror,
    run: Run,
    plan: Plan,
    committed: Committed,
    has: Room,
    connect: Callable[[], Reader],
) -> Room:
    """Return how much room the run needs, or the most that it can need if that is free."""
    beside = _RESERVE + 2 * run.index.stat().st_size  # consumer index and its copy, each beside the old one
    files = sum(plan.shards) - plan.adopt
    told = read_header(run.state)["index"]["size"]
    if told is not None:
        most = Room(told + files * (_BLOCK + _BESIDE) + beside, files + _RESERVED_FILES)
        if has.holds(most):
            return most
    size, files = _asked(mirror, run, plan, committed, connect)
    need = Room(min(size + files * _BESIDE + beside, NO_LIMIT), files + _RESERVED_FILES)
    log.info("%s: this run needs %s, and %s are free", mirror.provider, need, has)
    return need


def _asked(mirror: Mirror, run: Run, plan: Plan, committed: Committed, connect: Callable[[], Reader]) -> Room:
    """Return what the content takes that the plan brings, by the sizes that the provider tells.

    What it refuses to tell counts as empty: pulling it will be refused too.
    """
    copies_are_free = shares_blocks(mirror.staging)
    seen = Seen(sum(plan.shards))
    size = files = asked = 0
    reader: Reader | None = None
    pace = Pace()
    with mirror.open_staging() as staging:

        def take(answers: list[Fetched | Stated]) -> None:
            nonlocal size
            for answer in answers:
                assert isinstance(answer, Stated)
                if answer.attributes is not None:
                    lacking = answer.attributes.size or 0
                    if answer.key is not None:
                        lacking = staging.lacks(answer.key, lacking)
                    size += -(-lacking // _BLOCK) * _BLOCK

        for item in _items(run, plan, committed):
            if item.adopt:
                continue
            # What is staged, or has partly come, goes to the first of equal files; the others are copies.
            is_copy = seen.comes_again(item.md5)
            if not is_copy and staging.has(item.md5):
                continue
            files += 1
            if (is_copy or item.source) and copies_are_free:
                continue
            reader = reader or connect()
            while not reader.room:
                take(reader.wait())
            reader.submit_stat(item.path, None if is_copy else item.md5)
            asked += 1
            if pace.due():
                log.info("%s sizes asked for so far", f"{asked:,}")
        while reader is not None and reader.busy:
            take(reader.wait())
    return Room(size, files)


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
