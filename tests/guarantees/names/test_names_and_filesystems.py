"""Policy rows 10, 12, 13, 18 and 19, tried hard, and file systems that lack what the usual ones have."""

from __future__ import annotations

import os
import random
import shutil
import stat
import time
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.history.changes import ChangeKind
from airflow_mdbackup.scheme.store import mirror as mirror_module
from airflow_mdbackup.scheme.store.version_names import version_path
from tests.guarantees.disks.filesystems import MB, mounted
from tests.guarantees.names.true_index import content_at
from tests.guarantees.whatever_happens.soundness import below, check_sound, digest, files_of
from tests.pair import Pair
from tests.torture import Cases, scaled

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
guarantee = pytest.mark.guarantee("9. Awkward names and file systems")


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
