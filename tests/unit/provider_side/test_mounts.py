"""Mount points and bind mounts below the chroot, in a mount namespace that ends with each test."""

from __future__ import annotations

import os
import sys

import pytest

from airflow_mdbackup.provider_side import Done, Note, indexer
from tests.unit.provider_side.indexing import Run, finish, md5, read_index, spawn, write

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def build_with(chroot: bytes, mounts: str, *arguments: str) -> Run:
    """Mount, with the chroot as current directory, build, and have all mounts vanish."""
    command = f'cd "$1" && shift && {{ {mounts}; }} && exec "$@"'
    indexing = [sys.executable, indexer.__file__, "--chroot", os.fsdecode(chroot), *arguments]
    return finish(spawn(["unshare", "-m", "sh", "-ec", command, "sh", os.fsdecode(chroot), *indexing]))


def test_what_is_mounted_or_bound_below_a_source_is_indexed(chroot):
    """As the backup account sees it: directories bound read-only are how a chroot gets its content."""
    write(chroot + b"/data/x")
    write(chroot + b"/backups/file")
    for name in (b"bound", b"memory"):
        os.mkdir(chroot + b"/backups/" + name)
    mounts = "mount --bind data backups/bound; mount -o remount,bind,ro backups/bound;"
    mounts += "mount -t tmpfs none backups/memory; echo content >backups/memory/y"
    run = build_with(chroot, mounts, "--source", "/backups")
    assert run.status == 0
    assert read_index(chroot)[0] == {
        b"/backups/bound/x": md5(b"content"),
        b"/backups/file": md5(b"content"),
        b"/backups/memory/y": md5(b"content\n"),
    }


def test_one_file_system_leaves_out_what_is_mounted_and_says_so(chroot):
    """A source may itself be a mount point; what is bound from the same filesystem is on it."""
    write(chroot + b"/data/x")
    for name in (b"bound", b"memory"):
        os.mkdir(chroot + b"/backups/" + name)
    mounts = "mount --bind data backups/bound; mount -t tmpfs none backups/memory; echo >backups/memory/y"
    run = build_with(chroot, mounts, "--source", "/backups", "--one-file-system")
    assert [type(report) for report in run.report] == [Note, Done]
    assert run.report[0].text == "/backups/memory is on another filesystem, and is left out"
    assert list(read_index(chroot)[0]) == [b"/backups/bound/x"]
    run = build_with(chroot, mounts, "--source", "/backups/memory", "--one-file-system")
    assert list(read_index(chroot)[0]) == [b"/backups/memory/y"]


def test_directory_that_is_mounted_below_itself_is_walked_once(chroot):
    """The walk ends, and each file is there under its shortest path."""
    write(chroot + b"/backups/file")
    os.makedirs(chroot + b"/backups/a/loop")
    run = build_with(chroot, "mount --bind backups backups/a/loop", "--source", "/backups")
    assert run.report[0] == Note(
        "/backups/a/loop is a directory above it once more, by a mount, and is left out"
    )
    assert (run.status, list(read_index(chroot)[0])) == (0, [b"/backups/file"])


def test_file_that_is_seen_by_two_mounts_has_both_paths(chroot):
    """It is two files to the backup account. So are hard links; and a file may be bound by itself."""
    write(chroot + b"/backups/a/file")
    os.mkdir(chroot + b"/backups/b")
    os.link(chroot + b"/backups/a/file", chroot + b"/backups/a/link")
    write(chroot + b"/backups/c", b"")
    mounts = "mount --bind backups/a backups/b; mount --bind backups/a/file backups/c"
    for _ in range(2):
        run = build_with(chroot, mounts, "--source", "/backups")
        assert run.status == 0
        assert set(read_index(chroot)[0].values()) == {md5(b"content")}
        paths = [
            b"/backups/a/file",
            b"/backups/a/link",
            b"/backups/b/file",
            b"/backups/b/link",
            b"/backups/c",
        ]
        assert list(read_index(chroot)[0]) == paths


def test_cache_survives_a_filesystem_that_is_mounted_anew(chroot):
    """Its device number may be another one by then; then its files are hashed once more."""
    os.mkdir(chroot + b"/backups/memory")
    mounts = "mount -t tmpfs none backups/memory; echo {} >backups/memory/y"
    for content in ("1", "2"):
        assert build_with(chroot, mounts.format(content), "--source", "/backups").status == 0
        assert read_index(chroot)[0] == {b"/backups/memory/y": md5(content.encode() + b"\n")}
