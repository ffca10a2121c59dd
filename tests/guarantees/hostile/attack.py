"""Names and indexes of a provider that attacks, and how to see what came of them."""

from __future__ import annotations

import os
from pathlib import Path

from airflow_mdbackup.scheme.index.canonical import format_line
from tests.pair import Pair

MD5 = b"d41d8cd98f00b204e9800998ecf8427e"
MIB = 1 << 20

# Names that are legal, and mean something to some program that a name may pass on its way.
NAMES = [
    *(
        b"..%2f..%2fetc%2fpasswd",
        b"%2e%2e",
        b"..\\..\\etc",
        b"\\..\\",
        b"\\n",
        b"...",
        b".. ",
        b"..\n",
        b"\n..",
    ),
    *(b"-rf", b"--", b"-", b"~", b"~root", b" ", b"*", b"$(id)", b"`id`", b"${HOME}", b"a;b", b"a|b", b"'\""),
    *(b"{{ 7*78901 }}", b"{% raw %}", b"{{ conn.password }}", b"{# x #}", b"%(x)s", b"%s%n", b"{0}"),
    *(b"<script>alert(1)<", b"<img src=x onerror=alert(1)>", b"&amp;", b"[x](javascript:alert(1))", b"|"),
    *(b"\x1b[31mred\x1b[0m", b"\x1b]0;title\x07", b"\x1b]8;;http:x\x1b\\y", b"\x9b31m", "\u009b31m".encode()),
    *("\u202eexe.txt".encode(), "\u2066a\u2069".encode(), "\u200b".encode(), "\u2028".encode(), b"\x7f\x08"),
    *(b"a\nb", b"a\rb", b"a\r\nb", b"\xff\xfe", b"\xed\xb2\x80", "\u00e9".encode(), "e\u0301".encode()),
    *(b"Name", b"name", b"NAME", "stra\u00dfe".encode(), b"strasse", b"STRASSE", b"x" * 255),
    *(b"index.md5", b".mdbackup", b"lost+found", b"files", b"provider-id", b".old2", b"old", b"con", b"aux."),
    *(b"x::endgroup::y", b"::group::x", b"::group:", b"::endgroup:"),
    *(b"a.20261123T031500.123456Z", MD5, MD5 + b".part", b"# mdbackup end format=1 files=0 unreadable=0"),
]

# What no path of an index may be.
TRAVERSALS = [
    *(
        b"/..",
        b"/../x",
        b"/a/..",
        b"/a/../../x",
        b"/a/../../../../../../../etc/passwd",
        b"/.",
        b"/./x",
        b"/a/.",
    ),
    *(b"//x", b"//etc/passwd", b"/a//x", b"/a//../x", b"/a/", b"/a//", b"/", b"//", b"///", b"/a/./../x"),
    *(
        b"..",
        b"../x",
        b"x",
        b"./../x",
        b".//x",
        b"././x",
        b"./",
        b".",
        b"~/x",
        b"C:\\x",
        b"\\\\host\\x",
        b"a/../x",
    ),
    *(b"/a\0/../x", b"/a\0", b"/" + b"x" * 256, b"/x" * 2049, b"/..\r"),
]


def is_harmless(text: str) -> bool:
    """Tell that a text acts on no terminal, and that Airflow's page of a log folds nothing by it."""
    folds = "::group::" in text or "::endgroup::" in text
    return not folds and all(character.isprintable() for character in text)


def index_file(pair: Pair) -> Path:
    return Path(os.fsdecode(pair.index))


def write_index(pair: Pair, entries: dict[bytes, bytes], remarks: bytes = b"") -> None:
    """Write A's index by hand, of whatever paths, the way A's indexer would."""
    lines = b"".join(format_line(path, md5) for path, md5 in sorted(entries.items())) + remarks
    end = b"# mdbackup end format=1 files=%d unreadable=%d\n"
    index_file(pair).write_bytes(lines + end % (len(entries), remarks.count(b"# mdbackup unreadable ")))


def snapshot(root: Path, but: Path) -> dict[Path, tuple[object, ...]]:
    """Return what is known of everything below ``root``, but for what is below ``but``."""
    found: dict[Path, tuple[object, ...]] = {}
    for folder, directories, names in os.walk(root):
        directories[:] = [name for name in directories if Path(folder, name) != but]
        for path in (Path(folder, name) for name in directories + names):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[path] = status.st_mode, status.st_ino, status.st_nlink, status.st_mtime_ns, content
    return found


def everything_in(folder: Path) -> bytes:
    """Return all names and contents below a directory in one."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return b"\n".join(os.fsencode(p) + (p.read_bytes() if p.is_file() else b"") for p in paths)
