"""File systems to back up to: small real ones, which only root can mount, and one that is played."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme import tree as tree_module

MB = 1 << 20


@contextmanager
def mounted(kind: str, at: Path, size: int) -> Iterator[Path]:
    """Hold a new, empty file system of ``size`` bytes at the directory ``at``, which is made if need be.

    :param kind: `tmpfs`, `ext4`, `btrfs`, `exfat` (folds case and keeps spelling; has no hard links, no
        modes, no renaming without replacing) or `ntfs` (folds case, and shows names in lower case).
    """
    at.mkdir(exist_ok=True)
    device = ""
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs"]
    else:
        image = image_of(at)
        with image.open("wb") as file:
            file.truncate(size)
        make, mount = _KINDS[kind]
        run(*make, str(image))
        device = run("losetup", "--find", "--show", str(image))
        mount = [*mount, device]
    try:
        run(*mount, str(at))
        try:
            yield at
        finally:
            unmount(at)
    finally:
        if device:
            run("losetup", "--detach", device)


def unmount(at: Path) -> None:
    """Unmount a file system, which nobody may use any more; if somebody does, it goes with its last use."""
    try:
        run("umount", str(at))
    except subprocess.CalledProcessError:
        run("umount", "--lazy", str(at))
        raise


_KINDS = {
    "ext4": (["mkfs.ext4", "-q", "-m", "0"], ["mount"]),
    "btrfs": (["mkfs.btrfs", "-q"], ["mount"]),
    "exfat": (["mkfs.exfat"], ["mount.exfat-fuse"]),
    "ntfs": (["mkntfs", "-q", "-F", "-Q"], ["lowntfs-3g", "-o", "ignore_case,permissions"]),
}


def image_of(at: Path) -> Path:
    """Return the file that has the file system mounted at ``at``."""
    return at.with_name(at.name + ".img")


def mount_again(at: Path) -> None:
    """Unmount a file system, forgetting all that the kernel knows of it, and mount it again."""
    device = run("findmnt", "--noheadings", "--output", "SOURCE", str(at))
    run("umount", str(at))
    while True:
        try:  # other namespaces may keep it mounted for a moment
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
            break
        except OSError as error:
            assert error.errno == errno.EBUSY
            time.sleep(0.05)
    run("mount", device, str(at))


def remount(at: Path, options: str) -> None:
    """Change the options of a mounted file system."""
    run("mount", "-o", f"remount,{options}", str(at))


class Folding:
    """Has a :class:`Tree` see a file system that takes names for one if ``fold`` makes the same of them.

    It keeps the spelling of the name that came first, and cannot rename without replacing.
    """

    def __init__(self, fold: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self._fold = fold
        monkeypatch.setattr(tree_module, "os", self)
        library = ctypes.CDLL(None, use_errno=True)
        library.renameat2 = _refuse  # type: ignore[assignment]
        monkeypatch.setattr(tree_module, "_libc", library)

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
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
