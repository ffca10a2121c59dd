"""Ends or stops a process at its n-th step that changes the disk: a kill, a cut of the power, a debugger.

A step is one system call, just before it is made: opening a file for writing, writing, naming, renaming,
unlinking, attributes, cutting short, syncing. Of a write there is a second step, when half of it is done.
What has no name (``O_TMPFILE``) does not outlive the process and is no step. That none is missed is shown by
a test which compares the steps with what strace(1) sees.

A cut of the power, as on a journalling filesystem: names and attributes reach the disk in their order, so
that it has them as of some step. Content reaches it when it is synced, and at any time besides. So whatever
differs from what it was when last synced may be torn: empty, cut short, zeros, or whole. Some filesystems
(btrfs) do not keep that order where single files are synced; see :class:`HarshPowerCut`.

And a disk that once refuses what is written to it, as a thin device does that is full: see :class:`Refusal`.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]
import builtins
import errno
import io
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import airflow_mdbackup
from airflow_mdbackup.scheme.errors import DestinationFull
from airflow_mdbackup.scheme.files import content as content_module
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.isolation import end_with_parent
from tests.torture import LONG

if TYPE_CHECKING:
    from tests.pair import Pair

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What Python tells of before it is done (PEP 578). os.replace tells of os.rename.
_EVENTS = {
    **{"os.rename": "rename", "os.link": "link", "os.remove": "unlink", "os.mkdir": "mkdir"},
    **{"os.rmdir": "rmdir", "os.truncate": "truncate", "os.chmod": "chmod", "os.utime": "utime"},
}
_AMID = "amid a write"
_OURS = os.path.dirname(airflow_mdbackup.__file__) + os.sep
_PLACES = 2  # in the code, from the system call outwards, by which steps are of one kind


class PowerCut:
    """What was synced of the files below a directory, and what the loss of the rest makes of them.

    :param tear: given a file's content, its size or less of it after the cut.
    """

    def __init__(self, root: Path, tear: Callable[[bytes], bytes]) -> None:
        self._root = root
        self._tear = tear
        self._synced: dict[int, bytes] = {}  # content, by inode
        self.sync_all()

    def sync_all(self, descriptor: int | None = None) -> None:
        """Note that all content is on the disk.

        :param descriptor: of a directory, by which that was asked for.
        """
        self._synced = dict(map(_content, self._files()))

    def sync(self, descriptor: int) -> None:
        """Note that the content of an open file is on the disk."""
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            inode, content = _content(f"/proc/self/fd/{descriptor}")
            self._synced[inode] = content

    def written(self, descriptor: int) -> None:
        """Note that an open file was written to."""

    def happen(self) -> None:
        """Tear what was not synced. Times stay, for they are no content."""
        for path in self._files():
            inode, content = _content(path)
            if self._synced.get(inode) != content:
                self._tear_up(path, inode, content)

    def _tear_up(self, path: str, inode: int, content: bytes) -> None:
        times = os.stat(path)
        self._synced[inode] = torn = self._tear(content)
        with io.FileIO(path, "r+") as file:
            file.truncate(0)
            file.write(torn)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _files(self) -> Iterator[str]:
        for folder, _, names in os.walk(self._root):
            yield from (f"{folder}/{name}" for name in names)


def _content(path: str) -> tuple[int, bytes]:
    """Return the inode of a file, and what is in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        return status.st_ino, os.read(descriptor, status.st_size + 1)
    finally:
        os.close(descriptor)


class _File(NamedTuple):
    inode: int
    content: bytes
    status: os.stat_result


class HarshPowerCut(PowerCut):
    """A cut that takes away all that was not synced: content and names, each directory for itself.

    A file that was synced has its name, and a directory that was synced the names in it. All else is as it
    was when everything was synced last.
    """

    def sync_all(self, descriptor: int | None = None) -> None:
        super().sync_all()
        self._names = {folder: self._names_in(folder) for folder, _, _ in os.walk(self._root)}

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(f"{self._root}/") and path != os.fspath(self._root):
            return
        if os.path.isdir(path):
            self._names[path] = self._names_in(path)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():  # it has its name too, though not those in it
                        self._names.setdefault(entry.path, {})
        else:
            folder, name = os.path.split(path)
            self._names.setdefault(folder, {})[name] = self._file(path)

    def happen(self) -> None:
        for folder, folders, names in os.walk(self._root, topdown=False):
            wanted = self._names.get(folder, {})
            for name in names:
                path = f"{folder}/{name}"
                if name not in wanted or _content(path) != wanted[name][:2]:
                    os.unlink(path)
            for name in folders:
                if f"{folder}/{name}" not in self._names:
                    os.rmdir(f"{folder}/{name}")
        for folder, wanted in self._names.items():
            os.makedirs(folder, exist_ok=True)
            for name, file in wanted.items():
                path = f"{folder}/{name}"
                if not os.path.exists(path):
                    with open(path, "wb") as lost:
                        lost.write(file.content)
                    os.chmod(path, file.status.st_mode & 0o7777)
                    os.utime(path, ns=(file.status.st_atime_ns, file.status.st_mtime_ns))

    def _names_in(self, folder: str) -> dict[str, _File]:
        with os.scandir(folder) as entries:
            return {entry.name: self._file(entry.path) for entry in entries if entry.is_file()}

    def _file(self, path: str) -> _File:
        inode, content = _content(path)
        return _File(inode, self._synced.setdefault(inode, self._tear(content)), os.stat(path))


class Refusal(PowerCut):
    """A disk that refuses, once, all that was written and is not on it yet.

    That is told to each descriptor that is open then, once, when it is synced; to those that are opened later
    it is not. Memory still has what was written, and gives it to whoever reads it, until it is told to forget
    the file. Then, or when all is over (:meth:`happen`), what the disk has comes to light.

    Source: the Linux kernel's errseq_t, and what PostgreSQL found out about fsync(2) in 2018.
    """

    def __init__(self, root: Path, tear: Callable[[bytes], bytes]) -> None:
        self.has_refused = False
        self._lost: dict[int, bytes] = {}  # content that only memory has, by inode
        self._untold: set[int] = set()  # descriptors
        super().__init__(root, tear)

    def refuse(self) -> None:
        """Refuse what is not on the disk at this moment."""
        self.has_refused = True
        found = map(_content, self._files())
        self._lost = {inode: content for inode, content in found if self._synced.get(inode) != content}
        self._untold = set(map(int, os.listdir("/proc/self/fd")))

    def sync_all(self, descriptor: int | None = None) -> None:
        found = map(_content, self._files())
        self._synced = {inode: content for inode, content in found if self._lost.get(inode) != content}
        self._tell(descriptor)

    def sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            inode, content = _content(f"/proc/self/fd/{descriptor}")
            if self._lost.get(inode) != content:
                self._synced[inode] = content
        self._tell(descriptor)

    def _tell(self, descriptor: int | None) -> None:
        if descriptor in self._untold:
            self._untold.remove(descriptor)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.readlink(f"/proc/self/fd/{descriptor}"))

    def written(self, descriptor: int) -> None:
        """Offer the disk again what is in a file. It may be a new one with an inode of before."""
        self._lost.pop(os.fstat(descriptor).st_ino, None)

    def close(self, descriptor: int) -> None:
        """Note that a descriptor is closed: its number may be that of another one from now on."""
        self._untold.discard(descriptor)

    def forget_cached(self, descriptor: int) -> None:
        """Have an open file be what the disk has."""
        path = f"/proc/self/fd/{descriptor}"
        inode, content = _content(path)
        if self._lost.pop(inode, None) == content:
            self._tear_up(path, inode, content)


# What may be left of content that was not synced.
TEARS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: b"\xff" * len(content),
}


def mixed(seed: int) -> Callable[[bytes], bytes]:
    """Return a tear that lets each file fare in another way, some of them well."""
    chance = random.Random(seed)
    return lambda content: chance.choice([*TEARS.values(), bytes])(content)


def crash_at(number: int, act: Callable[[], object], cut: PowerCut | None = None) -> bool:
    """Do ``act`` in a child process that is killed just before its step ``number``, from 1 on.

    What a file object has not written to the kernel by then is lost.

    :param cut: what happens to the disk then, besides.
    :return: whether it came to the crash.
    """

    def scene() -> None:
        def end() -> None:
            if cut is not None:
                stop()
                cut.happen()
            os.kill(os.getpid(), signal.SIGKILL)

        stop = _count_down(number, end, cut)
        act()

    status = _status_of(scene)
    assert status in (0, -signal.SIGKILL), f"the step failed with status {status}"
    return status != 0


def refuse_at(number: int, act: Callable[[], object], again: Callable[[], object], disk: Refusal) -> bool:
    """Do ``act`` in a child process, and have the disk refuse what was written before its step ``number``.

    If ``act`` fails for that, ``again`` is done, at most twice. In the end memory forgets everything.

    :return: whether it came to the refusal.
    """

    def scene() -> None:
        stop = _count_down(number, disk.refuse, disk)
        really_close = os.close

        def close(descriptor: int) -> None:
            disk.close(descriptor)
            really_close(descriptor)

        os.close = close
        os.posix_fadvise = lambda descriptor, *_: disk.forget_cached(descriptor)  # type: ignore[assignment]
        for attempt in (act, again, again):
            try:
                attempt()
                break
            except DestinationFull:
                assert disk.has_refused
        else:
            raise AssertionError("it does not heal")
        stop()
        disk.happen()
        told.write(b"1" if disk.has_refused else b"0")

    with tempfile.TemporaryFile(buffering=0) as told:
        in_a_child(scene)
        told.seek(0)
        return told.read() == b"1"


def numbers_to_try(act: Callable[[], object], sample: random.Random | None = None) -> Iterator[int]:
    """Give the numbers of the steps of ``act`` at which to crash it, then further ones.

    In the long form each step, in the short form one of each kind: the same system call, made at the same
    place in the code and called from the same place. Of several it is the middle one, amid what is half done.
    Call it where ``act`` can begin; it does it in a child process, so that what is on the disk must be
    brought back to what it was.

    :raises AssertionError: ``act`` does not come to its end for thousands of steps.
    :param sample: takes four of the kinds in the short form, where there are too many cases for all.
    """
    if LONG:
        return _at_most(count(1))
    kinds: dict[str, list[int]] = {}
    kinds_of_all = _kinds_of_steps(act)
    for number, kind in enumerate(kinds_of_all, 1):
        kinds.setdefault(kind, []).append(number)
    chosen = [numbers[len(numbers) // 2] for numbers in kinds.values()]
    if sample is not None:
        chosen = sample.sample(chosen, min(4, len(chosen)))
    return _at_most(chain(sorted(chosen), count(len(kinds_of_all) + 1)))


def _at_most(numbers: Iterator[int], most: int = 5000) -> Iterator[int]:
    yield from islice(numbers, most)
    raise AssertionError("it never came to its end")


def crashes(
    pair: Pair,
    act: Callable[[], object],
    cutter: Callable[[Path, int], PowerCut | None] = lambda dest, number: None,
    sample: random.Random | None = None,
) -> Iterator[bool]:
    """Let ``act`` crash at one step after the other (see :func:`numbers_to_try`), at last come to its end.

    Each time on a fresh copy of the pair's ``dest``, which is the pair's own again afterwards.

    :param cutter: makes the cut of the power, if there is to be one, given ``dest`` and the step.
    :return: whether it crashed.
    """
    template = pair.mirror

    def renew() -> None:
        pair.mirror = Mirror(template.dest.with_name(f"{template.dest.name}-crashed"), template.provider)
        shutil.rmtree(pair.mirror.dest, ignore_errors=True)
        shutil.copytree(template.dest, pair.mirror.dest, symlinks=True)

    renew()
    for number in numbers_to_try(act, sample):
        renew()
        crashed = crash_at(number, act, cutter(pair.mirror.dest, number))
        yield crashed
        if not crashed:
            break
    shutil.rmtree(pair.mirror.dest)
    pair.mirror = template


def _kind(step: str) -> str:
    """Return what the step that is being made has in common with others: what is done, where in our code."""
    frame, places = sys._getframe(), []
    while frame is not None and len(places) < _PLACES:
        if frame.f_code.co_filename.startswith(_OURS):
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return " ".join([step, *places])


def _kinds_of_steps(act: Callable[[], object]) -> list[str]:
    """Do ``act`` in a child process, and return the kinds of all its steps."""
    with tempfile.TemporaryFile("w+") as told:

        def record() -> None:
            kinds: list[str] = []
            stop = _count_down(sys.maxsize, lambda: None, note=lambda step: kinds.append(_kind(step)))
            act()
            stop()
            told.write("\n".join(kinds))
            told.flush()

        in_a_child(record)
        told.seek(0)
        return told.read().splitlines()


def in_a_child(act: Callable[[], None]) -> None:
    """Do something in a process of its own, which must come through it."""
    assert _status_of(act) == 0


def _status_of(act: Callable[[], object]) -> int:
    """Do something in a child process; return its exit status: 1 if it raised, negative if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            end_with_parent()
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stop_at(number: int, act: Callable[[], object]) -> None:
    """Do ``act``, and have this process stopped just before its step ``number``."""
    _count_down(number, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    act()


def steps_of(act: Callable[[], object]) -> list[str]:
    """Do ``act`` and return its steps, without those amid a write. Only for a process that ends soon."""
    steps: list[str] = []
    _count_down(sys.maxsize, lambda: None, note=steps.append)
    act()
    return [step for step in steps if step != _AMID]


def _count_down(
    number: int,
    end: Callable[[], None],
    cut: PowerCut | None = None,
    *,
    note: Callable[[str], None] | None = None,
) -> Callable[[], None]:
    """Have this process do ``end`` at its step ``number``, and return what stops the counting.

    :param note: is told what each step is, as it is made.
    """
    left: float = number

    def step(kind: str) -> None:
        nonlocal left
        left -= 1
        if note is not None:
            note(kind)
        if left == 0:
            end()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            step(_EVENTS[event])
        elif event == "open":
            flags = arguments[2]
            if flags & _WRITING and flags & os.O_TMPFILE != os.O_TMPFILE:
                step("open")
        elif event == "fcntl.ioctl" and arguments[1] == content_module._FICLONE and _has_name(arguments[0]):
            step("clone")

    def write(descriptor: int, data: Any) -> int:
        if not _has_name(descriptor):
            return really_write(descriptor, data)
        step("write")
        view = memoryview(data)
        done = 0
        if len(view) > 1:
            nonlocal left
            left -= 1
            if note is not None:
                note(_AMID)
            if left == 0:
                done = really_write(descriptor, view[: len(view) // 2])
                end()
        done += really_write(descriptor, view[done:])
        if cut is not None:
            cut.written(descriptor)
        return done

    def fsync(descriptor: int) -> None:
        step("fsync")
        really_fsync(descriptor)
        if cut is not None:
            cut.sync(descriptor)

    class Library:
        @staticmethod
        def syncfs(*arguments: Any) -> Any:
            step("syncfs")
            result = library.syncfs(*arguments)
            if cut is not None:
                cut.sync_all(arguments[0])
            return result

        @staticmethod
        def renameat2(*arguments: Any) -> Any:
            step("renameat2")
            return library.renameat2(*arguments)

    def stop() -> None:
        nonlocal left
        left = float("inf")

    library, really_write, really_fsync = syscalls_module._libc, os.write, os.fsync
    syscalls_module._libc = Library  # type: ignore[assignment]
    os.write, os.fsync = write, fsync
    # File objects that write by os.write.
    io.open = builtins.open = _pyio.open
    sys.addaudithook(hook)
    return stop


def _has_name(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_nlink > 0
