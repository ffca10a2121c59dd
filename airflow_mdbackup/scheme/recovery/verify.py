"""The files of the mirror are read again, and compared with what history says of them.

::

    walked    all contents that history knows, live files and versions, path by path (see past)
    read      each from where it should be, several at a time, not faster than asked
    judged    missing; rotten, if its bytes are others while size and time are as they were; else changed
    looked    at whatever lies in the mirror besides, when all of it is walked
    repaired  if asked: the entries of live files that are rotten, or missing, leave the consumer index

What a run displaces meanwhile is looked for where history says that it went. No file is changed: the next run
pulls what has no entry any more, and keeps the rotten bytes as a version. A walk may be cut into parts, of so
many bytes each, and goes on where the last one ended.

What this does not give: damage of what history knows nothing of, such as empty directories, owners and ACLs.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

from airflow_mdbackup.scheme.common.parallel import parallel_map
from airflow_mdbackup.scheme.common.paths import from_text, to_text, unfolded
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.errors import DamageFound, DestinationRefused
from airflow_mdbackup.scheme.files.content import md5_of
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, write_state
from airflow_mdbackup.scheme.files.syscalls import concerns_one_file, seconds
from airflow_mdbackup.scheme.files.tree import Tree, TreePerThread
from airflow_mdbackup.scheme.history.changes import REPAIR
from airflow_mdbackup.scheme.history.forget import remove_entries
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.index.canonical import Entry
from airflow_mdbackup.scheme.recovery.prune import let_go
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter

_MOST_TOLD = 10  # damaged places that the error names
_MOST_PATHS = 100  # that a run can be limited to
_LONGEST = 4000  # characters of a command line that people copy


class VerifyOutcome(StrEnum):
    """What became of one content."""

    SOUND = "sound"
    MISSING = "missing"  # it is not where it should be
    ROTTEN = "rotten"  # other bytes, though size and time are as they were: a bad disk
    CHANGED = "changed"  # other bytes, and another size or time: by hand
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"  # no history tells of it
    PRUNED = "pruned"  # it is not there, since a person just had it taken away

    @property
    def good(self) -> bool:
        """Whether it is no damage. What is unknown harms nothing."""
        return self in (VerifyOutcome.SOUND, VerifyOutcome.UNKNOWN, VerifyOutcome.PRUNED)


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """What was found at one place.

    :ivar place: a path of the mirror's tree.
    :ivar content: what should be there; None for what is unknown.
    :ivar size: bytes that were read.
    """

    place: bytes
    found: VerifyOutcome
    content: FileVersion | None = None
    size: int = 0


def verify(
    mirror: Mirror,
    past: Timeline,
    contents: Iterable[FileVersion],
    *,
    threads: int = 2,
    wait: Callable[[int], Any] = lambda size: None,
) -> Iterator[VerifiedFile]:
    """Read contents again and yield what was found, in their order.

    :param past: where they are from.
    :param threads: how many files are read at a time.
    :param wait: is told how many bytes were read, by any thread, and waits as long as it wants.
    :raises OSError: the disk fails as a whole.
    """
    with TreePerThread(mirror.tree) as trees:
        reader = _Reader(mirror, past, trees, wait)
        there = (content for content in contents if content.places)
        yield from parallel_map(there, reader.read, threads, lambda content: content.size)


def unknown(mirror: Mirror, past: Timeline) -> Iterator[VerifiedFile]:
    """Yield the files of the mirror of which no history tells.

    :param past: all of it.
    """
    past.record_places()
    with mirror.tree() as tree:
        for place in tree.files_below():
            if not past.has_place(place):
                yield VerifiedFile(place, VerifyOutcome.UNKNOWN)


class _Reader:
    """Reads contents, in any thread."""

    def __init__(
        self, mirror: Mirror, past: Timeline, trees: TreePerThread, wait: Callable[[int], Any]
    ) -> None:
        self._mirror = mirror
        self._newest = past.newest
        self._trees = trees
        self._wait = wait

    def read(self, content: FileVersion) -> VerifiedFile:
        """Read a file.

        :raises OSError: no other one can be read either.
        """
        known = self._newest
        place = content.places[0]
        verified = self._read(content, place)
        while not verified.found.good and (newest := self._mirror.last_commit()) != known:
            # A run that was committed meanwhile, or has begun to be, may have displaced it.
            known = newest
            for now in _now(self._mirror, content):
                for again in (self._read(now, place) for place in now.places):
                    if again.found.good:
                        return again
                if now.pruned:
                    return VerifiedFile(place, VerifyOutcome.PRUNED, now)
        return verified

    def _read(self, content: FileVersion, place: bytes) -> VerifiedFile:
        return _look(self._trees(), content, place, self._limited)

    def _limited(self, size: int) -> None:
        try:
            self._wait(size)
        except OSError as error:  # which is not of the file that is read
            raise DestinationRefused(
                f"the limit cannot be kept: {error.filename}: {error.strerror}. Remove that file"
            ) from error


def _look(tree: Tree, content: FileVersion, place: bytes, progress: Callable[[int], Any]) -> VerifiedFile:
    """Read a file, and say what it is.

    :raises OSError: no other one can be read either.
    """
    size = 0
    try:
        with tree.opened(place) as descriptor:
            sound = md5_of(descriptor, progress=progress) == content.md5
            if sound and content.size is not None:
                size, found = content.size, VerifyOutcome.SOUND
            else:
                status = os.fstat(descriptor)
                size, found = status.st_size, VerifyOutcome.SOUND if sound else _judge(content, status)
    except FileNotFoundError:
        found = VerifyOutcome.PRUNED if content.pruned else VerifyOutcome.MISSING
    except OSError as error:
        if not concerns_one_file(error):
            raise
        found = VerifyOutcome.UNREADABLE
    if not found.good:
        tree.forget_directories()  # they may have been moved
    return VerifiedFile(place, found, content, size)


def _now(mirror: Mirror, content: FileVersion) -> list[FileVersion]:
    """Return a content by the history as it is now."""
    with Timeline(mirror, lambda path: path == content.path) as past:
        return [now for now in past.contents() if (now.md5, now.since) == (content.md5, content.since)]


def _judge(content: FileVersion, status: os.stat_result) -> VerifyOutcome:
    """Return what is wrong with a file that has other bytes."""
    as_it_was = content.size in (None, status.st_size) and content.mtime in (None, seconds(status))
    return VerifyOutcome.ROTTEN if as_it_was and stat.S_ISREG(status.st_mode) else VerifyOutcome.CHANGED


# --- in parts ---------------------------------------------------------------------------------------


class Portion:
    """So many bytes of all contents, from where the last part ended. Iterate once; then :meth:`keep` its end.

    :param size: bytes; the contents of the path that makes them full come as a whole.
    :ivar is_last: whether the next part begins anew.
    """

    def __init__(self, mirror: Mirror, past: Timeline, size: int) -> None:
        self._mirror = mirror
        self._contents = past.contents(_first_path(mirror))
        self._left = size
        self._next = b""

    def __iter__(self) -> Iterator[FileVersion]:
        path = None
        for content in self._contents:
            if self._left <= 0 and content.path != path:
                self._next = content.path
                return
            path = content.path
            self._left -= content.size or 0
            yield content

    @property
    def is_last(self) -> bool:
        return not self._next

    def keep(self) -> None:
        """Remember where the next part begins.

        :raises OSError: the disk is full or broken.
        """
        write_state(self._mirror.verified, {"next": to_text(self._next)})


def _first_path(mirror: Mirror) -> bytes:
    try:
        return from_text(str(read_header(mirror.verified).get("next", "")))
    except (FileNotFoundError, CorruptFile, ValueError):
        return b""


# --- repair -----------------------------------------------------------------------------------------


def repair(
    mirror: Mirror, damaged: Iterable[VerifiedFile], *, missing: bool = False, wait: float = OPERATOR_WAIT
) -> list[bytes]:
    """Take the entries of live files that are rotten out of the consumer index, and return their paths.

    A run may have replaced a file since it was looked at. So each is looked at again under the lock, and only
    an entry that its content belongs to is taken out. Versions, and what hands have changed, are left alone.

    :param damaged: what was found.
    :param missing: also of those that are missing.
    :param wait: seconds that a run may hold the lock meanwhile.
    :raises BackupError: as :func:`.history.forget.forget`. Nothing was taken out.
    """
    wanted = {VerifyOutcome.ROTTEN, VerifyOutcome.MISSING} if missing else {VerifyOutcome.ROTTEN}
    live = {
        each.content.path: each.content
        for each in damaged
        if each.found in wanted and each.content is not None and each.place == each.content.path
        if not each.content.until
    }
    if not live:
        return []
    with mirror.tree() as tree:

        def is_still_damaged(entry: Entry) -> bool:
            content = live.get(entry.path)
            if content is None or content.md5 != entry.md5:
                return False
            return _look(tree, content, content.path, lambda size: None).found in wanted

        return remove_entries(mirror, is_still_damaged, REPAIR, wait)


def what_follows(provider: str, gone: Sequence[bytes]) -> str:
    """Say what becomes of files whose entries :func:`repair` has taken out, and how to have them at once."""
    number = f"{len(gone):,} entries have" if len(gone) > 1 else "1 entry has"
    dag = f"mdbackup_{provider}"
    return (
        f"{number} left the index. The next run of {dag} pulls what the provider still has of these files; "
        f"rotten bytes become versions. At once: {_trigger(dag, gone)}"
    )


def _trigger(dag: str, paths: Sequence[bytes]) -> str:
    """Return a command line that starts a run of some paths only; of all, where it cannot name them."""
    command = f"airflow dags trigger {dag}"
    try:
        only = [path.decode() for path in paths[:_MOST_PATHS]]
    except UnicodeDecodeError:  # JSON has no such names
        return command
    # With no `::` in it, which Airflow's page of a log might take for the begin or end of a fold.
    options = shlex.quote(json.dumps({"only": only}).replace("::", ":\\u003a"))
    return command if len(paths) > _MOST_PATHS or len(options) > _LONGEST else f"{command} --conf {options}"


# --- all of it --------------------------------------------------------------------------------------


class Verification:
    """A verification from its beginning to its end. Iterate once; then :meth:`finish`.

    :param wanted: the paths that somebody asked for; by default all. Call its ``settle`` before.
    :param part: the next part of all, as bytes or as a fraction of them; None: all at once, and then also
        what is unknown.
    :param limit: bytes per second.
    :param threads: how many files are read at a time.
    :param repair: take damaged entries out at the end, see :func:`repair`; ``missing`` also those.
    :param let_go: have :meth:`let_go` note what is gone for good.
    :param tell: is told now and then how far it is, from any thread.
    :ivar counts: what was found, how often.
    :ivar files: that were looked at.
    :ivar size: bytes that were read.
    :ivar is_last: whether it was the last part, and the next one begins anew; false without parts.
    :ivar damage: some of the damaged places, with what was found there, for people.
    :raises ValueError: paths and a part do not go together, or ``missing`` is without ``repair``.
    """

    def __init__(
        self,
        mirror: Mirror,
        past: Timeline,
        wanted: Selection | None = None,
        *,
        part: int | Fraction | None = None,
        limit: int | None = None,
        threads: int = 2,
        repair: bool = False,
        missing: bool = False,
        let_go: bool = False,
        tell: Callable[[str], Any] = lambda text: None,
    ) -> None:
        self._mirror = mirror
        self._past = past
        self._wanted = Selection() if wanted is None else wanted
        if missing and not repair:
            raise ValueError("missing files are found without it: ask for a repair, too")
        if part is not None and not self._wanted.is_everything:
            raise ValueError("parts are of the whole backup: leave the paths out, or the part")
        if isinstance(part, Fraction):
            part = max(1, int(part * sum(content.size or 0 for content in past.contents())))
        self._part = None if part is None else Portion(mirror, past, part)
        self._limiter = RateLimiter(mirror.verifying, lambda: limit)
        self._threads = threads
        self._repairs = repair
        self._lets_go = let_go
        self._damaged: list[VerifiedFile] = []
        self._missing = missing
        self._tell = tell
        self._pace = ReportTimer()
        self._lock = threading.Lock()
        self._read = 0
        self.counts: Counter[VerifyOutcome] = Counter()
        self.files = 0
        self.size = 0
        self.damage: list[str] = []

    def __iter__(self) -> Iterator[VerifiedFile]:
        contents: Iterable[FileVersion] = self._past.contents() if self._part is None else self._part
        if not self._wanted.is_everything:
            contents = (content for content in contents if self._wanted.take(content.path))
        elif self._part is None:
            contents = self._past.recording_places(contents)
        found = verify(self._mirror, self._past, contents, threads=self._threads, wait=self._have_read)
        for verified in found:
            self.files += 1
            yield self._counted(verified)
        if self._part is None and self._wanted.is_everything:
            yield from map(self._counted, unknown(self._mirror, self._past))
        for word in self._wanted.not_found:
            self.counts[VerifyOutcome.MISSING] += 1
            self._note(f"nothing was ever backed up under {to_text(os.fsencode(word))}")

    @property
    def repairs(self) -> bool:
        """Whether a repair was asked for."""
        return self._repairs

    @property
    def is_sound(self) -> bool:
        """Whether there is no damage in what was walked so far, nor in the history that tells of it."""
        return not self._past.problems and all(found.good for found, number in self.counts.items() if number)

    @property
    def is_last(self) -> bool:
        return self._part is not None and self._part.is_last

    def finish(self, wait: float = OPERATOR_WAIT) -> list[bytes]:
        """Repair, if that was asked for, and remember where the next part begins.

        A part that could not be repaired is walked again the next time.

        :param wait: seconds that a run may hold the lock meanwhile.
        :returns: the paths whose entries have left the index.
        :raises BackupError: see :func:`repair`.
        :raises OSError: the disk is full or broken.
        """
        gone = []
        if self._repairs:
            gone = repair(self._mirror, self._damaged, missing=self._missing, wait=wait)
        if self._part is not None:
            self._part.keep()
        return gone

    def let_go(self, wait: float = OPERATOR_WAIT) -> list[bytes]:
        """Note in history that what is missing, and no run brings again, is gone for good; if that was asked.

        :returns: the places of versions, and of files that have left the index; see :func:`.let_go`.
        :raises BackupError: a run holds the lock for too long, or the disk is full or broken.
        """
        if not self._lets_go:
            return []
        found = self._damaged
        missing = [
            (d.content, d.place) for d in found if d.found == VerifyOutcome.MISSING and d.content is not None
        ]
        return let_go(self._mirror, missing, wait)

    def raise_for_damage(self, what_was_done: str) -> None:
        """Do nothing if there is no damage.

        :param what_was_done: about it, and what to do.
        :raises DamageFound: there is; the message names some places.
        """
        if self.is_sound:
            return
        places, ways_out = list(self.damage), [what_was_done] if self.damage else []
        if (number := sum(n for found, n in self.counts.items() if not found.good)) > len(places):
            places.append(f"and {number - len(places):,} more")
        if problems := self._past.problems:
            places += map(unfolded, problems[:_MOST_TOLD])
            ways_out.append(
                "What history does not tell of is not verified: `mdbackup rebuild "
                f"{self._mirror.provider}` on this worker tells it anew, by what is left"
            )
        heading = f"{self._mirror.provider}: damage in {self._mirror.files}: {self.in_words()}"
        raise DamageFound("\n".join(["\n- ".join([heading, *places]), *ways_out]))

    def in_words(self) -> str:
        """Return what was found, in one line."""
        counts = (f"{number:,} {found}" for found, number in self.counts.items() if number)
        return f"{', '.join(counts) or 'nothing to verify'}; {format_size(self.size)} read"

    def _counted(self, verified: VerifiedFile) -> VerifiedFile:
        self.counts[verified.found] += 1
        self.size += verified.size
        if not verified.found.good:
            self._note(f"{verified.found}: {to_text(verified.place)}")
            if self._repairs or self._lets_go:
                self._damaged.append(verified)
        return verified

    def _note(self, damage: str) -> None:
        if len(self.damage) < _MOST_TOLD:
            self.damage.append(damage)

    def _have_read(self, size: int) -> None:
        with self._lock:
            self._read += size
            due = self._pace.due()
        if due:
            self._tell(f"{self.files:,} files, {format_size(self._read)} read so far")
        self._limiter(size)
