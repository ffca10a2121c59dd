"""The disk of the consumer fills up, fails or is read-only, at every step of a run."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.errors import (
    DestinationBroken,
    DestinationFull,
    DestinationRefused,
    WorkerExhausted,
)
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files import tree as tree_module
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.disks.filesystems import MB, ThinDisk, mount_again, mounted, remount, run, thin_disk
from tests.guarantees.disks.scene import STEPS, Scene, check_words, pair_at
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.torture import Cases, scaled

pytestmark = pytest.mark.real_disk
guarantee = pytest.mark.guarantee("4. Disks that fail")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


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
    return pair.begin()


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


# --- too many open files ----------------------------------------------------------------------------


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
