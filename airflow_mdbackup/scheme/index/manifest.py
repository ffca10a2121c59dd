"""The manifest: what the index leaves out. Types, modes, owners, sizes, times and links, in mtree(5) format.

One line per path, sorted by raw path bytes, which is the order of the canonical index::

    #mtree
    ./backups type=dir uid=0 uname=root gid=0 gname=root mode=0755 time=1795402800.000000000
    ./backups/alpha type=file uid=0 uname=root gid=0 gname=root mode=0644 time=1795402800.5 size=12 nlink=1
    ./backups/link type=link uid=0 uname=root gid=0 gname=root mode=0777 time=1795402800.5 link=alpha
    #mdbackup end entries=3

Paths start with ``.``, the chroot. Bytes other than printable ASCII, and those that mean something to a
reader of the format (blank, ``#``, ``=``, backslash, wildcards), are octal escapes as vis(3) writes them with
``VIS_OCTAL``. Hard links are told by ``tags=inode:DEVICE:NUMBER``, since NetBSD's mtree refuses keywords that
it does not know, and libarchive ignores tags.

NetBSD's mtree takes names with ``*``, ``?`` or ``[`` for patterns however they are escaped, as it does in its
own lists.

A manifest that was received is hostile input: :func:`read_manifest` checks every line, in bounded memory.

Sources: mtree(5) of NetBSD 10 and of libarchive, vis(3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import partial
from typing import BinaryIO, NamedTuple

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.index.canonical import MAX_PATH, check_path

START = b"#mtree\n"
END = b"#mdbackup end "
MAX_LINE = 4 * MAX_PATH * 2 + 1024  # bytes: a path and a link's target, all escaped, and the numbers
MAX_NAME = 255  # bytes of the name of a user or group


class Kind(StrEnum):
    """What a path is; the values are mtree's."""

    FILE = "file"
    DIRECTORY = "dir"
    LINK = "link"
    FIFO = "fifo"
    SOCKET = "socket"
    BLOCK_DEVICE = "block"
    CHARACTER_DEVICE = "char"


class Attributes(NamedTuple):
    """What the manifest says about a path.

    :ivar mode: permissions, with setuid, setgid and sticky: 0 to 0o7777.
    :ivar time: modification, nanoseconds since 1970, negative before.
    :ivar user: name of the owner; empty if it has none. ``group`` likewise.
    :ivar size: bytes of a file; 0 for everything else.
    :ivar target: of a symlink; empty for everything else.
    :ivar inode: device and inode of a file with several names; None for everything else.
    """

    kind: Kind
    mode: int
    uid: int
    gid: int
    user: bytes
    group: bytes
    time: int
    size: int = 0
    target: bytes = b""
    inode: tuple[int, int] | None = None


class ManifestEntry(NamedTuple):
    """One path of a manifest, absolute like those of the index."""

    path: bytes
    attributes: Attributes


class MalformedManifest(ValueError):
    """A line breaks the grammar. The message names the manifest and the line."""


# --- one line ---------------------------------------------------------------------------------------

_PLAIN = rb"[!-~]"  # printable ASCII ...
_SPECIAL = b"#=\\*?[]"  # ... but for these
_TO_ESCAPE = re.compile(rb"[^!-~]|[%b]" % re.escape(_SPECIAL))
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_TOKEN = rb"(?:(?![%b])%b|\\[0-3][0-7]{2})" % (re.escape(_SPECIAL), _PLAIN)
_NUMBER = rb"[0-9]{1,10}"
_LINE = re.compile(
    rb"\.((?:/%b*)?) type=(%b) uid=(%b)(?: uname=(%b+))? gid=(%b)(?: gname=(%b+))? mode=([0-7]{4})"
    rb" time=(-?[0-9]{1,12})\.([0-9]{9})(?: size=([0-9]{1,19}))?(?: link=(%b+))?"
    rb"(?: tags=inode:([0-9]{1,20}):([0-9]{1,20}))?\n"
    % (_TOKEN, "|".join(Kind).encode(), _NUMBER, _TOKEN, _NUMBER, _TOKEN, _TOKEN)
)
_SECOND = 10**9  # nanoseconds


def vis(name: bytes) -> bytes:
    """Return ``name`` with every byte that a reader could misunderstand as an octal escape of vis(3)."""
    return _TO_ESCAPE.sub(lambda found: b"\\%03o" % found[0][0], name)


def unvis(token: bytes) -> bytes:
    """Undo :func:`vis`."""
    if b"\\" not in token:
        return token
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), token)


def format_entry(path: bytes, attributes: Attributes) -> bytes:
    """Return the line of a manifest for a path, with its line end."""
    one = attributes
    seconds, nanoseconds = divmod(one.time, _SECOND)
    words = [
        b"." + vis(path).removesuffix(b"/"),
        b"type=%b" % one.kind.value.encode(),
        b"uid=%d" % one.uid,
        *([b"uname=" + vis(one.user)] if one.user else []),
        b"gid=%d" % one.gid,
        *([b"gname=" + vis(one.group)] if one.group else []),
        b"mode=%04o" % one.mode,
        b"time=%d.%09d" % (seconds, nanoseconds),
        *([b"size=%d" % one.size] if one.kind is Kind.FILE else []),
        *([b"link=" + vis(one.target)] if one.kind is Kind.LINK else []),
        *([b"tags=inode:%d:%d" % one.inode] if one.inode is not None else []),
    ]
    return b" ".join(words) + b"\n"


def parse_entry(line: bytes) -> ManifestEntry:
    """Return what a line says.

    :raises ValueError: it is not a line that :func:`format_entry` writes.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"not a line of a manifest: {to_text(line[:200])}")
    name, kind_name, uid, user, gid, group, mode, seconds, nanoseconds, size, target, device, inode = (
        found.groups()
    )
    path = unvis(name) or b"/"
    if path != b"/":
        check_path(path)
    kind = Kind(kind_name.decode())
    if (size is None) is (kind is Kind.FILE):
        raise ValueError(f"a size belongs to files, and to nothing else: {to_text(path)}")
    if (target is None) is (kind is Kind.LINK):
        raise ValueError(f"a target belongs to symlinks, and to nothing else: {to_text(path)}")
    attributes = Attributes(
        kind,
        int(mode, 8),
        int(uid),
        int(gid),
        _name_of(user, path),
        _name_of(group, path),
        int(seconds) * _SECOND + int(nanoseconds),
        int(size or 0),
        _target_of(target, path),
        None if inode is None else (int(device), int(inode)),
    )
    return ManifestEntry(path, attributes)


def _name_of(token: bytes | None, path: bytes) -> bytes:
    name = unvis(token or b"")
    if len(name) > MAX_NAME or b"\0" in name:
        raise ValueError(f"not the name of a user or group, at {to_text(path)}")
    return name


def _target_of(token: bytes | None, path: bytes) -> bytes:
    target = unvis(token or b"")
    if len(target) > MAX_PATH or b"\0" in target:
        raise ValueError(f"not the target of a symlink, at {to_text(path)}")
    return target


# --- a whole manifest -------------------------------------------------------------------------------


def write_manifest(entries: Iterable[ManifestEntry], file: BinaryIO) -> int:
    """Write a manifest, given its entries in path order. Return how many there are."""
    count = 0
    file.write(START)
    for entry in entries:
        file.write(format_entry(*entry))
        count += 1
    file.write(END + b"entries=%d\n" % count)
    return count


def read_manifest(file: BinaryIO, name: str) -> Iterator[ManifestEntry]:
    """Yield the entries of a manifest that was received, in path order.

    :param file: its text, decompressed.
    :param name: what messages call the manifest.
    :raises MalformedManifest: at the first line that breaks the grammar or the order; or it has no end line.
    """
    lines = enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1)
    number, line = next(lines, (1, b""))
    if line != START:
        raise MalformedManifest(f"{name}, line 1: a manifest starts with {to_text(START)}")
    last, count = b"", 0
    for number, line in lines:
        try:
            if line.startswith(END):
                _check_end(line, count)
                break
            entry = parse_entry(line)
            if entry.path <= last:
                raise ValueError(f"{to_text(entry.path)} is out of order, or there twice")
        except ValueError as error:
            raise MalformedManifest(f"{name}, line {number}: {error}") from None
        last, count = entry.path, count + 1
        yield entry
    else:
        raise MalformedManifest(f"{name}, line {number}: it may be truncated: it has no end line")
    if next(lines, None) is not None:
        raise MalformedManifest(f"{name}, line {number + 1}: a line after the end line")


def _check_end(line: bytes, count: int) -> None:
    if line != END + b"entries=%d\n" % count:
        raise ValueError(f"truncated or edited: there are {count} entries, and {to_text(line[:100])}")
