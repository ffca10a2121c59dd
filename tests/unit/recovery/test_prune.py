"""What pruning deletes and what it keeps, compared with what was there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationFull
from airflow_mdbackup.scheme.files.disk import free_space
from airflow_mdbackup.scheme.history.changes import Change, commits, pending
from airflow_mdbackup.scheme.history.journal import Transaction
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery import prune as prune_module
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PruneOutcome
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.verify import VerifyOutcome, verify
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.guarantees.crash.crash import HarshPowerCut, PowerCut, crash_at, crashes, mixed
from tests.guarantees.crash.cut_off import settle as settle_now
from tests.guarantees.disks.filesystems import MB, mounted
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of, digest, files_of
from tests.kept import Kept, files_in
from tests.pair import Pair
from tests.torture import Cases, scaled
from tests.unit.recovery.damage import found_in
from tests.unit.recovery.somebody import Random, files_of_a
from tests.unit.recovery.versions import call, contents, many_versions, prune, told, walked


@pytest.mark.guarantee("11. Getting it back")
@pytest.mark.parametrize("seed", range(scaled(2, 20)))
def test_kept_versions_of_a_random_history_can_be_restored_and_all_others_are_reported_as_pruned(
    pair: Pair, cases: Cases, tmp_path: Path, seed: int
) -> None:
    """Every state, byte for byte; the totals of the status are what a walk of the disk counts."""
    somebody = Random(pair, seed)
    snapshots: list[tuple[str, dict[bytes, Kept]]] = []
    pruned: set[tuple[bytes, str]] = set()
    for number in range(24):
        somebody.work()
        pair.backup(allow_empty=True)
        snapshots.append((pair.mirror.last_commit(), files_of_a(pair)))
        assert told(pair) == walked(pair)
        if number % 8 == 7:
            rules = (KeepRules(last=1), KeepRules(since=snapshots[-4][0]), KeepRules(daily=1))[number // 8]
            before = files_of(pair)
            gone = {v.place: v for v in prune(pair, rules) if v.outcome == PruneOutcome.PRUNED}
            pruned |= {(version.content.path, version.content.until) for version in gone.values()}
            assert files_of(pair) == {p: file for p, file in before.items() if p not in gone}
            assert all(b"/.old/" in place for place in gone)
            assert told(pair) == walked(pair)
            check_sound(pair)
            assert found_in(pair) == {}
    with Timeline(pair.mirror) as past:
        assert not past.problems
    assert {(each.path, each.until) for each in contents(pair) if each.pruned} == pruned
    assert pruned
    still_here = set(map(digest, contents_of(pair)))  # some contents were under several names
    for number, (stamp, kept) in enumerate(snapshots):
        target = tmp_path / str(number)
        with cases.one(), Timeline(pair.mirror) as past:
            moment = past.moment_at(stamp)
            states = list(past.state(moment)) if moment is not None else []
            came = list(restore(pair.mirror, past, states, target))
            lost = {each.content.path for each in came if each.outcome == RestoreOutcome.PRUNED}
            assert {each.outcome for each in came} <= {RestoreOutcome.RESTORED, RestoreOutcome.PRUNED}
            gone_for_good = [each for each in states if each.md5 not in still_here]
            assert lost == {each.path for each in gone_for_good if (each.path, each.until) in pruned}
            assert files_in(target) == {path: file for path, file in kept.items() if path not in lost}
        shutil.rmtree(target, ignore_errors=True)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (KeepRules(last=2), "ab"),
        (KeepRules(since="20261101T"), "ab"),
        (KeepRules(daily=2), "ac"),
        (KeepRules(daily=3), "acd"),
        (KeepRules(monthly=2), "ac"),
        (KeepRules(monthly=9), "acf"),
        (KeepRules(last=1, monthly=3), "acf"),
        (KeepRules(last=3, since="20261201T"), "abc"),
    ],
)
def test_a_version_stays_if_any_rule_keeps_it(rules: KeepRules, kept: str) -> None:
    """Days and months count only if they have a version; the newest of each stays."""
    stamps = {
        **{"a": "20261103T120000.000000Z", "b": "20261103T110000.000000Z", "c": "20261030T110000.000000Z"},
        **{"d": "20261002T120000.000000Z", "e": "20261002T110000.000000Z", "f": "20250102T110000.000000Z"},
    }
    keeps = rules.for_one_path()
    assert "".join(name for name, stamp in stamps.items() if keeps(stamp)) == kept


def test_versions_in_a_directory_that_was_moved_are_pruned_too_with_empty_directories(
    pair: Pair,
) -> None:
    many_versions(pair)
    (moved,) = (pair.live("flips").parent / ".old").glob("flips.*")
    assert {path.name for path in (moved / ".old").iterdir()} and (moved / "below").is_file()
    versions = prune(pair, KeepRules(last=1), ("flips",))
    assert sorted(v.outcome.value for v in versions) == ["kept"] * 2 + ["pruned"] * 6
    assert sorted(path.name for path in moved.iterdir()) == ["below", "beside"]
    prune(pair, KeepRules(since="9"))
    assert not list(pair.mirror.files.rglob(".old"))
    assert pair.live("deep").is_dir() and found_in(pair) == {}
    assert told(pair) == walked(pair) and walked(pair)[2:] == (0, 0)
    pair.put("changes", b"newest")
    assert pair.backup().replaced == 1 and len(pair.versions("changes")) == 1


def test_nothing_is_changed_unless_it_is_to_be_carried_out(pair: Pair) -> None:
    many_versions(pair)
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in pair.mirror.dest.rglob("*"))
    assert {v.outcome for v in prune(pair, KeepRules(last=1), carry_out=False)} == {
        PruneOutcome.GOES,
        PruneOutcome.KEPT,
    }
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in pair.mirror.dest.rglob("*")) == before


def test_files_that_are_not_what_history_says_stay_and_count_for_no_rule(pair: Pair, tmp_path: Path) -> None:
    """Other bytes, a symlink, nothing at all, another name. Other times alone are no reason."""
    for number in range(7):
        pair.put("file", b"%d" % number * 9)
        pair.backup()
    old = sorted((pair.live("file").parent / ".old").iterdir())
    contents_of_old = [path.read_bytes() for path in old]
    os.utime(old[0], (1, 1))
    old[1].write_bytes(b"by hand")
    old[2].unlink()
    old[2].symlink_to(old[5])
    os.link(old[3], tmp_path / "linked")
    old[4].write_bytes(b"same size")
    os.utime(old[4], (1, 1))
    old[5].unlink()
    versions = prune(pair, KeepRules(last=1))
    root = os.fsencode(pair.mirror.files)
    assert {Path(os.fsdecode(root + v.place)).name: v.outcome.value for v in versions} == {
        old[0].name: "pruned",
        old[1].name: "changed",
        old[2].name: "changed",
        old[3].name: "kept",
        old[4].name: "changed",
    }
    assert old[3].read_bytes() == contents_of_old[3] and not old[0].exists()
    assert [v.outcome for v in prune(pair, KeepRules(since="9"))].count(PruneOutcome.LINKED) == 1
    assert old[3].read_bytes() == contents_of_old[3] and old[1].exists() and old[2].is_symlink()
    assert pair.live("file").read_bytes() == b"6" * 9


def test_nothing_is_reached_through_a_symlink(pair: Pair, tmp_path: Path) -> None:
    """Nor is what cannot be seen behind one recorded as gone."""
    many_versions(pair)
    deep = pair.live("deep")
    deep.rename(tmp_path / "elsewhere")
    deep.symlink_to(tmp_path / "elsewhere")
    fates = {v.outcome for v in prune(pair, KeepRules(since="9")) if b"/deep/" in v.place}
    assert fates == set() and len(list((tmp_path / "elsewhere/.old").iterdir())) == 3
    assert not any(c.pruned for c in contents(pair) if b"/deep/" in c.path)


def test_a_version_that_cannot_be_seen_any_more_is_not_recorded_as_gone(pair: Pair, tmp_path: Path) -> None:
    """Somebody puts a symlink in its way while a pruning is cut off."""
    many_versions(pair)
    for number in count(1):
        assert crash_at(number, lambda: prune(pair, KeepRules(since="9"), ("deep",)))
        if any(pending(pair.mirror)):
            break
    deep = pair.live("deep")
    deep.rename(tmp_path / "elsewhere")
    deep.symlink_to(tmp_path / "elsewhere")
    settle_now(pair.mirror)
    assert not any(pending(pair.mirror)) and not any(c.pruned for c in contents(pair))


def test_a_run_older_than_the_last_commit_is_superseded_after_a_pruning(pair: Pair) -> None:
    """Even if only history shows how new that was."""
    many_versions(pair)
    old = pair.prepare()
    pair.put("same", b"newer")
    pair.backup()
    prune(pair, KeepRules(last=1))
    pair.mirror.status.unlink()
    assert pair.finish(old).superseded and pair.live("same").read_bytes() == b"newer"


def test_the_index_and_manual_edits_of_it_stay_as_they_are(pair: Pair) -> None:
    """Even if it is damaged or deleted: pruning is not a run. The next run reports it."""
    many_versions(pair)
    lines = pair.mirror.index.read_bytes()
    for spoilt, name in ((b"spoilt", "changes"), (None, "gone"), (lines.replace(b"  ", b" *", 1), "flips")):
        pair.mirror.index.unlink(missing_ok=True)
        if spoilt is not None:
            pair.mirror.index.write_bytes(spoilt)
        assert PruneOutcome.PRUNED in {v.outcome for v in prune(pair, KeepRules(last=1), (name,))}
        assert (pair.mirror.index.read_bytes() if pair.mirror.index.exists() else None) == spoilt
    pair.mirror.index.unlink()
    assert pair.backup().outcomes == {"pulled": 4}
    check_sound(pair)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("kinds", scaled([(None, HarshPowerCut)], [(None,), (HarshPowerCut,)]))
def test_pruning_may_be_killed_at_any_step_and_is_not_resumed_by_itself(
    pair: Pair, cases: Cases, monkeypatch: pytest.MonkeyPatch, kinds: tuple[type[PowerCut] | None, ...]
) -> None:
    """What is gone is reported as pruned, the rest is intact; the same command again does the rest."""
    monkeypatch.setattr(prune_module, "_FIRST_BATCH", 2)
    for number in range(3):
        pair.put("changes", b"%d" % number)
        pair.put("flips/below", b"%d" % number * 2)
        pair.backup()
    shutil.rmtree(pair.path("flips"))
    pair.put("flips", b"a file")
    pair.backup()
    kept = files_of(pair)
    rules = KeepRules(since="9")
    goes = {v.place for v in prune(pair, rules, carry_out=False) if v.outcome == PruneOutcome.GOES}
    assert len(goes) == 5
    interrupted = 0

    def cutter(dest: Path, number: int) -> PowerCut | None:
        kind = kinds[number % len(kinds)]
        return kind(dest, mixed(number)) if kind else None

    for _ in crashes(pair, lambda: prune(pair, rules), cutter):
        with cases.one():
            there = {path: file.content for path, file in files_of(pair).items()}
            assert there.items() <= {path: file.content for path, file in kept.items()}.items()
            assert kept.keys() - there.keys() <= goes
            assert set(found_in(pair).values()) <= {"pruned"}
            interrupted += any(pending(pair.mirror))
            settle_now(pair.mirror)
            assert not any(pending(pair.mirror)) and found_in(pair) == {}
            check_sound(pair)
            assert {path: file.content for path, file in files_of(pair).items()} == there
            assert {c.path for c in contents(pair) if not c.places and not c.pruned} == set()
            assert sum(bool(c.pruned) for c in contents(pair)) == len(kept) - len(there)
            prune(pair, rules)
            assert kept.keys() - files_of(pair).keys() == goes
            check_sound(pair)
            assert told(pair) == walked(pair)
    assert interrupted > 10


def test_what_a_cut_off_pruning_may_have_deleted_is_no_damage_and_is_restored_if_it_exists(
    pair: Pair, tmp_path: Path
) -> None:
    """Before any run has recovered it."""
    many_versions(pair)
    with Timeline(pair.mirror) as past:
        state = list(past.state(past.moments[0]))
    template = pair.mirror.dest
    for number in count(1):
        pair.mirror = Mirror(template.with_name("killed"), "srv1")
        shutil.copytree(template, pair.mirror.dest)
        assert crash_at(number, lambda: prune(pair, KeepRules(since="9")))
        if any(pending(pair.mirror)) and not list((pair.live("changes").parent / ".old").glob("changes.*")):
            break
        shutil.rmtree(pair.mirror.dest)
    with Timeline(pair.mirror) as past:
        came = {
            each.content.path: each.outcome
            for each in restore(pair.mirror, past, list(past.state(past.moments[0])), tmp_path / "target")
        }
        found = {each.outcome for each in verify(pair.mirror, past, past.contents())}
    assert came.keys() == {content.path for content in state}
    assert (
        came[pair.path("changes")] == RestoreOutcome.PRUNED
        and came[pair.path("same")] == RestoreOutcome.RESTORED
    )
    assert found == {VerifyOutcome.SOUND, VerifyOutcome.PRUNED}


def test_what_is_pruned_while_it_is_verified_is_no_damage(pair: Pair) -> None:
    many_versions(pair)
    with Timeline(pair.mirror) as past:
        known = list(past.contents())
        prune(pair, KeepRules(since="9"))
        found = [each.outcome for each in verify(pair.mirror, past, known)]
    assert (
        set(found) == {VerifyOutcome.SOUND, VerifyOutcome.PRUNED} and found.count(VerifyOutcome.PRUNED) == 17
    )


def test_a_running_backup_continues_after_a_pruning(pair: Pair) -> None:
    """It has archived already; its versions get another stamp, and none of them is lost."""
    many_versions(pair)
    pair.put("changes", b"newest")
    run = pair.begin()
    pair.archive(run)
    prune(pair, KeepRules(since="9"))
    assert pair.commit(run).outcomes == {"pulled": 1}
    assert len(pair.versions("changes")) == 1
    check_sound(pair)
    assert told(pair) == walked(pair)


def test_a_run_that_holds_the_lock_is_named_and_waited_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_versions(pair)
    monkeypatch.setattr(prune_module, "OPERATOR_WAIT", 0.3)
    with pair.mirror.lock("commit_backup"), pytest.raises(DestinationBusy, match="by commit_backup"):
        prune(pair, KeepRules(last=1))


@pytest.mark.parametrize("number", [1, 2])
def test_versions_of_a_lost_history_stay(pair: Pair, capsys: pytest.CaptureFixture[str], number: int) -> None:
    """The gap is reported; known versions are pruned, and the rest is counted as unknown."""
    for n in range(4):
        pair.put("file", b"%d" % n)
        pair.backup()
    versions = sorted((pair.live("file").parent / ".old").iterdir())
    commits(pair.mirror)[number].unlink()
    status, _, said = call(capsys, "prune", "--dest", str(pair.mirror.dest), "--keep-last", "9")
    assert status == 1 and "WARNING: history is missing" in said
    assert "1 file in .old left: history does not know" in said
    prune(pair, KeepRules(since="9"))
    assert versions[number - 1].exists() and sum(path.exists() for path in versions) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_is_full_except_for_some_kilobytes_can_be_pruned(pair: Pair) -> None:
    """The first versions make space for the history of the others; a completely full disk is reported."""
    with mounted("tmpfs", pair.mirror.dest, 80 * MB):
        for number in range(5):
            for name in range(60):
                pair.put(str(name), b"%d" % number * 1000)
            pair.backup()
        for server in pair.servers:
            server.stop()
        with (pair.mirror.dest / "full").open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, free_space(pair.mirror.dest).size)
            with pytest.raises(DestinationFull, match="no space even for the history"):
                prune(pair, KeepRules(since="9"))
            assert len(files_of(pair)) == 300
            file.truncate(file.seek(0, os.SEEK_END) - 40_000)
            assert [v.outcome for v in prune(pair, KeepRules(since="9"))] == [PruneOutcome.PRUNED] * 240
        assert told(pair) == walked(pair)


# --- the totals of the status -----------------------------------------------------------------------


@pytest.mark.guarantee("11. Getting it back")
def test_a_version_that_somebody_is_writing_to_stays(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has the same size as before."""
    many_versions(pair)
    old = sorted((pair.live("changes").parent / ".old").glob("changes.*"))[0]
    write_ahead = Transaction.prune

    def meanwhile(tx: Transaction, going: Iterable[Change]) -> Callable[[], None]:
        old.write_bytes(b"X" * old.stat().st_size)
        return write_ahead(tx, going)

    monkeypatch.setattr(Transaction, "prune", meanwhile)
    fates = {version.place: version.outcome for version in prune(pair, KeepRules(last=1))}
    assert fates[os.fsencode(old)[len(os.fsencode(pair.mirror.files)) :]] == PruneOutcome.CHANGED
    assert set(old.read_bytes()) == set(b"X")
