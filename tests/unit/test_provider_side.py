"""Both indexers, run for real over trees with awkward names, by the command lines that SSH would run.

What both promise is tested with each of: the Python program, and the shell program in dash with GNU tools and
in busybox with nothing but busybox. (Debian packages: busybox, dash.)
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side import (
    NO_PYTHON,
    Done,
    Failed,
    IndexRequest,
    Progress,
    Unreadable,
    indexer,
    parse_report,
    python_command,
    python_input,
    shell_command,
    shell_input,
)
from airflow_mdbackup.scheme.index import Remark, canonicalise, read_entries, read_remarks

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
INDEX = b"/.mdbackup/index.md5"
OLD_PYTHONS = sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python3"))


@dataclass
class Run:
    """What a program did: its exit status and every line it wrote, as text and as read by parse_report."""

    status: int
    lines: list[str]

    @property
    def report(self) -> list[Progress | Unreadable | Done | Failed | None]:
        return [parse_report(line) for line in self.lines]


@dataclass
class Indexer:
    """One of the programs, and the environment in which to run it."""

    name: str
    path: str

    def start(self, request: IndexRequest, prefix: tuple[str, ...] = (), **options) -> subprocess.Popen:
        """Start it as sshd would, by a login shell; standard input stays open."""
        python = self.name == "python"
        command = [*prefix, shutil.which("sh", path=self.path), "-c"]
        command.append(python_command() if python else shell_command())
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=subprocess.DEVNULL,
            env={"PATH": self.path},
            cwd="/",
            start_new_session=True,
            **options,
        )
        process.stdin.write(python_input(request) if python else shell_input(request))
        process.stdin.flush()

        def end() -> None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

        # So that a program that hangs fails its test.
        watchdog = threading.Timer(60, end)
        watchdog.daemon = True
        watchdog.start()
        return process

    def run(self, request: IndexRequest, prefix: tuple[str, ...] = (), **options) -> Run:
        process = self.start(request, prefix, **options)
        output = process.stdout.read().decode("ascii")
        status = process.wait()
        process.stdin.close()
        process.stdout.close()
        return Run(status, output.splitlines())


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Directories to be used as PATH: one with this Python, one with busybox alone, one where sh is dash."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("python", "busybox", "dash"):
        (folder / name).mkdir()
    (folder / "python" / "python3").symlink_to(sys.executable)
    (folder / "dash" / "sh").symlink_to(shutil.which("dash"))
    busybox = shutil.which("busybox")
    for applet in subprocess.check_output([busybox, "--list"], text=True).split():
        (folder / "busybox" / applet).symlink_to(busybox)
    return {
        "python": f"{folder}/python:/usr/bin:/bin",
        "dash": f"{folder}/dash:/usr/bin:/bin",
        "busybox": f"{folder}/busybox",
    }


@pytest.fixture(params=["python", "dash", "busybox"])
def indexer_program(request, programs, monkeypatch):
    if request.param != "python":
        # The command names /bin/sh, which is whatever the machine has.
        shell = shutil.which("sh", path=programs[request.param])
        monkeypatch.setattr(sys.modules[__name__], "shell_command", lambda: f"exec {shell} -s")
    return Indexer(request.param, programs[request.param])


@pytest.fixture
def python_program(programs):
    return Indexer("python", programs["python"])


@pytest.fixture
def chroot(tmp_path):
    (tmp_path / "chroot" / "backups").mkdir(parents=True)
    return os.fsencode(tmp_path / "chroot")


def write(path: bytes, content: bytes = b"content") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def wanted(chroot: bytes, *source: bytes) -> IndexRequest:
    return IndexRequest(chroot, source or (b"/backups",), INDEX)


def read_index(chroot: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Give the index as the consumer's strict reader takes it: md5 by path, and the unreadable paths."""
    canonical = Path(os.fsdecode(chroot) + ".canonical")
    summary = canonicalise(Path(os.fsdecode(chroot + INDEX)), canonical, name="index")
    assert summary.complete
    assert abs(summary.started - time.time()) < 60
    return {entry.path: entry.md5 for entry in read_entries(canonical)}, list(
        read_remarks(canonical, Remark.UNREADABLE)
    )


def md5(content: bytes) -> bytes:
    return hashlib.md5(content).hexdigest().encode()


def without_root_power() -> tuple[str, ...]:
    """Give a command prefix after which root, too, is bound by file modes."""
    capabilities = "-dac_override,-dac_read_search"
    return ("/usr/bin/setpriv", f"--bounding-set={capabilities}") if os.geteuid() == 0 else ()


def make_large(path: bytes, size: int = 1 << 40) -> None:
    """Make a file that takes for ever to hash and no room on the disk."""
    write(path, b"")
    os.truncate(path, size)


def wait_for_temporary(chroot: bytes) -> None:
    directory = chroot + os.path.dirname(INDEX)
    deadline = time.monotonic() + 20
    while not (os.path.isdir(directory) and any(name.endswith(b".tmp") for name in os.listdir(directory))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)


# --- what both indexers promise ---------------------------------------------------------------------


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
    """Symlinks to files and directories, fifos and the like are left out without a word."""
    write(chroot + b"/backups/file")
    write(chroot + b"/elsewhere/secret")
    os.symlink(chroot + b"/elsewhere", chroot + b"/backups/directory link")
    os.symlink(chroot + b"/elsewhere/secret", chroot + b"/backups/file link")
    os.symlink(b"nowhere", chroot + b"/backups/dangling")
    os.mkfifo(chroot + b"/backups/fifo")
    assert indexer_program.run(wanted(chroot)).status == 0
    assert read_index(chroot) == ({b"/backups/file": md5(b"content")}, [])


def test_index_and_its_temporary_files_are_never_indexed(chroot, indexer_program):
    """With the whole chroot as source, only the indexer's own names are left out, and killed builds' too."""
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
    """What the configuration names and nobody can walk is told; it never looks like an empty directory."""
    write(chroot + b"/elsewhere/file")
    write(chroot + b"/backups/file")
    os.symlink(b"elsewhere", chroot + b"/link")
    missing = b"/missing '$(touch pwned)\\\n\xff"
    run = indexer_program.run(
        wanted(chroot, b"/backups", missing, b"/link", b"/link/file", b"/backups/file/x")
    )
    assert run.status == 3
    told = {thing.path: thing.reason for thing in run.report[:-1]}
    assert told == {
        missing: "does not exist",
        b"/link": "is a symlink",
        b"/link/file": "lies below a symlink",
        b"/backups/file/x": "does not exist",
    }
    assert run.report[-1].unreadable == 4
    assert read_index(chroot) == ({b"/backups/file": md5(b"content")}, sorted(told))


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
    assert os.listdir(os.path.dirname(chroot + INDEX)) == [b"index.md5"]


@pytest.mark.parametrize(
    "path", [b"/backups/../etc", b"/./backups", b"//backups", b"/backups/", b"/backups/.."]
)
def test_path_with_an_odd_component_is_an_error(chroot, indexer_program, path):
    """Neither a source nor the index may have one, since nothing may lead out of the chroot."""
    for request in (IndexRequest(chroot, (path,), INDEX), IndexRequest(chroot, (b"/backups",), path)):
        run = indexer_program.run(request)
        assert run.status == 1
        assert len(run.lines) == 1
        assert path.decode() in run.report[0].message
        assert os.listdir(chroot) == [b"backups"]


def test_missing_chroot_and_symlinked_index_directory_are_errors(chroot, indexer_program):
    """An index that the backup account could not find is not written at all."""
    run = indexer_program.run(wanted(chroot + b"/not mounted\n"))
    assert (run.status, type(run.report[0])) == (1, Failed)
    assert "not mounted\\x0a" in run.lines[0]
    assert "is not a directory" in run.lines[0]
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
    assert os.listdir(chroot + os.path.dirname(INDEX)) == [b"index.md5"]


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
    """SIGTERM, as at a shutdown of the provider, leaves no litter and is told as an error."""
    make_large(chroot + b"/backups/large")
    process = indexer_program.start(wanted(chroot))
    wait_for_temporary(chroot)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert type(parse_report(output.decode().splitlines()[-1])) is Failed
    assert os.listdir(chroot + os.path.dirname(INDEX)) == []


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
        assert os.listdir(chroot + os.path.dirname(INDEX)) == [b"index.md5"]


def test_build_goes_on_silently_when_the_connection_is_lost(chroot, indexer_program):
    """With nobody to read the output any more, and a hang-up, the index is finished all the same."""
    for number in range(30):
        write(chroot + b"/backups/%d" % number)
        os.chmod(chroot + b"/backups/%d" % number, 0)
    write(chroot + b"/backups/readable")
    reading, writing = os.pipe()
    os.close(reading)
    process = indexer_program.start(wanted(chroot), without_root_power(), stdout=writing)
    os.close(writing)
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


def test_progress_is_told_while_one_huge_file_is_hashed(chroot, indexer_program):
    """A connection that looks silent for more than a few seconds would be taken for dead."""
    write(chroot + b"/backups/a")
    make_large(chroot + b"/backups/b")
    process = indexer_program.start(wanted(chroot))
    begun = time.monotonic()
    progress = parse_report(process.stdout.readline().decode().rstrip("\n"))
    waited = time.monotonic() - begun
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert type(progress) is Progress
    assert 4 <= progress.seconds <= waited + 1 < 10


# --- the Python indexer -----------------------------------------------------------------------------


def test_python_indexer_has_the_grammar_of_python_3_6():
    """The provider's Python may be much older than the consumer's."""
    source = Path(indexer.__file__).read_text()
    ast.parse(source, feature_version=(3, 6))
    assert "from __future__" not in source


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


def test_file_that_never_holds_still_is_unreadable(chroot, python_program):
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


def change_during_read(monkeypatch, change) -> None:
    """Call `change` once, when the first block of a file has been read."""
    real = os.readv
    pending = [change]

    def readv(descriptor, buffers):
        count = real(descriptor, buffers)
        if pending:
            pending.pop()()
        return count

    monkeypatch.setattr(indexer.os, "readv", readv)


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
def test_file_that_changes_once_is_hashed_again(chroot, monkeypatch, change, expected):
    """The second reading counts; a file that is gone by then is no error."""
    path = chroot + b"/backups/file"
    write(path)
    write(path + b".other")

    def change_later() -> None:
        time.sleep(0.02)  # longer than the clock tick that file times are taken from
        change(path)

    change_during_read(monkeypatch, change_later)
    report = indexer.Report()
    request = indexer.make_request(chroot, (b"/backups/file",), INDEX)
    found = [(path, digest) for path, digest, _ in indexer.Tree(request, report).files()]
    assert found == ([] if expected is None else [(b"/backups/file", md5(expected).decode())])
    assert report.unreadable == {}


def test_directory_that_vanishes_during_the_walk_is_no_error(chroot, monkeypatch):
    """But a source that does is unreadable."""
    write(chroot + b"/backups/a")
    write(chroot + b"/backups/b/file")
    change_during_read(
        monkeypatch, lambda: (shutil.rmtree(chroot + b"/backups/b"), shutil.rmtree(chroot + b"/c"))
    )
    os.mkdir(chroot + b"/c")
    report = indexer.Report()
    tree = indexer.Tree(indexer.make_request(chroot, (b"/backups", b"/c"), INDEX), report)
    assert [path for path, _, _ in tree.files()] == [b"/backups/a"]
    assert report.unreadable == {b"/c": "does not exist"}


def test_python_indexer_can_be_run_by_hand(chroot):
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


# --- the builders -----------------------------------------------------------------------------------


def test_commands_mean_the_same_to_every_login_shell():
    """Nothing in them is special within single quotes to sh, csh or fish, and there is one such pair."""
    for command in (python_command(), shell_command()):
        assert not set(command) & set("!\\\n$`")
        assert command.count("'") in (0, 2)


@pytest.mark.parametrize("shell", ["dash", "bash", "csh", "fish"])
def test_python_command_runs_in_a_login_shell(chroot, shell, programs):
    """The account may have any of them, and they quote differently."""
    program = shutil.which(shell)
    assert program is not None, f"{shell} is missing: make system-packages"
    write(chroot + b"/backups/file")
    done = subprocess.run(
        [program, "-c", python_command()],
        input=python_input(wanted(chroot)),
        env={"PATH": programs["python"], "HOME": "/"},
        capture_output=True,
    )
    assert done.returncode == 0
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"content")}


def test_python_command_without_python_ends_with_the_status_to_fall_back(tmp_path):
    """Neither a missing python3 nor one older than 3.6 is mistaken for a failed build."""
    request = wanted(os.fsencode(tmp_path))
    for shell in filter(None, map(shutil.which, ["sh", "csh", "fish"])):
        missing = subprocess.run(
            [shell, "-c", python_command()],
            env={"PATH": str(tmp_path), "HOME": "/"},
            capture_output=True,
        )
        assert missing.returncode == NO_PYTHON
    old = tmp_path / "python3"
    pretend = "import sys; sys.version_info = (3, 5, 9); exec(sys.argv[1])"
    old.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -c ]; do shift; done\nexec {sys.executable} -c \'{pretend}\' "$2"\n'
    )
    old.chmod(0o755)
    too_old = subprocess.run(
        ["/bin/sh", "-c", python_command()],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        input=python_input(request),
        capture_output=True,
    )
    assert too_old.returncode == NO_PYTHON


def test_modules_in_the_home_of_the_index_account_are_not_imported(chroot, tmp_path, python_program):
    """A json.py that lies there for some other purpose does not become part of the indexer."""
    (tmp_path / "json.py").write_text("raise SystemExit(99)")
    done = subprocess.run(
        ["/bin/sh", "-c", python_command()],
        input=python_input(wanted(chroot)),
        env={"PATH": python_program.path, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("path", [b"relative", b"", b"/nul\0"])
def test_request_of_an_impossible_path_is_refused(path):
    """Such a path can be neither sent nor meant."""
    for chroot, source, index in [(path, b"/a", b"/i"), (b"/", path, b"/i"), (b"/", b"/a", path)]:
        with pytest.raises(ValueError, match="absolute path"):
            IndexRequest(chroot, (source,), index)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mdbackup progress files=1 bytes=22 seconds=5", Progress(1, 22, 5.0)),
        ("mdbackup unreadable /a: b\\x0a\\\\: does not exist", Unreadable(b"/a: b\n\\", "does not exist")),
        ("mdbackup done files=1 bytes=2 hashed=3 unreadable=4 seconds=5.6", Done(1, 2, 3, 4, 5.6)),
        ("mdbackup error no room: try later", Failed("no room: try later")),
        ("Welcome to the provider", None),
        ("", None),
        ("mdbackup done files=1 bytes=2 hashed=3 unreadable=4 seconds=5.6\n", None),
        (" mdbackup progress files=1 bytes=22 seconds=5", None),
        ("mdbackup progress files=-1 bytes=22 seconds=5", None),
        ("mdbackup progress files=\u0661 bytes=22 seconds=5", None),
        ("mdbackup progress files=" + "9" * 20 + " bytes=22 seconds=5", None),
        ("mdbackup unreadable relative: reason", None),
        ("mdbackup unreadable /a\\q: reason", None),
        ("mdbackup error \x1b[31m", None),
        ("mdbackup error ", None),
    ],
)
def test_parse_report_reads_exactly_the_lines_of_the_protocol(line, expected):
    """The provider's output is hostile input: whatever is not such a line is None."""
    assert parse_report(line) == expected
