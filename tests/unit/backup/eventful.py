"""A run with every kind of change, and what B must have at its end."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from airflow_mdbackup.scheme.history.changes import ChangeKind, last
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.pair import Pair, md5


def files_of(mirror: Mirror) -> dict[str, tuple[int, bytes]]:
    """Return inode and content of all live files and versions, by path."""
    return {
        str(path.relative_to(mirror.files)): (path.stat().st_ino, path.read_bytes())
        for path in mirror.files.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def eventful(pair: Pair) -> None:
    """Bring about each kind of change between a first backup, which this does, and A as it is then."""
    pair.put("same", b"same")
    pair.put("changed", b"changed, old")
    pair.put("changed too", b"changed too, old")
    pair.put("gone", b"gone")
    pair.put("returns", b"returns")
    pair.put("moves", b"moves")
    pair.put("file", b"file")
    pair.put("folder/below", b"below")
    pair.put("edited on B", b"edited, old")
    pair.backup()
    pair.put("folder/below", b"below, changed")
    os.rename(pair.path("returns"), pair.a.parent / "aside")
    pair.backup()
    pair.put("changed", b"changed, new")
    pair.put("changed too", b"twins")
    pair.put("twin", b"twins")
    pair.put("new/deep", b"new")
    pair.put("edited on B", b"edited, new")
    pair.live("edited on B").write_bytes(b"edited on B")
    os.unlink(pair.path("gone"))
    os.rename(pair.a.parent / "aside", pair.path("returns"))
    os.rename(pair.path("moves"), pair.path("moved"))
    os.unlink(pair.path("file"))
    pair.put("file/below", b"now below")
    os.unlink(pair.path("folder/below"))
    os.rmdir(pair.path("folder"))
    pair.put("folder", b"now a file")
    pair.build_index()


# What must be somewhere among the versions in the end, and how often.
DISPLACED = sorted([
    *(b"changed, old", b"changed too, old", b"edited on B", b"file", b"below", b"below, changed"),
])  # fmt: skip


def check_end(pair: Pair, *, exactly: bool = True) -> None:
    """Make sure that B is as A wants it, nothing is lost, and history tells how it came to be.

    :param exactly: whether each displaced content is there just once.
    """
    mirror = pair.mirror
    assert dict(read_entries(mirror.index)) == pair.index_a()
    for path, digest in pair.index_a().items():
        live = Path(os.fsdecode(os.fsencode(mirror.files) + path))
        assert md5(live.read_bytes()) == digest
    files = files_of(mirror)
    versions = sorted(content for path, (_, content) in files.items() if "/.old/" in path)
    assert (versions if exactly else sorted(set(versions))) == DISPLACED
    live = [inode for path, (inode, _) in files.items() if "/.old/" not in path]
    assert len(set(live)) == len(live)
    state: dict[bytes, bytes] = {}
    told: dict[bytes, bytes | None] = {}  # versions, by where they lie after all moves
    for changes in pair.history():
        for change in changes:
            if change.what == ChangeKind.MOVED:
                assert change.version is not None
                assert os.path.lexists(os.fsencode(mirror.files) + change.version)
                below = change.path + b"/"
                told = {v.replace(below, change.version + b"/", 1): m for v, m in told.items()}
                continue
            if change.version is not None:
                told[change.version] = change.old_md5
            state.pop(change.path, None)
            if change.md5:
                state[change.path] = change.md5
    assert state == pair.index_a()
    for version, digest in told.items():
        assert md5(Path(os.fsdecode(os.fsencode(mirror.files) + version)).read_bytes()) == digest
    assert last(mirror)["after"] == hashlib.sha256(mirror.index.read_bytes()).hexdigest()
    assert sorted(mirror.staging.iterdir()) == []
    assert not [path for path in mirror.history.iterdir() if path.suffix != ".jsonl"]


OUTCOMES = {"pulled": 6, "copied": 2, "adopted": 1}
