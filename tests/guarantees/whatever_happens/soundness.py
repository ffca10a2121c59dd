"""What must hold for a backup at any moment, and whatever has happened to it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from airflow_mdbackup.scheme.history.changes import ChangeKind, pending
from tests.pair import Pair


class File(NamedTuple):
    """A file below ``files``."""

    inode: int
    content: bytes


def digest(content: bytes) -> bytes:
    return hashlib.md5(content).hexdigest().encode()


def below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory + b"/")


def files_of(pair: Pair) -> dict[bytes, File]:
    """Return all live files and versions, by path."""
    root = pair.mirror.files
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {os.fsencode(p)[len(os.fsencode(root)) :]: File(p.stat().st_ino, p.read_bytes()) for p in paths}


def contents_of(pair: Pair) -> set[bytes]:
    """Return the contents of all live files and versions."""
    return {file.content for file in files_of(pair).values()}


def check_sound(pair: Pair, by_hand: Collection[bytes] = (), *, edited: bool = False) -> None:
    """Make sure that the index claims what the disk holds, and that history leads to it.

    :param by_hand: live files that somebody deleted or edited on B, of which the index need not be true.
    :param edited: whether somebody edited the index, which only the next commit tells of.
    """
    mirror = pair.mirror
    if not mirror.history.exists():
        return
    files = files_of(pair)
    live = {path: file for path, file in files.items() if b"/.old/" not in path}
    inodes = Counter(file.inode for file in live.values())
    assert set(inodes.values()) <= {1}, "live files share an inode"
    index = pair.index_b() if mirror.index.exists() else {}
    for path, known in index.items():
        if path not in live or digest(live[path].content) != known:
            assert path in by_hand, f"the index claims {path!r}, which the disk lacks"
    if not any(pending(mirror)):
        state, versions = replayed(pair)
        assert edited or state == index, "history does not lead to the index"
        for version, known in versions.items():
            assert version in files, f"{version!r} is missing, of which history tells"
            assert digest(files[version].content) == known, f"{version!r} is not what history tells"
            assert files[version].inode not in inodes, f"{version!r} is a live file"


def replayed(pair: Pair) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Return what history makes of an empty index, and the versions of which it tells."""
    state: dict[bytes, bytes] = {}
    versions: dict[bytes, bytes] = {}
    for commit in pair.history():
        for change in commit:
            if change.what == ChangeKind.MOVED:
                there, size = change.version or b"", len(change.path)
                state = {path: md5 for path, md5 in state.items() if not below(path, change.path)}
                versions = {
                    there + path[size:] if below(path, change.path) else path: md5
                    for path, md5 in versions.items()
                }
            elif change.what == ChangeKind.PRUNED:
                versions.pop(change.version or b"", None)
            elif change.what == ChangeKind.IMPORTED:
                versions[change.version or b""] = change.old_md5 or b""
            elif change.md5 is None:
                state.pop(change.path, None)
            else:
                state[change.path] = change.md5
                if change.what == ChangeKind.REPLACED:
                    versions[change.version or b""] = change.old_md5 or b""
    return state, versions
