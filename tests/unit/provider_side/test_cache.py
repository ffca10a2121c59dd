"""What the Python indexer hashes and what it does not, and how it finds rot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side.report import Done, Note, Rotten, Unreadable
from airflow_mdbackup.scheme.index.received import canonicalise
from tests.unit.provider_side.indexing import (
    FOLDER,
    INDEX,
    Run,
    indexer,
    make_large,
    md5,
    read_index,
    run_patched,
    write,
)

CACHE = FOLDER + b"/.index.md5.cache"

# To have old files without waiting: what was hashed counts as younger by so many seconds.
LATER = "real = indexer.time.time; indexer.time.time = lambda: real() + {}"


def build(chroot: bytes, *arguments: bytes, patch: str = LATER.format(100)) -> Run:
    """Build an index as if all files had been there for 100 seconds."""
    return run_patched(patch, b"--chroot", chroot, b"--source", b"/backups", *arguments)


def done(run: Run) -> Done:
    assert isinstance(run.report[-1], Done), run.lines
    return run.report[-1]


def rot(path: bytes, content: bytes) -> None:
    """Change a file in a way that leaves no trace in size, times and inode."""
    before = os.stat(path)
    assert before.st_size == len(content)
    # The change time cannot be set, so the clock must have been there: in a process with a clock of its own
    # there is no way either. What can be done is to make the cache believe the status that the file has now.
    write(path, content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_cache(chroot: bytes, path: bytes, edit: Callable[[bytes], bytes]) -> None:
    """Change the status in the record of a file, and have the cache look whole."""
    name = os.fsdecode(chroot + CACHE)
    data = bytearray(Path(name).read_bytes())
    length = len(data) - indexer.CACHE_END_BYTES
    ended, position, rotten = (int(part.split(b"=")[1]) for part in bytes(data[length:]).split()[4:7])
    end = 0
    while (end := data.find(path + b"\0", end)) >= 0:  # of a rotten file there are two
        status = slice(end - indexer.STATUS.size, end)
        data[status] = edit(bytes(data[status]))
        end += 1
    body = bytes(data[:length])
    Path(name).write_bytes(body + indexer.cache_end(ended, position, rotten, indexer.zlib.crc32(body)))


def adopt_status(chroot: bytes, path: bytes) -> None:
    """Give the record of a file in the cache the file's status of now, as if it had never changed."""
    edit_cache(chroot, path, lambda _: indexer.status_of(os.lstat(chroot + path)))


def renumber_device(chroot: bytes, path: bytes) -> None:
    """Give the record another device, as if the filesystem had had another number before a restart."""
    edit_cache(chroot, path, lambda status: status[:-1] + bytes([status[-1] ^ 1]))


def test_second_build_hashes_only_what_changed(chroot):
    """Content, times, size, name: any of it is a change; and the cache is nobody else's to read."""
    for name in (b"same", b"touched", b"grown", b"gone", b"renamed", b"d/same\n", b"d/replaced", b"\xff"):
        write(chroot + b"/backups/" + name, name)
    assert done(build(chroot)).hashed == 8
    assert os.stat(chroot + CACHE).st_mode & 0o7777 == 0o600
    assert done(build(chroot)).hashed == 0

    os.utime(chroot + b"/backups/touched", (1, 1))
    write(chroot + b"/backups/grown", b"grown up")
    os.unlink(chroot + b"/backups/gone")
    os.rename(chroot + b"/backups/renamed", chroot + b"/backups/c")
    write(chroot + b"/backups/d/new", b"new")
    os.replace(chroot + b"/backups/d/new", chroot + b"/backups/d/replaced")
    run = build(chroot)
    assert (done(run).files, done(run).hashed) == (7, 4)
    assert read_index(chroot)[0] == {
        b"/backups/same": md5(b"same"),
        b"/backups/touched": md5(b"touched"),
        b"/backups/grown": md5(b"grown up"),
        b"/backups/c": md5(b"renamed"),
        b"/backups/d/same\n": md5(b"d/same\n"),
        b"/backups/d/replaced": md5(b"new"),
        b"/backups/\xff": md5(b"\xff"),
    }
    assert done(build(chroot)).hashed == 0


def test_index_is_the_same_whether_hashed_or_from_the_cache(chroot):
    """With many files, in many batches and with a big one between them, byte for byte."""
    for number in range(3000):
        write(chroot + b"/backups/%d/%04d\\" % (number % 7, number), b"%d" % number)
    make_large(chroot + b"/backups/3/1000 big", 40 << 20)

    def entries() -> bytes:
        return b"\n".join(Path(os.fsdecode(chroot + INDEX)).read_bytes().splitlines()[1:])

    assert done(build(chroot)).hashed == 3001
    first = entries()
    assert done(build(chroot, b"--jobs", b"1")).hashed == 0
    assert entries() == first
    assert 300 < done(build(chroot, b"--rehash", b"20")).hashed < 900
    assert entries() == first
    os.unlink(chroot + CACHE)
    assert done(build(chroot, b"--jobs", b"7")).hashed == 3001
    assert entries() == first
    assert len(read_index(chroot)[0]) == 3001


def test_chroot_and_sources_may_change_between_builds(chroot):
    """What the cache knows of paths that are still there is of use, the rest does no harm."""
    for name in (b"/a/x", b"/b/x", b"/c/x"):
        write(chroot + name, name)

    def sources(*names: bytes) -> Done:
        arguments = [word for name in names for word in (b"--source", name)]
        return done(run_patched(LATER.format(100), b"--chroot", chroot, *arguments))

    assert sources(b"/a", b"/c").hashed == 2
    assert sources(b"/a", b"/b").hashed == 1
    assert sources(b"/").hashed == 1
    assert sources(b"/a", b"/b", b"/c").hashed == 0
    assert list(read_index(chroot)[0]) == [b"/a/x", b"/b/x", b"/c/x"]
    os.rename(chroot, chroot + b"2")
    arguments = (b"--chroot", chroot + b"2", b"--source", b"/a")
    assert done(run_patched(LATER.format(100), *arguments)).hashed == 0
    os.rename(chroot + b"2", chroot)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        lambda data: data[:40] + data[41:],
        lambda data: b"",
        lambda data: b"something else\n" * 100,
        lambda data: data.replace(b"format=1", b"format=2"),
    ],
    ids=["end cut off", "half", "a bit", "a byte less", "empty", "foreign", "newer format"],
)
def test_damaged_cache_is_noted_and_everything_hashed(chroot, damage):
    """Of a cache that is not whole, nothing is believed."""
    for number in range(5):
        write(chroot + b"/backups/%d" % number)
    build(chroot)
    cache = Path(os.fsdecode(chroot + CACHE))
    cache.write_bytes(damage(cache.read_bytes()))
    run = build(chroot)
    assert isinstance(run.report[0], Note)
    assert "cache" in run.report[0].text
    assert (run.status, done(run).hashed) == (0, 5)
    assert done(build(chroot)).hashed == 0


def test_cache_that_others_can_write_is_not_believed(chroot):
    """It would let them have any md5 in the index."""
    write(chroot + b"/backups/file")
    build(chroot)
    os.chmod(chroot + CACHE, 0o666)
    assert done(build(chroot)).hashed == 1
    assert os.stat(chroot + CACHE).st_mode & 0o777 == 0o600


def test_cache_that_is_a_symlink_is_replaced_not_followed(chroot):
    """Nothing outside is read or written by it."""
    write(chroot + b"/backups/file")
    build(chroot)
    os.rename(chroot + CACHE, chroot + b"/elsewhere")
    os.symlink(b"../elsewhere", chroot + CACHE)
    assert done(build(chroot)).hashed == 1
    assert not os.path.islink(chroot + CACHE)


def test_file_touched_within_two_seconds_of_its_hashing_is_hashed_again(chroot):
    """It may have been changed after that in the same tick of a clock. Here it is."""
    path = chroot + b"/backups/file"
    write(path, b"before")
    first = build(chroot, patch="")
    assert (done(first).hashed, read_index(chroot)[0]) == (1, {b"/backups/file": md5(b"before")})
    write(path, b"after!")
    adopt_status(chroot, b"/backups/file")
    assert done(build(chroot)).hashed == 1
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"after!")}
    assert done(build(chroot)).hashed == 0


def test_times_in_the_future_cost_a_second_hashing_and_no_more(chroot):
    """A clock that is ahead does not show when a file was changed; that it stays unchanged does."""
    path = chroot + b"/backups/file"
    write(path)
    os.utime(path, (time.time() + 1e6, time.time() + 1e6))
    assert done(build(chroot)).hashed == 1
    assert done(build(chroot, patch=LATER.format(101))).hashed == 1
    assert done(build(chroot, patch=LATER.format(200))).hashed == 1
    assert done(build(chroot, patch=LATER.format(300))).hashed == 0


def test_file_on_a_filesystem_of_another_clock_is_hashed_until_it_held_still_for_a_minute(chroot):
    """An NFS server may be hours behind: a file that was changed just now looks old there."""
    write(chroot + b"/backups/file")
    remote = "\nindexer.is_local = lambda *_: False"
    assert done(build(chroot, patch=LATER.format(100) + remote)).hashed == 1
    assert done(build(chroot, patch=LATER.format(101) + remote)).hashed == 1
    assert done(build(chroot, patch=LATER.format(110) + remote)).hashed == 1
    assert done(build(chroot, patch=LATER.format(200) + remote)).hashed == 1
    assert done(build(chroot, patch=LATER.format(210) + remote)).hashed == 0


def test_rehash_all_reads_everything_and_finds_it_sound(chroot):
    """Nothing is rotten that did not change."""
    for number in range(1000):
        write(chroot + b"/backups/%d" % number)
    build(chroot)
    run = build(chroot, b"--rehash", b"all")
    assert (run.status, done(run).hashed, done(run).rotten) == (0, 1000, 0)


def test_rehash_of_a_percentage_reaches_every_file_in_turn(chroot):
    """A quarter each time, another one each time; and a build that fails does not count."""
    for number in range(400):
        write(chroot + b"/backups/%d" % number)
    build(chroot)
    find_hashed = "\nrun = indexer.Hasher.run\n" + (
        "def recording(self, job):\n"
        f"    with open({os.fsdecode(chroot)!r} + '.hashed', 'ab') as file:\n"
        "        file.write(b''.join(name + b'\\n' for name in job.names if name[-1] != 47))\n"
        "    return run(self, job)\n"
        "indexer.Hasher.run = recording\n"
    )
    hashed: list[set[bytes]] = []
    log = Path(os.fsdecode(chroot) + ".hashed")
    for number in range(4):
        if number == 2:
            failing = "\nindexer.Output.finish = lambda *_: (_ for _ in ()).throw(indexer.Failure('no'))"
            assert build(chroot, b"--rehash", b"25", patch=LATER.format(100) + failing).status == 1
        log.write_bytes(b"")
        run = build(chroot, b"--rehash", b"25", patch=LATER.format(100) + find_hashed)
        hashed.append(set(log.read_bytes().split()))
        assert done(run).hashed == len(hashed[-1])
        assert 60 < len(hashed[-1]) < 140
        if number == 1:
            assert done(build(chroot)).hashed == 0  # one without keeps the place
    assert len(set.union(*hashed)) == 400
    assert sum(map(len, hashed)) <= 404


def test_rotten_file_is_named_and_keeps_the_md5_of_its_sound_content(chroot):
    """The consumer's good copy is not replaced; in every build, until the content is sound again."""
    path = chroot + b"/backups/ro\ntten"
    write(path, b"sound")
    write(chroot + b"/backups/other")
    build(chroot)
    rot(path, b"r0tt!")
    adopt_status(chroot, b"/backups/ro\ntten")
    assert (build(chroot).status, read_index(chroot)[0][b"/backups/ro\ntten"]) == (0, md5(b"sound"))
    for arguments in ((b"--rehash", b"all"), (), ()):
        run = build(chroot, *arguments)
        assert run.status == 3
        assert run.report[0] == Rotten(b"/backups/ro\ntten")
        assert (done(run).files, done(run).rotten, done(run).unreadable) == (2, 1, 0)
        assert read_index(chroot) == (
            {b"/backups/other": md5(b"content"), b"/backups/ro\ntten": md5(b"sound")},
            [],
        )
        lines = Path(os.fsdecode(chroot + INDEX)).read_bytes().splitlines()
        assert lines[-2] == b"# mdbackup rotten /backups/ro\\ntten"
    rot(path, b"sound")
    adopt_status(chroot, b"/backups/ro\ntten")
    run = build(chroot)
    assert (run.status, done(run).rotten, done(run).hashed) == (0, 0, 1)
    assert done(build(chroot)).hashed == 0


def make_rotten(chroot: bytes) -> bytes:
    """Have a file rot, and a build find that; return its path."""
    path = chroot + b"/backups/d/file"
    write(path, b"sound")
    write(chroot + b"/backups/other")
    build(chroot)
    rot(path, b"r0tt!")
    adopt_status(chroot, b"/backups/d/file")
    assert build(chroot, b"--rehash", b"all").status == 3
    return path


@pytest.mark.parametrize("away", ["moved", "unreadable", "read error", "renumbered"])
def test_rotten_file_is_remembered_when_a_build_cannot_read_it(chroot, away):
    """Else what it has now would be taken for a change, and the good copy would go."""
    path = make_rotten(chroot)
    folder = os.path.dirname(path)
    if away == "moved":
        os.rename(folder, chroot + b"/aside")
        assert done(build(chroot)).rotten == 0
        os.rename(chroot + b"/aside", folder)
    elif away == "unreadable":
        failing = """
def fail(self, stack, name):
    self.refuse(stack[-1].path + name, PermissionError(13, 'Permission denied'))
indexer.Walk._enter = fail
"""
        assert done(build(chroot, patch=f"{LATER.format(100)}\n{failing}")).unreadable == 1
    elif away == "read error":
        failing = "def fail(*_): raise OSError(5, 'Input/output error')\nindexer.Hasher._read_md5 = fail"
        assert done(build(chroot, patch=f"{LATER.format(100)}\n{failing}")).unreadable == 1
    else:
        renumber_device(chroot, b"/backups/d/file")
    for _ in range(2):
        run = build(chroot)
        assert (run.status, done(run).rotten) == (3, 1)
        assert read_index(chroot)[0][b"/backups/d/file"] == md5(b"sound")
    write(path, b"sound")
    adopt_status(chroot, b"/backups/d/file")
    assert build(chroot).status == 0
    os.utime(path)
    assert build(chroot).status == 0


def test_rot_is_found_also_when_the_filesystem_has_another_number(chroot):
    """As after a restart of the server: then everything is hashed again, and what it had is still known."""
    path = chroot + b"/backups/file"
    write(path, b"sound")
    build(chroot)
    rot(path, b"r0tt!")
    adopt_status(chroot, b"/backups/file")
    renumber_device(chroot, b"/backups/file")
    run = build(chroot)
    assert (run.status, done(run).rotten, done(run).hashed) == (3, 1, 1)
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"sound")}


def test_touch_accepts_a_rotten_file_as_it_is(chroot):
    """Its times have moved, so it is an ordinary changed file."""
    path = chroot + b"/backups/file"
    write(path, b"sound")
    build(chroot)
    rot(path, b"r0tt!")
    adopt_status(chroot, b"/backups/file")
    assert build(chroot, b"--rehash", b"all").status == 3
    os.utime(path)
    assert build(chroot).status == 0
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"r0tt!")}


def test_big_file_can_rot_too(chroot):
    """Its line has its place before its md5 is known."""
    path = chroot + b"/backups/big"
    make_large(path, 33 << 20)
    write(chroot + b"/backups/after")
    build(chroot)
    sound = read_index(chroot)[0][b"/backups/big"]
    with open(path, "r+b") as file:
        file.write(b"rot")
    adopt_status(chroot, b"/backups/big")
    run = build(chroot, b"--rehash", b"all")
    assert (run.status, done(run).rotten) == (3, 1)
    assert read_index(chroot)[0][b"/backups/big"] == sound


def test_file_that_changed_soon_after_it_was_hashed_is_not_rotten(chroot):
    """What is written through mmap within half a minute leaves no other trace."""
    path = chroot + b"/backups/file"
    write(path, b"before")
    assert done(build(chroot, patch=LATER.format(30))).hashed == 1
    assert done(build(chroot, patch=LATER.format(30))).hashed == 0
    write(path, b"after!")
    adopt_status(chroot, b"/backups/file")
    run = build(chroot, b"--rehash", b"all")
    assert (run.status, done(run).rotten) == (0, 0)
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"after!")}


def test_file_that_was_young_when_it_was_hashed_is_hashed_once_more_when_it_is_not(chroot):
    """What was written through mmap into a page that was being written is found, without any re-hash."""
    path = chroot + b"/backups/file"
    write(path, b"before")
    assert done(build(chroot, patch=LATER.format(10))).hashed == 1
    write(path, b"after!")
    adopt_status(chroot, b"/backups/file")
    assert done(build(chroot, patch=LATER.format(40))).hashed == 0
    run = build(chroot, patch=LATER.format(100))
    assert (run.status, done(run).hashed, done(run).rotten) == (0, 1, 0)
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"after!")}
    assert done(build(chroot, patch=LATER.format(200))).hashed == 0


def test_file_that_was_indexed_when_it_came_can_rot_like_any_other(chroot):
    """As where a build follows each upload: of such a file, too, the good copy is kept."""
    path = chroot + b"/backups/file"
    write(path, b"sound")
    build(chroot, patch=LATER.format(10))
    build(chroot, patch=LATER.format(200))
    rot(path, b"r0tt!")
    adopt_status(chroot, b"/backups/file")
    run = build(chroot, b"--rehash", b"all", patch=LATER.format(300))
    assert (run.status, done(run).rotten) == (3, 1)
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"sound")}


@pytest.mark.parametrize("seconds", [-(10**11), 10**10, 10**11], ids=["-1199", "2286", "5138"])
def test_files_of_any_year_are_indexed_and_hashed_again_only_when_they_change(chroot, seconds):
    """A filesystem may hold years that nanoseconds in 64 bits do not reach: tmpfs, XFS, ZFS, btrfs."""
    path = chroot + b"/backups/file"
    write(path)
    os.utime(path, (seconds, seconds))  # some filesystems take what is nearest of what they can hold
    write(chroot + b"/backups/other")
    assert (build(chroot).status, read_index(chroot)[0].keys()) == (0, {b"/backups/file", b"/backups/other"})
    assert build(chroot, patch=LATER.format(200)).status == 0
    assert done(build(chroot, patch=LATER.format(300))).hashed == 0
    os.utime(path, (seconds + 1, seconds + 1))
    assert done(build(chroot, patch=LATER.format(400))).hashed == 1


def test_file_that_is_being_modified_during_its_rehash_is_not_rotten(chroot):
    """Through mmap: the times have not moved yet, but the content differs from reading to reading."""
    path = chroot + b"/backups/file"
    make_large(path, 20 << 20)
    build(chroot)
    program = f"""
import mmap, struct
with open({os.fsdecode(path)!r}, "r+b") as file:
    pages = mmap.mmap(file.fileno(), 0)
    number = 0
    print(flush=True)
    while True:
        number += 1
        for at in range(0, len(pages), 1 << 18):
            pages[at : at + 8] = struct.pack("Q", number)
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        time.sleep(0.5)
        adopt_status(chroot, b"/backups/file")
        run = build(chroot, b"--rehash", b"all")
    finally:
        writer.kill()
        writer.communicate()
    # Whether its times move by being looked at depends on the filesystem.
    assert run.report[:-1] in ([], [Unreadable(b"/backups/file", "changed while being read")])
    assert done(run).rotten == 0


def test_cache_that_cannot_be_written_costs_the_next_build_only(chroot):
    """The index is what counts. Here the place of the cache is taken by a directory."""
    write(chroot + b"/backups/file")
    os.makedirs(chroot + CACHE + b"/x")
    run = build(chroot)
    assert run.status == 0
    assert [type(report) for report in run.report] == [Note, Note, Done]
    assert read_index(chroot)[0] == {b"/backups/file": md5(b"content")}


def test_consumer_reads_an_index_with_rotten_files_like_any_other(chroot):
    """The comment is new, and readers pass over comments that they do not know."""
    index = Path(os.fsdecode(chroot + b"/index.md5"))
    index.write_bytes(
        b"# mdbackup started 1\n"
        + md5(b"")
        + b"  /a\n# mdbackup unreadable /b\n# mdbackup rotten /a\n"
        + b"# mdbackup end format=1 files=1 unreadable=1 bytes=0\n"
    )
    assert canonicalise(index, index.with_name("canonical"), name="index").complete


def test_cache_that_was_cut_short_while_it_is_read_makes_no_wrong_line(chroot):
    """A reader that meets nonsense after the checksum was right finds nothing, and hashes."""
    cache_file = os.fsdecode(chroot + b"/cache")
    for data in (b"", b"x" * 39, bytes(40) + b"/a", bytes(40) + b"/a\0s"):
        Path(cache_file).write_bytes(data)
        descriptor = os.open(cache_file, os.O_RDONLY)
        cache = indexer.Cache(descriptor, len(data), 0, 0, 0)
        value = cache.take(bytes(40) + b"/b\0")
        assert value is None
        os.close(descriptor)


def test_files_that_are_written_to_all_the_time_never_get_a_stale_md5(chroot):
    """One writer, many builds: once it has ended, the next build has what is there."""
    paths = [chroot + b"/backups/%d" % number for number in range(20)]
    stop = threading.Event()

    def keep_writing() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with open(paths[number % 20], "r+b" if number > 20 else "w+b", buffering=0) as file:
                file.write(b"%08d" % number)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    for _ in range(5):
        build(chroot, patch="")
    stop.set()
    writer.join()
    build(chroot, patch="")
    contents = {path[len(chroot) :]: md5(Path(os.fsdecode(path)).read_bytes()) for path in paths}
    assert read_index(chroot)[0] == contents
