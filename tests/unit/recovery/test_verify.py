"""Which damage a verification finds, and that it finds nothing else."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import DestinationBusy
from airflow_mdbackup.scheme.files.jsonl import write_state
from airflow_mdbackup.scheme.history import status_file as status_file_module
from airflow_mdbackup.scheme.history import timeline as past_module
from airflow_mdbackup.scheme.history import usage as totals
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.history.forget import forget
from airflow_mdbackup.scheme.history.journal import Transaction
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.verify import (
    Portion,
    Verification,
    VerifiedFile,
    VerifyOutcome,
    describe_repair,
    repair,
    verify,
)
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crashes
from tests.guarantees.crash.cut_off import drop_entries
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.torture import Cases
from tests.unit.recovery.damage import found_in, rot
from tests.unit.recovery.somebody import mdbackup, two_runs
from tests.unit.recovery.versions import told, walked


def test_a_sound_backup_is_sound(pair: Pair) -> None:
    """With versions, deleted files, and a directory that was moved out of the way."""
    two_runs(pair)
    assert found_in(pair) == {}
    shutil.rmtree(pair.path("twin"), ignore_errors=True)
    pair.put("flipped", b"another file")
    pair.backup()
    assert found_in(pair) == {}


@pytest.mark.guarantee("11. Getting it back")
def test_each_kind_of_damage_is_found_as_what_it_is(pair: Pair) -> None:
    two_runs(pair)
    (old,) = (pair.live("changed").parent / ".old").glob("changed.*")
    (below,) = (pair.live("flipped").parent / ".old").glob("flipped.*/below")
    rot(pair.live("same"))
    rot(old)
    pair.live("twin").unlink()
    pair.live("new").write_bytes(b"by hand")
    below.unlink()
    below.symlink_to("/etc/passwd")
    stray = pair.live("stray")
    stray.write_bytes(b"of nobody")
    root = os.fsencode(pair.mirror.files)
    assert found_in(pair) == {
        pair.path("same"): "rotten",
        os.fsencode(old)[len(root) :]: "rotten",
        pair.path("twin"): "missing",
        pair.path("new"): "changed",
        os.fsencode(below)[len(root) :]: "missing",
        pair.path("stray"): "unknown",
    }


def test_what_a_run_commits_meanwhile_is_looked_for_where_it_went(pair: Pair) -> None:
    """It is no damage that a file is not where it was when the verification began; corruption is."""
    two_runs(pair)
    with Timeline(pair.mirror) as past:
        pair.put("same", b"changed now")
        pair.put("gone", b"back")
        os.unlink(pair.path("twin"))
        pair.put("twin/is a directory", b"now")
        pair.backup()
        rot(pair.live("new"))
        every = list(verify(pair.mirror, past, past.contents()))
        found = {each.content.path: each.outcome for each in every if each.content is not None}
    assert found.pop(pair.path("new")) == VerifyOutcome.ROTTEN
    assert set(found.values()) == {VerifyOutcome.SOUND}


def test_a_limit_that_cannot_be_kept_makes_no_file_unreadable(pair: Pair) -> None:
    two_runs(pair)
    pair.mirror.verifying.mkdir()
    status, out, told = mdbackup("verify", "--dest", str(pair.mirror.dest), "--limit", "1MB")
    assert (status, out) == (2, "") and "the limit cannot be kept" in told


@pytest.mark.parametrize("size", [1, 10, 10_000])
def test_parts_cover_everything_once(pair: Pair, size: int) -> None:
    """A path with all its versions is in one part; files that appear or disappear in between do no harm."""
    two_runs(pair)
    seen: list[VerifiedFile] = []
    parts = 0
    while True:
        parts += 1
        with Timeline(pair.mirror) as past:
            part = Portion(pair.mirror, past, size)
            seen += verify(pair.mirror, past, part)
            part.save_position()
        if part.is_last:
            break
    with Timeline(pair.mirror) as past:
        assert [each.content for each in seen] == [c for c in past.contents() if c.places]
    assert (parts > 1) == (size < 10_000)


@pytest.mark.parametrize("content", [b"", bytes(50), b'{"format": 1}\n', b'{"format": 1, "next": "\\\\q"}\n'])
def test_a_corrupted_position_starts_from_the_beginning(pair: Pair, content: bytes) -> None:
    two_runs(pair)
    pair.mirror.verified.write_bytes(content)
    with Timeline(pair.mirror) as past:
        assert list(Portion(pair.mirror, past, 10_000)) == list(past.contents())


def test_command_fails_for_damage_and_names_the_files(pair: Pair) -> None:
    """Without Airflow; some paths, parts, and what does not go together."""
    two_runs(pair)
    command = ("verify", "--dest", str(pair.mirror.dest))
    status, out, told = mdbackup(*command)
    assert (status, out) == (0, "") and "9 sound" in told
    rot(pair.live("same"))
    status, out, told = mdbackup(*command, "--limit", "50MB")
    assert status == 1 and "1 rotten" in told
    assert out == f"rotten      {pair.live('same')}\n"
    assert mdbackup(*command, "twin")[0] == 0
    listed = [json.loads(line) for line in mdbackup(*command, "--format", "json")[1].splitlines()]
    assert [each["path"] for each in listed if each["found"] == "rotten"] == [os.fsdecode(pair.path("same"))]
    parts = [mdbackup(*command, "--fraction", "1/3") for _ in range(4)]
    assert sum(part[0] for part in parts) == 1 and sum("last part" in part[2] for part in parts) == 1
    assert mdbackup(*command, "--bytes", "1GB")[0] in (0, 1)
    for wrong in (("--fraction", "2"), ("--fraction", "x"), ("--bytes", "x"), ("--bytes", "1GB", "twin")):
        assert mdbackup(*command, *wrong)[0] == 2


# --- repair -----------------------------------------------------------------------------------------


def excluded_from_restore(pair: Pair, folder: Path, *words: str) -> str:
    """Return what a restore says about entries that an operator removed."""
    to = ("--to", str(folder / "restored"), "--dry-run")
    told = mdbackup("restore", "--dest", str(pair.mirror.dest), *to, *words)[2]
    return "".join(line.partition(":")[0] for line in told.splitlines() if " excluded: " in line)


def test_repair_has_corrupted_live_files_pulled_again_and_changes_nothing_else(
    pair: Pair, tmp_path: Path
) -> None:
    """Not versions, nor manual edits, and missing files only on request; the corrupted content is kept."""
    two_runs(pair)
    as_of = datetime.now(UTC).isoformat()
    (old,) = (pair.live("changed").parent / ".old").glob("changed.*")
    rot(pair.live("same"))
    rot(old)
    pair.live("twin").unlink()
    pair.live("new").write_bytes(b"by hand")
    rotten = pair.live("same").read_bytes()
    command = ("verify", "--dest", str(pair.mirror.dest), "--repair")
    status, out, told = mdbackup(*command)
    assert status == 1 and len(out.splitlines()) == 5
    assert out.splitlines()[-1] == f"forgotten   {os.fsdecode(pair.path('same'))}"
    assert 'airflow dags trigger mdbackup_srv1 --conf \'{"only": ["' in told
    assert pair.index_a().keys() - pair.index_b().keys() == {pair.path("same")}
    last = mdbackup("log", "--dest", str(pair.mirror.dest))[1].splitlines()[-1]
    assert "repair__" in last and "1 forgotten" in last
    assert mdbackup(*command, "same")[1].count("forgotten") == 0  # it has no entry any more
    assert excluded_from_restore(pair, tmp_path) == "1 file excluded"
    status, out, _ = mdbackup(*command, "--missing", "--format", "json")
    assert [json.loads(line)["path"] for line in out.splitlines() if '"repair"' in line] == [
        os.fsdecode(pair.path("twin"))
    ]
    assert excluded_from_restore(pair, tmp_path) == "2 files excluded"
    assert excluded_from_restore(pair, tmp_path, "sam*") == "1 file excluded"
    assert excluded_from_restore(pair, tmp_path, "new", "--as-of", "now") == ""
    assert excluded_from_restore(pair, tmp_path, "--include-gone") == ""
    assert excluded_from_restore(pair, tmp_path, "--as-of", as_of) == ""
    pair.backup()
    assert excluded_from_restore(pair, tmp_path) == ""
    assert pair.live("same").read_bytes() == b"same" and pair.live("twin").exists()
    assert pair.versions("same") == [rotten]
    assert set(found_in(pair).values()) == {"changed", "rotten"}  # by hand, and the version
    assert pair.live("new").read_bytes() == b"by hand"
    assert mdbackup("verify", "--dest", str(pair.mirror.dest), "--missing")[0] == 2


def test_damage_is_checked_again_under_the_lock(pair: Pair) -> None:
    """A run may have replaced the file since it was read, or somebody may have repaired it."""
    two_runs(pair)
    for name in ("same", "new", "gone", "twin"):
        pair.put(name, b"first of " + name.encode())
    pair.backup()
    sound = pair.live("new").read_bytes()
    for name in ("same", "new", "gone"):
        rot(pair.live(name))
    pair.live("twin").unlink()
    with Timeline(pair.mirror) as past:
        damaged = [each for each in verify(pair.mirror, past, past.contents()) if not each.outcome.good]
    assert len(damaged) == 4
    before = os.stat(pair.path("same"))
    pair.put("same", b"other of same")  # of the same size and time, as if the old one had rotted
    os.utime(pair.path("same"), ns=(before.st_atime_ns, before.st_mtime_ns))
    pair.backup()
    pair.live("new").write_bytes(sound)
    pair.live("gone").write_bytes(b"by hand meanwhile")
    pair.live("twin").write_bytes(b"first of twin")
    index = pair.index_b()
    assert repair(pair.mirror, damaged, missing=True) == []
    assert pair.index_b() == index


def test_a_part_that_could_not_be_repaired_is_verified_again(pair: Pair) -> None:
    """Its damage need not wait until all other parts have been verified."""
    two_runs(pair)
    rot(pair.live("same"))
    found = []
    for wait in (0.0, 60.0):
        with Timeline(pair.mirror) as past:
            walk = Verification(pair.mirror, past, part=Fraction(1), repair=True)
            found.append([each.place for each in walk if not each.outcome.good])
            if wait:
                assert walk.finish(wait) == [pair.path("same")]
            else:
                with pair.mirror.lock("a run"), pytest.raises(DestinationBusy, match="a run"):
                    walk.finish(wait)
                assert not pair.mirror.verified.exists()
    assert found == [[pair.path("same")]] * 2 and walk.is_last and pair.mirror.verified.exists()


@pytest.mark.parametrize("name", [b"plain", b'it\'s $(id) `id`; "x" \\ \n \x1b[31m', "ü".encode()])
def test_the_printed_command_pulls_just_these_files_whatever_their_names(name: bytes) -> None:
    """In a shell, and as JSON; and no name has an effect on a terminal or a log viewer."""
    told = describe_repair("web", [b"/" + name])
    command = shlex.split(told.partition("To do it now: ")[2])
    assert told.isprintable() and "group:" not in told
    assert command[:4] == ["airflow", "dags", "trigger", "mdbackup_web"]
    assert json.loads(command[5])["only"] == [f"/{name.decode()}"]


@pytest.mark.parametrize("paths", [[b"/\xff"], [b"/%d" % n for n in range(101)], [b"/" + bytes([97] * 3999)]])
def test_a_full_run_is_suggested_where_a_command_cannot_name_the_paths(paths: list[bytes]) -> None:
    assert describe_repair("web", paths).endswith("airflow dags trigger mdbackup_web")


# --- forget -----------------------------------------------------------------------------------------


def test_a_forgotten_file_is_copied_again_if_it_is_corrupted(pair: Pair) -> None:
    """The corrupted content becomes a version; a sound file is adopted; an earlier edit is recorded."""
    two_runs(pair)
    rot(pair.live("same"))
    drop_entries(pair, "new")
    status, out, _ = mdbackup("forget", "--dest", str(pair.mirror.dest), "same", "twin*")
    names = [os.path.basename(shlex.split(line)[0]) for line in out.splitlines()]
    assert (status, names) == (0, ["same", "twin", "twin of changed"])
    check_sound(pair, [pair.path("same")])
    summary = pair.backup()
    assert summary.outcomes == {"pulled": 1, "adopted": 3}
    assert pair.live("same").read_bytes() == b"same" and len(pair.versions("same")) == 1
    check_sound(pair)
    assert mdbackup("forget", "--dest", str(pair.mirror.dest), "nothing")[0] == 1
    assert mdbackup("forget", "--dest", str(pair.mirror.dest))[0] == 2


def test_what_is_in_the_index_again_is_not_reported_as_excluded(pair: Pair, tmp_path: Path) -> None:
    """Whoever put it back, and whether history says so or not; but at the earlier time it was."""
    two_runs(pair)
    index = pair.mirror.index.read_bytes()
    forget(pair.mirror, lambda path: path in (pair.path("same"), pair.path("new")))
    as_of = datetime.now(UTC).isoformat()
    assert (
        excluded_from_restore(pair, tmp_path)
        == excluded_from_restore(pair, tmp_path, "--as-of", as_of)
        == "2 files excluded"
    )
    pair.mirror.index.write_bytes(index)
    assert excluded_from_restore(pair, tmp_path) == ""
    pair.put("changed", b"once more")
    pair.backup()
    assert excluded_from_restore(pair, tmp_path) == ""
    assert excluded_from_restore(pair, tmp_path, "--as-of", as_of) == "2 files excluded"
    forget(pair.mirror, lambda path: path == pair.path("same"))
    pair.backup()
    commits(pair.mirror)[-1].unlink()
    assert excluded_from_restore(pair, tmp_path) == ""


def test_forgetting_that_is_committed_does_not_fail_afterwards(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk cannot read old history, or cannot write the status any more."""
    two_runs(pair)
    status = pair.mirror.read_status()
    del status["totals"]
    write_state(pair.mirror.status, status)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(totals, "read_header", fail)
    files = len(pair.index_b())
    assert forget(pair.mirror, lambda path: path == pair.path("same")) == [pair.path("same")]
    assert pair.mirror.read_status()["files"] == files - 1
    monkeypatch.setattr(status_file_module, "write_state", fail)
    assert forget(pair.mirror, lambda path: path == pair.path("new")) == [pair.path("new")]
    assert len(pair.index_b()) == files - 2


@pytest.mark.guarantee("1. Crash at every step")
def test_forgetting_may_be_killed_at_any_step(pair: Pair, cases: Cases, tmp_path: Path) -> None:
    two_runs(pair)

    def forget_same() -> None:
        forget(pair.mirror, lambda path: path == pair.path("same"))

    for killed in crashes(pair, forget_same):
        with cases.one():
            check_sound(pair)
            restore = ("restore", "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "back"))
            _, out, told = mdbackup(*restore, "--dry-run")
            assert (os.fsdecode(pair.path("same")) in out) != (" excluded: " in told)
            if killed:
                forget_same()
                assert pair.mirror.read_status()["files"] == len(pair.index_b())
            pair.backup()
            check_sound(pair)
            assert pair.index_b() == pair.index_a()


@pytest.mark.guarantee("11. Getting it back")
def test_missing_files_can_be_acknowledged_and_are_not_reported_any_more(pair: Pair, tmp_path: Path) -> None:
    """A version, and a file that had left the index; not what a run can bring back. It may reappear."""
    two_runs(pair)
    (old,) = (pair.live("changed").parent / ".old").glob("changed.*")
    for file in (old, pair.live("gone"), pair.live("same")):
        file.unlink()
    dest = str(pair.mirror.dest)
    assert mdbackup("verify", "--dest", dest)[0] == 1 and len(found_in(pair)) == 3
    status, out, _ = mdbackup("verify", "--dest", dest, "--acknowledge-missing")
    assert status == 1 and out.count("acknowledged") == 2
    assert found_in(pair) == {pair.path("same"): "missing"}
    assert mdbackup("verify", "--dest", dest, "--acknowledge-missing")[1].count("acknowledged") == 0
    assert mdbackup("verify", "--dest", dest, "--repair", "--missing")[0] == 1
    pair.put("gone", b"gone")
    pair.backup()
    assert found_in(pair) == {} and told(pair) == walked(pair)
    check_sound(pair)
    rot(pair.live("gone"))
    assert found_in(pair) == {pair.path("gone"): "rotten"}


def test_a_file_that_exists_again_is_not_acknowledged_as_missing(pair: Pair, tmp_path: Path) -> None:
    """As when a part of the disk was not mounted."""
    two_runs(pair)
    (old,) = (pair.live("changed").parent / ".old").glob("changed.*")
    old.rename(tmp_path / "aside")
    with Timeline(pair.mirror) as past:
        walk = Verification(pair.mirror, past, acknowledge=True)
        assert [each.outcome for each in walk].count(VerifyOutcome.MISSING) == 1
    (tmp_path / "aside").rename(old)
    assert walk.acknowledge_missing() == [] and found_in(pair) == {}


def _listed_before(
    found: Callable[[Mirror], list[Path]], runs: Iterator[Run], pair: Pair, mirror: Mirror
) -> list[Path]:
    """Return what is listed; then the next of some runs ends."""
    files = found(mirror)
    for run in runs:
        pair.commit(run)
    return files


def test_a_commit_that_ends_while_history_is_read_is_in_it_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it had begun before or not: nothing is reported as missing."""
    pair.put("file", b"1")
    pair.backup()
    for number, cut_off in enumerate((True, False), 2):
        pair.put("file", b"%d" % number)
        run = pair.begin()
        pair.archive(run)
        if cut_off:
            with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
                broken.setattr(Transaction, "carry_out", lambda *args, **options: 1 / 0)
                pair.commit(run)
        for which in ("commits", "pending"):
            with monkeypatch.context() as racing:
                found = getattr(past_module, which)
                racing.setattr(past_module, which, partial(_listed_before, found, iter([run]), pair))
                with Timeline(pair.mirror) as past:
                    assert [moment.finished for moment in past.moments] == [True] * number
                    assert past.problems == []
