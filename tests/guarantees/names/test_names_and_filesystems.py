"""Policy rows 10, 12, 13, 18 and 19, tried hard, and file systems that lack what the usual ones have."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup import name_collisions as clash
from airflow_mdbackup.scheme.files.content import copy_of, md5_of
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import ChangeKind
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of
from airflow_mdbackup.scheme.store import mirror as mirror_module
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import version_path
from tests.guarantees.crash.crash import crash_at, in_a_child
from tests.guarantees.disks.filesystems import MB, Folding, mounted
from tests.guarantees.whatever_happens.soundness import below, check_sound, contents_of, digest, files_of
from tests.pair import Pair
from tests.torture import Cases, scaled

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
guarantee = pytest.mark.guarantee("9. Awkward names and file systems")


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs begin on disks of a few megabytes."""
    monkeypatch.setattr("airflow_mdbackup.scheme.backup.free_space._RESERVE", 0)


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A directory for what syncs often: in memory, if that can be mounted."""
    if os.geteuid() != 0:
        yield tmp_path
    else:
        with mounted("tmpfs", tmp_path / "fast", 64 * MB) as folder:
            yield folder


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


# --- row 18: two names that are one file here -------------------------------------------------------


def fold_case(name: bytes) -> bytes:
    return name.decode("utf-8", "surrogateescape").casefold().encode("utf-8", "surrogateescape")


def decompose(name: bytes) -> bytes:
    text = name.decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFD", text).encode("utf-8", "surrogateescape")


def cut_off(name: bytes) -> bytes:
    return name[:100]


@pytest.fixture(params=["exfat", "ntfs", "played"])
def folding(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """A pair whose consumer's file system folds case."""
    yield from folding_pair(request.param, tmp_path)


@pytest.fixture(params=["exfat", "played"])
def coherent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """The same, where both names of a file always show the same; lowntfs-3g remembers old files by name."""
    yield from folding_pair(request.param, tmp_path)


def folding_pair(kind: str, folder: Path) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        pair = Pair(folder)
        try:
            if kind == "played":
                Folding(fold_case, patch)
                yield pair
            elif os.geteuid() != 0:
                pytest.skip("only root can mount")
            else:
                with mounted(kind, pair.mirror.dest, 16 * MB):
                    yield pair
        finally:
            for server in pair.servers:
                server.stop()


def forget_names() -> None:
    """Wait until the kernel has forgotten the names of a FUSE file system."""
    time.sleep(1.1)


def clash_of(pair: Pair, second: str, first: str) -> str:
    """Return the pattern of the message that two paths are one file here."""
    path, other = re.escape(str(pair.a / second)), re.escape(str(pair.a / first))
    return rf"failed {path} \(it and {other} are one file on this side's file system.*rename or exclude"


@guarantee
def test_the_second_of_two_names_that_differ_in_case_fails_and_is_named(folding: Pair, cases: Cases) -> None:
    """The first one arrives, and so does all else; also in each later run, whichever of both changes."""
    folding.put("dir/Readme", b"one")
    folding.put("dir/readme", b"two")
    folding.put("good", b"three")
    for change, content in ((None, b"one"), (None, b"one"), ("dir/Readme", b"new"), ("dir/readme", b"new")):
        with cases.one():
            if change:
                folding.put(change, b"new")
            summary = folding.backup()
            assert summary.outcomes["failed"] == summary.failed == 1
            assert re.match(clash_of(folding, "dir/readme", "dir/Readme"), summary.failures[0])
            assert content_at(folding, folding.path("dir/Readme")) == content
            assert set(folding.index_b()) == {folding.path("dir/Readme"), folding.path("good")}
            check_true(folding)
            assert b"two" not in contents_of(folding)


@guarantee
def test_a_new_name_never_touches_the_live_file_that_it_cannot_be_told_from(
    folding: Pair, cases: Cases
) -> None:
    """Neither is anything archived through it, be its bytes other ones or the same."""
    folding.put("Readme", b"one")
    folding.backup()
    for content in (b"two", b"one"):
        with cases.one():
            folding.put("README", content)
            folding.build_index()
            run = folding.prepare()
            before = files_of(folding)
            assert folding.archive(run).archived == 0
            summary = folding.commit(run)
            assert files_of(folding).keys() == before.keys()
            assert contents_of(folding) == {b"one"}
            assert re.match(clash_of(folding, "README", "Readme"), summary.failures[0])
            assert set(folding.index_b()) == {folding.path("Readme")}


@guarantee
def test_files_may_share_a_directory_that_has_two_names(folding: Pair, cases: Cases) -> None:
    """Only a file of the same name in both fails."""
    folding.put("A/x", b"one")
    folding.put("a/y", b"two")
    with cases.one():
        assert folding.backup().outcomes == {"pulled": 2}
        check_true(folding)
    for first, second in (("A/x", "a/x"), ("a/y", "A/y")):
        with cases.one():
            folding.put(second, b"other")
            summary = folding.backup()
            assert re.match(clash_of(folding, second, first), summary.failures[0])
            assert summary.failed == 1
            unlink(folding, second)
            check_true(folding)
    folding.put("a/y", b"newer")
    with cases.one():
        assert folding.backup().outcomes == {"pulled": 1}
        check_true(folding)
        forget_names()
        assert contents_of(folding) == {b"one", b"two", b"newer"}


@guarantee
def test_a_file_and_a_directory_whose_names_cannot_be_told_apart_are_a_clash(
    folding: Pair, cases: Cases
) -> None:
    """Neither moves the other out of the way, whichever came first."""
    folding.put("A/x", b"one")
    folding.put("b", b"two")
    folding.backup()
    folding.put("a", b"three")
    folding.put("B/x", b"four")
    for _ in range(2):
        with cases.one():
            summary = folding.backup()
            assert summary.failed == 2 and summary.outcomes == {"failed": 2}
            told = sorted(summary.failures, reverse=True)
            assert re.match(clash_of(folding, "a", "A/x"), told[0])
            assert re.match(clash_of(folding, "B/x", "b"), told[1])
            assert contents_of(folding) == {b"one", b"two"}
            check_true(folding)


@guarantee
def test_a_file_and_a_directory_that_come_together_are_a_clash_too(folding: Pair, cases: Cases) -> None:
    """The first in path order arrives."""
    folding.put("A/x", b"one")
    folding.put("a", b"two")
    folding.put("B", b"three")
    folding.put("b/x", b"four")
    with cases.one():
        summary = folding.backup()
        assert summary.outcomes == {"pulled": 2, "failed": 2}
        assert contents_of(folding) == {b"one", b"three"}
        check_true(folding)


@guarantee
@pytest.mark.parametrize("content", [b"one", b"other"])
def test_a_file_whose_name_changed_its_case_on_a_loses_no_bytes(
    coherent: Pair, cases: Cases, content: bytes
) -> None:
    """It takes over the file of the old name; other bytes than before make that a version of the new one."""
    coherent.put("Readme", b"one")
    coherent.put("good", b"good")
    coherent.backup()
    unlink(coherent, "Readme")
    coherent.put("README", content)
    with cases.one():
        summary = coherent.backup()
        assert not summary.failed and summary.forgotten == 1
        assert set(coherent.index_b()) == {coherent.path("README"), coherent.path("good")}
        check_true(coherent)
        assert contents_of(coherent) == {b"one", content, b"good"}
    coherent.put("README", b"last")
    forget_names()
    with cases.one():
        assert coherent.backup().outcomes == {"pulled": 1}
        check_true(coherent)
        forget_names()
        assert contents_of(coherent) == {b"one", content, b"good", b"last"}


@guarantee
def test_no_name_that_is_one_with_that_of_the_versions_comes_between(folding: Pair, cases: Cases) -> None:
    """`.OLD/<a version's name>` would replace that version. All else in such a directory fails, too."""
    folding.put("dir/file", b"one")
    folding.backup()
    folding.put("dir/file", b"two")
    folding.backup()
    ((name, _),) = [(path.name, path) for path in folding.live("dir/.old").iterdir()]
    folding.put(f"dir/.OLD/{name}", b"in its place")
    folding.put("other/.Old/file", b"where none is yet")
    folding.put("other/.older", b"another name")
    forget_names()
    with cases.one():
        summary = folding.backup()
        assert summary.outcomes == {"pulled": 1, "failed": 2}
        old = re.escape(str(folding.a / "dir" / ".old"))
        assert re.search(rf"takes its name for {old}, which is for versions; rename", summary.failures[0])
        assert folding.versions("dir/file") == [b"one"]
        assert folding.path("other/.older") in folding.index_b()
        check_true(folding)


@guarantee
def test_a_name_is_taken_as_long_as_the_index_has_it_though_its_file_was_deleted_here(
    folding: Pair, cases: Cases
) -> None:
    """Else the file of the new name would be replaced when the old one changes."""
    folding.put("Readme", b"one")
    folding.backup()
    os.unlink(folding.live("Readme"))
    folding.put("readme", b"two")
    forget_names()
    with cases.one():
        assert re.match(clash_of(folding, "readme", "Readme"), folding.backup().failures[0])
        assert contents_of(folding) == set()


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
@pytest.mark.parametrize(
    ("fold", "first", "second"),
    [
        (fold_case, "\u00c4rger", "\u00e4rger"),
        (decompose, "\u00e4rger", "a\u0308rger"),
        (cut_off, "n" * 100 + "1", "n" * 100 + "2"),
    ],
)
def test_names_are_told_from_one_another_by_whatever_rule_the_file_system_has(
    pair: Pair,
    cases: Cases,
    monkeypatch: pytest.MonkeyPatch,
    fold: Callable[[bytes], bytes],
    first: str,
    second: str,
) -> None:
    """Case, Unicode normalisation, or a length at which names are cut off."""
    Folding(fold, monkeypatch)
    one, two = sorted(map(str.encode, (first, second)))
    pair.put(one, b"one")
    pair.put(two, b"two")
    pair.put("good", b"three")
    for _ in range(2):
        with cases.one():
            summary = pair.backup()
            assert summary.failed == 1 and str(pair.a / two.decode()) in summary.failures[0]
            assert set(pair.index_b()) == {pair.path(one), pair.path("good")}
            check_true(pair)


@guarantee
def test_whatever_names_change_their_case_the_backup_stays_sound(fast: Path, cases: Cases) -> None:
    """No bytes are lost, the index claims what is there, and what does not clash is backed up."""
    names = ("a", "A", "b/x", "B/x", "b/X", "b/y", "B/y", "C/D/e", "c/d/E", "c/d", "C")
    for seed in range(scaled(12, 250)):
        chance = random.Random(seed)
        folder = fast / str(seed)
        folder.mkdir()
        pair = Pair(folder)
        with pytest.MonkeyPatch.context() as patch, cases.one():
            Folding(fold_case, patch)
            for number in range(8):
                shutil.rmtree(pair.a)
                pair.a.mkdir()
                for name in chance.sample(names, chance.randint(1, 6)):
                    above = [pair.a / name, *(pair.a / name).parents]
                    if not (pair.a / name).is_dir() and not any(p.is_file() for p in above):
                        pair.put(name, b"%d" % chance.randint(0, number))
                before = contents_of(pair) if pair.mirror.files.exists() else set()
                summary = pair.backup(allow_empty=True)
                assert before <= contents_of(pair), f"seed {seed}: bytes are lost"
                check_true(pair)
                ours, theirs = pair.index_b(), pair.index_a()
                missing = {path for path in theirs if ours.get(path) != theirs[path]}
                assert len(missing) == summary.failed, f"seed {seed}"
                folded = [fold_case(path) for path in ours]
                assert len(set(folded)) == len(folded), f"seed {seed}: two entries are one file"
                for path in missing:
                    others = (fold_case(other) for other in theirs if other != path)
                    mine = fold_case(path)
                    assert any(below(mine, o) or below(o, mine) for o in others), f"seed {seed}: {path!r}"
        for server in pair.servers:
            server.stop()
        shutil.rmtree(folder)


def test_a_file_system_that_tells_names_apart_is_only_probed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The indexes are not read for that, and nothing is left of it."""
    monkeypatch.setattr(clash, "_remaining_entries", lambda *_: pytest.fail("it was read"))
    for name in ("Readme", "README", "\u00e4", "a\u0308", "a.", "a ", "a"):
        pair.put(name, name.encode())
    pair.build_index()
    run = pair.prepare()
    before = sorted(os.listdir(run.folder))
    assert pair.archive(run).archived == 0
    assert sorted(os.listdir(run.folder)) == sorted([*before, "archived.jsonl", "stamp.json"])
    assert pair.commit(run).outcomes == {"pulled": 7}


# --- renaming without replacing ---------------------------------------------------------------------


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
            pair.build_index()
            run = pair.prepare()
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
            pair.build_index()
            run = pair.prepare()
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
            pair.build_index()
            first = pair.prepare()
            pair.put("alpha", b"new")
            pair.build_index()
            second = pair.prepare()
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


# --- row 10: files and directories that take each other's place -------------------------------------


def restorable(pair: Pair) -> set[tuple[bytes, bytes]]:
    """Return which bytes of which path can be found by what history tells, each made sure of on the disk."""
    at: dict[bytes, tuple[bytes, bytes]] = {}  # where bytes lie now: whose they are, and their md5
    for commit in pair.history():
        for change in commit:
            if change.what == ChangeKind.MOVED:
                there, size = change.version or b"", len(change.path)
                at = {there + p[size:] if below(p, change.path) else p: whose for p, whose in at.items()}
            elif change.what == ChangeKind.REPLACED:
                at[change.version or b""] = at.pop(change.path)
            if change.md5 is not None:
                at[change.path] = change.path, change.md5
    found = files_of(pair)
    for place, (path, md5) in at.items():
        assert digest(found[place].content) == md5, f"{place!r} is not what history tells of {path!r}"
    return set(at.values())


@guarantee
def test_each_version_can_be_found_by_history_however_files_and_directories_flip(
    fast: Path, cases: Cases
) -> None:
    """In both directions, deep, over files forgotten long ago; and the newest state is always there."""
    names = ("a", "a/b", "a/b/c", "a/b/c/d", "a-", "a/b-", "a/x/y/z", "a/x", "e/f", "e")
    for seed in range(scaled(20, 500)):
        chance = random.Random(seed)
        folder = fast / str(seed)
        folder.mkdir()
        pair = Pair(folder)
        ever: set[tuple[bytes, bytes]] = set()
        with cases.one():
            for number in range(scaled(10, 14)):
                if chance.random() < 0.5:
                    shutil.rmtree(pair.a)  # what is gone is forgotten, and stays
                for name in chance.sample(names, chance.randint(1, 4)):
                    path = pair.a / name
                    for above in [path, *path.parents]:
                        if above.is_file():
                            above.unlink()
                    shutil.rmtree(path, ignore_errors=True)
                    pair.put(name, b"%d %d" % (number, chance.randint(0, 3)))
                assert not pair.backup(allow_empty=True).failed
                assert pair.index_b() == pair.index_a()
                check_sound(pair)
                ever |= set(pair.index_b().items())
                assert ever <= restorable(pair), f"seed {seed}: a version cannot be found"
        for server in pair.servers:
            server.stop()
        shutil.rmtree(folder)


# --- row 12: long names -----------------------------------------------------------------------------

LONG_NAMES = (
    b"n" * 240 + b"-one",
    b"n" * 240 + b"-two",
    b"n" * 255,
    "\u00e4".encode() * 127,
    b"x" + "\u00e4".encode() * 127,
    "\U0001f4be".encode() * 63,
    b"xx" + "\u20ac".encode() * 84,
    bytes(range(0x80, 0xBF)) * 4,
)


@pytest.mark.real_disk
@guarantee
@pytest.mark.parametrize("kind", ["usual", pytest.param("exfat", marks=only_root)])
def test_versions_of_long_names_are_told_apart_and_history_knows_whose_they_are(
    tmp_path: Path, cases: Cases, kind: str
) -> None:
    """Also where a name must be UTF-8: no character is cut in two."""
    pair = Pair(tmp_path)
    names = LONG_NAMES if kind == "usual" else LONG_NAMES[:-1]
    if kind == "usual":
        versions_of_long_names(pair, cases, names)
    else:
        with mounted(kind, pair.mirror.dest, 16 * MB):
            versions_of_long_names(pair, cases, names)
    for server in pair.servers:
        server.stop()


def versions_of_long_names(pair: Pair, cases: Cases, names: tuple[bytes, ...]) -> None:
    told: dict[bytes, list[bytes]] = {name: [] for name in names}
    for number in range(scaled(3, 20)):
        for name in names:
            pair.put(name, b"%d " % number + name)
        summary = pair.backup(allow_empty=True)
        assert not summary.failed, summary.failures
        for change in pair.history()[-1]:
            assert len(change.path.rpartition(b"/")[2]) > 235
            if change.version is not None:
                with cases.one():
                    name = change.path.rpartition(b"/")[2]
                    assert content_at(pair, change.version) == b"%d " % (number - 1) + name
                    assert len(change.version.rpartition(b"/")[2]) <= 255
                    told[name].append(change.version)
    assert all(len(set(versions)) == scaled(3, 20) - 1 for versions in told.values())


def test_a_version_name_of_a_text_is_a_text() -> None:
    """Wherever it has to be cut."""
    for character in ("\u00e4", "\u20ac", "\U0001f4be"):
        for before in range(5):
            name = (b"x" * before + character.encode() * 130)[:255].decode(errors="ignore").encode()
            version = version_path(b"/" + name, "20261123T031500.123456Z").rpartition(b"/")[2]
            assert len(version.decode()) and 252 <= len(version) <= 255


# --- row 13: the clock ------------------------------------------------------------------------------


@guarantee
@pytest.mark.parametrize("step", [0, -1, -86_400_000_000], ids=["standing", "going back", "days back"])
def test_each_of_many_changes_is_a_version_whatever_the_clock_says(
    pair: Pair, cases: Cases, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """They stay in the order in which they came."""
    clock = 1_700_000_000_000_000

    def now() -> str:
        nonlocal clock
        clock += step
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(clock // 1_000_000))
        return f"{moment}.{clock % 1_000_000:06}Z"

    monkeypatch.setattr(mirror_module, "now_stamp", now)
    changes = scaled(15, 300)
    for number in range(changes):
        pair.put("alpha", b"%d" % number)
        with cases.one():
            summary = pair.backup()
            assert not summary.superseded and summary.outcomes == {"pulled": 1}
    assert pair.versions("alpha") == [b"%d" % number for number in range(changes - 1)]
    stamps = [path.name[:23] for path in sorted(pair.mirror.history.iterdir())]
    assert len(set(stamps)) == changes


# --- row 19: times, modes, umask --------------------------------------------------------------------


@guarantee
def test_every_mode_is_kept_but_what_would_be_dangerous_or_unreadable(pair: Pair, cases: Cases) -> None:
    """Never setuid, setgid or sticky; the owner can always read."""
    chosen = random.Random(19).sample(range(0o10000), scaled(200, 4096 - 5))
    modes = {0o040, 0, 0o4755, 0o2755, 0o1777, *chosen}
    for mode in modes:
        os.chmod(pair.put(f"{mode:05o}", b"%d" % mode), mode)
    if os.geteuid() != 0:
        modes = {mode for mode in modes if mode & 0o400}
    pair.backup()
    for mode in modes:
        with cases.one():
            live = pair.live(f"{mode:05o}").stat()
            assert stat.S_IMODE(live.st_mode) == mode & 0o777 | 0o400


@guarantee
@pytest.mark.parametrize("mtime", [-1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32])
def test_each_time_that_the_protocol_can_tell_is_kept(pair: Pair, cases: Cases, mtime: int) -> None:
    """Version 3 of SFTP tells 32 bits without a sign; a time beyond them stops nothing."""
    os.utime(pair.put("alpha", b"one"), (mtime, mtime))
    on_a = int(os.stat(pair.path("alpha")).st_mtime)
    with cases.one():
        assert not pair.backup().failed
        expected = on_a if 0 <= on_a < 2**32 else on_a % 2**32
        assert int(pair.live("alpha").stat().st_mtime) == expected


@guarantee
@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
@pytest.mark.parametrize("there", [False, True])
def test_whatever_the_umask_nobody_else_gets_at_the_backup(
    tmp_path: Path, cases: Cases, umask: int, there: bool
) -> None:
    """`dest` and its state are for their owner only; modes of files are those of A; directories obey it."""
    before = os.umask(umask)
    try:
        pair = Pair(tmp_path)
        if there:
            pair.mirror.dest.mkdir(mode=0o755)
        for content in (b"one", b"two"):
            os.chmod(pair.put("dir/alpha", content), 0o664)
            with cases.one():
                assert not pair.backup().failed
                state = pair.mirror.dest / ".mdbackup"
                ours = [state, pair.mirror.files, pair.mirror.staging, pair.mirror.history]
                for directory in [*ours, *(state / "runs").iterdir()] + [pair.mirror.dest] * (not there):
                    assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory
                assert stat.S_IMODE(pair.live("dir").stat().st_mode) == 0o755 & ~umask
                assert stat.S_IMODE(pair.live("dir/alpha").stat().st_mode) == 0o664
                for path in pair.mirror.dest.rglob("*"):
                    assert not path.stat().st_mode & 0o7000
                    if below(bytes(path), bytes(state)):
                        assert not path.stat().st_mode & 0o777 & umask, path
    finally:
        os.umask(before)
    for server in pair.servers:
        server.stop()


# --- hard links that the kernel forbids -------------------------------------------------------------


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
        pair.build_index()
        run = pair.prepare()
        monkeypatch.setattr(Folder, "is_whole", lambda *_: pytest.fail("hashed"))
        assert pair.finish(run).outcomes == {"pulled": 51}
