"""The files of the mirror are read again and compared with the history.

::

    list      all contents that the history knows, live files and versions, path by path
    read      each from where it should be, several at a time, within a limit of bytes per second
    judge     missing; rotten (bit rot), if the content differs while size and time do not; else changed
    scan      the mirror for files that the history does not know, if all of it is verified at once
    repair    on request: the entries of corrupted or missing live files are removed from the consumer index

A file that a run displaces meanwhile is looked for where the history says that it went. No file is changed:
the next run pulls what has no entry any more, and keeps the corrupted content as a version. A verification
may be cut into parts of a given size; each resumes where the previous one ended.

Limitations: nothing is checked that the history does not record, such as empty directories, owners and ACLs.
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
from airflow_mdbackup.scheme.recovery.prune import acknowledge_missing
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.locks import OPERATOR_WAIT
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter

_MAX_NAMED = 10  # damaged places, or problems of the history, that the error names
_MAX_TRIGGER_PATHS = 100  # that a run can be limited to
_MAX_COMMAND = 4000  # characters of a command line that people copy


class VerifyOutcome(StrEnum):
    """What was found where a content should be."""

    SOUND = "sound"
    MISSING = "missing"  # it is not there
    ROTTEN = "rotten"  # different content, though size and time are the same: a bad disk
    CHANGED = "changed"  # different content, and another size or time: edited by hand
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"  # the history does not know the file
    PRUNED = "pruned"  # it is not there, because an operator has just pruned it

    @property
    def good(self) -> bool:
        """Whether this is no damage. Unknown files do no harm."""
        return self in (VerifyOutcome.SOUND, VerifyOutcome.UNKNOWN, VerifyOutcome.PRUNED)


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """What was found at one place.

    :ivar place: a path in the mirror's tree.
    :ivar content: what should be there; None for an unknown file.
    :ivar size: bytes read.
    """

    place: bytes
    outcome: VerifyOutcome
    content: FileVersion | None = None
    size: int = 0


def verify(
    mirror: Mirror,
    timeline: Timeline,
    contents: Iterable[FileVersion],
    *,
    threads: int = 2,
    wait: Callable[[int], Any] = lambda size: None,
) -> Iterator[VerifiedFile]:
    """Read contents again, and yield what was found, in their order.

    :param timeline: where the contents are from.
    :param threads: how many files are read at a time.
    :param wait: called in any thread with the number of bytes just read; may block, to limit the speed.
    :raises OSError: the whole disk fails.
    """
    with TreePerThread(mirror.tree) as trees:
        reader = _Reader(mirror, timeline, trees, wait)
        existing = (content for content in contents if content.places)
        yield from parallel_map(existing, reader.read, threads, lambda content: content.size)


def unknown_files(mirror: Mirror, timeline: Timeline) -> Iterator[VerifiedFile]:
    """Yield the files of the mirror that the history does not know.

    :param timeline: of all paths.
    """
    timeline.record_places()
    with mirror.tree() as tree:
        for place in tree.files_below():
            if not timeline.has_place(place):
                yield VerifiedFile(place, VerifyOutcome.UNKNOWN)


class _Reader:
    """Reads contents, in any thread."""

    def __init__(
        self, mirror: Mirror, timeline: Timeline, trees: TreePerThread, wait: Callable[[int], Any]
    ) -> None:
        self._mirror = mirror
        self._newest = timeline.newest
        self._trees = trees
        self._wait = wait

    def read(self, content: FileVersion) -> VerifiedFile:
        """Read a content from where it is, even if a run moves it meanwhile.

        :raises OSError: no other file can be read either.
        """
        known = self._newest
        place = content.places[0]
        verified = self._read_at(place, content)
        while not verified.outcome.good and (newest := self._mirror.last_commit()) != known:
            # A commit since then, finished or not, may have displaced it.
            known = newest
            for current in _find_again(self._mirror, content):
                for again in (self._read_at(place, current) for place in current.places):
                    if again.outcome.good:
                        return again
                if current.pruned:
                    return VerifiedFile(place, VerifyOutcome.PRUNED, current)
        return verified

    def _read_at(self, place: bytes, content: FileVersion) -> VerifiedFile:
        return _read_and_judge(self._trees(), place, content, self._limit_speed)

    def _limit_speed(self, size: int) -> None:
        try:
            self._wait(size)
        except OSError as error:  # not about the file that is being read
            raise DestinationRefused(
                f"the limit cannot be kept: {error.filename}: {error.strerror}. Remove that file"
            ) from error


def _read_and_judge(
    tree: Tree, place: bytes, content: FileVersion, progress: Callable[[int], Any] = lambda size: None
) -> VerifiedFile:
    """Read the file at a place, and compare it with the content that should be there.

    :raises OSError: no other file can be read either.
    """
    size = 0
    try:
        with tree.opened(place) as descriptor:
            is_sound = md5_of(descriptor, progress=progress) == content.md5
            if is_sound and content.size is not None:
                size, outcome = content.size, VerifyOutcome.SOUND
            else:
                status = os.fstat(descriptor)
                size = status.st_size
                outcome = VerifyOutcome.SOUND if is_sound else _rotten_or_changed(content, status)
    except FileNotFoundError:
        outcome = VerifyOutcome.PRUNED if content.pruned else VerifyOutcome.MISSING
    except OSError as error:
        if not concerns_one_file(error):
            raise
        outcome = VerifyOutcome.UNREADABLE
    if not outcome.good:
        tree.forget_directories()  # they may have been moved
    return VerifiedFile(place, outcome, content, size)


def _rotten_or_changed(content: FileVersion, status: os.stat_result) -> VerifyOutcome:
    """Return what happened to a file that has other content."""
    looks_untouched = content.size in (None, status.st_size) and content.mtime in (None, seconds(status))
    is_rotten = looks_untouched and stat.S_ISREG(status.st_mode)
    return VerifyOutcome.ROTTEN if is_rotten else VerifyOutcome.CHANGED


def _find_again(mirror: Mirror, content: FileVersion) -> list[FileVersion]:
    """Return a content as the history knows it now."""
    with Timeline(mirror, lambda path: path == content.path) as timeline:
        return [
            current
            for current in timeline.contents()
            if (current.md5, current.since) == (content.md5, content.since)
        ]


# --- parts ------------------------------------------------------------------------------------------


class Portion:
    """The next part of all contents. Iterate once; then :meth:`save_position`.

    :param size: its bytes; the contents of the path with which it becomes full are all included.
    :ivar is_last: whether the next part starts from the beginning.
    """

    def __init__(self, mirror: Mirror, timeline: Timeline, size: int) -> None:
        self._mirror = mirror
        self._contents = timeline.contents(_saved_position(mirror))
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

    def save_position(self) -> None:
        """Save where the next part starts.

        :raises OSError: the disk is full or broken.
        """
        write_state(self._mirror.verified, {"next": to_text(self._next)})


def _saved_position(mirror: Mirror) -> bytes:
    """Return the path with which the next part starts."""
    try:
        return from_text(str(read_header(mirror.verified).get("next", "")))
    except (FileNotFoundError, CorruptFile, ValueError):
        return b""


# --- repair -----------------------------------------------------------------------------------------


def repair(
    mirror: Mirror, damaged: Iterable[VerifiedFile], *, missing: bool = False, wait: float = OPERATOR_WAIT
) -> list[bytes]:
    """Remove the entries of corrupted live files from the consumer index, and return their paths.

    A run may have replaced a file since it was read. So each is read again under the lock, and an entry is
    removed only if the damaged content still belongs to it. Versions and files edited by hand are skipped.

    :param damaged: what was found.
    :param missing: also remove the entries of missing live files.
    :param wait: seconds that a run may hold the lock meanwhile.
    :raises BackupError: as for :func:`.history.forget.forget`. Nothing was removed.
    """
    repairable = {VerifyOutcome.ROTTEN, VerifyOutcome.MISSING} if missing else {VerifyOutcome.ROTTEN}
    live = {
        each.content.path: each.content
        for each in damaged
        if each.outcome in repairable and each.content is not None and each.place == each.content.path
        if not each.content.until
    }
    if not live:
        return []
    with mirror.tree() as tree:

        def is_still_damaged(entry: Entry) -> bool:
            content = live.get(entry.path)
            if content is None or content.md5 != entry.md5:
                return False
            return _read_and_judge(tree, content.path, content).outcome in repairable

        return remove_entries(mirror, is_still_damaged, REPAIR, wait)


def describe_repair(provider: str, removed: Sequence[bytes]) -> str:
    """Return, for people, what happens next to files that :func:`repair` handled, and how to speed it up."""
    entries = f"{len(removed):,} entries have" if len(removed) > 1 else "1 entry has"
    dag = f"mdbackup_{provider}"
    return (
        f"{entries} left the index. The next run of {dag} pulls these files again if the provider still has "
        f"them; corrupted content becomes a version. To do it now: {_trigger_command(dag, removed)}"
    )


def _trigger_command(dag: str, paths: Sequence[bytes]) -> str:
    """Return a command line that starts a run of these paths; of all paths if it cannot name them."""
    command = f"airflow dags trigger {dag}"
    try:
        only = [path.decode() for path in paths[:_MAX_TRIGGER_PATHS]]
    except UnicodeDecodeError:  # JSON cannot hold such names
        return command
    # Without `::`, which Airflow's log page might take for the start or end of a fold.
    options = shlex.quote(json.dumps({"only": only}).replace("::", ":\\u003a"))
    if len(paths) > _MAX_TRIGGER_PATHS or len(options) > _MAX_COMMAND:
        return command
    return f"{command} --conf {options}"


# --- all of it --------------------------------------------------------------------------------------


class Verification:
    """A verification from start to end. Iterate once; then :meth:`finish`.

    :param wanted: the selected paths, resolved; all by default.
    :param part: verify only the next part, of that many bytes or that fraction of all; None for everything
        at once, including unknown files.
    :param limit: bytes per second.
    :param threads: how many files are read at a time.
    :param repair: remove damaged entries at the end, see :func:`repair`; ``missing`` also missing ones.
    :param acknowledge: let :meth:`acknowledge_missing` record what is lost for good.
    :param report_progress: called now and then, in any thread, with a line for people.
    :ivar counts: how often each outcome was found.
    :ivar files: how many files were verified.
    :ivar size: bytes read.
    :ivar is_last: whether this was the last part, so the next one starts from the beginning; false without
        parts.
    :ivar damage: the first few damaged places, with their outcomes; for people.
    :raises ValueError: paths are combined with a part, or ``missing`` is set without ``repair``.
    """

    def __init__(
        self,
        mirror: Mirror,
        timeline: Timeline,
        wanted: Selection | None = None,
        *,
        part: int | Fraction | None = None,
        limit: int | None = None,
        threads: int = 2,
        repair: bool = False,
        missing: bool = False,
        acknowledge: bool = False,
        report_progress: Callable[[str], Any] = lambda text: None,
    ) -> None:
        if missing and not repair:
            raise ValueError("missing files are repaired only together with corrupted ones: add `repair`")
        self.is_repairing = repair
        self._mirror = mirror
        self._timeline = timeline
        self._wanted = Selection() if wanted is None else wanted
        self._part = self._make_portion(part)
        self._limiter = RateLimiter(mirror.verifying, lambda: limit)
        self._threads = threads
        self._missing = missing
        self._acknowledge = acknowledge
        self._damaged: list[VerifiedFile] = []
        self._report_progress = report_progress
        self._timer = ReportTimer()
        self._lock = threading.Lock()
        self._bytes_read = 0
        self.counts: Counter[VerifyOutcome] = Counter()
        self.files = 0
        self.size = 0
        self.damage: list[str] = []

    def _make_portion(self, part: int | Fraction | None) -> Portion | None:
        if part is None:
            return None
        if not self._wanted.is_everything:
            raise ValueError("a part is of the whole backup: leave out either the paths or the part")
        if isinstance(part, Fraction):
            part = max(1, int(part * sum(content.size or 0 for content in self._timeline.contents())))
        return Portion(self._mirror, self._timeline, part)

    def __iter__(self) -> Iterator[VerifiedFile]:
        contents: Iterable[FileVersion] = self._timeline.contents() if self._part is None else self._part
        if not self._wanted.is_everything:
            contents = (content for content in contents if self._wanted.take(content.path))
        elif self._part is None:
            contents = self._timeline.recording_places(contents)
        results = verify(
            self._mirror, self._timeline, contents, threads=self._threads, wait=self._count_bytes
        )
        for verified in results:
            self.files += 1
            yield self._count(verified)
        if self._part is None and self._wanted.is_everything:
            yield from map(self._count, unknown_files(self._mirror, self._timeline))
        for word in self._wanted.not_found:
            self.counts[VerifyOutcome.MISSING] += 1
            self._add_damage(f"nothing was ever backed up under {to_text(os.fsencode(word))}")

    @property
    def is_sound(self) -> bool:
        """Whether no damage has been found so far, in files or in the history itself."""
        is_damaged = any(number and not outcome.good for outcome, number in self.counts.items())
        return not self._timeline.problems and not is_damaged

    @property
    def is_last(self) -> bool:
        return self._part is not None and self._part.is_last

    def finish(self, wait: float = OPERATOR_WAIT) -> list[bytes]:
        """Repair, if asked to, and save where the next part starts.

        A part that could not be repaired is verified again next time.

        :param wait: seconds that a run may hold the lock meanwhile.
        :returns: the paths whose entries have left the index.
        :raises BackupError: see :func:`repair`.
        :raises OSError: the disk is full or broken.
        """
        removed = []
        if self.is_repairing:
            removed = repair(self._mirror, self._damaged, missing=self._missing, wait=wait)
        if self._part is not None:
            self._part.save_position()
        return removed

    def acknowledge_missing(self, wait: float = OPERATOR_WAIT) -> list[bytes]:
        """Record in the history that missing files that no run brings back are lost for good, if asked to.

        :returns: the places of versions and of files that had left the index; see
            :func:`.prune.acknowledge_missing`.
        :raises BackupError: a run holds the lock for too long, or the disk is full or broken.
        """
        if not self._acknowledge:
            return []
        missing = [
            (each.content, each.place)
            for each in self._damaged
            if each.outcome == VerifyOutcome.MISSING and each.content is not None
        ]
        return acknowledge_missing(self._mirror, missing, wait)

    def raise_for_damage(self, what_was_done: str) -> None:
        """Do nothing if there is no damage.

        :param what_was_done: about the damage, and what to do next.
        :raises DamageFound: there is damage; the message names some places.
        """
        if self.is_sound:
            return
        places, next_steps = list(self.damage), [what_was_done] if self.damage else []
        total = sum(number for outcome, number in self.counts.items() if not outcome.good)
        if total > len(places):
            places.append(f"and {total - len(places):,} more")
        if problems := self._timeline.problems:
            places += map(unfolded, problems[:_MAX_NAMED])
            next_steps.append(
                "Files that the history does not know are not verified: `mdbackup rebuild "
                f"{self._mirror.provider}` on this worker reconstructs the history from what is left"
            )
        heading = f"{self._mirror.provider}: damage in {self._mirror.files}: {self.summary()}"
        raise DamageFound("\n".join(["\n- ".join([heading, *places]), *next_steps]))

    def summary(self) -> str:
        """Return what was found, as one line."""
        counts = (f"{number:,} {outcome}" for outcome, number in self.counts.items() if number)
        return f"{', '.join(counts) or 'nothing to verify'}; {format_size(self.size)} read"

    def _count(self, verified: VerifiedFile) -> VerifiedFile:
        self.counts[verified.outcome] += 1
        self.size += verified.size
        if not verified.outcome.good:
            self._add_damage(f"{verified.outcome}: {to_text(verified.place)}")
            if self.is_repairing or self._acknowledge:
                self._damaged.append(verified)
        return verified

    def _add_damage(self, damage: str) -> None:
        if len(self.damage) < _MAX_NAMED:
            self.damage.append(damage)

    def _count_bytes(self, size: int) -> None:
        """Count bytes just read, and wait as long as the limit demands. In any thread."""
        with self._lock:
            self._bytes_read += size
            is_due = self._timer.due()
        if is_due:
            self._report_progress(f"{self.files:,} files, {format_size(self._bytes_read)} read so far")
        self._limiter(size)
