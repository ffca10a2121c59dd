"""A crash at every step of a whole run, by a kill and by a cut of the power, over every kind of entry.

At the crash, before anything is mended, four promises must hold: each live file is whole, old or new; every
version that ever was is there; the consumer index claims nothing that the disk lacks; the history can be
read, and leads to the index. Then the next run, or a retry of the one that crashed, must end as if nothing
had been.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged, DestinationBusy
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.jsonl import CorruptFile, read_header, read_records
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, commits, last, pending
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.index.canonical import digest
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.store.version_names import version_path
from tests.guarantees.crash.crash import (
    TEARS,
    HarshPowerCut,
    PowerCut,
    Refusal,
    crash_at,
    crashes,
    mixed,
    numbers_to_try,
    refuse_at,
    steps_of,
)
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import STEPS, Pair, md5
from tests.torture import LONG, Cases, scaled

STAMP = "20990101T000000.%06dZ"
ARCHIVE_STAMP = STAMP % 2
LARGE = 300_000  # bytes; such a file comes in parts
LONG_NAME = "long " + "x" * 245


# --- what there is to crash ---------------------------------------------------------------------------


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


def drop_entries(pair: Pair, *names: str) -> None:
    """Edit the consumer index as somebody might by hand: their files stay, but it knows nothing of them."""
    lines = pair.mirror.index.read_bytes().splitlines(keepends=True)
    paths = [pair.path(name) for name in names]
    kept = [line for line in lines if line[34:-1] not in paths]
    kept[-1] = kept[-1].replace(b"files=%d" % (len(lines) - 1), b"files=%d" % (len(kept) - 1))
    pair.mirror.index.write_bytes(b"".join(kept))


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


# --- the whole run, and what must hold ----------------------------------------------------------------


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


@pytest.fixture
def disk_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the real disk, which a killed process or a :class:`PowerCut` has nothing to do with."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(syscalls_module._libc, "syncfs", lambda descriptor: 0)


@pytest.fixture
def no_noreplace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(syscalls_module._libc, "renameat2", refuse)


# --- a kill, a cut of the power -----------------------------------------------------------------------

ALL = (every_kind, half_crashed, first_run, only_forgotten)
NEXT_RUN, RETRY, IN_TURN = Scene.next_run, Scene.retry, Scene.in_turn
Make = Callable[[Pair], None]
Heal = Callable[[Scene, int], None]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.usefixtures("disk_in_memory")
@pytest.mark.parametrize(
    ("make", "heal"),
    scaled(
        [(every_kind, NEXT_RUN), (every_kind, RETRY), (first_run, IN_TURN), (only_forgotten, IN_TURN)],
        list(product(ALL, [NEXT_RUN, RETRY])),
    ),
    ids=name_of,
)
def test_a_run_killed_at_any_step_loses_nothing_and_is_mended(
    limited_pair: Pair, cases: Cases, make: Make, heal: Heal
) -> None:
    """The promises hold at the kill; the next run, or a retry, ends as if there had been none."""
    Scene(limited_pair, make).each(cases, heal)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.usefixtures("disk_in_memory", "no_links")
@pytest.mark.parametrize("heal", scaled([RETRY], [NEXT_RUN, RETRY]), ids=name_of)
def test_a_run_killed_at_any_step_loses_nothing_where_there_are_no_hard_links(
    limited_pair: Pair, cases: Cases, heal: Heal
) -> None:
    """Versions are copies then, which a kill may leave incomplete, but never under a version's name."""
    Scene(limited_pair, scaled(changes_only, every_kind)).each(cases, heal)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.usefixtures("disk_in_memory", "no_noreplace")
@pytest.mark.parametrize("heal", [NEXT_RUN, RETRY], ids=name_of)
def test_a_run_killed_at_any_step_loses_nothing_where_renaming_always_overwrites(
    limited_pair: Pair, cases: Cases, heal: Heal
) -> None:
    """An empty placeholder takes the name first, as on NFS."""
    Scene(limited_pair, scaled(changes_only, every_kind)).each(cases, heal)


@pytest.mark.guarantee("1. Power cut at every step")
@pytest.mark.usefixtures("disk_in_memory", "no_links")
def test_a_power_cut_at_any_step_loses_nothing_where_there_are_no_hard_links(
    limited_pair: Pair, cases: Cases
) -> None:
    """No version is there by name before its bytes are."""
    Scene(limited_pair, scaled(changes_only, every_kind)).each(cases, IN_TURN, mixed_cut)


@pytest.mark.guarantee("1. Power cut at every step")
@pytest.mark.usefixtures("disk_in_memory")
@pytest.mark.parametrize(
    ("make", "cutter"),
    scaled(
        [(every_kind, mixed_cut), (every_kind, harsh), (first_run, harsh)],
        list(product(ALL, [empty, half, zeros, mixed_cut, harsh])),
    ),
    ids=name_of,
)
def test_a_power_cut_at_any_step_loses_nothing_and_is_mended(
    limited_pair: Pair, cases: Cases, make: Make, cutter: Callable[[Path, int], PowerCut]
) -> None:
    """What was not synced by then is empty, cut short, zeros, a mixed lot, or gone with its name."""
    Scene(limited_pair, make).each(cases, IN_TURN, cutter)


@pytest.mark.guarantee("4. Disks that fail")
@pytest.mark.usefixtures("disk_in_memory")
@pytest.mark.parametrize("make", scaled([every_kind], ALL), ids=name_of)
def test_a_disk_that_refuses_at_any_step_what_was_written_is_believed_nothing(
    limited_pair: Pair, cases: Cases, make: Make
) -> None:
    """It says so once, to whoever is there to hear it; memory still has what the disk has not."""
    Scene(limited_pair, make).each_refusal(cases)


@pytest.mark.guarantee("1. Power cut at every step")
def test_a_kill_never_sets_the_order_of_runs_back(pair: Pair, cases: Cases) -> None:
    """At each step of giving a place out."""
    pair.mirror.claim()
    last = pair.mirror.next_order()
    for number in count(1):
        with cases.one():
            crashed = crash_at(number, pair.mirror.next_order)
            before, last = last, pair.mirror.next_order()
            assert last > before
        if not crashed:
            break
    assert number > 3


@pytest.mark.guarantee("1. Power cut at every step")
@pytest.mark.parametrize("content", [b"", bytes(500), b"\xff" * 500, b"2099", b"20261324T000000.000000Z"])
def test_spoilt_files_that_are_written_in_place_stop_nothing(
    pair: Pair, cases: Cases, content: bytes
) -> None:
    """Runs are counted on from the last one that is known; the lock is a lock whatever its file says."""
    pair.put("alpha", b"1")
    pair.backup()
    state, before = pair.mirror.dest / ".mdbackup", pair.mirror.last_commit()
    with cases.one():
        order = read_header(pair.mirror.status)["order"]
        for name in ("order", "lock"):
            (state / name).write_bytes(content)
        with (state / "lock").open() as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(DestinationBusy), pair.mirror.lock("test", wait=0.1):
                pass
        pair.put("alpha", b"2")
        assert pair.backup().outcomes == {"pulled": 1}
        assert pair.versions("alpha") == [b"1"] and pair.mirror.last_commit() > before
        assert read_header(pair.mirror.status)["order"] > order


# --- whether the steps are all --------------------------------------------------------------------------

# What strace calls whatever may change a file, and what a step of that is called.
_CALLS = {
    **{"open": "open", "openat": "open", "creat": "open", "write": "write", "rename": "rename"},
    **{"renameat": "rename", "renameat2": "renameat2", "link": "link", "linkat": "link", "unlink": "unlink"},
    **{"unlinkat": "unlink", "rmdir": "rmdir", "mkdir": "mkdir", "mkdirat": "mkdir", "chmod": "chmod"},
    **{"fchmod": "chmod", "fchmodat": "chmod", "utimensat": "utime", "ftruncate": "truncate"},
    **{"fsync": "fsync", "syncfs": "syncfs", "ioctl": "clone"},
}
_OTHER_CALLS = (
    *("pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice", "fallocate"),
    *("truncate", "fdatasync", "sync_file_range", "symlink", "symlinkat", "mknod", "mknodat", "chown"),
    *("fchown", "fchownat", "lchown", "setxattr", "fsetxattr", "lsetxattr", "utime", "utimes", "futimesat"),
)


@pytest.mark.real_disk
@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("make", [every_kind, first_run])
def test_a_crash_is_tried_at_every_system_call_that_changes_the_disk(
    limited_pair: Pair, cases: Cases, tmp_path: Path, make: Callable[[Pair], None]
) -> None:
    """In their order, as strace sees them. So a call that some later code makes cannot be missed."""
    make(limited_pair)
    told = tmp_path / "steps"
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            told.write_text("\n".join(steps_of(lambda: limited_pair.finish(limited_pair.prepare()))))
        finally:
            os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    trace = tmp_path / "trace"
    calls = ",".join([*_CALLS, *_OTHER_CALLS])
    command = ["strace", "-y", "-e", f"trace={calls}", "-o", os.fspath(trace), "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        os.kill(child, signal.SIGCONT)
    os.waitpid(child, 0)
    seen = [step for line in trace.read_text().splitlines() if (step := _step(line, limited_pair.mirror))]
    assert len(seen) > 100
    assert told.read_text().splitlines() == seen
    cases.add(len(seen))


def _step(line: str, mirror: Mirror) -> str | None:
    """Return what changes the disk, of a line of strace; None if it does not, or not below ``dest``."""
    call, _, arguments = line.partition("(")
    nameless = "(deleted)" in line or "O_TMPFILE" in line
    if os.fspath(mirror.dest) not in arguments or nameless:
        return None
    if call in ("open", "openat") and not re.search("O_(WRONLY|RDWR|CREAT|TRUNC)", arguments):
        return None
    if call == "ioctl" and "FICLONE" not in arguments:
        return None
    return "rmdir" if "AT_REMOVEDIR" in arguments else _CALLS.get(call, call)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("became", ["directory", "file"])
def test_index_claims_nothing_that_settling_moves_out_of_the_way(
    pair: Pair, cases: Cases, became: str
) -> None:
    """Also where the commit that moves it is killed, and then the one that finishes it, at any step."""
    old, new = ("d", "d/a") if became == "directory" else ("d/a", "d")
    pair.put(old, b"old")
    pair.put("other", b"other")
    pair.backup()
    old_path = pair.path("d")
    shutil.rmtree(old_path) if os.path.isdir(old_path) else os.unlink(old_path)
    pair.put(new, b"new")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    sample = random.Random(1)
    for _ in cut_off_commits(pair, run):
        for _ in crashes(pair, lambda: pair.commit(pair.mirror.run(run.run_id)), sample=sample):
            with cases.one():
                check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("edit", ["drop", "restore", "delete"])
def test_hands_on_the_index_count_also_while_a_commit_is_cut_off(pair: Pair, cases: Cases, edit: str) -> None:
    """An edit is kept, and history tells of it; for a deleted index everything comes again."""
    for name in ("a", "b", "c", "d", "gone"):
        pair.put(name, name.encode())
    pair.backup()
    drop_entries(pair, "b")
    pair.put("a", b"new")
    pair.put("e", b"e")
    os.unlink(pair.path("gone"))
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if edit == "drop":
            drop_entries(pair, "c")
        elif edit == "restore":
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
        else:
            pair.mirror.index.unlink()
        ended = len(commits(pair.mirror)) == 2  # what is edited now, the next commit tells of
        for again in count(1 if LONG else 1000):
            with cases.one():
                killed = crash_at(again, partial(_settle, pair.mirror))
                if not (killed or ended or edit == "delete"):
                    check_sound(pair)
            if not killed:
                break
        index = pair.index_b() if pair.mirror.index.exists() else {}
        assert (pair.path("c") in index) == (edit == "restore")
        assert bool(index) == (edit != "delete")
        pair.backup()
        check_sound(pair)
        assert set(pair.index_b()) == {pair.path(name) for name in "abcde"}
        if edit == "delete":
            assert pair.outcome.outcomes == {"pulled": 5}


def _settle(mirror: Mirror) -> None:
    with mirror.lock("a test"):
        recover(mirror, mirror.dest / ".mdbackup" / "consumer.md5")


def cut_off_commits(pair: Pair, run: Run) -> Iterator[None]:
    """Let the commit of ``run`` be cut off at each step that leaves its history written ahead."""
    for crashed in crashes(pair, lambda: pair.commit(pair.mirror.run(run.run_id))):
        if crashed and any(pending(pair.mirror)):
            yield


@pytest.mark.guarantee("1. Crash at every step")
def test_an_index_that_is_restored_claims_nothing_that_the_cut_off_commit_moves(pair: Pair) -> None:
    """Its entry had been dropped before, so that the commit knows nothing of it."""
    for name in ("d/a", "b", "c"):
        pair.put(name, name.encode())
    pair.backup()
    drop_entries(pair, "d/a")
    os.unlink(pair.path("d/a"))
    pair.put("d/a/x", b"below now")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if len(commits(pair.mirror)) == 1:
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
            _settle(pair.mirror)
            check_sound(pair)
            drop_entries(pair, "b")
            pair.backup()
            check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
def test_an_index_that_is_restored_while_a_full_copy_is_cut_off_is_told_of(pair: Pair) -> None:
    for name in ("a", "b", "gone", "excluded"):
        pair.put(name, name.encode())
    pair.backup()
    pair.mirror.index.unlink()
    os.unlink(pair.path("gone"))
    pair.put("a", b"new")
    pair.build_index()
    run = pair.prepare(exclude=["excluded"])
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if len(commits(pair.mirror)) == 1:
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
            _settle(pair.mirror)
            check_sound(pair)
            pair.backup(exclude=["excluded"])
            check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
def test_a_spoilt_index_is_restored_from_the_last_commit_that_came_to_its_end(pair: Pair) -> None:
    """Though that was cut off before the copy of its index had its name."""
    pair.put("a", b"1")
    pair.backup()
    pair.put("a", b"2")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        if len(commits(pair.mirror)) == 2:
            pair.mirror.index.write_bytes(b"spoilt")
            with pytest.raises(ConsumerIndexDamaged, match="is what the last commit wrote"):
                pair.prepare()
            shutil.copyfile(pair.mirror.committed, pair.mirror.index)
            _settle(pair.mirror)
            check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
def test_a_spoilt_history_says_what_to_move_away_and_backups_go_on(pair: Pair) -> None:
    """Of the last commit, or of one that was cut off."""
    pair.put("alpha", b"1")
    pair.backup()
    commits(pair.mirror)[-1].write_bytes(bytes(50))
    with pytest.raises(CorruptFile, match="Move that file away: what was committed then"):
        pair.backup()
    commits(pair.mirror)[-1].unlink()
    pair.put("alpha", b"2")
    assert pair.backup().replaced == 1
    pair.put("alpha", b"3")
    pair.build_index()
    run = pair.prepare()
    pair.archive(run)
    for _ in cut_off_commits(pair, run):
        (path,) = pending(pair.mirror)
        path.write_bytes(bytes(50))
        if len(commits(pair.mirror)) == 1:
            with pytest.raises(CorruptFile, match="Move that file away: the next run"):
                pair.prepare()
            path.unlink()
        pair.backup()
        assert pair.index_b() == pair.index_a()
        assert pair.live("alpha").read_bytes() == b"3"
