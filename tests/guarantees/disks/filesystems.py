"""File systems to back up to: small real ones, which only root can mount, and one that is played."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.files import content as content_module
from airflow_mdbackup.scheme.files import folder as folder_module
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files import tree as tree_module
from demo import processes

MB = 1 << 20


@contextmanager
def mounted(kind: str, at: Path, size: int) -> Iterator[Path]:
    """Hold a new, empty file system of ``size`` bytes at the directory ``at``, which is made if need be.

    :param kind: `tmpfs`, `ext4`, `btrfs`, `exfat` (folds case and keeps spelling; has no hard links, no
        modes, no renaming without replacing) or `ntfs` (folds case, and shows names in lower case).
    """
    at.mkdir(exist_ok=True)
    server = None
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(at))
    else:
        with image_of(at).open("wb") as file:
            file.truncate(size)
        run(*_MAKE[kind], str(image_of(at)))
        if kind in _SERVE:
            server = _serve(kind, at)
        else:
            _mount_image(at)
    try:
        yield at
    finally:
        unmount(at)
        if server is not None:
            processes.stop([server])


class ThinDisk:
    """An ext4 on a device that gets blocks as they are written to; while it is :meth:`full`, none.

    Then writing to it goes well, and what was written is lost when the kernel brings it to the device.
    """

    def __init__(self, at: Path, host: Path, size: int) -> None:
        self.at = at
        self._host = host
        self._size = size
        image = str(image_of(at))
        run("fallocate", "--length", str(size), image)  # what the file system needs for itself
        for first, last in re.findall(r"(\d+)-(\d+)", _of_free_blocks(image)):
            begin, end = max(int(first) * 4096, size // 8), (int(last) + 1) * 4096
            if end > begin + MB:
                run("fallocate", "--punch-hole", "--offset", str(begin), "--length", str(end - begin), image)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Hold the device in want of blocks, but for a few."""
        host = os.statvfs(self._host)
        # It may be written to meanwhile.
        remount(self._host, f"size={(host.f_blocks - host.f_bfree) * host.f_frsize + 8 * MB}")
        try:
            yield
        finally:
            remount(self._host, f"size={self._size}")


def _of_free_blocks(image: str) -> str:
    """Return the ranges of free blocks of an ext4, as dumpe2fs(8) writes them."""
    lines = run("dumpe2fs", image).splitlines()
    return " ".join(line for line in lines if line.startswith("  Free blocks:"))


@contextmanager
def thin_disk(at: Path, size: int) -> Iterator[ThinDisk]:
    """Hold such a disk, mounted at a directory of the name ``at`` in a directory that is made for it."""
    host = at.with_name(f"{at.name}.host")
    with mounted("tmpfs", host, size + 4 * MB), mounted("ext4", host / at.name, size) as disk:
        yield ThinDisk(disk, host, size + 4 * MB)


def _mount_image(at: Path) -> None:
    """Mount the file system in an image, whose loop device the kernel frees with its last use."""
    run("mount", "-o", "loop", str(image_of(at)), str(at))


def _serve(kind: str, at: Path) -> subprocess.Popen[bytes]:
    """Mount a file system by a program (FUSE), which ends with this process at the latest."""
    program, *options = _SERVE[kind]
    device = run("losetup", "--find", "--show", str(image_of(at)))
    command = [shutil.which(program, path=_PATH) or program, device, str(at), *options]
    keeper = ["/bin/sh", "-c", _KEEP, "keep", str(at)]
    try:
        server = processes.start([*keeper, *command], log=Path(os.devnull))
        while not os.path.ismount(at):
            assert server.poll() is None, f"{command} ended with {server.returncode}"
            time.sleep(0.02)
    finally:
        run("losetup", "--detach", device)  # with its last use
    return server


def unmount(at: Path) -> None:
    """Unmount a file system, which nobody may use any more; if somebody does, it goes with its last use."""
    try:
        run("umount", str(at))
    except subprocess.CalledProcessError:
        run("umount", "--lazy", str(at))
        raise


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-m", "0", "-b", "4096"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "exfat": ["mkfs.exfat"],
    "ntfs": ["mkntfs", "-q", "-F", "-Q"],
}
# A program must not outlive all others that see its mount: the kernel then waits for ever for its own answer.
_KEEP = """at=$1; shift; trap 'umount "$at"' TERM; "$@" & wait; wait"""
# In the foreground.
_SERVE = {
    "exfat": ["mount.exfat-fuse", "-d"],
    "ntfs": ["lowntfs-3g", "-o", "ignore_case,permissions,no_detach"],
}


def image_of(at: Path) -> Path:
    """Return the file that has the file system mounted at ``at``."""
    return at.with_name(at.name + ".img")


def mount_again(at: Path) -> None:
    """Unmount a file system, forgetting all that the kernel knows of it, and mount it again."""
    run("umount", str(at))
    deadline = time.monotonic() + 20
    while run("losetup", "--associated", str(image_of(at))):
        assert time.monotonic() < deadline, "it is still in use"
        time.sleep(0.05)  # other namespaces may keep it mounted for a moment
    _mount_image(at)


def remount(at: Path, options: str) -> None:
    """Change the options of a mounted file system."""
    run("mount", "-o", f"remount,{options}", str(at))


class Folding:
    """Has a :class:`Tree` see a file system that takes names for one if ``fold`` makes the same of them.

    It keeps the spelling of the name that came first, and cannot rename without replacing.
    """

    def __init__(self, fold: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self._fold = fold
        for module in (tree_module, folder_module, syscalls_module, content_module):
            monkeypatch.setattr(module, "os", self)
        library = ctypes.CDLL(None, use_errno=True)
        library.renameat2 = _refuse  # type: ignore[assignment]
        monkeypatch.setattr(syscalls_module, "_libc", library)

    def __getattr__(self, function: str) -> Any:
        return getattr(os, function)

    def _name(self, name: Any, directory: int | None) -> Any:
        """Return the name under which a file is really there."""
        if directory is None or directory < 0 or b"/" in name:
            return name
        there = map(os.fsencode, os.listdir(directory))
        return next((n for n in there if self._fold(n) == self._fold(name)), name)

    def open(self, name: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        return os.open(self._name(name, dir_fd), flags, mode, dir_fd=dir_fd)

    def lstat(self, name: Any, *, dir_fd: int | None = None) -> os.stat_result:
        return os.lstat(self._name(name, dir_fd), dir_fd=dir_fd)

    def mkdir(self, name: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        os.mkdir(self._name(name, dir_fd), mode, dir_fd=dir_fd)

    def rmdir(self, name: Any, *, dir_fd: int | None = None) -> None:
        os.rmdir(self._name(name, dir_fd), dir_fd=dir_fd)

    def unlink(self, name: Any, *, dir_fd: int | None = None) -> None:
        os.unlink(self._name(name, dir_fd), dir_fd=dir_fd)

    def link(self, old: Any, new: Any, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool) -> None:
        old, new = self._name(old, src_dir_fd), self._name(new, dst_dir_fd)
        os.link(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)

    def rename(self, old: Any, new: Any, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        old, new = self._name(old, src_dir_fd), self._name(new, dst_dir_fd)
        os.rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def _refuse(*names: object) -> int:
    ctypes.set_errno(errno.EINVAL)
    return -1


def run(*command: str) -> str:
    """Run a program of the system, which must succeed, and return what it says."""
    environment = {**os.environ, "PATH": _PATH}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
