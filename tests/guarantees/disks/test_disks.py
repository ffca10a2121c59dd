"""The disk of the consumer fills up, fails, is read-only, or is not there, at every step of a run."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.backup.pull import pull
from airflow_mdbackup.scheme.errors import (
    DestinationBroken,
    DestinationFull,
    DestinationRefused,
    RunIncomplete,
    WorkerExhausted,
)
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files import tree as tree_module
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter
from tests.guarantees.crash.crash import in_a_child
from tests.guarantees.disks.filesystems import (
    MB,
    ThinDisk,
    image_of,
    mount_again,
    mounted,
    remount,
    run,
    thin_disk,
)
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of
from tests.pair import Pair
from tests.torture import Cases, scaled

pytestmark = pytest.mark.real_disk
guarantee = pytest.mark.guarantee("4. Disks that fail")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")

STEPS = ("fetch", "diff", "pull", "archive", "commit")


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs begin on disks of a few megabytes."""
    monkeypatch.setattr("airflow_mdbackup.scheme.backup.free_space._RESERVE", 0)


@contextmanager
def pair_at(folder: Path) -> Iterator[Pair]:
    folder.mkdir(exist_ok=True)
    pair = Pair(folder)
    try:
        yield pair
    finally:
        for server in pair.servers:
            server.stop()


class Scene:
    """A run with every kind of entry, on a backup that is there already."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        for name in ("changed", "large", "twin", "dir/file", "moved", "gone", "same"):
            pair.put(name, name.encode() * 3000)
        pair.backup()
        self.before = contents_of(pair)
        pair.put("changed", b"new " * 5000)
        pair.put("large", os.urandom(300_000))
        pair.put("twin", b"twin" * 2000)
        pair.put("twin2", b"twin" * 2000)
        shutil.rmtree(pair.a / "dir")
        pair.put("dir", b"a file now " * 1000)
        os.rename(pair.path("moved"), pair.path("moved2"))
        os.unlink(pair.path("gone"))
        pair.build_index()
        self.run = pair.new_run()

    def act(self, step: str) -> None:
        pair, run = self.pair, self.run
        if step == "fetch":
            pair.fetch(run)
        elif step == "diff":
            pair.diff(run)
        elif step == "pull":
            pull(pair.mirror, run, 0, pair.connect)
        elif step == "archive":
            pair.archive(run)
        elif not pair.commit(run).superseded:
            # What could not be pulled fails the run, as the operator of this step has it.
            pair.outcome.raise_for_failures("srv1")

    def forward(self, before: str) -> None:
        for step in STEPS[: STEPS.index(before)]:
            self.act(step)

    def rest(self, after: str) -> None:
        for step in STEPS[STEPS.index(after) :]:
            self.act(step)

    def check(self) -> None:
        """Nothing was lost, and nothing that is not there is claimed."""
        assert self.before <= contents_of(self.pair), "bytes are lost"
        check_sound(self.pair)

    def check_end(self) -> None:
        self.check()
        assert self.pair.index_b() == self.pair.index_a()


def check_words(told: BaseException, pair: Pair, *words: str) -> None:
    """Make sure that a message names provider, host and path, and says what to do."""
    assert isinstance(told.__cause__, OSError)
    for word in ("srv1", socket.gethostname(), str(pair.mirror.dest), *words):
        assert word in str(told), f"{word!r} is not in {told}"


# --- what it has not, though it took it --------------------------------------------------------------


@contextmanager
def refusing(disk: ThinDisk, monkeypatch: pytest.MonkeyPatch, others: bool) -> Iterator[None]:
    """Have the disk lose the first time what was written, when that is to be brought onto it.

    :param others: somebody else, who uses the same disk, hears of it first.
    """

    def sync(descriptor: int) -> None:
        monkeypatch.setattr(syscalls_module, "syncfs", really_sync)
        with disk.full():
            if others:
                with tree_module.Folder(disk.at) as folder, pytest.raises(OSError, match="No space"):
                    really_sync(folder.descriptor)
            really_sync(descriptor)

    really_sync = syscalls_module.syncfs
    monkeypatch.setattr(syscalls_module, "syncfs", sync)
    yield
    assert syscalls_module.syncfs is really_sync, "nothing was refused"


@only_root
@guarantee
@pytest.mark.parametrize("others", [False, True], ids=["told to us", "told to others first"])
def test_a_run_does_not_take_memory_for_a_disk_that_refused_what_was_written(
    tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    with thin_disk(tmp_path / "disk", 320 * MB) as disk, pair_at(tmp_path / "pair") as pair:
        pair.mirror = Mirror(disk.at / "dest", "srv1")
        pair.put("first", b"first")
        pair.backup()
        for number in range(16):
            pair.put(f"large {number}", os.urandom(4 * MB))
        pair.build_index()
        run = pair.new_run()
        pair.fetch(run)
        plan = pair.diff(run)
        with cases.one(), refusing(disk, monkeypatch, others), pytest.raises(DestinationFull):
            pair.pull(run, plan)
        with cases.one():
            before = pair.transferred
            pair.pull(run, plan)
            assert pair.transferred > before, "nothing came again"
            assert not pair.finish(run).failed
            mount_again(disk.at)
            assert pair.index_b() == pair.index_a()
            check_sound(pair)


@only_root
@guarantee
@pytest.mark.parametrize("others", [False, True], ids=["told to us", "told to others first"])
def test_a_restore_does_not_take_memory_for_a_disk_that_refused_what_was_written(
    tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    with thin_disk(tmp_path / "disk", 320 * MB) as disk, pair_at(tmp_path / "pair") as pair:
        for number in range(16):
            pair.put(f"large {number}", os.urandom(4 * MB))
        pair.backup()
        target = disk.at / "restored"

        def restored() -> list[RestoreOutcome]:
            with state_of(pair.mirror, Selection()) as state:
                return [
                    each.outcome for each in restore(pair.mirror, state.timeline, state.contents(), target)
                ]

        with (
            cases.one(),
            refusing(disk, monkeypatch, others),
            pytest.raises(DestinationFull, match="free some space"),
        ):
            restored()
        with cases.one():
            assert set(restored()) == {RestoreOutcome.RESTORED}
            mount_again(disk.at)
            assert set(restored()) == {RestoreOutcome.THERE}


# --- full -------------------------------------------------------------------------------------------


def leave(at: Path, blocks: int, files: int = 10_000) -> None:
    """Have a tmpfs full but for so many blocks and inodes."""
    disk = os.statvfs(at)
    size = (disk.f_blocks - disk.f_bfree + blocks) * disk.f_frsize
    remount(at, f"size={size},nr_inodes={disk.f_files - disk.f_ffree + files}")


@only_root
@guarantee
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("kind", ["blocks", "inodes"])
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_is_full_at_any_point_of_a_step_is_told_and_healed(
    tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch, step: str, kind: str, links: bool
) -> None:
    """So many blocks or inodes are left when it begins. With room again, a retry or the next run goes on."""
    if not links:
        monkeypatch.setattr(tree_module.Tree, "link", refuse_link)
    refused = 0
    for left in range(0, scaled(24, 150), scaled(3, 1)):
        with pair_at(tmp_path / str(left)) as pair, mounted("tmpfs", pair.mirror.dest, 16 * MB), cases.one():
            scene = Scene(pair)
            scene.forward(before=step)
            leave(pair.mirror.dest, *((left, 10_000) if kind == "blocks" else (1000, left)))
            try:
                scene.act(step)
                done = True
            except DestinationFull as error:
                done = False
                refused += 1
                if error.__cause__ is not None:
                    check_words(error, pair, "is full", "Free some space", "are free")
            scene.check()
            leave(pair.mirror.dest, 1000)
            if left % 2:
                scene.rest(after=step)
            else:
                pair.backup()
            scene.check_end()
        if done and left > scaled(20, 60):
            break
    assert refused, "the disk was never full"


def refuse_link(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@only_root
@guarantee
def test_a_disk_that_fills_up_in_one_run_after_the_other_is_healed_once_there_is_room(
    tmp_path: Path, cases: Cases
) -> None:
    """Ext4, whose last blocks go to a file of somebody else, a few more left each time."""
    with pair_at(tmp_path) as pair, mounted("ext4", pair.mirror.dest, 16 * MB):
        scene = Scene(pair)
        filler = pair.mirror.dest / "lost+found" / "filler"
        refused = 0
        for left in range(0, 500_000, scaled(50_000, 7_000)):
            fill(filler, left)
            with cases.one():
                try:
                    pair.backup()
                except DestinationFull as error:
                    refused += 1
                    if error.__cause__ is not None:
                        check_words(error, pair, "is full", "Free some space")
                filler.unlink()
                scene.check()
        assert refused
        pair.backup()
        scene.check_end()


def fill(path: Path, left: int) -> None:
    """Use up the disk of ``path`` but for about so many bytes."""
    with path.open("wb") as file:
        disk = os.statvfs(path)
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - left - (64 << 10))


@only_root
@guarantee
def test_a_quota_that_is_used_up_is_told_like_a_full_disk(tmp_path: Path, cases: Cases) -> None:
    """The disk has room, the account has not: a Btrfs subvolume with a limit."""
    with (
        pair_at(tmp_path) as pair,
        mounted("btrfs", tmp_path / "disk", 128 * MB) as disk,
    ):
        run("btrfs", "quota", "enable", str(disk))
        run("btrfs", "subvolume", "create", str(disk / "dest"))
        # Asked of the disk, since a change of the limit takes room from whatever it is asked of.
        group = "0/" + run("btrfs", "inspect-internal", "rootid", str(disk / "dest"))
        pair.mirror = Mirror(disk / "dest", "srv1")
        scene = Scene(pair)
        for size in (400_000, 600_000):
            pair.put("large", os.urandom(8 * MB))
            run("btrfs", "qgroup", "limit", str(MB + size), group, str(disk))
            with cases.one():
                with pytest.raises(DestinationFull) as told:
                    pair.backup()
                cause = told.value.__cause__
                assert isinstance(cause, OSError) and cause.errno == errno.EDQUOT
                check_words(told.value, pair, "is full", "Free some space", "quota")
                scene.check()
        run("btrfs", "qgroup", "limit", "none", group, str(disk))
        pair.backup()
        scene.check_end()


# --- read-only, broken ------------------------------------------------------------------------------


@only_root
@guarantee
@pytest.mark.parametrize("step", STEPS)
def test_a_read_only_disk_is_refused_with_words_and_nothing_is_changed(
    tmp_path: Path, cases: Cases, step: str
) -> None:
    """As ext4 becomes after an error. When it can be written to again, the same step goes on."""
    with pair_at(tmp_path) as pair, mounted("ext4", pair.mirror.dest, 16 * MB):
        scene = Scene(pair)
        scene.forward(before=step)
        remount(pair.mirror.dest, "ro")
        with cases.one():
            with pytest.raises(DestinationRefused) as told:
                scene.act(step)
            check_words(told.value, pair, "read-only", "dmesg", "clear the failed task")
            scene.check()
            remount(pair.mirror.dest, "rw")
            scene.rest(after=step)
            scene.check_end()


@only_root
@guarantee
def test_a_new_dest_on_a_read_only_disk_is_refused_with_words(tmp_path: Path, cases: Cases) -> None:
    """Nothing can be set up there."""
    with pair_at(tmp_path) as pair, mounted("ext4", pair.mirror.dest, 16 * MB), cases.one():
        remount(pair.mirror.dest, "ro")
        with pytest.raises(DestinationRefused) as told:
            pair.mirror.claim()
        check_words(told.value, pair, "read-only")


SHUT_DOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN


@only_root
@guarantee
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_fails_is_told_and_the_next_run_heals_after_it_is_back(
    tmp_path: Path, cases: Cases, step: str
) -> None:
    """Ext4 is shut down, so that all but reading from memory fails, and what was not synced is lost."""
    with pair_at(tmp_path) as pair, mounted("ext4", pair.mirror.dest, 16 * MB):
        dest = pair.mirror.dest
        scene = Scene(pair)
        scene.forward(before=step)
        with opened(dest) as disk:
            fcntl.ioctl(disk, SHUT_DOWN, b"\2\0\0\0")
        with cases.one():
            with pytest.raises((DestinationBroken, DestinationRefused)) as told:
                scene.act(step)
            check_words(told.value, pair, "dmesg")
            mount_again(dest)
            scene.check()
            pair.backup()
            scene.check_end()


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- gone within a step -----------------------------------------------------------------------------


class Trouble:
    """Has a method of :class:`.Tree` do something before it is called for the second time."""

    def __init__(self, method: str, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        really = getattr(tree_module.Tree, method)

        def tried(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                act()
            return really(*arguments)

        monkeypatch.setattr(tree_module.Tree, method, tried)


def changed_files(pair: Pair) -> Run:
    """Have four files to be replaced, whose new bytes are staged."""
    for content in (b"old ", b"new "):
        for name in ("a", "b", "c", "d"):
            pair.put(name, content + name.encode())
        if content == b"old ":
            pair.backup()
    pair.build_index()
    return pair.prepare()


@only_root
@guarantee
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files that are left open
@pytest.mark.parametrize(("step", "method"), [("archive", "put_new"), ("commit", "put")])
def test_a_disk_whose_server_dies_amid_the_files_stops_the_step_at_once(
    tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch, step: str, method: str
) -> None:
    """A real FUSE file system: it is no trouble of one file after the other."""
    with pair_at(tmp_path) as pair, mounted("exfat", pair.mirror.dest, 16 * MB):
        dest = pair.mirror.dest
        run_ = changed_files(pair)
        if step == "commit":
            pair.archive(run_)
        trouble = Trouble(method, lambda: kill_server(dest), monkeypatch)
        with cases.one():
            with pytest.raises(DestinationBroken) as told:
                getattr(pair, step)(run_)
            cause = told.value.__cause__
            assert isinstance(cause, OSError) and cause.errno == errno.ENOTCONN
            check_words(told.value, pair, "dmesg", "whether the disk is still mounted")
            assert trouble.calls == 2
        del told, cause
        gc.collect()  # what they keep open keeps the disk from being unmounted


def kill_server(mount: Path) -> None:
    """Kill the process that serves a FUSE file system, and wait until it is felt."""
    for commands in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = commands.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"mount.exfat-fuse" in arguments[0] and os.fsencode(mount) in arguments:
            os.kill(int(commands.parent.name), signal.SIGKILL)
    with pytest.raises(OSError):
        while True:
            os.stat(mount)


@guarantee
@pytest.mark.parametrize(
    "number", [errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ESTALE, errno.ENODEV]
)
@pytest.mark.parametrize(("step", "method"), [("archive", "link"), ("commit", "put")])
def test_an_error_of_a_disk_on_the_net_fails_no_file_but_stops_the_step(
    pair: Pair, cases: Cases, monkeypatch: pytest.MonkeyPatch, step: str, method: str, number: int
) -> None:
    """A retry brings everything."""
    run_ = changed_files(pair)
    if step == "commit":
        pair.archive(run_)

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    trouble = Trouble(method, fail, monkeypatch)
    with cases.one():
        with pytest.raises(DestinationBroken) as told:
            getattr(pair, step)(run_)
        check_words(told.value, pair, "dmesg")
        assert trouble.calls == 2
        assert pair.finish(run_).failed == 0
        assert pair.index_b() == pair.index_a()
        check_sound(pair)
        assert pair.versions("a") == [b"old a"] and pair.versions("d") == [b"old d"]


# --- somebody else's --------------------------------------------------------------------------------

NOBODY = 65534


@contextmanager
def pair_of_nobody() -> Iterator[Pair]:
    """A pair all of whose files belong to nobody in particular, who can get at them."""
    with tempfile.TemporaryDirectory(prefix="pair-") as folder:
        os.chmod(folder, 0o755)
        with pair_at(Path(folder)) as pair:
            yield pair


def give(*paths: Path, to: int = NOBODY) -> None:
    for path in paths:
        os.chown(path, to, to, follow_symlinks=False)


NOT_NEEDED = [
    *((".mdbackup/runs/*", "fetch"), (".mdbackup/lock", "fetch"), (".mdbackup/lock", "pull")),
    *(("index.md5", "fetch"), ("index.md5", "pull"), ("index.md5", "archive")),
]


def as_nobody(act: Callable[[], object]) -> None:
    def act_so() -> None:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        act()

    in_a_child(act_so)


@only_root
@guarantee
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("of_root", ["", ".mdbackup", ".mdbackup/runs/*", ".mdbackup/lock", "index.md5"])
def test_a_dest_of_somebody_else_is_refused_with_the_command_that_mends_it(
    cases: Cases, of_root: str, step: str
) -> None:
    """In words in any step that needs it, and nothing is changed; when it is given back, the step goes on."""
    with pair_of_nobody() as pair, cases.one():
        scene = Scene(pair)
        scene.forward(before=step)
        folder = pair.mirror.dest.parent
        give(folder, *folder.rglob("*"))
        taken = list(pair.mirror.dest.glob(of_root)) if of_root else [pair.mirror.dest]
        modes = [path.stat().st_mode for path in taken]
        give(*taken, to=0)
        for path in taken:
            path.chmod(0o700 if path.is_dir() else 0o600)

        def act() -> None:
            try:
                scene.act(step)
            except DestinationRefused as told:
                user = pwd.getpwuid(NOBODY).pw_name
                give_back = f"As root: chown -R {user} {pair.mirror.dest}"
                check_words(told, pair, f"cannot be used by {user}", give_back)
            else:
                assert (of_root, step) in NOT_NEEDED

        as_nobody(act)
        scene.check()
        give(*taken)
        for path, mode in zip(taken, modes, strict=True):
            path.chmod(mode & 0o7777)
        as_nobody(lambda: scene.rest(after=step))
        scene.check_end()


@only_root
@guarantee
def test_a_new_dest_in_a_directory_of_somebody_else_is_refused_with_the_command_that_makes_it(
    cases: Cases,
) -> None:
    """The most frequent mistake of a first run."""
    with pair_of_nobody() as pair, cases.one():

        def act() -> None:
            with pytest.raises(DestinationRefused) as told:
                pair.mirror.claim()
            user = pwd.getpwuid(NOBODY).pw_name
            check_words(told.value, pair, f"As root: install -d -o {user} -m 700 {pair.mirror.dest}")

        as_nobody(act)
        assert not pair.mirror.dest.exists()


@only_root
@guarantee
def test_files_in_a_directory_of_somebody_else_fail_alone(cases: Cases) -> None:
    """Within the mirror; all others arrive, and these do when it is given back."""
    with pair_of_nobody() as pair, cases.one():
        for name in ("a", "d/b", "e"):
            pair.put(name, b"old " + name.encode())
        pair.backup()
        for name in ("a", "d/b", "d/c", "e"):
            os.chmod(pair.put(name, b"new " + name.encode()), 0o644)
        folder = pair.mirror.dest.parent
        give(folder, *folder.rglob("*"))
        give(pair.live("d"), to=0)
        pair.live("d").chmod(0o700)

        def act() -> None:
            summary = pair.backup()
            assert summary.outcomes == {"pulled": 2, "failed": 2}
            assert all("Permission denied on this side" in failure for failure in summary.failures)

        as_nobody(act)
        check_sound(pair)
        give(pair.live("d"))
        as_nobody(pair.backup)
        assert pair.index_b() == pair.index_a()
        assert pair.versions("d/b") == [b"old d/b"]


# --- too many open files ----------------------------------------------------------------------------


@only_root
@pytest.mark.parametrize(
    "words",
    [
        ["verify", "--limit", "1GB"],
        ["verify", "--fraction", "1/2"],
        ["forget", "*"],
        ["rebuild"],
        ["prune", "--keep-last", "1", "--yes"],
    ],
)
def test_what_a_command_of_root_makes_in_a_dest_belongs_to_its_owner(words: list[str]) -> None:
    """Or else the tasks cannot use it afterwards, as they use the file that keeps a limit."""
    with pair_of_nobody() as pair:
        for content in (b"1", b"2", b"3"):
            os.chmod(pair.put("file", content), 0o644)
            pair.backup()
        if words == ["rebuild"]:
            commits(pair.mirror)[1].unlink()
        folder = pair.mirror.dest.parent
        give(folder, *folder.rglob("*"))
        before = os.umask(0o077)
        try:
            assert main([*words, "--dest", str(pair.mirror.dest)]) == 0
        finally:
            os.umask(before)
        assert [path for path in folder.rglob("*") if path.stat().st_uid != NOBODY] == []
        os.chmod(pair.put("file", b"4"), 0o644)
        pair.build_index()
        as_nobody(lambda: pair.finish(pair.prepare()))
        as_nobody(lambda: main(["verify", "--limit", "1GB", "--dest", str(pair.mirror.dest)]) and os._exit(1))
        assert pair.live("file").read_bytes() == b"4"


@only_root
def test_a_file_that_is_linked_into_a_dest_is_not_given_away(tmp_path: Path) -> None:
    """Who owns the directory might have linked root's file there."""
    secret, linked = tmp_path / "secret", tmp_path / "of nobody" / "verifying"
    secret.write_bytes(b"")
    linked.parent.mkdir()
    os.link(secret, linked)
    give(linked.parent)
    RateLimiter(linked, lambda: 10**9)(1)
    assert secret.stat().st_uid == 0


@only_root
@guarantee
@pytest.mark.parametrize("step", STEPS)
def test_too_many_open_files_at_any_point_of_a_step_are_told_and_a_retry_goes_on(
    tmp_path: Path, cases: Cases, step: str
) -> None:
    """The process may open so many more when the step begins."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    for left in range(scaled(12, 30)):
        with pair_at(tmp_path / str(left)) as pair, mounted("tmpfs", pair.mirror.dest, 16 * MB):
            scene = Scene(pair)
            scene.forward(before=step)
            with cases.one():
                free = free_descriptors(left)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
                try:
                    scene.act(step)
                    done = True
                except WorkerExhausted as error:
                    done = False
                    check_words(error, pair, "cannot open more files", "ulimit -n")
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                refused += not done
                scene.check()
                scene.rest(after=step)
                scene.check_end()
    assert refused


def free_descriptors(left: int) -> int:
    """Return the limit below which so many numbers of descriptors are free."""
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    number = -1
    while left >= 0:
        number += 1
        left -= number not in taken
    return number


# --- the mount that is missing ----------------------------------------------------------------------


@only_root
@guarantee
@pytest.mark.parametrize("below", ["", "srv1"], ids=["dest is the mount point", "dest lies below it"])
def test_a_dest_whose_disk_is_not_mounted_is_never_taken_for_a_new_one(
    tmp_path: Path, cases: Cases, below: str
) -> None:
    """Airflow knows of a good run, or `mount` says it outright. Nothing is made in the empty mount point."""
    disk = tmp_path / "disk"
    with pair_at(tmp_path) as pair:
        pair.mirror = Mirror(disk / below, "srv1")
        pair.put("alpha", b"one")
        with mounted("ext4", disk, 16 * MB):
            pair.mirror.claim(mount=str(disk))
            pair.backup()
            began = pair.new_run()
            pair.fetch(began)
            pair.diff(began)
        with cases.one():
            with pytest.raises(
                DestinationRefused, match=f"srv1: .*{re.escape(socket.gethostname())} has no backup"
            ):
                pair.mirror.claim(known=True)
            assert list(disk.iterdir()) == []
        with cases.one():
            with pytest.raises(DestinationRefused, match=r"is not a mount point.*Mount the disk"):
                pair.mirror.claim(mount=str(disk))
            assert list(disk.iterdir()) == []
        later: list[Callable[[], Any]] = [
            pair.mirror.check,
            lambda: pair.diff(began),
            lambda: pair.pull(began, pair.plan),
            lambda: pair.archive(began),
            lambda: pair.commit(began),
        ]
        for act in later:
            with cases.one():
                with pytest.raises((DestinationRefused, RunIncomplete)):
                    act()
                assert list(disk.iterdir()) == []
        run("mount", "-o", "loop", str(image_of(disk)), str(disk))
        try:
            with cases.one():
                pair.mirror.claim(known=True, mount=str(disk))
                assert pair.index_b() == pair.index_a()
        finally:
            run("umount", str(disk))


@only_root
@guarantee
def test_a_disk_of_another_kind_in_the_place_of_the_right_one_is_refused(
    tmp_path: Path, cases: Cases
) -> None:
    """It is mounted, and empty; or it lost its marker."""
    with pair_at(tmp_path) as pair, mounted("tmpfs", pair.mirror.dest, MB):
        with cases.one(), pytest.raises(DestinationRefused, match="has no backup, but one succeeded before"):
            pair.mirror.claim(known=True, mount=str(pair.mirror.dest))
        assert list(pair.mirror.dest.iterdir()) == []
        pair.put("alpha", b"one")
        pair.backup()
        (pair.mirror.dest / ".mdbackup" / "provider-id").unlink()
        for known in (True, False):
            with cases.one(), pytest.raises(DestinationRefused):
                pair.mirror.claim(known=known)
        assert pair.index_b() == pair.index_a()


@only_root
def test_a_disk_that_goes_away_within_a_step_is_told_as_such(tmp_path: Path) -> None:
    """What is missing then is the marker."""
    with pair_at(tmp_path) as pair:
        with mounted("tmpfs", pair.mirror.dest, MB):
            pair.mirror.claim()
        missing = pytest.raises(DestinationRefused, match=r"holds no backup .*Is the disk not mounted")
        with missing, pair.mirror.translate_os_errors(), pair.mirror.lock("test"):
            pass
