"""A line of the index, escaped as GNU md5sum 9 does."""

import re

FORMAT = 1
MUST_ESCAPE = re.compile(rb"[\\\n\r]").search


def index_line(md5: bytes, path: bytes) -> bytes:
    """Return a line of the index."""
    shown = escaped(path)
    return b"%s%s  %s\n" % (b"" if shown == path else b"\\", md5, shown)


def escaped(path: bytes) -> bytes:
    """Return a path as it is in a line."""
    return path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def first_line(started: int) -> bytes:
    """Return the first line; `started` is Unix seconds."""
    return b"# mdbackup started %d\n" % started


def remark_line(word: bytes, path: bytes) -> bytes:
    """Return the comment on a path that is ``unreadable`` or ``rotten``."""
    return b"# mdbackup %s %s\n" % (word, escaped(path))


def last_line(files: int, unreadable: int, size: int) -> bytes:
    """Return the last line, without which an index is incomplete."""
    return b"# mdbackup end format=%d files=%d unreadable=%d bytes=%d\n" % (FORMAT, files, unreadable, size)
