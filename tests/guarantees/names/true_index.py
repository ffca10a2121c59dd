"""What the mirror has under a name."""

from __future__ import annotations

import os

from airflow_mdbackup.scheme.files.content import md5_of
from tests.guarantees.disks.filesystems import MB
from tests.pair import Pair


def unlink(pair: Pair, name: str) -> None:
    os.unlink(pair.path(name))


def content_at(pair: Pair, path: bytes) -> bytes:
    """Return the bytes of a file in the mirror, as the scheme itself reaches it."""
    with pair.mirror.tree() as tree, tree.opened(path) as descriptor:
        return os.read(descriptor, MB)


def check_true(pair: Pair) -> None:
    """Make sure that the index claims what is there, under whatever spelling."""
    for path, md5 in pair.index_b().items():
        with pair.mirror.tree() as tree, tree.opened(path) as descriptor:
            assert md5_of(descriptor) == md5, f"the index claims {path!r}, which the disk lacks"
