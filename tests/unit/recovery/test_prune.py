"""What pruning deletes and what it keeps, compared with what was there; and what is reported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.errors import DestinationBusy, DestinationFull
from airflow_mdbackup.scheme.files.disk import free_space
from airflow_mdbackup.scheme.history.changes import Change, ChangeKind, commits, pending
from airflow_mdbackup.scheme.history.journal import Transaction
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.history.usage import DiskUsage, stored_totals
from airflow_mdbackup.scheme.recovery import prune as prune_module
from airflow_mdbackup.scheme.recovery.health import check_health
from airflow_mdbackup.scheme.recovery.prune import KeepRules, PrunableVersion, PruneOutcome, pruning
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.verify import Verification, VerifyOutcome, verify
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.import_versions import import_versions
from airflow_mdbackup.scheme.takeover.survey import SourceTree
from tests.guarantees.crash.crash import HarshPowerCut, PowerCut, crash_at, crashes, mixed
from tests.guarantees.crash.cut_off import settle as settle_now
from tests.guarantees.disks.filesystems import MB, mounted
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of, digest, files_of
from tests.kept import Kept, files_in
from tests.pair import Pair
from tests.torture import Cases, scaled
from tests.unit.common.test_times import NOW
from tests.unit.recovery.somebody import Random, files_of_a
from tests.unit.recovery.test_verify import found_in


def prune(
    pair: Pair, rules: KeepRules, words: tuple[str, ...] = (), *, carry_out: bool = True
) -> list[PrunableVersion]:
    with pruning(pair.mirror, Selection(words), rules, carry_out=carry_out) as (_, versions):
        return list(versions)


def mdbackup(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command, and return its exit status and output."""
    try:
        status = main(words)
    except SystemExit as end:
        status = int(str(end.code))
    told = capsys.readouterr()
    return status, told.out, told.err


def contents(pair: Pair) -> list[FileVersion]:
    with Timeline(pair.mirror) as past:
        return list(past.contents())


def walked(pair: Pair) -> tuple[int, int, int, int]:
    """Return what a walk of the disk counts: live files and their bytes, versions and theirs."""
    files = files_of(pair)
    versions = [len(file.content) for path, file in files.items() if b"/.old/" in path]
    live = [len(file.content) for path, file in files.items() if b"/.old/" not in path]
    return len(live), sum(live), len(versions), sum(versions)


def told(pair: Pair) -> tuple[int, ...]:
    """Return what the status says of the same."""
    disk = check_health(pair.mirror, None, NOW).disk
    assert disk is not None
    return disk[:4]


def many_versions(pair: Pair) -> None:
    """Make versions of files, of deleted ones too, and some in a directory that was moved out of the way."""
    for number in range(4):
        for name in ("changes", "deep/changes", "gone", "flips/below", "flips/beside"):
            pair.put(name, f"{name}, {number}".encode() * (number + 1))
        pair.put("same", b"same")
        pair.backup()
    os.unlink(pair.path("gone"))
    shutil.rmtree(pair.path("flips"))
    pair.put("flips", b"a file")
    pair.backup()


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
    status, _, said = mdbackup(capsys, "prune", "--dest", str(pair.mirror.dest), "--keep-last", "9")
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


# --- the commands -----------------------------------------------------------------------------------


def test_the_command_shows_first_and_deletes_on_request(
    pair: Pair, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In text and in JSON; and what log, history, versions and restore say afterwards."""
    many_versions(pair)
    dest = ("--dest", str(pair.mirror.dest))
    status, out, said = mdbackup(capsys, "prune", *dest, "--keep-last", "1")
    assert status == 0 and "12 versions of 5 paths would be pruned: " in said and "--yes deletes them" in said
    assert sum(int(line.split()[0]) for line in out.splitlines()) == 12 and len(out.splitlines()) == 5
    assert mdbackup(capsys, "prune", *dest, "--keep-last", "1", "--dry-run") == (status, out, said)
    listed = [
        json.loads(line)
        for line in mdbackup(capsys, "prune", *dest, "--keep-last", "1", "--format", "json")[1].splitlines()
    ]
    assert {each["fate"] for each in listed} == {"goes", "kept"}
    assert all(Path(each["file"]).stat().st_size == each["bytes"] for each in listed)
    assert all(Path(each["file"]).stat().st_blocks * 512 == each["room"] for each in listed)
    assert len(files_of(pair)) == 22
    words = [os.fsdecode(pair.path(name)) for name in ("changes", "gone")]
    status, _, said = mdbackup(capsys, "prune", *dest, *words, "--keep-last", "1", "--yes")
    assert status == 0 and "pruned: " in said and len(files_of(pair)) == 22 - 4
    first, last = (mdbackup(capsys, "log", *dest)[1].splitlines()[n] for n in (0, -1))
    assert "4 pruned" in last and "bytes freed" in last and "freed" not in first
    logged = json.loads(mdbackup(capsys, "log", *dest, "--format", "json")[1].splitlines()[-1])
    assert logged["changes"] == {"pruned": 4} and logged["freed"] > 0 == logged["bytes"]
    told_of = mdbackup(capsys, "history", *dest, words[0])[1].splitlines()
    assert sum("  pruned     " in line and " <- " in line for line in told_of) == 2
    assert mdbackup(capsys, "versions", *dest, words[0])[1].count("    pruned on 20") == 2
    facts = [
        json.loads(line)
        for line in mdbackup(capsys, "versions", *dest, words[0], "--format", "json")[1].splitlines()
    ]
    assert [bool(each["pruned"]) for each in facts] == [True, True, False, False]
    assert [each["file"] is None for each in facts] == [True, True, False, False]
    status, _, said = mdbackup(capsys, "diff", *dest, words[0], "--from", facts[0]["since"])
    assert status == 1 and said.splitlines()[-1].startswith("pruned: ")
    assert mdbackup(capsys, "verify", *dest)[0] == 0
    with Timeline(pair.mirror) as past:
        moment = past.moments[0].stamp
    command = ("restore", *dest, "--to", str(tmp_path / "target"), "--as-of", moment)
    for more in (("--dry-run",), ()):
        status, out, said = mdbackup(capsys, *command, *more)
        assert (
            status == 1 and "2 pruned" in said and f"{pair.path('gone').decode()}: it was pruned on 20" in out
        )


def test_pruned_content_is_restored_from_another_copy(pair: Pair, tmp_path: Path) -> None:
    pair.put("a", b"bytes")
    pair.put("b", b"bytes")
    pair.backup()
    pair.put("a", b"other")
    pair.backup()
    prune(pair, KeepRules(since="9"))
    with Timeline(pair.mirror) as past:
        came = list(restore(pair.mirror, past, past.state(past.moments[0]), tmp_path / "target"))
    assert {each.outcome for each in came} == {RestoreOutcome.RESTORED}
    assert {file.content for file in files_in(tmp_path / "target").values()} == {b"bytes"}


def test_no_other_version_is_mistaken_for_a_pruned_one(pair: Pair, tmp_path: Path) -> None:
    """Of the same path and size; nor by a dry run."""
    for content in (b"first", b"other", b"third"):
        pair.put("a", content)
        pair.backup()
    prune(pair, KeepRules(last=1))
    for dry_run in (True, False):
        with Timeline(pair.mirror) as past:
            state = past.state(past.moments[0])
            (came,) = restore(pair.mirror, past, state, tmp_path / "target", dry_run=dry_run)
        assert came.outcome == RestoreOutcome.PRUNED


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say what to keep"),
        (("--keep-within", "6m"), "is less than a day (m are minutes)"),
        (("--keep-within", "soon"), "is not a duration"),
        (("--keep-last", "0"), "must be at least 1"),
        (("--keep-last", "1", ""), "a path is empty"),
        (("--keep-last", "1", "--yes", "--dry-run"), "write one of them"),
    ],
)
def test_a_rule_is_needed_and_must_be_meant(
    pair: Pair, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    many_versions(pair)
    before = files_of(pair)
    status, _, told = mdbackup(capsys, "prune", "--dest", str(pair.mirror.dest), "--yes", *words)
    assert status == 2 and said in told and files_of(pair) == before


def test_a_path_that_was_never_backed_up_is_reported(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    many_versions(pair)
    status, _, said = mdbackup(
        capsys, "prune", "--dest", str(pair.mirror.dest), "--keep-within", "1y", "/nowhere"
    )
    assert status == 1 and "0 versions" in said and "under '/nowhere'" in said


# --- the totals of the status -----------------------------------------------------------------------


@pytest.mark.guarantee("1. Crash at every step")
def test_totals_count_a_commit_once_wherever_it_is_killed(pair: Pair, cases: Cases) -> None:
    """Added, replaced, moved and returned files; killed at each step, recovered and resumed by a retry."""
    for name in ("same", "changed", "returns", "flips/below", "flips/changed", "file"):
        pair.put(name, name.encode())
    pair.backup()
    pair.put("flips/changed", b"changed once")
    os.unlink(pair.path("returns"))
    pair.backup()
    assert told(pair) == walked(pair)
    pair.put("changed", b"new bytes")
    pair.put("returns", b"returns")
    shutil.rmtree(pair.path("flips"))
    pair.put("flips", b"a file")
    os.unlink(pair.path("file"))
    pair.put("file/below", b"below")
    run = pair.begin()
    template = pair.mirror.dest
    for number in count(1, scaled(3, 1)):
        pair.mirror = Mirror(template.with_name("killed"), "srv1")
        shutil.copytree(template, pair.mirror.dest)
        with cases.one():
            run = pair.mirror.run(run.run_id)
            pair.archive(run)
            killed = crash_at(number, partial(pair.commit, run))
            pair.commit(run)
            check_sound(pair)
            assert told(pair) == walked(pair)
        shutil.rmtree(pair.mirror.dest)
        if not killed:
            break


@pytest.mark.parametrize("stored", ["none", "damaged", "of another time", "lost", "old"])
def test_lost_totals_are_counted_again_by_the_next_run(pair: Pair, stored: str) -> None:
    many_versions(pair)
    before = told(pair)
    status = json.loads(pair.mirror.status.read_text())
    if stored == "old":  # nor does a history of that time say what it added
        for path in commits(pair.mirror):
            header, rest = path.read_text().split("\n", 1)
            path.write_text(
                json.dumps({k: v for k, v in json.loads(header).items() if k != "disk"}) + "\n" + rest
            )
        stored = "none"
    if stored == "lost":
        pair.mirror.status.unlink()
    else:
        changed = {
            "none": None,
            "damaged": {"disk": 1},
            "of another time": {**status["totals"], "stamp": "3"},
        }
        pair.mirror.status.write_text(json.dumps({**status, "totals": changed[stored]}))
    pair.backup()
    assert told(pair) == walked(pair) == before


def test_a_run_that_changes_nothing_reads_no_history_for_the_totals(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_versions(pair)
    before = pair.mirror.read_status()["totals"]

    def refuse(*arguments: object) -> None:
        raise AssertionError("history is read")

    monkeypatch.setattr("airflow_mdbackup.scheme.history.usage.Timeline", refuse)
    monkeypatch.setattr("airflow_mdbackup.scheme.history.usage.read_header", refuse)
    pair.backup()
    assert pair.mirror.read_status()["totals"] == before


def test_growth_is_what_arrived_in_the_last_30_days(pair: Pair) -> None:
    pair.put("a", bytes(1000))
    pair.backup()
    pair.put("a", bytes(300))
    pair.backup()
    status = check_health(pair.mirror, None, NOW)
    totals = stored_totals(pair.mirror.read_status())
    assert totals is not None and sum(totals.days.values()) == 1300 == totals.disk.came
    assert status.disk == DiskUsage(1, 300, 1, 1000, 1300)
    month = totals.plus("1", "20261030", DiskUsage(came=5)).plus("2", "20261029", DiskUsage(came=7))
    assert month.came(NOW) - totals.came(NOW) == 5


def test_files_put_there_by_hand_are_counted_once_adopted(pair: Pair) -> None:
    """They were not part of a commit, so everything is counted again."""
    pair.put("a", b"a")
    pair.backup()
    for name in ("b", "c"):
        pair.put(name, name.encode())
        pair.live(name).write_bytes(name.encode())
    assert pair.backup().adopted == 2
    assert told(pair) == walked(pair) == (3, 3, 0, 0)


def test_history_has_path_md5_size_and_place_of_pruned_versions(pair: Pair) -> None:
    pair.put("a", b"first")
    pair.backup()
    pair.put("a", b"second")
    pair.backup()
    (version,) = prune(pair, KeepRules(since="9"))
    (change,) = pair.history()[-1]
    assert (change.what, change.path, change.size) == (ChangeKind.PRUNED, pair.path("a"), 5)
    assert (change.version, change.old_md5, change.md5) == (version.place, digest(b"first"), None)
    assert not any(pending(pair.mirror))


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


def test_versions_with_the_same_stamp_each_count(pair: Pair, tmp_path: Path) -> None:
    """As imports of several trees of one day may have."""
    pair.put("file", b"now")
    pair.backup()
    for number in range(3):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
        (tmp_path / "tree" / str(number) / "file").write_bytes(b"%d" % number)
    meant = (pair.path("file"), "20260101T000000.000000Z")
    import_versions(pair.mirror, SourceTree(tmp_path / "tree", b""), lambda path: meant, copy=True)
    prune(pair, KeepRules(last=2))
    assert len(pair.versions("file")) == 2


@pytest.mark.parametrize("how", ["repaired", "no index", "another size"])
def test_a_file_deleted_by_hand_and_copied_again_counts_once(pair: Pair, how: str) -> None:
    pair.put("file", b"file")
    pair.put("other", b"other")
    pair.backup()
    pair.live("file").unlink()
    if how == "repaired":
        with Timeline(pair.mirror) as past:
            walk = Verification(pair.mirror, past, repair=True, missing=True)
            assert len(list(walk)) == 2
        assert walk.finish() == [pair.path("file")]
        assert check_health(pair.mirror, None, NOW).files == len(pair.index_b()) == 1
    elif how == "no index":
        pair.mirror.index.unlink()
    else:
        pair.put("file", b"a longer one")
    pair.backup()
    assert told(pair) == walked(pair)
    assert [content.left for content in contents(pair) if not content.until] == ["", ""]
