"""What both indexers promise, run for real over trees with awkward names, as SSH would run them.

The Python program, and the shell program in dash with GNU tools and in busybox with nothing but busybox.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side.report import Done, Failed, Progress, Ready, Unreadable, parse_report
from airflow_mdbackup.provider_side.request import IndexRequest
from tests.unit.provider_side.indexing import (
    INDEX,
    beside_index,
    make_large,
    md5,
    read_index,
    read_until,
    wait_for_temporary,
    wanted,
    without_root_power,
    write,
)

AWKWARD = [
    b"plain",
    b"new\nline",
    b"ends in newline\n",
    b"\r",
    b"c\rr",
    b"back\\slash",
    b"\\n",
    b"\\\n\\",
    b"tab\t",
    b"\xff\xfe\x81\x88 no utf-8",
    "ä".encode(),
    b"n" * 255,
    b"-dash",
    b"-",
    b" blank ",
    b"$(touch pwned)`touch pwned`;touch pwned&'\"*?[a]~#!",
    b"..hidden",
    *(b"control-%c-" % code for code in range(1, 32)),
]


def test_index_of_awkward_names_is_verified_by_md5sum_and_read_by_the_consumer(chroot, indexer_program):
    """Every name that Linux can hold arrives whole, at the top and in directories of awkward names."""
    expected = {}
    for folder in (b"", b"in a/-directory", b"of\nawkward\\names\r"):
        for name in AWKWARD:
            path = os.path.join(b"/backups", folder, name)
            write(chroot + path, folder + name)
            expected[path] = md5(folder + name)
    run = indexer_program.run(wanted(chroot))
    size = sum(
        len(folder + name)
        for folder in (b"", b"in a/-directory", b"of\nawkward\\names\r")
        for name in AWKWARD
    )
    assert run.status == 0
    assert [(d.files, d.bytes, d.hashed, d.unreadable) for d in run.report] == [
        (len(expected), size, len(expected), 0)
    ]
    assert read_index(chroot) == (expected, [])

    text = Path(os.fsdecode(chroot + INDEX)).read_bytes()
    relative = re.sub(rb"(?m)^(\\?[0-9a-f]{32}  )/", rb"\1", text)
    checked = subprocess.run(
        ["md5sum", "-c", "--strict", "--quiet"], input=relative, cwd=chroot, capture_output=True
    )
    assert (checked.returncode, checked.stdout) == (0, b"")
    assert text.endswith(b"# mdbackup end format=1 files=%d unreadable=0 bytes=%d\n" % (len(expected), size))
    assert re.match(rb"# mdbackup started [0-9]+\n", text)
    plain = [line[34:] for line in text.splitlines() if line[:1] not in (b"#", b"\\")]
    assert plain == sorted(plain)
    assert b"pwned" not in b"".join(os.listdir(b"/") + os.listdir(chroot))


def test_only_regular_files_are_indexed_and_no_symlink_is_followed(chroot, indexer_program):
    """Symlinks to files and directories, fifos and the like are skipped silently."""
    write(chroot + b"/backups/file")
    write(chroot + b"/elsewhere/secret")
    os.symlink(chroot + b"/elsewhere", chroot + b"/backups/directory link")
    os.symlink(chroot + b"/elsewhere/secret", chroot + b"/backups/file link")
    os.symlink(b"nowhere", chroot + b"/backups/dangling")
    os.mkfifo(chroot + b"/backups/fifo")
    assert indexer_program.run(wanted(chroot)).status == 0
    assert read_index(chroot) == ({b"/backups/file": md5(b"content")}, [])


def test_index_and_its_temporary_files_are_never_indexed(chroot, indexer_program):
    """If the source is the whole chroot, only the indexer's own files are skipped, also of killed builds."""
    write(chroot + INDEX)
    write(chroot + b"/.mdbackup/.index.md5.123.456.tmp")
    write(chroot + b"/.mdbackup/.index.md5.123.457.tmp/names")
    others = [
        b".index.md5.tmp",
        b".index.md5.x.1.tmp",
        b"index.md5.old",
        b".index.md5.1.2.tmp.tmp",
        b"xindex.md5",
    ]
    for name in others:
        write(chroot + b"/.mdbackup/" + name)
    write(chroot + b"/index.md5")
    assert indexer_program.run(wanted(chroot, b"/")).status == 0
    expected = [b"/.mdbackup/" + name for name in others] + [b"/index.md5"]
    assert sorted(read_index(chroot)[0]) == sorted(expected)


def test_source_that_is_missing_or_a_symlink_is_unreadable(chroot, indexer_program):
    """A configured source that cannot be walked is reported; it never looks like an empty directory."""
    write(chroot + b"/elsewhere/file")
    write(chroot + b"/backups/file")
    os.symlink(b"elsewhere", chroot + b"/link")
    missing = b"/missing '$(touch pwned)\\\n\xff"
    run = indexer_program.run(
        wanted(chroot, b"/backups", missing, b"/link", b"/link/file", b"/backups/file/x")
    )
    assert run.status == 3
    reasons = {thing.path: thing.reason for thing in run.report[:-1]}
    assert reasons == {
        missing: "does not exist",
        b"/link": "is a symlink",
        b"/link/file": "lies below a symlink",
        b"/backups/file/x": "does not exist",
    }
    assert run.report[-1].unreadable == 4
    assert read_index(chroot) == ({b"/backups/file": md5(b"content")}, sorted(reasons))


def test_unreadable_file_and_directory_are_named_and_the_rest_is_indexed(chroot, indexer_program):
    """File modes that bind the indexer cost their own entry only."""
    for name in (b"file\n", b"directory/inside", b"readable"):
        write(chroot + b"/backups/" + name)
    os.chmod(chroot + b"/backups/file\n", 0)
    os.chmod(chroot + b"/backups/directory", 0)
    run = indexer_program.run(wanted(chroot), without_root_power())
    os.chmod(chroot + b"/backups/directory", 0o700)
    assert run.status == 3
    reason = "Permission denied" if indexer_program.name == "python" else "cannot be opened"
    assert set(run.report[:-1]) == {
        Unreadable(b"/backups/file\n", reason),
        Unreadable(b"/backups/directory", reason),
    }
    assert read_index(chroot) == (
        {b"/backups/readable": md5(b"content")},
        [b"/backups/directory", b"/backups/file\n"],
    )


def test_log_names_twenty_unreadable_things_and_the_index_names_all(chroot, indexer_program):
    """A whole unreadable tree does not flood the task's log."""
    for number in range(25):
        write(chroot + b"/backups/%d" % number)
        os.chmod(chroot + b"/backups/%d" % number, 0)
    run = indexer_program.run(wanted(chroot), without_root_power())
    assert [type(thing) for thing in run.report] == [Unreadable] * 20 + [Done]
    assert run.report[-1].unreadable == 25
    assert len(read_index(chroot)[1]) == 25


def test_path_too_long_for_an_index_makes_its_directory_unreadable(chroot, indexer_program):
    """The strict reader would refuse such a path, so a directory that it can name stands for it."""
    write(chroot + b"/backups/file")
    directory = os.open(chroot + b"/backups", os.O_RDONLY)
    for _ in range(21):
        os.mkdir(b"d" * 200, dir_fd=directory)
        below = os.open(b"d" * 200, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    # With / as chroot, the limit of the system, which counts the chroot in, is not met first.
    run = indexer_program.run(IndexRequest(b"/", (chroot + b"/backups",), chroot + INDEX))
    assert run.status == 3
    entries, unreadable = read_index(chroot)
    assert list(entries) == [chroot + b"/backups/file"]
    assert unreadable
    # The find of busybox cannot name anything so deep, and then the whole source counts as unreadable.
    below = b"/backups" if indexer_program.name == "busybox" else b"/backups/ddd"
    assert all(path.startswith(chroot + below) for path in unreadable)


def test_overlapping_sources_give_each_file_once(chroot, indexer_program):
    """A source in another, and the same one twice, count once; /backups-2 is not in /backups."""
    for path in (b"/backups/a/file", b"/backups/a\\b", b"/backups-2/file"):
        write(chroot + path)
    source = (b"/backups/a", b"/backups", b"/backups", b"/backups/a\\b", b"/backups-2")
    run = indexer_program.run(wanted(chroot, *source))
    assert run.report[-1].files == 3
    assert run.report[-1].bytes == 21
    assert sorted(read_index(chroot)[0]) == [b"/backups-2/file", b"/backups/a/file", b"/backups/a\\b"]


def test_source_may_be_a_single_file(chroot, indexer_program):
    """One file, here with a name that sorts between those below a directory, is a source like any other."""
    for path in (b"/a/x", b"/a.b/x", b"/a.c"):
        write(chroot + path)
    assert indexer_program.run(wanted(chroot, b"/a", b"/a.b", b"/a.c")).status == 0
    assert list(read_index(chroot)[0]) == [b"/a.b/x", b"/a.c", b"/a/x"]


def test_empty_tree_gives_a_valid_index(chroot, indexer_program):
    """No files are not a failure here; the consumer's guard judges that."""
    run = indexer_program.run(wanted(chroot))
    assert (run.status, run.report[-1].files, run.report[-1].bytes) == (0, 0, 0)
    assert read_index(chroot) == ({}, [])


def test_index_can_be_read_by_the_backup_account_whatever_the_umask(chroot, indexer_program):
    """The index is 0644 and its new directory 0755, also for an index account with a umask of 077."""
    indexer_program.run(wanted(chroot), umask=0o077)
    assert os.stat(chroot + INDEX).st_mode & 0o7777 == 0o644
    assert os.stat(os.path.dirname(chroot + INDEX)).st_mode & 0o7777 == 0o755
    assert beside_index(chroot) == [b"index.md5"]


@pytest.mark.parametrize(
    "path", [b"/backups/../etc", b"/./backups", b"//backups", b"/backups/", b"/backups/.."]
)
def test_path_with_an_odd_component_is_an_error(chroot, indexer_program, path):
    """Neither a source nor the index may have one, since nothing may lead out of the chroot."""
    for request in (IndexRequest(chroot, (path,), INDEX), IndexRequest(chroot, (b"/backups",), path)):
        run = indexer_program.run(request)
        assert run.status == 1
        assert len(run.report) == 1
        assert path.decode() in run.report[0].message
        assert os.listdir(chroot) == [b"backups"]


def test_missing_chroot_and_symlinked_index_directory_are_errors(chroot, indexer_program):
    """An index that the backup account could not find is not written at all."""
    run = indexer_program.run(wanted(chroot + b"/not mounted\n"))
    assert (run.status, type(run.report[0])) == (1, Failed)
    assert "not mounted\\x0a" in run.lines[-1]
    assert "is not a directory" in run.lines[-1]
    os.mkdir(chroot + b"/elsewhere")
    os.symlink(b"elsewhere", chroot + b"/.mdbackup")
    run = indexer_program.run(wanted(chroot))
    assert run.status == 1
    assert "symlink" in run.report[0].message
    assert os.listdir(chroot + b"/elsewhere") == []


def test_directory_in_the_place_of_the_index_is_an_error(chroot, indexer_program):
    """It is not moved away, nothing is put into it, and nothing is left beside it."""
    os.makedirs(chroot + INDEX)
    run = indexer_program.run(wanted(chroot))
    assert (run.status, type(run.report[-1])) == (1, Failed)
    assert os.listdir(chroot + INDEX) == []
    assert beside_index(chroot) == [b"index.md5"]


def test_killed_build_leaves_the_old_index_whole_and_the_next_one_works(chroot, indexer_program):
    """SIGKILL at half way: the reader sees the old index until a later build has finished."""
    write(chroot + b"/backups/first")
    assert indexer_program.run(wanted(chroot)).status == 0
    before = Path(os.fsdecode(chroot + INDEX)).read_bytes()
    make_large(chroot + b"/backups/large")
    process = indexer_program.start(wanted(chroot))
    wait_for_temporary(chroot)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert Path(os.fsdecode(chroot + INDEX)).read_bytes() == before
    os.unlink(chroot + b"/backups/large")
    assert indexer_program.run(wanted(chroot, b"/")).status == 0
    assert list(read_index(chroot)[0]) == [b"/backups/first"]


def test_stopped_build_removes_its_temporary_file(chroot, indexer_program):
    """SIGTERM, as at a shutdown of the provider, leaves no temporary files and is reported as an error."""
    make_large(chroot + b"/backups/large")
    process = indexer_program.start(wanted(chroot))
    wait_for_temporary(chroot)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert type(parse_report(output.decode().splitlines()[-1])) is Failed
    assert beside_index(chroot) == []


def test_full_disk_leaves_the_old_index(chroot, indexer_program):
    """An index that cannot be written to its end is an error, never a shorter index."""
    write(chroot + b"/backups/first")
    assert indexer_program.run(wanted(chroot)).status == 0
    before = Path(os.fsdecode(chroot + INDEX)).read_bytes()
    for number in range(300):
        write(chroot + b"/backups/" + b"n" * 100 + b"%d" % number)
    for limit in (20_000, 40_000):

        def no_larger_files(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        run = indexer_program.run(wanted(chroot), preexec_fn=no_larger_files)
        assert (run.status, type(run.report[-1])) == (1, Failed)
        assert Path(os.fsdecode(chroot + INDEX)).read_bytes() == before
        assert beside_index(chroot) == [b"index.md5"]


def test_build_goes_on_silently_when_the_connection_is_lost(chroot, indexer_program):
    """With nobody to read the output any more, and a hang-up, the index is finished all the same."""
    for number in range(30):
        write(chroot + b"/backups/%d" % number)
        os.chmod(chroot + b"/backups/%d" % number, 0)
    write(chroot + b"/backups/readable")
    process = indexer_program.start(wanted(chroot), without_root_power())
    if indexer_program.name == "python":
        assert read_until(process, Ready) == [Ready(program=True)]
    process.stdout.close()
    process.stdin.close()
    wait_for_index = time.monotonic() + 20
    while not os.path.exists(chroot + os.path.dirname(INDEX)):
        assert time.monotonic() < wait_for_index
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait() == 3
    assert len(read_index(chroot)[1]) == 30


def test_build_with_closed_standard_output_writes_a_clean_index(chroot, indexer_program):
    """No line of the report ends up in a file that took the closed descriptor's place."""
    write(chroot + b"/backups/file")
    process = indexer_program.start(wanted(chroot, b"/backups", b"/missing"), preexec_fn=lambda: os.close(1))
    assert process.wait() == 3
    process.communicate()
    assert read_index(chroot) == ({b"/backups/file": md5(b"content")}, [b"/missing"])


def test_progress_is_reported_while_one_huge_file_is_hashed(chroot, indexer_program):
    """A connection that looks silent for more than a few seconds would be taken for dead."""
    write(chroot + b"/backups/a")
    make_large(chroot + b"/backups/b")
    process = indexer_program.start(wanted(chroot))
    begun = time.monotonic()
    progress = read_until(process, Progress)[-1]
    waited = time.monotonic() - begun
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert type(progress) is Progress
    assert 4 <= progress.seconds <= waited + 1 < 10
