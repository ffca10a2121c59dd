"""Lost or damaged history is rebuilt from what is left."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.backup import cleanup as clean_module
from airflow_mdbackup.scheme.errors import ConsumerIndexDamaged
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.history.consumer_index import consumer_index
from airflow_mdbackup.scheme.history.forget import forget
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.prune import KeepRules, pruning
from airflow_mdbackup.scheme.recovery.rebuild_history import rebuild
from airflow_mdbackup.scheme.recovery.restore import read_content
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.takeover.import_versions import import_versions
from airflow_mdbackup.scheme.takeover.survey import SourceTree
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.kept import Kept, files_in
from tests.pair import Pair, md5
from tests.torture import LONG, Cases, scaled
from tests.unit.recovery.somebody import Random, back, files_of_a, mdbackup


def lose(pair: Pair, choose: random.Random) -> None:
    """Lose some of the history: whole files, ends of files, headers."""
    files = commits(pair.mirror)
    for path in choose.sample(files, choose.randint(1, max(1, len(files) // 3))):
        lines = path.read_bytes().splitlines(keepends=True)
        match choose.randint(0, 2):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(b"".join(lines[: choose.randint(1, len(lines))]) + b"{")
            case _:
                path.write_bytes(b"spoilt\n" + b"".join(lines[1:]))


@pytest.mark.parametrize("lost", ["told anew", "moved away", "damaged"])
def test_no_run_deletes_a_version_because_its_history_has_another_name(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Runs clean up what earlier ones archived in vain; no file name shows whether it was in vain."""
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 2)
    for content in (b"A", b"B", b"A"):
        pair.put("file", content)
        pair.backup()
    assert pair.versions("file") == [b"A", b"B"]
    for path in commits(pair.mirror)[: 2 if lost == "damaged" else 3]:  # a run needs the last one whole
        if lost == "damaged":
            path.write_bytes(b"spoilt")
        else:
            path.rename(pair.mirror.dest.with_name(path.name))
    if lost == "told anew":
        rebuild(pair.mirror)
    for number in range(6):
        pair.put("other", b"%d" % number)
        pair.backup()
    assert len(list((pair.mirror.dest / ".mdbackup" / "runs").iterdir())) <= 3
    assert pair.versions("file") == [b"A", b"B"]


def test_a_version_stays_of_each_commit_of_a_run_that_was_cleared(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It committed twice, under two stamps; what it archived is of the first one."""
    monkeypatch.setattr(clean_module, "_MAX_RUNS", 1)
    for name in ("first", "second"):
        pair.put(name, b"A")
    pair.backup()
    for name in ("first", "second"):
        pair.put(name, b"B " + name.encode())
    run = pair.begin()
    pair.archive(run)
    with monkeypatch.context() as patch:
        put = Tree.put

        def picky(tree: Tree, source: Folder, file: bytes, path: bytes) -> None:
            if path.endswith(b"/second"):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            put(tree, source, file, path)

        patch.setattr(Tree, "put", picky)
        assert pair.commit(run).outcomes == {"pulled": 1, "failed": 1}
    run.done.unlink()
    pair.commit(run)
    pair.put("first", b"A")
    for number in range(4):
        pair.put("other", b"%d" % number)
        pair.backup()
    assert not run.folder.exists()
    assert pair.versions("first") == [b"A", b"B first"]


@pytest.mark.guarantee("11. Getting it back")
@pytest.mark.parametrize("seed", range(5 if not LONG else 200))
def test_lost_parts_of_a_random_history_are_rebuilt(
    pair: Pair, cases: Cases, tmp_path: Path, seed: int
) -> None:
    """States before the loss are restored exactly; later ones completely, rather with too much."""
    somebody, choose = Random(pair, seed), random.Random(seed)
    snapshots: list[tuple[str, dict[bytes, Kept]]] = []
    for _ in range(scaled(12, 40)):
        somebody.work()
        pair.backup(allow_empty=True)
        snapshots.append((pair.mirror.last_commit(), files_of_a(pair)))
    lose(pair, choose)
    with Timeline(pair.mirror) as past:
        exact = {m.stamp for m in past.moments} - {gap.after for gap in past.gaps if gap.within}
        gaps = past.gaps
    rebuilt = rebuild(pair.mirror)
    assert rebuilt.gaps == len(gaps) > 0 and not rebuilt.unclear
    assert rebuild(pair.mirror).gaps == 0
    for number, (stamp, kept) in enumerate(snapshots):
        target = tmp_path / str(number)
        with cases.one():
            back(pair, target, stamp)
            came = files_in(target) if target.exists() else {}
            if stamp in exact and stamp <= gaps[0].after:
                assert came == kept
            elif (stamp in exact and stamp > gaps[-1].after) or (len(gaps) == 1 and pair_knows(pair, stamp)):
                assert kept.items() <= came.items()


def pair_knows(pair: Pair, stamp: str) -> bool:
    """Whether there is a commit that is not after a stamp: when lost first ones were is not known."""
    with Timeline(pair.mirror) as past:
        return past.moment_at(stamp) is not None


def test_runs_continue_a_rebuilt_history(pair: Pair, tmp_path: Path) -> None:
    """None was left: versions have their times, damaged files stay, and the next run succeeds."""
    for content in (b"1", b"2", b"3"):
        pair.put("changed", content)
        pair.put("of " + content.decode(), content)
        pair.backup()
    files = commits(pair.mirror)
    files[0].unlink()
    files[1].write_bytes(b"spoilt")
    files[2].write_bytes(files[2].read_bytes()[:-3])
    by_hand = pair.live(".old/whose")
    by_hand.write_bytes(b"")
    names = sorted(path.name for path in pair.mirror.history.iterdir())
    assert rebuild(pair.mirror, dry_run=True).gaps == 2
    assert sorted(path.name for path in pair.mirror.history.iterdir()) == names
    status, told, said = mdbackup("rebuild", "--dest", str(pair.mirror.dest))
    assert status == 0 and "added" in told and str(by_hand) in said
    assert len(list(pair.mirror.history.glob("*.damaged"))) == 2
    assert mdbackup("rebuild", "--dest", str(pair.mirror.dest))[2] == "Nothing is missing\n"
    pair.put("changed", b"4")
    pair.backup()
    with Timeline(pair.mirror) as past:
        assert not past.problems
        held = [content for content in past.contents() if content.path == pair.path("changed")]
        assert [content.md5 for content in held] == [md5(b"%d" % n) for n in (1, 2, 3, 4)]
        assert all(pair.mirror.tree().has_file(content.places[0]) for content in held)
    status, _, said = mdbackup("restore", "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "back"))
    assert status == 0 and "4 restored" in said


def test_a_lost_first_commit_is_rebuilt_as_of_when_the_backup_was_set_up(pair: Pair, tmp_path: Path) -> None:
    """Else a time between it and the second is before all backups. If it is unknown, the message says so."""
    pair.put("first", b"1")
    pair.backup()
    between = f"{datetime.now(UTC).isoformat()}"
    pair.put("second", b"2")
    pair.backup()
    commits(pair.mirror)[0].unlink()
    dest = "--dest", str(pair.mirror.dest)
    words = "restore", *dest, "--as-of", between, "--to", str(tmp_path / "back")
    status, _, said = mdbackup(*words)
    assert status == 2 and "no known backup is as old as" in said and "mdbackup rebuild" in said
    rebuild(pair.mirror)
    rebuilt, second = commits(pair.mirror)
    status, _, said = mdbackup(*words)
    assert status == 0 and "1 restored" in said and "there may be too many files" in said
    assert list(files_in(tmp_path / "back")) == [pair.path("first")]
    rebuilt.unlink()
    os.utime(pair.mirror.dest / ".mdbackup" / "provider-id")  # as if written by hand
    rebuild(pair.mirror)
    status, _, said = mdbackup(*words)
    assert status == 2 and "no known backup is as old as" in said
    assert "it includes what was there before" in said
    assert commits(pair.mirror)[1:] == [second]


def states(pair: Pair, stamps: list[str]) -> dict[str, dict[bytes, bytes]]:
    """Return what history says about some times: the md5 of each path that can be restored."""
    found: dict[str, dict[bytes, bytes]] = {}
    with Timeline(pair.mirror) as past:
        for stamp in stamps:
            moment = past.moment_at(stamp)
            contents = past.state(moment) if moment is not None else iter(())
            there = [c for c in contents if read_content(pair.mirror, past, c) is not None]
            found[stamp] = {content.path: content.md5 for content in there}
    return found


def imported(pair: Pair, tree: Path, stamp: str, choose: random.Random) -> None:
    for _ in range(3):
        file = tree.joinpath(*choose.choices(Random.NAMES, k=choose.randint(1, 2)))
        if not file.exists() and not any(parent.is_file() for parent in file.parents):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(choose.randbytes(9))
    import_versions(pair.mirror, SourceTree(tree, os.fsencode(pair.a)), lambda path: (path, stamp))


@pytest.mark.parametrize("seed", range(2 if not LONG else 100))
def test_rebuilding_loses_no_state_whatever_operators_did(pair: Pair, tmp_path: Path, seed: int) -> None:
    """They forgot, imported and pruned. Each state is the index of that time; no file of it is lost."""
    somebody, choose = Random(pair, seed), random.Random(seed)
    indexes: dict[str, dict[bytes, bytes]] = {}
    for number in range(12):
        somebody.work()
        pair.backup(allow_empty=True)
        indexes[pair.mirror.last_commit()] = pair.index_b()
        match choose.randint(0, 9):
            case 0 | 1 if pair.index_b():
                gone = choose.choice(sorted(pair.index_b()))
                forget(pair.mirror, lambda path, gone=gone: path == gone)  # type: ignore[misc]
            case 2 | 3 | 4 | 5:
                imported(pair, tmp_path / str(number), "20200101T000000.000000Z", choose)
            case 6:
                with pruning(pair.mirror, Selection(), KeepRules(last=1), carry_out=True) as (_, versions):
                    assert all(version.content.until for version in versions)
        indexes[pair.mirror.last_commit()] = pair.index_b()
        check_sound(pair)
    for stamp, state in states(pair, list(indexes)).items():
        assert state.items() <= indexes[stamp].items()
    lose(pair, choose)
    before = states(pair, list(indexes))
    rebuild(pair.mirror)
    after = states(pair, list(indexes))
    for stamp, index in indexes.items():
        assert before[stamp].items() & index.items() <= after[stamp].items()
    somebody.work()
    pair.backup(allow_empty=True)
    with Timeline(pair.mirror) as past:
        assert not past.problems
    assert states(pair, ["9"])["9"] == pair.index_b()


def test_rebuilding_makes_nobody_trust_an_index_edited_by_hand(pair: Pair) -> None:
    """Where no copy of it is left: one out of order is sorted by the next run, a damaged one is refused."""
    for name in ("a", "b", "c"):
        pair.put(name, name.encode())
    pair.backup()
    commits(pair.mirror)[0].unlink()
    pair.mirror.committed.unlink()
    *lines, end = pair.mirror.index.read_bytes().splitlines(keepends=True)
    pair.mirror.index.write_bytes(b"".join(lines))
    with pytest.raises(ConsumerIndexDamaged):
        rebuild(pair.mirror)
    assert not commits(pair.mirror)
    pair.mirror.index.write_bytes(b"".join([*reversed(lines), end]))
    rebuild(pair.mirror)
    assert states(pair, ["9"])["9"] == {pair.path(name): md5(name.encode()) for name in ("a", "b", "c")}
    with pair.mirror.lock("test"):
        assert consumer_index(pair.mirror, pair.mirror.scratch_index) == pair.mirror.scratch_index
    assert pair.backup().outcomes == {}


def test_rebuilding_that_is_cut_off_is_resumed(pair: Pair) -> None:
    for content in (b"1", b"2", b"3"):
        pair.put("changed", content)
        pair.backup()
    for path in commits(pair.mirror):
        path.unlink()
    rebuild(pair.mirror)
    whole = [path.read_bytes() for path in commits(pair.mirror)]
    assert len(whole) == 3
    for kept in range(3):
        for path in commits(pair.mirror)[kept:]:
            path.unlink()
        rebuild(pair.mirror)
        assert [path.read_bytes() for path in commits(pair.mirror)] == whole
        with Timeline(pair.mirror) as past:
            assert not past.problems


def test_texts_are_compared(pair: Pair) -> None:
    """Between the last two versions, or any two times; for binary files it only says that they differ."""
    stamps = []
    for text in (b"one\n", b"one\ntwo\n", b"one\nthree\x1b\n", b"\0"):
        pair.put("text", text)
        pair.backup()
        stamps.append(pair.mirror.last_commit())
    dest, name = str(pair.mirror.dest), os.fsdecode(pair.path("text"))
    status, told, _ = mdbackup("diff", "--dest", dest, name)
    assert status == 0 and told == "Binary files differ\n"
    status, told, _ = mdbackup("diff", "--dest", dest, name, "--from", stamps[0], "--to", stamps[2])
    assert status == 0 and told.splitlines()[2:] == ["@@ -1 +1,2 @@", " one", "+three\x1b"]
    status, told, _ = mdbackup("diff", "--dest", dest, name, "--to", stamps[1])
    assert status == 0 and told.splitlines()[-1] == "+two"
    (version,) = (pair.live("text").parent / ".old").glob(f"*{stamps[2]}")
    version.write_bytes(b"other")
    status, _, said = mdbackup("diff", "--dest", dest, name, "--to", stamps[1])
    assert status == 1 and said.splitlines()[-1].startswith("lost: ")
    assert mdbackup("diff", "--dest", dest, name, "--to", stamps[0])[0] == 2
    assert "was never backed up" in mdbackup("diff", "--dest", dest, "nothing")[2]
    status, _, said = mdbackup("diff", "--dest", dest, os.fsdecode(pair.a))
    assert status == 2 and "is a directory: name a file" in said


def test_a_text_acts_on_no_terminal(pair: Pair) -> None:
    """Neither by control characters of seven or eight bits, nor by marks for the direction of writing."""
    pair.put("text", b"old\n")
    pair.backup()
    lines = [b"\x9b31mred", b"\x1b[31m \x7f"]
    lines += [line.encode() for line in ("\u202eturned \u2066", "\x85\u2028 \xa0 ä\t日本")]
    pair.put("text", b"\n".join(lines))
    pair.backup()
    command = [sys.executable, "-m", "airflow_mdbackup", "diff", "--dest", str(pair.mirror.dest)]
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        subprocess.run([*command, os.fsdecode(pair.path("text"))], stdout=theirs, check=True)
        told = os.read(terminal.fileno(), 1 << 16).decode()
        os.close(theirs)
    assert [line for line in told.splitlines() if line.startswith("+")][1:] == [
        "+\\x9b31mred",
        "+\\x1b[31m \\x7f",
        "+\\xe2\\x80\\xaeturned \\xe2\\x81\\xa6",
        "+\\xc2\\x85\\xe2\\x80\\xa8 \xa0 ä\t日本",
    ]
