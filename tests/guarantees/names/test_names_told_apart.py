"""Names that are one file here and two on the provider (row 18 of the policy table), tried hard."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup import name_collisions as clash
from tests.guarantees.disks.filesystems import MB, Folding, mounted
from tests.guarantees.names.true_index import check_true, content_at, unlink
from tests.guarantees.whatever_happens.soundness import below, contents_of, files_of
from tests.pair import Pair
from tests.torture import Cases, scaled

guarantee = pytest.mark.guarantee("9. Awkward names and file systems")


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
    run = pair.begin()
    before = sorted(os.listdir(run.folder))
    assert pair.archive(run).archived == 0
    assert sorted(os.listdir(run.folder)) == sorted([*before, "archived.jsonl", "stamp.json"])
    assert pair.commit(run).outcomes == {"pulled": 7}
