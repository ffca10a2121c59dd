"""Mount points and bind mounts below the chroot, in a mount namespace that ends with each test."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side.report import Done, Note
from airflow_mdbackup.provider_side.request import IndexRequest
from tests.unit.provider_side.indexing import (
    FOLDER,
    INDEX,
    Run,
    finish,
    indexer,
    md5,
    read_index,
    spawn,
    wanted,
    write,
)

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


def test_one_file_system_skips_mounts_and_says_so(chroot):
    """A source may itself be a mount point; what is bound from the same filesystem is on it."""
    write(chroot + b"/data/x")
    for name in (b"bound", b"memory"):
        os.mkdir(chroot + b"/backups/" + name)
    mounts = "mount --bind data backups/bound; mount -t tmpfs none backups/memory; echo >backups/memory/y"
    run = build_with(chroot, mounts, "--source", "/backups", "--one-file-system")
    assert [type(report) for report in run.report] == [Note, Done]
    assert run.report[0].text == "/backups/memory is on another filesystem, skipped"
    assert list(read_index(chroot)[0]) == [b"/backups/bound/x"]
    run = build_with(chroot, mounts, "--source", "/backups/memory", "--one-file-system")
    assert list(read_index(chroot)[0]) == [b"/backups/memory/y"]


@pytest.mark.parametrize("indexer_program", ["python", "dash", "busybox"], indirect=True)
def test_one_file_system_keeps_to_each_source_that_is_asked_for(chroot, indexer_program):
    """Also to one that lies in another one, on what is mounted there: at its root, or deeper in it."""
    write(chroot + b"/backups/file")
    for name in (b"here", b"there"):
        os.mkdir(chroot + b"/backups/" + name)
    mounts = " ".join(
        f"mount -t tmpfs none backups/{name}; cd backups/{name}; mkdir -p deep/er/most;"
        " touch y deep/x deep/erg deep/er/most/z; echo content >'deep/er/a\\b'; cd ../..;"
        for name in ("here", "there")
    )
    enter = ("unshare", "-m", "sh", "-ec", f'cd "$0"; {mounts} exec "$@"', os.fsdecode(chroot))
    sources = (b"/backups", b"/backups/here", b"/backups/there/deep/er", b"/backups/there/deep/er/most")
    run = indexer_program.run(IndexRequest(chroot, sources, INDEX, one_file_system=True), enter)
    assert run.status == 0, run.lines
    assert set(read_index(chroot)[0]) == {
        b"/backups/file",
        b"/backups/here/y",
        b"/backups/here/deep/x",
        b"/backups/here/deep/erg",
        b"/backups/here/deep/er/a\\b",
        b"/backups/here/deep/er/most/z",
        b"/backups/there/deep/er/a\\b",
        b"/backups/there/deep/er/most/z",
    }
    assert (run.report[-1].files, run.report[-1].bytes) == (8, 7 + 8 + 8)


def test_file_of_a_lower_layer_is_known_to_be_stamped_by_this_clock(chroot, python_program, tmp_path):
    """Its device is not that of the mount, as on a subvolume of btrfs; and it is hashed once all the same."""
    write(os.fsencode(tmp_path) + b"/lower/file")
    os.utime(tmp_path / "lower" / "file", (1, 1))
    mounts = (
        "mkdir up; mount -t tmpfs none up; mkdir up/u up/w;"
        ' mount -t overlay -o "lowerdir=$PWD/../lower,upperdir=$PWD/up/u,workdir=$PWD/up/w" none backups'
    )
    later = ["unshare", "-m", "sh", "-ec", f'cd "$0"; {mounts}; exec "$@"', os.fsdecode(chroot)]
    time.sleep(2.1)
    first = python_program.run(wanted(chroot), tuple(later))
    assert (first.status, first.report[-1].hashed) == (0, 1)
    data = (Path(os.fsdecode(chroot + FOLDER)) / ".index.md5.cache").read_bytes()
    record = data[: data.index(b"/backups/file\0") + len(b"/backups/file\0") + 1]
    assert record[-1] != indexer.RACY


def test_directory_that_is_mounted_below_itself_is_walked_once(chroot):
    """The walk ends, and each file is there under its shortest path."""
    write(chroot + b"/backups/file")
    os.makedirs(chroot + b"/backups/a/loop")
    run = build_with(chroot, "mount --bind backups backups/a/loop", "--source", "/backups")
    assert run.report[0] == Note("/backups/a/loop is mounted below itself, skipped")
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


def test_cache_survives_a_filesystem_that_is_mounted_again(chroot):
    """Its device number may be another one by then; then its files are hashed once more."""
    os.mkdir(chroot + b"/backups/memory")
    mounts = "mount -t tmpfs none backups/memory; echo {} >backups/memory/y"
    for content in ("1", "2"):
        assert build_with(chroot, mounts.format(content), "--source", "/backups").status == 0
        assert read_index(chroot)[0] == {b"/backups/memory/y": md5(content.encode() + b"\n")}
