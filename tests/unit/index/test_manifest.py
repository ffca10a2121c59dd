"""The manifest: its own reader and writer, and what mtree and bsdtar make of it."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.scheme.index.manifest import (
    Attributes,
    Kind,
    MalformedManifest,
    ManifestEntry,
    format_entry,
    parse_entry,
    read_manifest,
    unvis,
    vis,
    write_manifest,
)

ODD = b"\xff\n\r\t \\#=*?[]~\x7f\x1b\xc3\xa4"
FILE = Attributes(Kind.FILE, 0o644, 0, 0, b"root", b"root", 1_795_402_800_000_000_007, size=12)


def manifest(*lines: bytes, end: bytes | None = None) -> io.BytesIO:
    end = b"#mdbackup end entries=%d\n" % len(lines) if end is None else end
    return io.BytesIO(b"#mtree\n" + b"".join(lines) + end)


names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
components = names.filter(lambda name: b"/" not in name and name not in (b".", b".."))
paths = st.lists(components, min_size=1, max_size=4).map(lambda parts: b"/" + b"/".join(parts))


@st.composite
def attributes(draw: st.DrawFn) -> Attributes:
    kind = draw(st.sampled_from(Kind))
    return Attributes(
        kind,
        draw(st.integers(0, 0o7777)),
        *(draw(st.integers(0, 2**32 - 1)) for _ in range(2)),
        *(draw(st.one_of(st.just(b""), names)) for _ in range(2)),
        draw(st.integers(-(2**62), 2**62)),
        draw(st.integers(0, 2**63)) if kind is Kind.FILE else 0,
        draw(names) if kind is Kind.LINK else b"",
        draw(st.one_of(st.none(), st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1)))),
    )


@given(st.dictionaries(paths, attributes(), max_size=5))
def test_what_is_written_is_read_back(tree: dict[bytes, Attributes]) -> None:
    entries = [ManifestEntry(path, tree[path]) for path in sorted(tree)]
    file = io.BytesIO()
    assert write_manifest(entries, file) == len(entries)
    assert all(32 <= byte < 127 or byte == 10 for byte in file.getvalue())
    file.seek(0)
    assert list(read_manifest(file, "it")) == entries


@given(st.binary())
def test_every_byte_survives_its_escape(name: bytes) -> None:
    assert unvis(vis(name)) == name


def test_the_root_is_a_single_dot() -> None:
    line = format_entry(b"/", FILE._replace(kind=Kind.DIRECTORY))
    assert line.startswith(b". type=dir ") and parse_entry(line).path == b"/"


GOOD = format_entry(b"/a", FILE)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\n", "not a line"),
        (GOOD.replace(b"./a", b"/a"), "not a line"),
        (GOOD.replace(b"./a", b"./a/"), "empty component"),
        (GOOD.replace(b"./a", b"./a//b"), "empty component"),
        (GOOD.replace(b"./a", b"./../a"), "'..'"),
        (GOOD.replace(b"./a", b"./\\056\\056/a"), "'..'"),
        (GOOD.replace(b"./a", b"./a\\000"), "NUL"),
        (GOOD.replace(b"./a", b"./a\\777"), "not a line"),
        (GOOD.replace(b"./a", b"./\xff"), "not a line"),
        (GOOD.replace(b"./a", b"./" + b"x" * 256), "over 255 bytes"),
        (GOOD.replace(b"type=file", b"type=door"), "not a line"),
        (GOOD.replace(b"uid=0", b"uid=-1"), "not a line"),
        (GOOD.replace(b"mode=0644", b"mode=00644"), "not a line"),
        (GOOD.replace(b" size=12", b""), "a size belongs to files"),
        (GOOD.replace(b"type=file", b"type=dir"), "a size belongs to files"),
        (GOOD.replace(b"\n", b" link=x\n"), "a target belongs to symlinks"),
        (GOOD.replace(b"uname=root", b"uname=" + b"x" * 256), "not the name of a user"),
        (GOOD.replace(b"uname=root", b"uname=a\\000"), "not the name of a user"),
        (GOOD.replace(b"size=12", b"size=" + b"9" * 20), "not a line"),
        (GOOD.replace(b"\n", b" sha256=0\n"), "not a line"),
    ],
)
def test_a_line_that_breaks_the_grammar_is_refused(line: bytes, why: str) -> None:
    with pytest.raises(MalformedManifest, match=rf"it, line 2: .*{re.escape(why)}"):
        list(read_manifest(manifest(line), "it"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "line 1: a manifest starts with"),
        (b"#mdbackup end entries=0\n", "line 1: a manifest starts with"),
        (b"#mtree\n" + GOOD, "line 2: it may be truncated"),
        (b"#mtree\n" + GOOD + b"#mdbackup end entries=2\n", "line 3: truncated or edited: there are 1"),
        (b"#mtree\n" + GOOD + GOOD + b"#mdbackup end entries=2\n", "line 3: .*there twice"),
        (b"#mtree\n#mdbackup end entries=0\n\n", "line 3: a line after the end line"),
        (b"#mtree\n" + b"x" * 10**6, "line 2: not a line"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(MalformedManifest, match=f"it, {why}"):
        list(read_manifest(io.BytesIO(content), "it"))


# --- the tools of others ----------------------------------------------------------------------------


def seen(path: Path, name: bytes) -> ManifestEntry:
    """Return the entry of a path that is there."""
    there = os.lstat(path)
    kinds = {
        stat.S_IFREG: Kind.FILE,
        stat.S_IFDIR: Kind.DIRECTORY,
        stat.S_IFLNK: Kind.LINK,
        stat.S_IFIFO: Kind.FIFO,
    }
    kind = kinds[stat.S_IFMT(there.st_mode)]
    return ManifestEntry(
        name,
        Attributes(
            kind,
            stat.S_IMODE(there.st_mode),
            *(there.st_uid, there.st_gid, b"root", b"root", there.st_mtime_ns),
            there.st_size if kind is Kind.FILE else 0,
            os.fsencode(os.readlink(path)) if kind is Kind.LINK else b"",
            (there.st_dev, there.st_ino) if kind is Kind.FILE and there.st_nlink > 1 else None,
        ),
    )


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    """A tree of odd things, and its manifest."""
    root = tmp_path / "tree"
    (root / "empty").mkdir(parents=True)
    for byte in ODD:
        (root / os.fsdecode(b"odd-%c" % byte)).write_bytes(b"x")
    (root / "second").hardlink_to(root / "odd-~")
    (root / "link").symlink_to(os.fsdecode(b"no where" + ODD.replace(b"/", b"")))
    os.mkfifo(root / "fifo")
    for name, when in (("odd-*", -(2 * 10**9)), ("odd-?", 1), ("odd-[", 7_000_000_000 * 10**9 + 123_456_789)):
        os.utime(root / name, ns=(when, when))
    (root / "odd-#").chmod(0o4751)
    entries = sorted(seen(path, b"/" + os.fsencode(path.relative_to(root))) for path in root.rglob("*"))
    file = tmp_path / "manifest"
    with file.open("wb") as output:
        write_manifest([seen(root, b"/"), *entries], output)
    return root, file


def test_mtree_of_netbsd_finds_the_tree_as_the_manifest_says(tree: tuple[Path, Path]) -> None:
    """Except for names with wildcards, which it takes for patterns, as it does in its own lists."""
    root, file = tree
    for name in ("odd-*", "odd-?", "odd-["):
        (root / name).unlink()
    os.utime(root, ns=(0, 0))
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = re.sub(rb"time=[0-9.]+", b"time=0.000000000", lines[1])
    file.write_bytes(b"".join(line for line in lines if not re.match(rb"\./odd-\\(052|077|133) ", line)))
    mtree = shutil.which("mtree")
    assert mtree, "install mtree-netbsd"
    same = subprocess.run([mtree, "-p", root, "-f", file], capture_output=True, check=False)
    assert (same.returncode, same.stdout, same.stderr) == (0, b"", b"")
    (root / "odd-~").chmod(0o600)
    other = subprocess.run([mtree, "-p", root, "-f", file], capture_output=True, check=False)
    assert other.returncode == 2 and b"odd-~" in other.stdout


def test_bsdtar_reads_the_manifest(tree: tuple[Path, Path]) -> None:
    _, file = tree
    bsdtar = shutil.which("bsdtar")
    assert bsdtar, "install libarchive-tools"
    again = subprocess.run(
        [bsdtar, "-cf", "-", "--format=mtree", "--options=!all,type,mode,uid,gid,time,size,link", f"@{file}"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert not again.stderr

    def facts(text: bytes) -> dict[bytes, set[bytes]]:
        lines = [line.split() for line in text.splitlines() if line.startswith(b".")]
        return {
            unvis(words[0]): {
                word for word in words[1:] if word.startswith((b"type", b"uid", b"gid", b"size"))
            }
            for words in lines
        }

    assert facts(again.stdout) == facts(file.read_bytes())
