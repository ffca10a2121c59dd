"""The walk and the hashing of the Python indexer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side.report import Failed, Unreadable, parse_report
from airflow_mdbackup.provider_side.request import IndexRequest
from tests.unit.provider_side.indexing import (
    INDEX,
    OLD_PYTHONS,
    Indexer,
    indexer,
    make_large,
    md5,
    read_index,
    run_patched,
    wanted,
    without_root_power,
    write,
)


@pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda path: path.parts[-3])
def test_python_indexer_runs_on_an_older_python(chroot, python):
    """Each older Python that the machine has gives the same index."""
    write(chroot + b"/backups/file\n\xff")
    run = Indexer("python", f"{python.parent}:/usr/bin:/bin").run(
        wanted(chroot, b"/backups", b"/missing\xff")
    )
    assert run.status == 3
    assert read_index(chroot) == ({b"/backups/file\n\xff": md5(b"content")}, [b"/missing\xff"])


def test_whole_index_is_sorted_by_raw_path_bytes(chroot, python_program):
    """A directory stands where the paths below it belong, not where its own name does."""
    for path in (b"a/x", b"a.b", b"a-b/x", b"a0", b"a\n", b"b/a/x", b"b/a.x", b"\xff", b"B"):
        write(chroot + b"/backups/" + path)
    python_program.run(wanted(chroot))
    lines = Path(os.fsdecode(chroot + INDEX)).read_bytes().splitlines()[1:-1]
    paths = [line.lstrip(b"\\")[34:].replace(b"\\n", b"\n") for line in lines]
    assert paths == sorted(paths)
    assert len(paths) == 9


def test_file_that_keeps_changing_is_unreadable(chroot, python_program):
    """A digest of a mixture of two states must not get into the index."""
    make_large(chroot + b"/backups/log", 100 << 20)
    write(chroot + b"/backups/quiet")
    stop = threading.Event()

    def keep_writing() -> None:
        with open(chroot + b"/backups/log", "r+b", buffering=0) as file:
            while not stop.wait(0.005):
                file.seek(0)
                file.write(b"x")

    writer = threading.Thread(target=keep_writing)
    writer.start()
    run = python_program.run(wanted(chroot))
    stop.set()
    writer.join()
    assert run.report[0] == Unreadable(b"/backups/log", "changed while being read")
    assert read_index(chroot) == ({b"/backups/quiet": md5(b"content")}, [b"/backups/log"])


def test_file_that_grows_faster_than_it_is_read_is_not_followed(chroot):
    """Its end would never come, or only when the disk is full."""
    path = chroot + b"/backups/log"
    write(path, b"x" * (1 << 20))
    patch = f"""
    def growing(descriptor, buffers, read=os.readv):
        if os.path.getsize({path!r}) < 200 << 20:
            with open({path!r}, "ab") as log:
                log.write(bytes(2 << 20))
        return read(descriptor, buffers)
    os.readv = growing
    """
    arguments = (b"--chroot", chroot, b"--source", b"/backups", b"--jobs", b"1")
    run = run_patched(patch, *arguments)
    assert run.report[0] == Unreadable(b"/backups/log", "changed while being read")
    assert os.path.getsize(path) < 100 << 20


def change_during_read(monkeypatch, change) -> None:
    """Call `change` once, when the first block of a file has been read."""
    pending = [change]

    def changing(read):
        def read_and_change(*arguments):
            result = read(*arguments)
            if pending:
                pending.pop()()
            return result

        return read_and_change

    monkeypatch.setattr(indexer.os, "read", changing(os.read))
    monkeypatch.setattr(indexer.os, "readv", changing(os.readv))


@pytest.mark.parametrize("size", [7, 100_000])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: write(path, b"new content"), b"new content"),
        (lambda path: (write(path + b".new", b"other"), os.replace(path + b".new", path)), b"other"),
        (os.unlink, None),
        (lambda path: (os.unlink(path), os.symlink(b"/etc/passwd", path)), None),
        (lambda path: (os.unlink(path), os.mkfifo(path)), None),
    ],
    ids=["rewritten", "replaced", "deleted", "became a symlink", "became a fifo"],
)
def test_file_that_changes_once_is_hashed_again(chroot, monkeypatch, tmp_path, change, expected, size):
    """The second reading counts; a file that is gone by then is no error. Small files are read in one go."""
    monkeypatch.chdir(tmp_path)
    path = chroot + b"/backups/file"
    write(path, b"c" * size)
    os.utime(path, (0, 0))

    def change_later() -> None:
        time.sleep(0.02)  # longer than the clock tick that file times are taken from
        change(path)

    root = os.open(chroot, os.O_RDONLY)
    hasher = indexer.Hasher(root, None, lambda _: None)
    # So that the small file, which was made just now, looks old enough to be trusted until it changes.
    hasher._is_local[os.stat(path).st_dev] = True
    with monkeypatch.context() as patch:
        patch.setattr(indexer.time, "time", lambda real=time.time: real() + 2.005)
        change_during_read(patch, change_later)
        answer = hasher.run(indexer.Job([b"/backups/", b"file"], [b""], False, False, 0))
    os.close(root)
    assert answer.lines == [b"" if expected is None else md5(expected) + b"  /backups/file\n"]
    assert answer.refused == []


def test_directory_that_vanishes_during_the_walk_is_no_error(chroot):
    """But a source that does is unreadable."""
    write(chroot + b"/backups/a")
    write(chroot + b"/backups/b/file")
    os.mkdir(chroot + b"/c")
    patch = f"""
        import shutil
        level = indexer.Walk._listed
        def vanish(self, path, descriptor):
            found = level(self, path, descriptor)
            shutil.rmtree({os.fsdecode(chroot)!r} + "/backups/b", ignore_errors=True)
            shutil.rmtree({os.fsdecode(chroot)!r} + "/c", ignore_errors=True)
            return found
        indexer.Walk._listed = vanish
    """
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups", b"--source", b"/c")
    assert run.status == 3
    assert read_index(chroot) == ({b"/backups/a": md5(b"content")}, [b"/c"])


def test_big_files_that_vanish_before_they_are_hashed_leave_no_gap(chroot):
    """Their lines had a place already; what comes after them moves up, and is whole."""
    for name in (b"a", b"m\n", b"z"):
        write(chroot + b"/backups/" + name, name * 1000)
    for name in (b"0 big", b"b big", b"big\\", b"n big", b"zz big"):
        make_large(chroot + b"/backups/" + name, 33 << 20)
    patch = f"""
        give = indexer.Crew._send_job
        def vanish(self, worker, work):
            if isinstance(work, indexer.Big) and not work.path.endswith(b"n big"):
                os.unlink({chroot!r} + work.path)
            give(self, worker, work)
        indexer.Crew._send_job = vanish
    """
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups")
    assert (run.status, run.report[-1].files, run.report[-1].hashed) == (0, 4, 4)
    found, unreadable = read_index(chroot)
    assert found.pop(b"/backups/n big") == md5(bytes(33 << 20))
    assert found == {b"/backups/" + name: md5(name * 1000) for name in (b"a", b"m\n", b"z")}
    assert unreadable == []


@pytest.mark.parametrize("where", ["the walk", "the workers"])
def test_directory_that_becomes_a_symlink_during_the_walk_is_not_followed(chroot, where):
    """Neither the walk nor those who hash leave the tree by it, whoever makes it when."""
    write(chroot + b"/backups/a/file")
    write(chroot + b"/elsewhere/file", b"secret")
    method = "Walk._enter" if where == "the walk" else "Builder._close_batch"
    patch = f"""
        method = indexer.{method}
        def swap(self, *arguments):
            if not os.path.islink({os.fsdecode(chroot)!r} + "/backups/a"):
                os.rename({os.fsdecode(chroot)!r} + "/backups/a", {os.fsdecode(chroot)!r} + "/backups/b")
                os.symlink("../elsewhere", {os.fsdecode(chroot)!r} + "/backups/a")
            return method(self, *arguments)
        indexer.{method} = swap
    """
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups")
    assert run.status == 0
    assert os.path.islink(chroot + b"/backups/a")
    assert read_index(chroot) == ({}, [])


@pytest.mark.parametrize("kind", ["directory", "socket", "fifo"])
def test_file_that_becomes_something_else_before_it_is_hashed_is_gone(chroot, kind):
    """It is not a regular file any more, so it is neither indexed nor unreadable."""
    write(chroot + b"/backups/file")
    write(chroot + b"/backups/other")
    patch = f"""
        import socket
        path = {chroot!r} + b"/backups/file"
        method = indexer.Builder._close_batch
        def swap(self):
            global writer
            if os.path.isfile(path):
                os.unlink(path)
                if {kind!r} == "directory":
                    os.mkdir(path)
                elif {kind!r} == "socket":
                    os.chdir(os.path.dirname(path))
                    socket.socket(socket.AF_UNIX).bind("file")
                else:
                    os.mkfifo(path)
                    writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            return method(self)
        indexer.Builder._close_batch = swap
    """
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups")
    assert run.status == 0, run.lines
    assert read_index(chroot) == ({b"/backups/other": md5(b"content")}, [])


def test_directories_on_the_way_need_not_be_readable(chroot, python_program):
    """Those of mode 711 may be passed through: /home often is one, and to the index and the sources alike."""
    write(chroot + b"/home/user/backups/file")
    os.makedirs(chroot + b"/home/user/.mdbackup")
    for name in (b"/home/user", b"/home", b""):
        os.chmod(chroot + name, 0o111)
    request = IndexRequest(chroot, (b"/home/user/backups",), b"/home/user" + INDEX)
    run = python_program.run(request, without_root_power())
    for name in (b"", b"/home", b"/home/user"):
        os.chmod(chroot + name, 0o755)
    assert run.status == 0, run.lines
    assert b"  /home/user/backups/file\n" in Path(os.fsdecode(chroot + b"/home/user" + INDEX)).read_bytes()


@pytest.mark.parametrize("where", ["Builder._add_files_unhashed", "Hasher.run"], ids=["the walk", "a worker"])
def test_defect_of_the_indexer_ends_the_build_with_an_error_line(chroot, where):
    """Which says what and where, and the old index stays."""
    write(chroot + b"/backups/file")
    patch = f"""
        def fail(*_):
            raise KeyError("\\x1b")
        indexer.{where} = fail
    """
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups")
    assert run.status == 1
    assert [type(report) for report in run.report] == [Failed]
    assert run.report[0].message.startswith("unexpected: KeyError in line ")
    assert not os.path.exists(chroot + INDEX)


def test_python_indexer_can_be_run_from_the_command_line(chroot):
    """On a provider that builds its own index by cron, the file is called with plain arguments."""
    write(chroot + b"/backups/\xff")
    write(chroot + b"/more/file")
    command = [
        sys.executable,
        indexer.__file__,
        "--chroot",
        chroot,
        "--source",
        b"/backups",
        "--source",
        b"/more",
    ]
    output = subprocess.check_output(command, text=True)
    assert parse_report(output.rstrip("\n")).files == 2
    assert list(read_index(chroot)[0]) == [b"/backups/\xff", b"/more/file"]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]\n",
        b"{\n",
        b"\xff\n",
        b'{"chroot":"/"}\n',
        b'{"chroot":1,"source":[],"index":"/i"}\n',
        b'{"chroot":"/","source":"/a","index":"/i"}\n',
        b'{"chroot":"/","source":[],"index":"/i"}\n',
        b'{"chroot":"/","source":["/\\ud800"],"index":"/i"}\n',
        b'{"chroot":"/","source":["/\\u0000"],"index":"/i"}\n',
    ],
)
def test_request_that_is_not_understood_is_an_error(line):
    """Nothing is guessed from half a request."""
    command = [sys.executable, indexer.__file__, "--request-from-stdin"]
    done = subprocess.run(command, input=line, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")
    assert type(parse_report(done.stdout.decode().rstrip("\n"))) is Failed


@pytest.mark.parametrize("words", ["can be used otherwise", "cannot be used at all"])
def test_host_where_fips_rules_forbid_md5_for_security(chroot, words):
    """Python accepts md5 that is declared not to be for security; if not even that, the build says so."""
    write(chroot + b"/backups/file")
    patch = f"""
        import hashlib
        real = hashlib.md5
        def md5(data=b"", *, usedforsecurity=True):
            if usedforsecurity or {words!r} != "can be used otherwise":
                raise ValueError("disabled for FIPS")
            return real(data)
        hashlib.md5 = md5
        spec.loader.exec_module(indexer)
    """
    run = run_patched(patch, b"--chroot", chroot, b"--source", b"/backups")
    if words == "can be used otherwise":
        assert read_index(chroot)[0] == {b"/backups/file": md5(b"content")}
    else:
        assert (run.status, "FIPS" in run.report[0].message) == (1, True)
