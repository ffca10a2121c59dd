"""File systems that lack what the usual ones have: hard links, modes, a renaming that replaces nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.files.content import copy_of
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.guarantees.crash.crash import crash_at, in_a_child
from tests.guarantees.disks.filesystems import MB, Folding, mounted
from tests.guarantees.whatever_happens.soundness import below, check_sound, contents_of, files_of
from tests.pair import Pair
from tests.torture import Cases, scaled

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
guarantee = pytest.mark.guarantee("9. Awkward names and file systems")


@pytest.mark.real_disk
@guarantee
@only_root
def test_where_there_are_neither_hard_links_nor_modes_versions_are_whole_all_the_same(
    tmp_path: Path, cases: Cases
) -> None:
    """On exFAT, files and directories also take each other's place."""
    pair = Pair(tmp_path)
    with mounted("exfat", pair.mirror.dest, 16 * MB):
        for content in (b"one", b"two", b"three"):
            with cases.one():
                pair.put("dir/alpha", content)
                assert pair.backup().outcomes == {"pulled": 1}
                check_sound(pair)
        assert pair.versions("dir/alpha") == [b"one", b"two"]
        shutil.rmtree(pair.a / "dir")
        for name in ("dir", "dir/beta", "dir"):
            with cases.one():
                shutil.rmtree(pair.a)
                pair.put(name, name.encode())
                assert pair.backup(allow_empty=True).outcomes == {"pulled": 1}
                check_sound(pair)
        assert contents_of(pair) == {b"one", b"two", b"three", b"dir", b"dir/beta"}
    for server in pair.servers:
        server.stop()


@guarantee
def test_without_a_renaming_that_spares_what_is_there_nothing_is_replaced_either(
    tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and FUSE have none: a placeholder makes sure, and is gone if the move fails."""
    Folding(bytes, monkeypatch)
    for source in ("file", "directory"):
        for target in ("file", "directory", "nothing"):
            folder = tmp_path / f"{source}-{target}"
            folder.mkdir()
            for name, kind in (("a", source), ("b", target)):
                if kind == "file":
                    (folder / name).write_bytes(name.encode())
                elif kind == "directory":
                    (folder / name).mkdir()
            with Tree(folder) as tree, cases.one():
                if target == "nothing":
                    tree.move(b"/a", b"/b")
                    assert os.listdir(folder) == ["b"]
                    assert (folder / "b").is_dir() == (source == "directory")
                    continue
                with pytest.raises(FileExistsError):
                    tree.move(b"/a", b"/b")
                assert sorted(os.listdir(folder)) == ["a", "b"]
                with pytest.raises(OSError), monkeypatch.context() as patch:
                    patch.setattr(Folding, "rename", lambda *_, **__: os.stat("/nowhere"))
                    tree.move(b"/a", b"/c")
                assert sorted(os.listdir(folder)) == ["a", "b"]


@guarantee
@pytest.mark.parametrize(("first", "second"), [("a", "a/x"), ("a/x", "a"), ("a/b/x", "a/b")])
def test_a_crash_while_something_makes_way_is_mended_without_that_renaming_too(
    fast: Path, cases: Cases, first: str, second: str
) -> None:
    """At each step of the commit; the placeholder is not taken for the old thing."""
    for number in range(1, 200, scaled(3, 1)):
        folder = fast / str(number)
        folder.mkdir()
        pair = Pair(folder)
        with pytest.MonkeyPatch.context() as patch, cases.one():
            Folding(bytes, patch)
            pair.put(first, b"old")
            pair.backup()
            shutil.rmtree(pair.a)
            pair.put(second, b"new")
            run = pair.begin()
            pair.archive(run)
            crashed = crash_at(number, partial(pair.commit, run))
            assert b"old" in contents_of(pair)
            pair.backup()
            check_sound(pair)
            assert contents_of(pair) == {b"old", b"new"}
            assert len(files_of(pair)) == 2, "a placeholder is left"
        for server in pair.servers:
            server.stop()
        shutil.rmtree(folder)
        if not crashed:
            break
    assert number > 15


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_move_that_is_taken_up_again_drops_a_placeholder_and_nothing_else(
    tmp_path: Path, kind: str
) -> None:
    """What is empty, and of the kind that was to be moved. All else is the thing itself, moved before."""

    def make(name: str, content: bytes) -> None:
        if kind == "file":
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / name).mkdir()
            if content:
                (tmp_path / name / "in it").write_bytes(content)

    def content(name: str) -> bytes:
        return (tmp_path / name if kind == "file" else tmp_path / name / "in it").read_bytes()

    for name, old, there in (("cut off", b"old", b""), ("done", b"came back", b"old")):
        make(f"{name}, source", old)
        make(f"{name}, target", there)
        with Tree(tmp_path) as tree:
            assert tree.move_again(f"/{name}, source".encode(), f"/{name}, target".encode())
        assert content(f"{name}, target") == b"old"
    assert not (tmp_path / "cut off, source").exists() and content("done, source") == b"came back"


@guarantee
@pytest.mark.parametrize("old", [b"old", b""], ids=["", "empty file"])
def test_a_crash_while_a_version_is_copied_leaves_a_retry_no_empty_one(
    fast: Path, cases: Cases, old: bytes
) -> None:
    """Without hard links and that renaming, its name is there before it is, and then in nobody's way."""
    for number in count(1):
        folder = fast / str(number)
        folder.mkdir()
        pair = Pair(folder)
        with pytest.MonkeyPatch.context() as patch, cases.one():
            Folding(bytes, patch)
            patch.setattr(Folding, "link", _no_link)
            os.utime(pair.put("alpha", old), (1_000_000_000, 1_000_000_000))
            pair.backup()
            pair.put("alpha", b"new")
            run = pair.begin()
            crashed = crash_at(number, partial(pair.archive, run))
            assert pair.finish(run).outcomes == {"pulled": 1}
            check_sound(pair)
            (version,) = (pair.live("alpha").parent / ".old").iterdir()
            assert version.read_bytes() == old
            assert stat.S_IMODE(version.stat().st_mode) == 0o644 and version.stat().st_mtime == 1_000_000_000
        for server in pair.servers:
            server.stop()
        shutil.rmtree(folder)
        if not crashed:
            break
    assert number > 10


@guarantee
def test_a_crash_while_a_version_gets_another_stamp_leaves_a_retry_no_empty_one(
    fast: Path, cases: Cases
) -> None:
    """Another run was committed between archive and commit; where that renaming is lacking, too."""
    for number in count(1):
        folder = fast / str(number)
        folder.mkdir()
        pair = Pair(folder)
        with pytest.MonkeyPatch.context() as patch, cases.one():
            Folding(bytes, patch)
            pair.put("alpha", b"old")
            pair.put("bravo", b"1")
            pair.backup()
            pair.put("bravo", b"2")
            first = pair.begin()
            pair.put("alpha", b"new")
            second = pair.begin()
            pair.archive(second)
            pair.finish(first)
            crashed = crash_at(number, partial(pair.commit, second))
            assert not pair.commit(second).failed
            check_sound(pair)
            assert pair.versions("alpha") == [b"old"] and pair.live("alpha").read_bytes() == b"new"
        for server in pair.servers:
            server.stop()
        shutil.rmtree(folder)
        if not crashed:
            break
    assert number > 10


def _no_link(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@guarantee
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have files of another owner")
def test_files_of_another_owner_get_versions_though_the_kernel_forbids_to_link_them(cases: Cases) -> None:
    """The worker is no root, and somebody else owns what is live: fs.protected_hardlinks."""
    assert Path("/proc/sys/fs/protected_hardlinks").read_text().strip() == "1"
    nobody = 65534
    with tempfile.TemporaryDirectory(prefix="pair-") as name:
        folder = Path(name)
        pair = Pair(folder)
        pair.put("dir/alpha", b"one")
        pair.put("beta", b"one")
        pair.backup()
        os.chmod(pair.put("dir/alpha", b"two"), 0o644)
        for path in [folder, *folder.rglob("*")]:
            is_live_file = path.is_file() and below(bytes(path), bytes(pair.mirror.files))
            if not is_live_file:
                os.chown(path, nobody, nobody)
        owned = pair.live("dir/alpha").stat()
        assert owned.st_uid == 0

        def as_nobody() -> None:
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
            with pytest.raises(PermissionError):
                os.link(pair.live("dir/alpha"), folder / "link")
            assert pair.backup().outcomes == {"pulled": 1}

        with cases.one():
            in_a_child(as_nobody)
            assert pair.versions("dir/alpha") == [b"one"]
            version = next((pair.live("dir/alpha").parent / ".old").iterdir()).stat()
            assert (version.st_uid, version.st_mtime_ns) == (nobody, owned.st_mtime_ns)
            assert pair.live("dir/alpha").read_bytes() == b"two"
            check_sound(pair)
        for server in pair.servers:
            server.stop()


@pytest.mark.real_disk
@only_root
@pytest.mark.parametrize("kind", ["tmpfs", "btrfs"])
def test_a_copy_is_no_longer_than_its_source_whatever_was_tried_before(tmp_path: Path, kind: str) -> None:
    """Where blocks are shared too: a restore tries one file after another."""
    sources = [b"wrong" * 3000, b"right" * 1000, b"", b"short"]
    with mounted(kind, tmp_path / "disk", 200 * MB) as disk:
        target = os.open(disk / "target", os.O_RDWR | os.O_CREAT)
        for content in sources:
            (disk / "source").write_bytes(content)
            with open(disk / "source", "rb") as source:
                assert copy_of(source.fileno(), target) == hashlib.md5(content).hexdigest().encode()
            assert (disk / "target").read_bytes() == content
        os.close(target)


@pytest.mark.real_disk
@only_root
def test_a_restore_from_the_second_file_tried_is_whole_where_blocks_are_shared(
    pair: Pair, tmp_path: Path
) -> None:
    with mounted("btrfs", tmp_path / "disk", 200 * MB) as disk:
        (disk / "b").mkdir()
        pair.mirror = Mirror(disk / "b", "srv1")
        for content in (b"small" * 10, b"LARGE" * 1000, b"small" * 10):
            pair.put("file", content)
            pair.backup()
        pair.live("file").write_bytes(b"LARGE" * 2000)
        for file in pair.mirror.history.iterdir():
            file.unlink()
        with state_of(pair.mirror, Selection()) as state:
            (came,) = restore(pair.mirror, state.timeline, state.contents(), disk / "target")
        assert came.outcome == RestoreOutcome.RESTORED
        assert (disk / "target" / os.fsdecode(pair.path("file"))[1:]).read_bytes() == b"small" * 10


@pytest.mark.real_disk
@only_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "btrfs", "exfat", "ntfs"])
def test_results_vouch_for_what_they_brought_on_every_filesystem(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """However coarse its times are, and whatever it takes for inodes: nothing is hashed twice."""
    contents = [b"%d" % number * 10 for number in range(50)] + [b"large" * 100_000]
    with mounted(kind, pair.mirror.dest, 200 * MB):
        for number, content in enumerate(contents):
            pair.put(f"f{number}", content)
        run = pair.begin()
        monkeypatch.setattr(Folder, "is_whole", lambda *_: pytest.fail("hashed"))
        assert pair.finish(run).outcomes == {"pulled": 51}
