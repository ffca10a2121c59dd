"""What there is to crash: runs with every kind of entry, and what must hold after a crash."""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from airflow_mdbackup.scheme.files.jsonl import read_header, read_records
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, commits, last, pending
from airflow_mdbackup.scheme.index.canonical import digest
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import version_path
from tests.guarantees.crash.crash import (
    TEARS,
    HarshPowerCut,
    PowerCut,
    Refusal,
    crash_at,
    mixed,
    numbers_to_try,
    refuse_at,
)
from tests.guarantees.crash.cut_off import drop_entries
from tests.pair import STEPS, Pair, md5
from tests.torture import Cases

STAMP = "20990101T000000.%06dZ"
ARCHIVE_STAMP = STAMP % 2
LARGE = 300_000  # bytes; such a file comes in parts
LONG_NAME = "long " + "x" * 245


def every_kind(pair: Pair) -> None:
    """Have every kind of change between B's backup and A as it is, and each trouble that A can make."""
    for name in ("same", "changed", "changed, name taken", "moves", "gone", "adopted", "adopted, changed"):
        pair.put(name, f"{name}, old".encode())
    for name in ("file", "deep/folder/below", "denied", "changing", "hidden", "deleted on B", LONG_NAME):
        pair.put(name, f"{name}, old".encode())
    pair.put("large, changed", b"large, old" * (LARGE // 10))
    pair.backup()
    pair.put("deep/folder/below", b"below, changed")
    pair.put("changed", b"changed, once")
    pair.backup()
    drop_entries(pair, "adopted", "adopted, changed")
    pair.live("deleted on B").unlink()
    make_stamps_known(pair)
    for name in ("changed, name taken", "adopted, changed"):
        taken = os.fsencode(pair.mirror.files) + version_path(pair.path(name), ARCHIVE_STAMP)
        Path(os.fsdecode(taken)).write_bytes(f"{name}, a version of another time".encode())

    for name in ("changed", "changed, name taken", "adopted, changed", LONG_NAME):
        pair.put(name, f"{name}, new".encode())
    pair.put("large, changed", b"large, new" * (LARGE // 10))
    pair.put("large, new", b"another" * (LARGE // 7))
    pair.put("new/deep", b"new")
    pair.put("new/empty")
    pair.put("twin 1", b"twins")
    pair.put("twin 2", b"twins")
    os.chmod(pair.path("new/deep"), 0o4644)
    os.rename(pair.path("moves"), pair.path("moved"))
    os.unlink(pair.path("gone"))
    os.unlink(pair.path("file"))
    pair.put("file/below", b"now below")
    shutil.rmtree(pair.path("deep/folder"))
    pair.put("deep/folder", b"now a file")
    pair.put("vanished", b"soon gone")
    os.unlink(pair.path("hidden"))
    pair.put("denied", b"denied, new")
    pair.put("changing", b"changing, new")
    pair.build_index(unreadable=[pair.path("hidden")])
    os.unlink(pair.path("vanished"))
    os.chmod(pair.path("denied"), 0)
    pair.put("changing", b"changing, newer")


def make_stamps_known(pair: Pair) -> None:
    """Have the stamp of the last commit be in the future, so that those that follow are known."""
    newest = commits(pair.mirror)[-1]
    newest.rename(newest.with_name(STAMP % 1 + newest.name[len(STAMP % 1) :]))


def first_run(pair: Pair) -> None:
    """Let A have files, and B nothing, not even its directory."""
    for name in ("alpha", "bravo", "folder/charlie"):
        pair.put(name, f"{name}".encode())
    pair.put("twin", b"alpha")
    pair.put("large", b"large, new" * (LARGE // 10))
    pair.build_index()


def only_forgotten(pair: Pair) -> None:
    """Let files be gone from A, and nothing be new."""
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, f"{name}".encode())
    pair.backup()
    os.unlink(pair.path("bravo"))
    pair.build_index()


def changes_only(pair: Pair) -> None:
    """Let a few files have changed."""
    for name in ("alpha", "bravo", "charlie"):
        pair.put(name, f"{name}, old".encode())
    pair.backup()
    make_stamps_known(pair)
    taken = os.fsencode(pair.mirror.files) + version_path(pair.path("bravo"), ARCHIVE_STAMP)
    os.mkdir(os.path.dirname(taken))
    Path(os.fsdecode(taken)).write_bytes(b"bravo, a version of another time")
    pair.put("alpha", b"alpha, new")
    pair.put("bravo", b"bravo, new")
    pair.build_index()


def half_crashed(pair: Pair) -> None:
    """Have every kind of change, and an earlier run that crashed while it put files in place."""
    every_kind(pair)
    template = pair.mirror.dest
    for number in count(1):
        pair.mirror = Mirror(template.with_name("crashing"), "srv1")
        shutil.copytree(template, pair.mirror.dest)
        assert crash_at(number, lambda: pair.finish(pair.prepare()))
        if pair.live("new/deep").exists():
            break
        shutil.rmtree(pair.mirror.dest)
    assert any(pending(pair.mirror)) and not pair.live("twin 2").exists()
    pair.runs += 1


def is_version(path: bytes) -> bool:
    return b"/.old/" in path


@dataclass
class Seen:
    """What is to be seen on B, by paths below its files."""

    files: dict[bytes, bytes]  # live ones and versions
    attributes: dict[bytes, tuple[int, int]]  # of live files: mode and time
    index: dict[bytes, bytes]

    @property
    def live(self) -> dict[bytes, bytes]:
        return {path: content for path, content in self.files.items() if not is_version(path)}

    @property
    def versions(self) -> list[tuple[bytes, bytes]]:
        """Where displaced files lie, whenever that was, and what is in them; ordered."""
        stamp = re.compile(rb"\.\d{8}T\d{6}\.\d{6}Z(\.\d+)?")
        return sorted((stamp.sub(b"", path), c) for path, c in self.files.items() if is_version(path))


def empty(dest: Path, number: int) -> PowerCut:
    return PowerCut(dest, TEARS["empty"])


def half(dest: Path, number: int) -> PowerCut:
    return PowerCut(dest, TEARS["half"])


def zeros(dest: Path, number: int) -> PowerCut:
    return PowerCut(dest, TEARS["zeros"])


def mixed_cut(dest: Path, number: int) -> PowerCut:
    return PowerCut(dest, mixed(number))


def harsh(dest: Path, number: int) -> PowerCut:
    return HarshPowerCut(dest, mixed(number))


class Scene:
    """A run to be crashed, on fresh copies of the ``dest`` that was there before it."""

    def __init__(self, pair: Pair, make: Callable[[Pair], None]) -> None:
        make(pair)
        self.pair = pair
        self._template = pair.mirror.dest
        self._at = mmap.mmap(-1, 1)  # the step of the run, which the child tells
        self._first = pair.runs + 1
        self._history = [path.name for path in self._commits()]
        self._retried = True
        self.old = self.new = self._look()
        self.renew()
        self.run_all()
        self.new = self._look()
        self.outcomes = pair.outcome.outcomes
        self.check_end()

    def _commits(self) -> list[Path]:
        return commits(self.pair.mirror) if self.pair.mirror.history.exists() else []

    def renew(self) -> None:
        """Let the pair go on with a fresh copy of ``dest`` as it was."""
        mirror = Mirror(self._template.with_name("dest"), "srv1")
        shutil.rmtree(mirror.dest, ignore_errors=True)
        if self._template.exists():
            shutil.copytree(self._template, mirror.dest)
        self.pair.mirror = mirror
        self.pair.runs = self._first
        while self.pair.servers:
            self.pair.servers.pop().stop()

    # --- what is done -------------------------------------------------------------------------------

    def run_all(self, start: int = 0, *, later: int = 0) -> None:
        """Do the run that is to be crashed, or one so many runs later, from a step on."""
        run = self.pair.mirror.run(f"manual__{self._first + later}")
        for step, name in list(enumerate(STEPS))[start:]:
            self._at[0] = step
            STEPS[name](self.pair, run)

    def retry(self, number: int = 0) -> None:
        """Go on with the run from the step that crashed, as Airflow does."""
        self._retried = True
        self.run_all(self._at[0])

    def next_run(self, number: int = 0) -> None:
        """Let the crashed run be, and do the next."""
        self._retried = False
        self.run_all(later=1)

    def in_turn(self, number: int) -> None:
        """Mend by the next run, or by a retry, whichever is due."""
        (self.next_run, self.retry)[number % 2](number)

    def each(
        self,
        cases: Cases,
        heal: Callable[[Scene, int], None],
        cutter: Callable[[Path, int], PowerCut] | None = None,
    ) -> None:
        """Crash at each step, check the promises, have it healed, and check the end.

        :param cutter: makes the cut of the power, given ``dest`` and the step; None if there is only a kill.
        """
        self.renew()
        for number in numbers_to_try(self.run_all):
            self.renew()
            try:
                with cases.one():
                    cut = cutter(self.pair.mirror.dest, number) if cutter else None
                    crashed = crash_at(number, self.run_all, cut)
                    self.check_promises(self._look())
                    heal(self, number)
                    self.check_end(exactly=self._retried and cutter is not harsh)
            except Exception as error:
                error.add_note(f"crashed at step {number}, in {list(STEPS)[self._at[0]]}")
                raise
            if not crashed:
                print(f"{number - 1} steps")
                return

    def each_refusal(self, cases: Cases) -> None:
        """Have the disk refuse what was written, at each step; check that a retry ends as if it had not."""
        self.renew()
        for number in numbers_to_try(self.run_all):
            self.renew()
            try:
                with cases.one():
                    disk = Refusal(self.pair.mirror.dest, mixed(number))
                    refused = refuse_at(number, self.run_all, self.retry, disk)
                    self.check_end()
            except Exception as error:
                error.add_note(f"refused at step {number}, in {list(STEPS)[self._at[0]]}")
                raise
            if not refused:
                print(f"{number - 1} steps")
                return

    # --- what must be seen --------------------------------------------------------------------------

    def _look(self) -> Seen:
        root = os.fsencode(self.pair.mirror.files)
        files, attributes = {}, {}
        for folder, _, names in os.walk(root):
            for name in names:
                path = folder + b"/" + name
                with open(path, "rb") as file:
                    files[path[len(root) :]] = file.read()
                    status = os.fstat(file.fileno())
                if not is_version(path):
                    attributes[path[len(root) :]] = status.st_mode, int(status.st_mtime)
        index = self.pair.index_b() if self.pair.mirror.index.exists() else {}
        return Seen(files, attributes, index)

    def check_promises(self, now: Seen) -> None:
        """Make sure of what holds at any moment, before anybody has mended anything."""
        old = self.old
        for path, content in now.live.items():
            whole = content in (old.live.get(path), self.new.live.get(path))
            assert whole, f"{path!r} is neither old nor new: {content[:50]!r}"
        # A name goes only where a file becomes a directory, or the reverse.
        for path in old.live:
            flips = path.endswith((b"/file", b"/deep/folder/below"))
            assert path in now.live or flips, f"{path!r} is lost"
        contents = set(now.files.values())
        for path, content in old.files.items():
            assert content in contents, f"the bytes of {path!r} are lost"
            if is_version(path) and b"/deep/folder/" not in path:
                assert now.files.get(path) == content, f"the version {path!r} is lost"
        for path, known in now.index.items():
            there = now.live.get(path)
            by_hand = path.endswith(b"/deleted on B")
            assert by_hand if there is None else md5(there) == known, f"the index claims {path!r}"
        self._check_history(now)

    def _check_history(self, now: Seen) -> None:
        """Make sure that the history can be read, and tells of what is there."""
        mirror = self.pair.mirror
        if not mirror.history.exists():
            return
        for path in pending(mirror):
            list(read_records(path, Change))
        for path in self._commits():
            changes = list(read_records(path, Change))
            if path.name not in self._history:
                for change in changes:
                    if change.what == ChangeKind.REPLACED:
                        assert md5(now.files[change.version or b""]) == change.old_md5
        if not any(pending(mirror)) and mirror.index.exists():
            after = last(mirror).get("after") if self._commits() else None
            unchanged = now.index == self.old.index and [p.name for p in self._commits()] == self._history
            assert unchanged or digest(mirror.index) == after, "the history does not lead to the index"
        names = [read_header(path)["before"] for path in self._commits()[len(self._history) :]]
        assert len(names) == len(set(names))

    def check_end(self, *, exactly: bool = True) -> None:
        """Make sure that all is as after a run without a crash, and nothing is left that could pile up.

        :param exactly: whether no version may be there twice. What a crashed run linked and did not record
            stays beside that of the next run, for nothing is ever deleted.
        """
        now, mirror = self._look(), self.pair.mirror
        self.check_promises(now)
        assert now.index == self.new.index
        assert now.live == self.new.live
        assert now.attributes == self.new.attributes
        if exactly:
            assert now.versions == self.new.versions
        else:
            assert set(now.versions) == set(self.new.versions)
        assert digest(mirror.index) == last(mirror)["after"]
        assert mirror.committed.read_bytes() == mirror.index.read_bytes()
        assert self.pair.outcome.outcomes.keys() <= self.outcomes.keys() | {"adopted"}
        assert not os.listdir(mirror.staging)
        assert all(name.endswith(".jsonl") for name in os.listdir(mirror.history))
        temporary = {*mirror.dest.glob("*.tmp"), *(mirror.dest / ".mdbackup").glob("*.tmp")}
        assert not temporary
