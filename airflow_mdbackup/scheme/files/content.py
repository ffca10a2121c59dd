"""Hashing, copying and writing the bytes of files, with their holes.

Sources: posix_fadvise(2), ioctl_ficlone(2).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from tempfile import TemporaryFile

_BLOCK = 1 << 20
_HOLE = 1 << 16  # bytes; so many zeros become a hole
_ZEROS = bytes(_HOLE)


def md5_of(descriptor: int, into: int | None = None, progress: Callable[[int], None] | None = None) -> bytes:
    """Return the md5 of a file as it is on its disk, from the position of ``descriptor`` to its end.

    For data that was written just now, see :func:`forget_cached`.

    :param into: a descriptor that gets a copy of the bytes.
    :param progress: called with the number of bytes of each block.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    forget_cached(descriptor)
    while block := os.read(descriptor, _BLOCK):
        md5.update(block)
        if into is not None:
            write_sparse(into, block)
        if progress is not None:
            progress(len(block))
    if into is not None:
        end_sparse(into)
    return md5.hexdigest().encode()


def forget_cached(descriptor: int) -> None:
    """Make the next read of an open file come from its disk, not from memory.

    If a disk cannot store what was written, the kernel reports that once, to descriptors open at that time.
    From then on, memory has bytes that the disk lacks. Bytes not yet written stay in memory, and an error in
    writing them is reported by the next ``sync``.
    """
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def copy_of(source: int, target: int) -> bytes:
    """Make one open file a copy of another, replacing its content, and return the md5 of the bytes copied.

    Blocks are shared if the filesystem can do that.
    """
    # Cloning replaces only as many bytes as the source has. An empty file is not truncated, because ext4
    # writes a truncated file to the disk as soon as it is closed.
    if os.fstat(target).st_size:
        os.ftruncate(target, 0)
    os.lseek(target, 0, os.SEEK_SET)
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return md5_of(source, into=target)
    return md5_of(source)


def shares_blocks(directory: os.PathLike[str]) -> bool:
    """Whether :func:`copy_of` needs no space for a copy within the filesystem of ``directory``."""
    with TemporaryFile(dir=directory, buffering=0) as source, TemporaryFile(dir=directory) as target:
        source.write(bytes(4096))
        try:
            fcntl.ioctl(target, _FICLONE, source.fileno())
        except OSError:
            return False
    return True


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; ``os.write`` may write only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_sparse(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` at the file's position, leaving holes for long runs of zeros.

    A hole at the end of the file needs :func:`end_sparse`.
    """
    view = memoryview(data)
    done = 0
    for start in range(0, len(view), _HOLE):
        block = view[start : start + _HOLE]
        if block == _ZEROS[: len(block)]:
            write_all(descriptor, view[done:start])
            os.lseek(descriptor, len(block), os.SEEK_CUR)
            done = start + len(block)
    write_all(descriptor, view[done:])


def end_sparse(descriptor: int) -> None:
    """Extend a file to its position, if it ends in a hole."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    if os.fstat(descriptor).st_size < position:
        os.ftruncate(descriptor, position)


_FICLONE = 0x40049409
