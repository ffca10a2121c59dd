"""The second half of a commit, which a crash may cut off and the next run takes up again.

:func:`finish` carries out a history that was written ahead, all that it tells of being on the disk::

    step 5   write the consumer index without the entries about to be replaced
    step 6   put each file over its live name; syncfs
    step 7   write the final consumer index, and a copy; give the history its final name, then the copy

The history of a pruning is settled by :func:`finish_pruning`, which records what is gone.

Every step may be done again. After a crash the disk shows how far it came: content that still waits, whole,
is put in place; where none waits, the live file must have the new md5, or else that change did not happen and
is left out of index and history.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged
from airflow_mdbackup.scheme.history import PRUNE, Change, What, last, pending
from airflow_mdbackup.scheme.index import (
    Entry,
    IndexWriter,
    MalformedIndex,
    canonicalise,
    count_entries,
    digest,
    merge,
    read_entries,
    revise,
)
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.names import from_text, to_text
from airflow_mdbackup.scheme.ordered import Alongside, Covered, Prefixes
from airflow_mdbackup.scheme.progress import Pace
from airflow_mdbackup.scheme.records import (
    Damaged,
    RecordWriter,
    copy_records,
    read_header,
    read_records,
    write_records,
    write_state,
)
from airflow_mdbackup.scheme.totals import OnDisk, Tally, totals_state
from airflow_mdbackup.scheme.tree import (
    Blocked,
    Folder,
    Tree,
    concerns_one_file,
    copy_of,
    fsync_directory,
    is_file,
    md5_of,
    not_followed,
    seconds,
)

log = logging.getLogger(__name__)

STAGING = "staging"


def consumer_index(mirror: Mirror, target: Path) -> Path | None:
    """Return the consumer index in canonical form, or None if there is none.

    As the last commit left it, that is the file itself; else it is read strictly, into ``target``.

    :raises ConsumerIndexDamaged: it is not well formed, or incomplete.
    """
    if not _is_there(mirror, mirror.index):
        return None
    if digest(mirror.index) == last(mirror).get("after"):
        return mirror.index
    return _read_strictly(mirror, mirror.index, target)


def index_to_look_at(mirror: Mirror, target: Path) -> Path | None:
    """Return the consumer index as the next run would find it, for whoever only looks; None if there is none.

    While a commit is not finished, that is what it began with. No lock is needed.

    :param target: where it is written, in canonical form.
    :raises ConsumerIndexDamaged: see :func:`consumer_index`.
    """
    index = mirror.committed if any(pending(mirror)) else mirror.index
    return _read_strictly(mirror, index, target) if _is_there(mirror, index) else None


def _is_there(mirror: Mirror, index: Path) -> bool:
    """Whether there is an index.

    :raises ConsumerIndexDamaged: something else than a file has its name.
    """
    if index.exists() and not index.is_file():
        what = "is a directory" if index.is_dir() else "is no regular file"
        raise ConsumerIndexDamaged(
            f"{mirror.provider}: the consumer index {index} {what}. (Docker makes a directory where a "
            f"file that it is to mount is missing.) Remove that. {_ways_out(mirror)}"
        )
    return index.exists()


def _ways_out(mirror: Mirror) -> str:
    return (
        f"Nothing was changed. Either restore it ({mirror.committed} is what the last commit wrote), or "
        "delete it: then all files are copied again, and versions stay."
    )


def _read_strictly(mirror: Mirror, index: Path, target: Path) -> Path:
    ways_out = _ways_out(mirror)
    try:
        summary = canonicalise(index, target, name=f"{mirror.provider}: consumer index {index}")
    except MalformedIndex as error:
        raise ConsumerIndexDamaged(f"{error}. {ways_out}") from None
    if not summary.complete:
        raise ConsumerIndexDamaged(
            f"{mirror.provider}: the consumer index {index} has no end line: truncated. {ways_out}"
        )
    return target


def status_or_lost(mirror: Mirror) -> dict[str, Any]:
    """Return the status as the last run left it. One that is spoilt is no reason to do nothing."""
    try:
        return mirror.read_status()
    except Damaged as error:
        log.warning("%s. When the last good run was is not known until the next one", error)
        return {}


def refresh_status(mirror: Mirror) -> None:
    """Have the status tell what index and disk hold since the last commit; if there is one. Needs the lock.

    That is no reason for anything to fail which is committed by then.
    """
    status = status_or_lost(mirror)
    if not status:
        return
    try:
        if mirror.committed.exists():
            status["files"] = count_entries(mirror.committed)
        write_state(mirror.status, {**status, **totals_state(mirror, status)})
    except OSError as error:
        log.warning("%s is as it was before this commit: %s", mirror.status, error)


def present_index(mirror: Mirror, target: Path) -> Path | None:
    """Return the consumer index in canonical form, for whoever only reads; None if there is none.

    That of the last commit, where a later one was cut off or somebody damaged the index.

    :param target: where it is written.
    """
    index = mirror.committed if any(pending(mirror)) or not mirror.index.is_file() else mirror.index
    for path in (index, mirror.committed):
        try:
            if path.is_file() and canonicalise(path, target, name=str(path)).complete:
                return target
        except MalformedIndex as error:
            log.warning("%s", error)
    return None


def is_canonical(index: Path, target: Path) -> bool:
    """Whether an index is there, whole and in canonical form.

    :param target: where that form is written.
    """
    try:
        return (
            index.is_file()
            and canonicalise(index, target, name=str(index)).complete
            and digest(index) == digest(target)
        )
    except MalformedIndex:
        return False


def hand_edits(mirror: Mirror, current: Path | None) -> Iterator[Change]:
    """Yield what somebody changed in the consumer index since the last commit.

    :param current: see :func:`consumer_index`.
    """
    after = last(mirror).get("after")
    if after is None or (current is not None and after == digest(mirror.index)):
        return
    if not _is_index(mirror.committed, after):
        log.warning("The consumer index was edited, and what the last commit wrote is lost: not recorded")
        return
    for path, old, new in merge(read_entries(mirror.committed), read_entries(current) if current else ()):
        if old != new:
            yield Change(path, What.EDITED, old_md5=old, md5=new)


def settle(mirror: Mirror, target: Path) -> None:
    """Finish the commits that a crash cut off. Needs the lock.

    :param target: see :func:`consumer_index`.
    :raises Damaged: a history that was written ahead cannot be read.
    """
    for path in pending(mirror):
        log.warning("Finishing the commit of an earlier run that was cut off: %s", path.name)
        try:
            _take_up(mirror, path, target)
        except Damaged as error:
            raise Damaged(
                f"{mirror.provider}: {error}. Move that file away: the next run sees to what it left undone"
            ) from None


def _take_up(mirror: Mirror, path: Path, target: Path) -> None:
    """Finish a commit that was cut off, and take what somebody did to the index since for what it is.

    An edit is recorded with the commit. An index that was deleted is a wish to have everything copied again;
    it is written only where the next commit looks up what was deleted.
    """
    if path.with_suffix("").exists():  # but for what is tidied up, it came to its end
        finish(mirror, path, None)
        return
    header = read_header(path)
    if header.get("kind") == PRUNE:
        finish_pruning(mirror, path)
        return
    current = consumer_index(mirror, target)
    before = header["before"]
    if _is_index(mirror.index, before) if before else current is None:
        finish(mirror, path, current, takes=_takes(current, path))
    elif not _is_index(mirror.committed, last(mirror).get("after")):
        log.warning("Whether somebody edited the index meanwhile is not known: %s is lost", mirror.committed)
        finish(mirror, path, current, takes=_takes(current, path))
    elif current is None:
        with IndexWriter(target) as writer:
            for entry in _as_found(mirror, path):
                writer.add(*entry)
        finish(mirror, path, target, index=mirror.upcoming)
    else:
        kept, edited = target.with_name("kept.md5"), target.with_name("edited.jsonl")
        with IndexWriter(kept) as writer:
            for entry in _without_moved(current, path):
                writer.add(*entry)
        write_records(edited, _edited_meanwhile(mirror, path, kept))
        finish(mirror, path, kept, takes=_takes(kept, path), edited=read_records(edited, Change))


def _is_index(path: Path, known: str | None) -> bool:
    """Whether an index is there, and the one with this digest."""
    return path.is_file() and digest(path) == known


def _as_found(mirror: Mirror, path: Path) -> Iterator[Entry]:
    """Yield the index as the commit with the history at ``path`` found it."""
    edits = (
        Entry(change.path, change.md5 or b"")
        for change in read_records(path, Change)
        if change.what == What.EDITED
    )
    for name, old, new in merge(read_entries(mirror.committed), edits):
        md5 = old if new is None else new
        if md5:
            yield Entry(name, md5)


def _without_moved(current: Path, changes: Path) -> Iterator[Entry]:
    """Yield the entries of an index but for those of which the commit knows nothing, below what it moves."""
    moves = sorted(change.path for change in read_records(changes, Change) if change.what == What.MOVED)
    moved, claims = Covered(iter(moves)), Alongside(_claims(changes))
    for entry in read_entries(current):
        if not moved.covers(entry.path) or claims.find(entry.path):
            yield entry


def _edited_meanwhile(mirror: Mirror, path: Path, current: Path) -> Iterator[Change]:
    """Yield what somebody changed in the index since the history at ``path`` was written ahead.

    Entries that the commit changes itself are left out: they become what it says.
    """
    claims = Alongside(_claims(path))
    for name, old, new in merge(_as_found(mirror, path), read_entries(current)):
        if old != new and claims.find(name) is None:
            yield Change(name, What.EDITED, old_md5=old, md5=new)


def finish(
    mirror: Mirror,
    path: Path,
    current: Path | None,
    *,
    takes: bool = False,
    fresh: bool = False,
    index: Path | None = None,
    edited: Iterable[Change] = (),
    missed: Callable[[Change, str], None] | None = None,
) -> int:
    """Carry out the history at ``path`` and return how many entries the consumer index has then.

    Needs the lock.

    :param current: the consumer index in canonical form, if there is one.
    :param takes: whether entries of the consumer index will be untrue for a while.
    :param fresh: the commit that asks has written this history, and has seen its content to be there. That of
        another commit is hashed before it is put in place.
    :param index: where the new index goes, if somebody has deleted the consumer index meanwhile.
    :param edited: what somebody changed in the index since the history was written.
    :param missed: is told of each change that did not come about, and why. Index and history leave it out.
    :raises OSError: the disk is full or broken; the next run takes it up again.
    """
    final = path.with_suffix("")
    confirmed = path.with_suffix(".confirmed")
    files = 0
    if not final.exists():
        mirror.upcoming.unlink(missing_ok=True)
        # Step 5: the index must not claim what is about to be replaced.
        if index is None and (current is None or takes):
            _write_index(mirror.index, current, path if current else None, keep_replaced=False)
            current = mirror.index
        changed, kept, tally = 0, 0, Tally()
        with mirror.tree() as tree, RecordWriter[Change](confirmed) as writer:
            for change in _placed(mirror, tree, path, fresh, iter(edited), missed or _warn, tally):
                writer.add(change)
                changed += 1
                kept += change.what == What.KEPT
            tree.sync()
        files = _write_index(index or mirror.index, current, confirmed, keep_replaced=True)
        if changed > kept:
            if index is None:
                _copy(mirror.index, mirror.upcoming)
            _name(path, confirmed, tally.total(), after=digest(mirror.upcoming), kept=bool(kept))
    if mirror.upcoming.exists():
        mirror.upcoming.replace(mirror.committed)
        fsync_directory(mirror.committed.parent)
    confirmed.unlink(missing_ok=True)
    path.unlink()
    fsync_directory(mirror.history)
    return files


def finish_pruning(mirror: Mirror, path: Path) -> None:
    """Record which of the versions are gone that the history at ``path`` says are to go. Needs the lock.

    Nothing is taken away here: a pruning that was cut off goes no further by itself. The index stays.

    :raises OSError: the disk is full or broken; the next run takes it up again.
    """
    confirmed = path.with_suffix(".confirmed")
    tally, changed = Tally(), 0
    with mirror.tree() as tree, RecordWriter[Change](confirmed) as writer:
        # What is told to be gone must not come back with a cut of the power.
        tree.sync()
        for change in read_records(path, Change):
            if is_gone(tree, change.version or b""):
                writer.add(change)
                tally.add(tree, change)
                changed += 1
    if changed:
        _name(path, confirmed, tally.total(), after=read_header(path)["before"])
    confirmed.unlink(missing_ok=True)
    path.unlink()
    fsync_directory(mirror.history)


def is_gone(tree: Tree, place: bytes) -> bool:
    """Whether nothing stands at ``place``, as far as that can be seen."""
    try:
        return tree.lstat(place) is None and tree.blocker(place) is None
    except OSError as error:
        if not concerns_one_file(error):
            raise
        return False


def _name(path: Path, confirmed: Path, grown: OnDisk | None, *, after: str, kept: bool = False) -> None:
    """Give what came about of a history that was written ahead its final name, and the rest of its header.

    :param kept: whether it also has what stayed as it was, which is no history.
    """
    header = {key: value for key, value in read_header(path).items() if key != "format"}
    header |= {"after": after, "disk": grown}
    if kept:
        came = (change for change in read_records(confirmed, Change) if change.what != What.KEPT)
        write_records(path.with_suffix(""), came, **header)
    else:
        copy_records(confirmed, path.with_suffix(""), **header)


# --- the index --------------------------------------------------------------------------------------


def _takes(current: Path | None, changes: Path) -> bool:
    """Whether entries of the index are untrue for a while: their files are replaced, or go as a whole."""
    if current is None:
        return False
    if any(change.what == What.MOVED for change in read_records(changes, Change)):
        return True
    return any(both.left and both.right for both in merge(read_entries(current), _claims(changes)))


def _write_index(index: Path, current: Path | None, changes: Path | None, *, keep_replaced: bool) -> int:
    """Write an index anew, durably and in one step, and return its number of entries."""
    temporary = index.with_name(f"{index.name}.tmp")
    with IndexWriter(temporary) as writer:
        revise(writer, current, _revisions(changes, keep_replaced) if changes else ())
    temporary.replace(index)
    fsync_directory(index.parent)
    return writer.files


def _revisions(changes: Path, keep_replaced: bool) -> Iterator[Entry]:
    """Return what becomes of index entries, in path order; an empty md5 for those that leave."""
    return _claims(changes) if keep_replaced else (Entry(path, b"") for path, _ in _claims(changes))


def _claims(path: Path) -> Iterator[Entry]:
    """Yield what changes make of index entries, in path order; an empty md5 for what is forgotten."""
    for change in read_records(path, Change):
        if change.what not in (What.EDITED, What.MOVED, What.IMPORTED):
            yield Entry(change.path, change.md5 or b"")


def _copy(index: Path, target: Path) -> None:
    """Copy an index durably."""
    with index.open("rb") as source, open(target, "wb", buffering=0, opener=not_followed) as copy:
        copy_of(source.fileno(), copy.fileno())
        os.fsync(copy.fileno())
    fsync_directory(target.parent)


# --- the files --------------------------------------------------------------------------------------


def _placed(
    mirror: Mirror,
    tree: Tree,
    path: Path,
    fresh: bool,
    edited: Iterator[Change],
    missed: Callable[[Change, str], None],
    tally: Tally,
) -> Iterator[Change]:
    """Carry out the changes, yield those that the disk then shows, and add up what they add to it."""
    with ExitStack() as stack:
        staging = stack.enter_context(mirror.open_staging())
        copies = mirror.run(str(read_header(path)["run_id"])).copies
        folder = stack.enter_context(Folder(copies)) if copies.exists() else None
        waiting = _Waiting(staging, folder, copies)
        pace, taken = Pace(), Prefixes()
        for number, change in enumerate(read_records(path, Change), 1):
            if pace.due():
                log.info("%s changes carried out so far", number)
            if change.what != What.EDITED:
                yield from edited
            taken.advance(change.path)
            try:
                done = _carry_out(tree, change, waiting, fresh, taken)
                why = "its content is gone" if change.what != What.FORGOTTEN else "nothing took its place"
            except OSError as error:
                if not concerns_one_file(error):
                    raise
                done, why = False, reason(error)
            if _takes_place(tree, change, done):
                taken.push(change.path)
            if done:
                tally.add(tree, change)
                yield msgspec.structs.replace(change, content=None, replaces=None)
            else:
                missed(change, why)
                if change.replaces is not None:
                    yield _unreplaced(tree, change, change.replaces)
        yield from edited


def _takes_place(tree: Tree, change: Change, done: bool) -> bool:
    """Whether entries at or below the path of a change cannot stay after it."""
    if change.what == What.MOVED:  # or somebody has taken it away, so that something else can come
        return done or is_gone(tree, change.path)
    return done and change.what in (What.ADDED, What.REPLACED, What.ADOPTED)


def _unreplaced(tree: Tree, change: Change, md5: bytes) -> Change:
    """Return what becomes of an entry that had this md5, and that a change was to replace, but did not.

    It has left the index, and comes back if the live file still is what it says; else a run sees to it. One
    that was only to give way comes back as it was.
    """
    path = change.path
    if change.what == What.FORGOTTEN:
        return Change(path, What.KEPT, md5=md5)
    try:
        with tree.opened(path) as live:
            is_there = md5_of(live) == md5
    except OSError as error:
        if not concerns_one_file(error):
            raise
        is_there = False
    return Change(path, What.KEPT, md5=md5) if is_there else Change(path, What.FORGOTTEN, old_md5=md5)


def _warn(change: Change, why: str) -> None:
    log.warning(
        "It did not come to the change of %s (%s); the next run sees to it", to_text(change.path), why
    )


def reason(error: Exception) -> str:
    """Return why one file could not be brought into the mirror."""
    if isinstance(error, Blocked):
        what = "a symlink" if error.is_symlink else "no directory"
        return f"{to_text(error.at)} is {what} in the mirror; replace it by a directory"
    return f"{error.strerror} on this side" if isinstance(error, OSError) else str(error)


class _Waiting(NamedTuple):
    """Where the new bytes wait: in staging, or as copies."""

    staging: Folder
    copies: Folder | None
    copies_path: Path

    def content(self, change: Change) -> tuple[Folder | None, bytes]:
        """Return the folder and the name in it of what a change brings; no folder if nothing waits."""
        if change.content is None:
            return None, b""
        if change.content == STAGING:
            return self.staging, change.md5 or b""
        return self.copies, change.content.encode()

    def source(self, change: Change) -> Path | None:
        """Return the file that is to become an imported version; None if it waits no more."""
        if change.content is None:
            return None
        if change.content.startswith("/"):
            path = Path(os.fsdecode(from_text(change.content)))
        else:
            path = self.copies_path / change.content
        return path if path.is_file() and not path.is_symlink() else None


def _carry_out(tree: Tree, change: Change, waiting: _Waiting, fresh: bool, taken: Prefixes) -> bool:
    """Bring one change about, if the disk does not show it already; return whether it does then.

    :param taken: the places that changes before it have taken, from entries that give way.
    """
    if change.what == What.FORGOTTEN and change.replaces is not None:
        return taken.above(change.path) is not None
    if change.what in (What.EDITED, What.FORGOTTEN):
        return True
    if change.what == What.MOVED:
        return _move(tree, change)
    if change.what == What.IMPORTED:
        return _import(tree, change, waiting, fresh)
    return _place(tree, change, *waiting.content(change), fresh)


def _move(tree: Tree, change: Change) -> bool:
    assert change.version is not None
    return tree.move_again(change.path, change.version)


def _import(tree: Tree, change: Change, waiting: _Waiting, fresh: bool) -> bool:
    """Bring an old version to its place, never over another file; return whether it is there then."""
    assert change.version is not None and change.old_md5 is not None
    source = waiting.source(change)
    if source is not None:
        name = os.fsencode(source.name)
        with Folder(source.parent) as folder:
            if is_file(tree.lstat(change.version)):
                tree.drop_rest(folder, name, change.version)
            if tree.lstat(change.version) is None:
                if not (fresh or folder.is_whole(name, change.old_md5)):
                    return False  # it has changed since
                tree.put_new(folder, name, change.version)
                tree.give(change.version)
                return True
    try:
        tree.give(change.version)
        with tree.opened(change.version) as version:
            return (fresh and source is None) or md5_of(version) == change.old_md5
    except FileNotFoundError:
        return False


def _place(tree: Tree, change: Change, folder: Folder | None, name: bytes, fresh: bool) -> bool:
    """Make the live file what ``change`` says, from the file ``name`` of ``folder`` if that still waits."""
    try:
        # After a power cut the new bytes may be there by name only, or in part.
        if change.what != What.ADOPTED and folder and (fresh or folder.is_whole(name, change.md5 or b"")):
            _give_attributes(name, folder.descriptor, change)
            tree.put(folder, name, change.path)
            return True
    except FileNotFoundError:
        pass
    try:
        with tree.opened(change.path) as live:
            if not (fresh and change.what == What.ADOPTED) and md5_of(live) != change.md5:
                return False
            if change.what == What.ADOPTED:
                _give_attributes(live, None, change)
    except FileNotFoundError:
        return False
    if folder is not None:
        folder.remove(name)
    return True


def _give_attributes(target: bytes | int, directory: int | None, change: Change) -> None:
    """Give a file, by name or by open descriptor, the provider's mode and time where they are known."""
    now = os.stat(target, dir_fd=directory)
    # Who adopts a file need not be its owner, and its time may be finer than seconds.
    if change.mode is not None and stat.S_IMODE(now.st_mode) != permissions(change.mode):
        os.chmod(target, permissions(change.mode), dir_fd=directory)
    if change.mtime is not None and seconds(now) != change.mtime:
        os.utime(target, (change.mtime, change.mtime), dir_fd=directory)


def permissions(mode: int) -> int:
    """Return the mode that a file gets here: the owner can always read it, and it is never setuid."""
    return mode & 0o777 | 0o400
