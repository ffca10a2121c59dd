"""Files that change on the provider between its index and the pull, and while they are read.

Whatever happens to a file there: B keeps what it has of it, or gets what the index tells; each other file
arrives; and the next run, with a new index, catches up.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup.plan import Limits
from airflow_mdbackup.scheme.backup.pull import PullSummary, pull
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.guarantees.transport.channels import DATA, HANDLE, PacketChannel
from tests.pair import Pair, ServerProcess
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("3. Changing sources")

LARGE = 3 << 20  # three windows of the reader below, so that most is asked for after the first answer
WINDOW = 1 << 20
LONG_AGO = 1_000_000_000  # Unix seconds; a file with this time says that it has not changed

Change = Callable[[Pair, bytes], None]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here."""
    monkeypatch.setattr(syscalls_module, "syncfs", lambda descriptor: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- what can happen to a file ----------------------------------------------------------------------


def grow(pair: Pair, path: bytes) -> None:
    with open(path, "ab") as file:
        file.write(b"more" * 1000)


def shrink(pair: Pair, path: bytes) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def truncate(pair: Pair, path: bytes) -> None:
    os.truncate(path, 0)


def rewrite(pair: Pair, path: bytes) -> None:
    """In place, from its end, with as many bytes."""
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(len(content) // 2)
        file.write(bytes(len(content) - len(content) // 2))


def rewrite_in_secret(pair: Pair, path: bytes) -> None:
    """Like :func:`rewrite`, and nothing but the bytes tells of it."""
    status = os.stat(path)
    rewrite(pair, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(pair: Pair, path: bytes) -> None:
    with open(path + b".new", "wb") as file:
        file.write(b"another file, put in its place")
    os.rename(path + b".new", path)


def vanish(pair: Pair, path: bytes) -> None:
    os.unlink(path)


def close(pair: Pair, path: bytes) -> None:
    os.chmod(path, 0)


def become_directory(pair: Pair, path: bytes) -> None:
    os.unlink(path)
    os.mkdir(path)
    with open(path + b"/below", "wb") as file:
        file.write(b"below a name that was a file")


def become_link(pair: Pair, path: bytes) -> None:
    os.unlink(path)
    os.symlink(pair.path("steady"), path)


def become_link_to_itself(pair: Pair, path: bytes) -> None:
    os.unlink(path)
    os.symlink(path, path)


def become_link_to_nothing(pair: Pair, path: bytes) -> None:
    os.unlink(path)
    os.symlink(b"nothing", path)


def become_link_to_endless(pair: Pair, path: bytes) -> None:
    os.unlink(path)
    os.symlink(b"/dev/zero", path)


def become_link_to_directory(pair: Pair, path: bytes) -> None:
    os.unlink(path)
    os.symlink(b"..", path)


def move_behind_link(pair: Pair, path: bytes) -> None:
    """The same bytes are there still, elsewhere."""
    os.rename(path, path + b".moved")
    os.symlink(path + b".moved", path)


# What becomes of a file if it is done before the file is opened, and if after its first bytes were read: who
# has a file open may read it to its end, wherever its name is now.
CHANGES: dict[Change, tuple[str, str]] = {
    grow: ("changed", "pulled"),
    shrink: ("changed", "changed"),
    truncate: ("changed", "changed"),
    rewrite: ("changed", "changed"),
    rewrite_in_secret: ("corrupt", "corrupt"),
    replace: ("changed", "pulled"),
    vanish: ("vanished", "pulled"),
    close: ("denied", "pulled"),
    become_directory: ("failed", "pulled"),
    become_link: ("corrupt", "pulled"),  # to a file that has not changed, for what the server tells
    become_link_to_itself: ("vanished", "pulled"),  # as OpenSSH calls it
    become_link_to_nothing: ("vanished", "pulled"),
    become_link_to_endless: ("failed", "pulled"),
    become_link_to_directory: ("failed", "pulled"),
    move_behind_link: ("pulled", "pulled"),
}
WORDS = {
    become_directory: "not a regular file but a directory",
    become_link_to_directory: "not a regular file but a directory",
    become_link_to_endless: "not a regular file but a device",
}


# --- a run in which it happens ----------------------------------------------------------------------


def put_old(pair: Pair, name: str, content: bytes) -> bytes:
    """Write a file on A that has not been changed for years."""
    path = pair.put(name, content)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def planned(pair: Pair) -> Run:
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    pair.plan = pair.diff(run, limits=Limits(share=1.0))
    return run


def pull_while(pair: Pair, run: Run, change: Callable[[int, int, bytes], Iterator[bytes]]) -> PullSummary:
    """Pull, and let ``change`` see each packet before the reader does; see :class:`PacketChannel`."""
    server = ServerProcess(pair.user)
    try:
        wire = PacketChannel(server.channel, change)
        return pull(pair.mirror, run, 0, lambda: Reader(wire, window=WINDOW))
    finally:
        server.stop()


def first_answer(kind: int, act: Callable[[], Any]) -> Callable[[int, int, bytes], Iterator[bytes]]:
    """Return what acts once, before the first answer of a kind is handed on."""
    done = False

    def change(_: int, came: int, whole: bytes) -> Iterator[bytes]:
        nonlocal done
        if came == kind and not done:
            done = True
            act()
        yield whole

    return change


def results(run: Run) -> dict[bytes, Result]:
    return {os.path.basename(each.path): each for each in read_records(run.results(0), Result)}


def check_caught_up(pair: Pair) -> None:
    """Make sure that the next run brings whatever is there now, and that B then has it."""
    for path in pair.index_a():
        if os.path.isfile(path) and not os.path.islink(path):
            os.chmod(path, 0o644)
    for folder, _, names in os.walk(os.fsencode(pair.a)):
        for name in names:
            if os.path.islink(folder + b"/" + name):  # no index has them
                os.unlink(folder + b"/" + name)
    summary = pair.backup(limits=Limits(share=1.0))
    assert summary.failed == 0
    assert pair.index_b() == pair.index_a()
    for path in pair.index_a():
        with open(path, "rb") as file:
            assert pair.live(os.path.relpath(path, os.fsencode(pair.a))).read_bytes() == file.read()


@pytest.mark.parametrize("size", [5, 3000, 400_000], ids=["tiny", "small", "large"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_before_it_is_read_hurts_no_other(
    limited_pair: Pair, change: Change, size: int, cases: Cases
) -> None:
    """What B has of it stays, in the mirror and in the index, until the next run."""
    pair = limited_pair
    for name in ("folder/before", "folder/f", "folder/later"):
        put_old(pair, name, b"1")  # the same, which is not to matter
    put_old(pair, "steady", b"unchanged for years")
    pair.backup()
    content = random.Random(size).randbytes(size)
    path = put_old(pair, "folder/f", content)
    others = {"folder/before": b"2", "folder/later": b"3"}
    for name, other in others.items():
        put_old(pair, name, other)
    with cases.one():
        run = planned(pair)
        change(pair, path)
        pair.pull(run, pair.plan)
        summary = pair.finish(run)
        outcome = CHANGES[change][0]
        told = results(run)[b"f"]
        assert told.outcome == outcome, told
        assert WORDS.get(change) in (None, told.detail)
        assert summary.outcomes.pop(outcome) == (3 if outcome == "pulled" else 1)
        assert outcome == "pulled" or summary.outcomes == {"pulled": 2}
        assert summary.failed == (outcome in ("corrupt", "denied", "failed"))
        old = outcome != "pulled"
        assert pair.live("folder/f").read_bytes() == (b"1" if old else content)
        assert pair.versions("folder/f") == ([] if old else [b"1"])
        assert (pair.index_b()[path] == pair.index_a()[path]) != old
        assert {name: pair.live(name).read_bytes() for name in others} == others
        assert list(pair.mirror.staging.glob("*")) == []
        check_caught_up(pair)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_while_it_is_read_hurts_no_other(
    limited_pair: Pair, change: Change, cases: Cases
) -> None:
    """After its first block has come. It is the index's content, whole, or it is none."""
    pair = limited_pair
    put_old(pair, "f", b"1")
    put_old(pair, "steady", b"unchanged for years")
    pair.backup()
    content = random.Random(1).randbytes(LARGE)
    path = put_old(pair, "f", content)
    pair.put("later", b"2")
    pair.put("later too", b"3" * 500_000)
    with cases.one():
        run = planned(pair)
        pull_while(pair, run, first_answer(DATA, lambda: change(pair, path)))
        summary = pair.finish(run)
        outcome = CHANGES[change][1]
        assert results(run)[b"f"].outcome == outcome
        assert pair.live("later").read_bytes() == b"2"
        assert pair.live("later too").read_bytes() == b"3" * 500_000
        assert pair.live("f").read_bytes() == (content if outcome == "pulled" else b"1")
        assert (pair.index_b()[path] == pair.index_a()[path]) == (outcome == "pulled")
        assert summary.failed == (outcome == "corrupt")
        assert list(pair.mirror.staging.glob("*")) == []
        check_caught_up(pair)


@pytest.mark.parametrize("change", [grow, shrink, truncate, rewrite], ids=lambda change: change.__name__)
def test_a_small_file_that_changes_when_it_has_been_opened_hurts_no_other(
    pair: Pair, change: Change, cases: Cases
) -> None:
    """Its size is told before, and its bytes come after, or the other way round."""
    content = random.Random(2).randbytes(100_000)
    path = put_old(pair, "f", content)
    pair.put("later", b"2")
    with cases.one():
        run = planned(pair)
        pull_while(pair, run, first_answer(HANDLE, lambda: change(pair, path)))
        assert pair.finish(run).outcomes == {"changed": 1, "pulled": 1}
        assert pair.live("later").read_bytes() == b"2" and not pair.live("f").exists()
        check_caught_up(pair)


@pytest.mark.parametrize("spoilt", [LARGE, LARGE + 100_000, LARGE - 100_000, 1000], ids=str)
def test_a_file_that_is_back_as_it_was_when_it_is_read_again_is_pulled(
    pair: Pair, spoilt: int, cases: Cases
) -> None:
    """Such as one that is written in place, and then again; nothing stays of what was read first."""
    content = random.Random(3).randbytes(LARGE)
    path = put_old(pair, "f", content)
    turns = 0

    def change(_: int, kind: int, whole: bytes) -> Iterator[bytes]:
        nonlocal turns
        if kind == HANDLE:
            turns += 1
            with open(path, "wb") as file:
                file.write(bytes(spoilt) if turns == 1 else content)
        yield whole

    with cases.one():
        run = planned(pair)
        assert pull_while(pair, run, change).outcomes == {"pulled": 1}
        assert turns == 2 and pair.finish(run).failed == 0
        assert pair.live("f").read_bytes() == content


def test_a_file_that_is_another_one_whenever_it_is_read_has_changed(pair: Pair, cases: Cases) -> None:
    """Whatever its time says."""
    path = put_old(pair, "f", bytes(LARGE))

    def change(_: int, kind: int, whole: bytes) -> Iterator[bytes]:
        if kind == HANDLE:
            os.truncate(path, os.path.getsize(path) - 1)
            os.utime(path, (LONG_AGO, LONG_AGO))
        yield whole

    with cases.one():
        run = planned(pair)
        assert pull_while(pair, run, change).outcomes == {"changed": 1}
        assert pair.finish(run).failed == 0


def test_a_file_that_grows_for_ever_is_read_to_an_end(pair: Pair, cases: Cases) -> None:
    """It grows faster than it is read. What it held when it was opened is all that is asked for."""
    path = put_old(pair, "f", bytes(LARGE))
    pair.put("later", b"2")

    def change(_: int, kind: int, whole: bytes) -> Iterator[bytes]:
        if kind == DATA:
            os.truncate(path, os.path.getsize(path) + 2 * len(whole))
        yield whole

    with cases.one():
        run = planned(pair)
        summary = pull_while(pair, run, change)
        assert summary.outcomes == {"pulled": 2} and summary.transferred == LARGE + 1
        assert pair.finish(run).failed == 0 and pair.live("f").read_bytes() == bytes(LARGE)
        assert os.path.getsize(path) > 2 * LARGE
    with cases.one():  # it has grown since the index, and is read twice in vain
        os.truncate(path, 2 * LARGE)
        pair.build_index()
        os.truncate(path, 2 * LARGE + 1)
        run = pair.new_run()
        pair.fetch(run)
        pair.plan = pair.diff(run)
        summary = pull_while(pair, run, change)
        assert summary.outcomes == {"changed": 1} and summary.transferred < 10 * LARGE


def test_a_file_that_changes_in_three_runs_in_a_row_fails_the_third(pair: Pair, cases: Cases) -> None:
    """While it is read, each time; whenever it holds still it is brought, and counted from the start."""
    number = 0

    def run(*, still: bool = False) -> tuple[str, int]:
        nonlocal number
        number += 1
        path = pair.put("busy", b"%07d" % number * 100_000)
        pair.put("other", b"%d" % number)
        run = planned(pair)
        pull_while(pair, run, first_answer(DATA, lambda: None if still else rewrite(pair, path)))
        failed = pair.finish(run).failed
        assert pair.live("other").read_bytes() == b"%d" % number
        return results(run)[b"busy"].outcome, failed

    with cases.one():
        assert [run(), run()] == [("changed", 0)] * 2
        assert run(still=True) == ("pulled", 0)
        assert [run() for _ in range(4)] == [("changed", 0), ("changed", 0), ("changed", 1), ("changed", 1)]
        assert run(still=True) == ("pulled", 0)
        assert run() == ("changed", 0)


@pytest.mark.parametrize("seed", range(scaled(3, 40)))
def test_many_files_that_change_at_once_hurt_no_other(limited_pair: Pair, seed: int, cases: Cases) -> None:
    """A third of them, before and while others are read; in two runs, and a third one brings all."""
    pair = limited_pair
    chance = random.Random(seed)
    put_old(pair, "steady", b"unchanged for years")
    for round_ in range(2):
        before = {path: path.read_bytes() for path in pair.mirror.files.rglob("*") if path.is_file()}
        names = [f"{number % 7}/{number:03}" for number in range(150)]
        contents = {}
        for name in names:
            contents[name] = chance.randbytes(chance.choice([10, 2000, 70_000, 300_000]))
            put_old(pair, name, contents[name])
        run = planned(pair)
        hit = {name: chance.choice(list(CHANGES)) for name in names if chance.random() < 1 / 3}
        waiting = list(hit.items())
        chance.shuffle(waiting)
        for name, change in waiting[:20]:
            change(pair, pair.path(name))
        del waiting[:20]

        pull_while(pair, run, _acting(pair, waiting, chance))
        pair.finish(run)
        told = {each.path: each for each in read_records(run.results(0), Result)}
        for name in names:
            with cases.one():
                outcome = told[pair.path(name)].outcome
                allowed = {"pulled", *CHANGES[hit[name]]} if name in hit else {"pulled"}
                if hit.get(name) is rewrite_in_secret:
                    allowed.add("changed")  # for a moment, its time tells of it
                assert outcome in allowed, (name, hit.get(name))
                live = pair.live(name)
                if outcome == "pulled":
                    assert live.read_bytes() == contents[name]
                else:
                    assert (live.read_bytes() if live.exists() else None) == before.get(live)
        for path in pair.index_a():
            if os.path.islink(path) or os.path.isdir(path):
                become_file(path)
            elif os.path.exists(path):
                os.chmod(path, 0o644)
        if round_:
            check_caught_up(pair)


def _acting(
    pair: Pair, waiting: list[tuple[str, Change]], chance: random.Random
) -> Callable[[int, int, bytes], Iterator[bytes]]:
    """Return what does to files what waits for them, now and then while bytes arrive."""

    def act(_: int, kind: int, whole: bytes) -> Iterator[bytes]:
        if kind == DATA and waiting and chance.random() < 0.5:
            name, change = waiting.pop()
            change(pair, pair.path(name))
        yield whole

    return act


def become_file(path: bytes) -> None:
    """Take away what stands in the place of a file."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        os.unlink(path + b"/below")
        os.rmdir(path)
