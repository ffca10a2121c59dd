"""A provider that attacks: its names, its index and its md5s get it nothing but failures of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import BackupError, DestinationRefused, IndexRefused
from airflow_mdbackup.scheme.index.canonical import format_line
from tests.guarantees.hostile.attack import (
    MD5,
    NAMES,
    TRAVERSALS,
    everything_in,
    index_file,
    is_harmless,
    snapshot,
    write_index,
)
from tests.guarantees.whatever_happens.soundness import check_sound, digest
from tests.pair import Pair
from tests.torture import Cases

pytestmark = pytest.mark.guarantee("7. Hostile provider")


# --- where names lead -------------------------------------------------------------------------------


@pytest.mark.parametrize("escaped", [False, True])
def test_no_path_of_an_index_leads_out_of_the_mirror(
    pair: Pair, tmp_path: Path, cases: Cases, escaped: bool
) -> None:
    """Each refuses the whole index, before anything is fetched; what there is stays, and so does the rest."""
    good = pair.put("good", b"1")
    pair.backup()
    before, outside = everything_in(pair.mirror.files), snapshot(tmp_path, pair.mirror.dest)
    del outside[index_file(pair)]
    for path in TRAVERSALS:
        if escaped and path.endswith(b"\r"):
            continue  # escaped, it is a name
        with cases.one():
            line = format_line(path, MD5) if escaped else b"%s  %s\n" % (MD5, path)
            end = b"# mdbackup end format=1 files=2 unreadable=0\n"
            index_file(pair).write_bytes(format_line(good, digest(b"1")) + line + end)
            with pytest.raises(IndexRefused, match="line 2: ") as caught:
                pair.fetch(pair.new_run(), still=0.0)
            assert is_harmless(str(caught.value))
            assert everything_in(pair.mirror.files) == before
    now = snapshot(tmp_path, pair.mirror.dest)
    del now[index_file(pair)]
    assert now == outside


def test_names_that_look_like_something_else_are_only_names(pair: Pair, tmp_path: Path, cases: Cases) -> None:
    """Escapes, other separators, our own file names: twice through the whole scheme, byte for byte."""
    outside = None
    for content in (b"one ", b"two "):
        for name in NAMES:
            pair.put(b"dir/" + name, content + name)
            pair.put(b"sub/" + name + b"/" + name, content + name)
        outside = snapshot(tmp_path, pair.mirror.dest)
        outside.pop(index_file(pair), None)
        assert pair.backup(may_trip=True).failed == 0
    now = snapshot(tmp_path, pair.mirror.dest)
    assert {path: what for path, what in now.items() if path != index_file(pair)} == outside
    for name in NAMES:
        with cases.one():
            for path in (b"dir/" + name, b"sub/" + name + b"/" + name):
                assert pair.live(path).read_bytes() == b"two " + name
    assert set(os.listdir(os.fsencode(pair.live("dir")))) == {*NAMES, b".old"}
    assert len(os.listdir(pair.live("dir/.old"))) == len(NAMES)
    assert pair.index_b() == pair.index_a() and len(pair.index_b()) == 2 * len(NAMES)
    check_sound(pair)


def test_names_are_as_exact_in_records_as_in_the_index(pair: Pair, cases: Cases) -> None:
    """Newlines and all: in the plan, what to forget, the results and the history, one line for each."""
    for name in NAMES:
        pair.put(b"dir/" + name, name)
    pair.put("stays", b"1")
    pair.backup()
    for name in NAMES:
        os.unlink(pair.path(b"dir/" + name))
    assert pair.backup(may_trip=True).forgotten == len(NAMES)
    expected = {pair.path(b"dir/" + name) for name in NAMES}
    run = pair.mirror.run("manual__2")
    assert len(run.forget.read_bytes().splitlines()) == len(NAMES) + 1
    assert {change.path for change in pair.history()[-1]} == expected
    assert set(pair.index_b()) == {pair.path("stays")}
    cases.add(len(NAMES))


@pytest.mark.parametrize("first", ["a", "a/b"])
def test_a_name_that_is_a_directory_of_another_refuses_the_index(
    pair: Pair, cases: Cases, first: str
) -> None:
    """In either order, and with names between them that only begin alike."""
    second = "a/b" if first == "a" else "a"
    with cases.one():
        lines = b"".join(format_line(pair.path(name), MD5) for name in (first, "a-b", "a!", second, "a0"))
        index_file(pair).write_bytes(lines + b"# mdbackup end format=1 files=5 unreadable=0\n")
        with pytest.raises(IndexRefused, match="also the directory of another"):
            pair.fetch(pair.new_run(), still=0.0)


@pytest.mark.parametrize("name", [b".old", b".old/x", b"a/.old/b", b".old/.old"])
def test_nobody_but_us_writes_versions(pair: Pair, cases: Cases, name: bytes) -> None:
    """A provider that names a version could replace it."""
    with cases.one():
        write_index(pair, {pair.path(name): MD5})
        run = pair.new_run()
        pair.fetch(run)
        with pytest.raises(IndexRefused, match="reserved"):
            pair.diff(run)


# --- what is planted on B ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["files", ".mdbackup", "staging", "runs", "history"])
def test_a_symlink_in_place_of_a_directory_of_ours_is_refused(
    pair: Pair, tmp_path: Path, canary: bytes, cases: Cases, place: str
) -> None:
    """Even to a directory of the same form: what it leads to is not touched."""
    pair.put("alpha", b"1")
    pair.backup()
    pair.put("alpha", b"2")
    within = pair.mirror.dest if place in ("files", ".mdbackup") else pair.mirror.dest / ".mdbackup"
    real = within / place
    moved = tmp_path / "moved"
    real.rename(moved)
    real.symlink_to(moved)
    before = snapshot(moved, tmp_path)
    with cases.one(), pytest.raises(DestinationRefused, match="is a symlink"):
        pair.backup()
    assert snapshot(moved, tmp_path) == before


@pytest.mark.parametrize("name", ["", "received.md5", "provider.md5", "plan.json.tmp", "items.jsonl.tmp"])
def test_a_symlink_in_a_run_directory_is_not_written_through(
    pair: Pair, tmp_path: Path, canary: bytes, cases: Cases, name: str
) -> None:
    """The run fails, or takes the link away."""
    pair.put("alpha", b"1")
    pair.build_index()
    pair.mirror.claim()
    run = pair.mirror.run("manual__1")
    planted = run.folder / name
    if name:
        run.folder.mkdir()
    planted.symlink_to(tmp_path / "outside" / ("canary" if name else "."))
    with cases.one(), pytest.raises((OSError, DestinationRefused), match=r"symlink|symbolic links"):
        pair.finish(pair.prepare())


@pytest.mark.parametrize("what", ["parent", "leaf", "staged", "part", "version", "source"])
def test_a_symlink_in_the_mirror_or_in_staging_leads_nowhere(
    pair: Pair, tmp_path: Path, canary: bytes, cases: Cases, what: str
) -> None:
    """Neither is written through it, nor is what it leads to taken for content, whatever md5 A names."""
    outside = tmp_path / "outside"
    stolen = digest(canary)
    large = os.urandom(300_000)
    pair.put("dir/leaf", b"one")
    pair.put("good", b"one!")
    pair.backup()
    pair.put("dir/leaf", b"two")
    pair.put("dir/large", large)
    pair.put("good", b"two!")
    pair.build_index()
    entries = {**pair.index_a(), pair.path("stolen"): stolen, pair.path("dir/canary"): stolen}
    if what == "parent":
        pair.live("dir").rename(pair.live("kept"))
        pair.live("dir").symlink_to(outside)
    elif what == "leaf":
        pair.live("dir/canary").symlink_to(outside / "canary")
    elif what == "staged":
        (pair.mirror.staging / stolen.decode()).symlink_to(outside / "canary")
        (pair.mirror.staging / digest(b"two").decode()).symlink_to(outside / "canary")
    elif what == "part":
        pair.part(stolen).symlink_to(outside / "canary")
        pair.part(digest(large)).symlink_to(outside / "canary")
    elif what == "version":
        (pair.live("dir") / ".old").symlink_to(outside)
    else:
        pair.live("good").unlink()
        pair.live("good").symlink_to(outside / "canary")
        with index_file(pair).open("rb") as file:
            assert file.read(1)
        index_b = {**pair.index_b(), pair.path("good"): stolen}
        lines = b"".join(format_line(path, md5) for path, md5 in sorted(index_b.items()))
        end = b"# mdbackup end format=1 files=%d unreadable=0\n" % len(index_b)
        pair.mirror.index.write_bytes(lines + end)
    write_index(pair, entries)
    with cases.one():
        try:
            pair.finish(pair.prepare(may_trip=True))
            assert pair.live("stolen").exists() is False
        except (OSError, BackupError) as error:
            assert what in ("staged", "part"), error  # nobody but us has anything to do there


# --- what an md5 gets -------------------------------------------------------------------------------


def test_the_md5_of_another_providers_file_gets_nothing_of_it(
    pair: Pair, tmp_path: Path, cases: Cases
) -> None:
    """Rows 7 and 8: content is shared within one dest only, by index, live path or staging."""
    secret = b"what only the first provider may have"
    pair.put("secret", secret)
    pair.put("staged", b"staged " + secret)
    pair.backup()
    pair.staged(digest(b"staged " + secret)).write_bytes(b"staged " + secret)
    (tmp_path / "second").mkdir()
    other = Pair(tmp_path / "second")
    try:
        other.put("there", b"other bytes")
        other.build_index()
        wanted = {other.path("there"): digest(secret), other.path("absent"): digest(secret)}
        wanted |= {pair.path("secret"): digest(secret), other.path("staged"): digest(b"staged " + secret)}
        pair_a = pair.a.rename(tmp_path / "hidden")  # both servers see all of this machine
        write_index(other, wanted)
        with cases.one():
            outcome = other.finish(other.prepare(allow_empty=True))
            assert outcome.outcomes == {"vanished": 3, "changed": 1}
            assert secret not in everything_in(other.mirror.dest)
        pair_a.rename(pair.a)
    finally:
        for server in other.servers:
            server.stop()


def test_within_a_dest_an_md5_copies_only_what_the_same_provider_still_has_there(
    pair: Pair, cases: Cases
) -> None:
    """Not a file that a person put into the mirror, nor one that the provider gave up, nor a version."""
    pair.put("forgotten", b"forgotten")
    pair.put("versioned", b"old")
    pair.put("stays", b"stays")
    pair.backup()
    os.unlink(pair.path("forgotten"))
    pair.put("versioned", b"new")
    pair.backup(may_trip=True)
    by_hand = pair.live("by-hand")
    by_hand.write_bytes(b"by hand")
    pair.build_index()
    contents = {"x1": b"forgotten", "x2": b"old", "x3": b"by hand", "x4": b"stays"}
    write_index(pair, {**pair.index_a(), **{pair.path(n): digest(c) for n, c in contents.items()}})
    with cases.one():
        pair.put("x4", b"not looked at")
        assert pair.finish(pair.prepare()).outcomes == {"vanished": 3, "copied": 1}
        assert pair.live("x4").read_bytes() == b"stays"
        assert not any(pair.live(name).exists() for name in ("x1", "x2", "x3"))
