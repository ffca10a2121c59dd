"""TODO"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from tempfile import TemporaryFile

_BLOCK = 1 << 20
_HOLE = 1 << 16  # bytes; of zeros, a hole in what is written
_ZEROS = bytes(_HOLE)


# --- bytes ------------------------------------------------------------------------------------------


def md5_of(descriptor: int, into: int | None = None, progress: Callable[[int], None] | None = None) -> bytes:
    """Return the md5 of what a file has on its disk, from where ``descriptor`` stands to its end.

    What was written a moment ago is not there yet; see :func:`forget_cached`.

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
    """Have an open file read from its disk, and not from memory.

    If a disk refuses to take what was written, the kernel says so once, to those who are there to hear it.
    From then on memory has bytes that pass for the disk's. Bytes that are still to be written stay in memory,
    and an error in doing so is told to the next ``sync``. posix_fadvise(2).
    """
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def copy_of(source: int, target: int) -> bytes:
    """Make one open file a copy of another, whatever it was, and return the md5 of what was copied.

    Blocks are shared where the filesystem can.
    """
    # Cloning replaces only as much as there is to be cloned. What is empty is left so, since ext4 brings a
    # file that was truncated onto the disk as soon as it is closed.
    if os.fstat(target).st_size:
        os.ftruncate(target, 0)
    os.lseek(target, 0, os.SEEK_SET)
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return md5_of(source, into=target)
    return md5_of(source)


def shares_blocks(directory: os.PathLike[str]) -> bool:
    """Whether :func:`copy_of` takes no room for content within the filesystem of ``directory``."""
    with TemporaryFile(dir=directory, buffering=0) as source, TemporaryFile(dir=directory) as target:
        source.write(bytes(4096))
        try:
            fcntl.ioctl(target, _FICLONE, source.fileno())
        except OSError:
            return False
    return True


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``, which ``os.write`` need not do in one go."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_sparse(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` where the file stands, leaving a hole where it is nothing but zeros.

    At the end of the file holes are made by :func:`end_sparse`.
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
    """Have a file end where it stands, if it ends in a hole."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    if os.fstat(descriptor).st_size < position:
        os.ftruncate(descriptor, position)


# --- what os lacks ----------------------------------------------------------------------------------

_FICLONE = 0x40049409
