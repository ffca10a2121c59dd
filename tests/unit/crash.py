"""Ends or stops a process at its n-th step that changes the disk: a kill, a cut of the power, a debugger.

A step is one system call, just before it is made: opening a file for writing, writing, naming, renaming,
unlinking, attributes, cutting short, syncing. Of a write there is a second step, when half of it is done.
What has no name (``O_TMPFILE``) does not outlive the process and is no step. That none is missed is shown by
a test which compares the steps with what strace(1) sees.

A cut of the power, as on a journalling filesystem: names and attributes reach the disk in their order, so
that it has them as of some step. Content reaches it when it is synced, and at any time besides. So whatever
differs from what it was when last synced may be torn: empty, cut short, zeros, or whole. Some filesystems
(btrfs) do not keep that order where single files are synced; see :class:`HarshPowerCut`.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]
import builtins
import io
import os
import random
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from airflow_mdbackup.scheme import tree

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What Python tells of before it is done (PEP 578). os.replace tells of os.rename.
_EVENTS = {
    **{"os.rename": "rename", "os.link": "link", "os.remove": "unlink", "os.mkdir": "mkdir"},
    **{"os.rmdir": "rmdir", "os.truncate": "truncate", "os.chmod": "chmod", "os.utime": "utime"},
}


class PowerCut:
    """What was synced of the files below a directory, and what the loss of the rest makes of them.

    :param tear: given a file's content, its size or less of it after the cut.
    """

    def __init__(self, root: Path, tear: Callable[[bytes], bytes]) -> None:
        self._root = root
        self._tear = tear
        self._synced: dict[int, bytes] = {}  # content, by inode
        self.sync_all()

    def sync_all(self) -> None:
        """Note that all content is on the disk."""
        self._synced = dict(map(_content, self._files()))

    def sync(self, descriptor: int) -> None:
        """Note that the content of an open file is on the disk."""
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            inode, content = _content(f"/proc/self/fd/{descriptor}")
            self._synced[inode] = content

    def happen(self) -> None:
        """Tear what was not synced. Times stay, for they are no content."""
        for path in self._files():
            inode, content = _content(path)
            if self._synced.get(inode) == content:
                continue
            times = os.stat(path)
            self._synced[inode] = torn = self._tear(content)
            with open(path, "r+b", buffering=0) as file:
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

    def sync_all(self) -> None:
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

    def end() -> None:
        if cut is not None:
            stop()
            cut.happen()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            stop = _count_down(number, end, cut)
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the step failed with status {status}"
    return status != 0


def stop_at(number: int, act: Callable[[], object]) -> None:
    """Do ``act``, and have this process stopped just before its step ``number``."""
    _count_down(number, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    act()


def steps_of(act: Callable[[], object]) -> list[str]:
    """Do ``act`` and return its steps, without those amid a write. Only for a process that ends soon."""
    steps: list[str] = []
    _count_down(sys.maxsize, lambda: None, steps=steps)
    act()
    return steps


def _count_down(
    number: int,
    end: Callable[[], None],
    cut: PowerCut | None = None,
    *,
    steps: list[str] | None = None,
) -> Callable[[], None]:
    """Have this process do ``end`` at its step ``number``, and return what stops the counting."""
    left: float = number

    def step(kind: str) -> None:
        nonlocal left
        left -= 1
        if steps is not None:
            steps.append(kind)
        if left == 0:
            end()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            step(_EVENTS[event])
        elif event == "open":
            flags = arguments[2]
            if flags & _WRITING and flags & os.O_TMPFILE != os.O_TMPFILE:
                step("open")
        elif event == "fcntl.ioctl" and arguments[1] == tree._FICLONE and _has_name(arguments[0]):
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
            if left == 0:
                done = really_write(descriptor, view[: len(view) // 2])
                end()
        return done + really_write(descriptor, view[done:])

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
                cut.sync_all()
            return result

        @staticmethod
        def renameat2(*arguments: Any) -> Any:
            step("renameat2")
            return library.renameat2(*arguments)

    def stop() -> None:
        nonlocal left
        left = float("inf")

    library, really_write, really_fsync = tree._libc, os.write, os.fsync
    tree._libc = Library  # type: ignore[assignment]
    os.write, os.fsync = write, fsync
    # File objects that write by os.write.
    io.open = builtins.open = _pyio.open
    sys.addaudithook(hook)
    return stop


def _has_name(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_nlink > 0
