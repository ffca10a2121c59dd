"""A clock that was wrong for a while: order stays, and what goes by time goes by the true one."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import airflow_mdbackup.scheme.store.mirror as mirror_module
from airflow_mdbackup.scheme.common.times import format_time, stamp_of, time_of_stamp
from airflow_mdbackup.scheme.errors import DestinationRefused, IndexRefused
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.history.clock import doubt, true_times
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.health import Health, check_health
from airflow_mdbackup.scheme.recovery.prune import KeepRules, pruning
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crash_at
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.torture import scaled
from tests.unit.recovery.somebody import mdbackup

NOW = datetime.now(UTC)
AHEAD, DEAD = datetime(2099, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)
SetClock = Callable[[datetime], None]


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Set the clock of this machine, as far as backups ask it."""
    return lambda moment: monkeypatch.setattr(mirror_module, "now_stamp", lambda: stamp_of(moment))


def at(*days: float | datetime) -> list[str]:
    return [stamp_of(day if isinstance(day, datetime) else ago(day)) for day in days]


def told(claims: list[str]) -> list[float]:
    """Return when commits were, in days ago, to the hour."""
    return [
        round((NOW - time_of_stamp(time)) / timedelta(days=1), 1)
        for time in true_times(claims, stamp_of(NOW))
    ]


# --- when commits were ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "days"),
    [
        ([], []),
        (at(9, 5, 3), [9, 5, 3]),
        (at(9, AHEAD, 5, 3), [9, 7, 5, 3]),
        (at(9, AHEAD, AHEAD, 3), [9, 7, 5, 3]),
        (at(9, DEAD, 5), [9, 7, 5]),
        (at(9, 6, AHEAD), [9, 6, 3]),  # the last one, and it is now
        (at(9, 6, DEAD), [9, 6, 3]),
        (at(30, 1, 20, 10), [30, 25, 20, 10]),  # a clock that was ahead by less than has passed since
        (at(30, 20, 29, 10, 5), [30, 29.5, 29, 10, 5]),
    ],
)
def test_what_cannot_be_is_between_what_can(claims: list[str], days: list[float]) -> None:
    assert told(claims) == days


@pytest.mark.parametrize("wrong", [AHEAD, DEAD])
def test_where_no_commit_was_at_a_time_that_can_be_they_were_just_now(wrong: datetime) -> None:
    times = true_times(at(wrong, wrong), stamp_of(NOW))
    assert times == sorted(set(times))
    assert NOW - timedelta(minutes=1) < time_of_stamp(times[0]) < time_of_stamp(times[1]) <= NOW


def test_a_clock_that_is_wrong_now_makes_nothing_wrong_that_was_right() -> None:
    claims = at(9, AHEAD, 5)
    assert true_times(at(9, 5), stamp_of(DEAD)) == at(9, 5)
    assert true_times(claims, stamp_of(DEAD))[0] == claims[0]


@given(st.lists(st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1)), max_size=40))
def test_times_rise_whatever_clocks_said(moments: list[datetime]) -> None:
    claims = [stamp_of(moment.replace(tzinfo=UTC)) for moment in moments]
    times = true_times(claims, stamp_of(NOW))
    assert len(times) == len(claims) and times == sorted(set(times))
    assert all(time_of_stamp(time) < NOW + timedelta(hours=2) for time in times)


# --- what goes by them ------------------------------------------------------------------------------


def runs_at(pair: Pair, set_clock: SetClock, *moments: datetime) -> None:
    """Have a run at each of these moments, by the clock, each of which changes the one file."""
    for number, moment in enumerate(moments):
        set_clock(moment)
        pair.put("file", b"state %d" % number)
        assert pair.backup().outcomes == {"pulled": 1}


def restored(pair: Pair, folder: Path, as_of: str) -> str:
    status, _, said = mdbackup(
        *("restore", "--dest", str(pair.mirror.dest), "--to", str(folder), "--as-of", as_of, "--overwrite")
    )
    assert status == 0, said
    return Path(f"{folder}{pair.a}/file").read_text()


@pytest.mark.parametrize("wrong", [AHEAD, DEAD])
@pytest.mark.parametrize("knows", ["the commit", "its file"])
def test_one_run_under_a_wrong_clock_spoils_no_moment(
    pair: Pair, tmp_path: Path, set_clock: SetClock, wrong: datetime, knows: str
) -> None:
    """Neither for a restore nor for a pruning; and each stamp that is in a name can be asked for."""
    runs_at(pair, set_clock, ago(10), wrong, ago(5), ago(3), ago(1))
    if knows == "its file":  # as in backups that were made before commits told what the clock said
        forget_what_clocks_said(pair)
    set_clock(NOW)
    for as_of, state in (("9.9", 0), ("4", 2), ("2", 3), ("0", 4)):
        when = format_time(stamp_of(ago(float(as_of))))
        assert restored(pair, tmp_path / "target", when) == f"state {state}"
    assert restored(pair, tmp_path / "target", "now") == "state 4"
    for number, path in enumerate(commits(pair.mirror)):
        assert restored(pair, tmp_path / "target", path.name[:23]) == f"state {number}"
    dest = ("--dest", str(pair.mirror.dest))
    kept = mdbackup("prune", *dest, "--keep-daily", "30", "--format", "json")[1].splitlines()
    assert [json.loads(line)["fate"] for line in kept] == ["kept"] * 4
    days = [line[:10] for line in mdbackup("log", *dest)[1].splitlines()]
    assert days == [format_time(stamp_of(ago(day)))[:10] for day in (10, 7.5, 5, 3, 1)]
    assert "2099" not in mdbackup("versions", *dest, "*")[1].replace(".2099", "")
    check_sound(pair)


def forget_what_clocks_said(pair: Pair) -> None:
    for path in commits(pair.mirror):
        written = read_header(path)["at"]
        path.write_text(path.read_text().replace(f'"at":"{written}",', ""))
        assert "at" not in read_header(path)
        seconds = time_of_stamp(written).timestamp()
        os.utime(path, (seconds, seconds))


def test_a_run_that_commits_nothing_leaves_no_trace_of_its_clock(pair: Pair, set_clock: SetClock) -> None:
    """Not even of the versions that it has archived; a retry under the right clock gives them new names."""
    runs_at(pair, set_clock, ago(5))
    set_clock(AHEAD)
    pair.put("file", b"new")
    run = pair.begin()
    pair.archive(run)
    set_clock(NOW)
    assert pair.mirror.next_stamp() == stamp_of(NOW)
    pair.commit(run)
    (version,) = pair.live(".old").iterdir()
    assert version.name == f"file.{stamp_of(NOW)}" and pair.versions("file") == [b"state 0"]
    assert pair.mirror.last_commit() == stamp_of(NOW)


def test_of_two_wrong_commits_in_a_row_either_may_be_set_first(pair: Pair, set_clock: SetClock) -> None:
    """One that is only taken to have been some time bounds nothing."""
    runs_at(pair, set_clock, ago(10), AHEAD, AHEAD + timedelta(1), ago(4))  # taken for ago(8) and ago(6)
    set_clock(NOW)
    command = ("clock", "--dest", str(pair.mirror.dest), "--set")
    assert mdbackup(*command, "manual__2", format_time(stamp_of(ago(5))))[0] == 0
    status, _, told = mdbackup(*command, "manual__3", format_time(stamp_of(ago(5.5))))
    assert status == 2 and format_time(stamp_of(ago(5))) in told
    assert mdbackup(*command, "manual__3", format_time(stamp_of(ago(4.5))))[0] == 0
    with Timeline(pair.mirror) as past:
        days = [round((NOW - time_of_stamp(moment.time)) / timedelta(days=1), 1) for moment in past.moments]
    assert days == [10, 5, 4.5, 4]
    assert mdbackup(*command[:-1])[1].count("(set with --set)") == 2
    for run_id in ("manual__3", "manual__2"):
        assert (
            f"{run_id}: the time given by --set was removed" in mdbackup(*command[:-1], "--unset", run_id)[2]
        )
    with Timeline(pair.mirror) as past:
        days = [round((NOW - time_of_stamp(moment.time)) / timedelta(days=1), 1) for moment in past.moments]
    assert days == [10, 8, 6, 4]


def test_a_kill_before_the_records_and_another_clock_leave_no_version_that_nobody_knows(
    pair: Pair, set_clock: SetClock
) -> None:
    """A retry takes them back; if none comes, they go with the run."""
    start_of_two_files(pair)
    for number in count(1):
        for retried in scaled([number % 2 == 0], [True, False]):
            run, killed = archive_killed_at(number, pair, set_clock)
            if retried:
                pair.finish(run)
            else:
                pair.backup()
                os.utime(run.folder, (0, 0))
                pair.backup()
                assert not run.folder.exists()
            assert versions_there(pair) == versions_in_history(pair)
            check_sound(pair)
        if not killed:
            return


@pytest.mark.usefixtures("no_links")
def test_a_retry_takes_back_copies_that_a_kill_left_unrecorded(pair: Pair, set_clock: SetClock) -> None:
    start_of_two_files(pair)
    killed = True
    for number in count(1, step=scaled(3, 1)):
        run, killed = archive_killed_at(number, pair, set_clock)
        pair.finish(run)
        assert versions_there(pair) == versions_in_history(pair)
        if not killed:
            return


def test_a_retry_archives_the_rest_if_a_directory_cannot_be_read(
    pair: Pair, set_clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The versions that the killed try left there stay."""
    start_of_two_files(pair)
    pair.put("bad/c", b"at first")
    pair.backup()
    pair.put("bad/c", b"changed")
    run, killed = archive_killed_at(20, pair, set_clock)
    assert killed
    real = os.open

    def broken(path: bytes, *arguments: int, **options: int) -> int:
        if path == b"bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", broken)
        assert pair.finish(run).failed == 1
    assert versions_there(pair) == versions_in_history(pair)
    assert not pair.backup().failed
    check_sound(pair)


def start_of_two_files(pair: Pair) -> None:
    pair.put("a", b"at first")
    pair.put("b", b"at first")
    pair.backup()


def archive_killed_at(number: int, pair: Pair, set_clock: SetClock) -> tuple[Run, bool]:
    """Have a run be killed at a step of its archiving, under a clock that is ahead until then."""
    set_clock(datetime.now(UTC))
    for name in ("a", "b"):
        pair.put(name, os.urandom(8))
    run = pair.begin()
    set_clock(AHEAD)
    killed = crash_at(number, partial(pair.archive, run))
    set_clock(datetime.now(UTC))
    return run, killed


def versions_there(pair: Pair) -> set[bytes]:
    return {os.fsencode(path.name) for path in pair.live(".old").iterdir()}


def versions_in_history(pair: Pair) -> set[bytes]:
    changes = (change for commit in pair.history() for change in commit)
    return {os.path.basename(change.version) for change in changes if change.version is not None}


def test_a_person_who_knows_better_says_when_a_commit_was(
    pair: Pair, tmp_path: Path, set_clock: SetClock
) -> None:
    runs_at(pair, set_clock, ago(10), AHEAD, ago(5))
    set_clock(NOW)
    command = ("clock", "--dest", str(pair.mirror.dest))
    stamps = [path.name[:23] for path in commits(pair.mirror)]
    status, listed, _ = mdbackup(*command)
    assert status == 0 and [line.split()[0] for line in listed.splitlines()] == stamps[1:]
    assert format_time(stamp_of(ago(7.5))) in listed.splitlines()[0]
    better = format_time(stamp_of(ago(9)))
    for refused in (format_time(stamp_of(ago(11))), format_time(stamp_of(ago(4))), "soon"):
        assert mdbackup(*command, "--set", "manual__2", refused)[0] == 2
    assert mdbackup(*command, "--set", "manual__9", better)[0] == 2
    before = [path.read_bytes().partition(b"\n")[2] for path in commits(pair.mirror)]
    assert better in mdbackup(*command, "--set", "manual__2", better)[1]
    assert [path.read_bytes().partition(b"\n")[2] for path in commits(pair.mirror)] == before
    assert restored(pair, tmp_path / "target", format_time(stamp_of(ago(8)))) == "state 1"
    told = mdbackup(*command, "--format", "json")[1].splitlines()
    assert [json.loads(line)["run_id"] for line in told] == ["manual__2", "manual__3"]
    with Timeline(pair.mirror) as past:
        assert not past.problems


def test_where_no_clock_was_wrong_there_is_nothing_to_tell(pair: Pair) -> None:
    pair.put("file", b"1")
    pair.backup()
    status, listed, said = mdbackup("clock", "--dest", str(pair.mirror.dest))
    assert (status, listed, said) == (0, "", "Every commit was at the time of its stamp\n")


# --- who is told, and when --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clock", "last", "index", "built", "words"),
    [
        (NOW, ago(1), NOW, True, None),
        (NOW, None, NOW - timedelta(minutes=59), True, None),
        (NOW, None, NOW - timedelta(minutes=61), True, "that of the provider"),
        (NOW, ago(30), ago(1), True, "that of the provider"),
        (NOW, None, ago(1.9), False, None),
        (NOW, ago(-0.1), ago(1.9), False, None),
        (NOW, ago(-0.1), NOW - timedelta(minutes=10), True, None),
        (NOW, None, ago(30), False, None),
        (NOW, ago(1), NOW + timedelta(minutes=10), True, None),
        (DEAD, ago(1), NOW, True, "which is before this program was written"),
        (ago(30), ago(1), NOW, True, "but the last commit was at"),
        (ago(30), None, NOW, False, "that of the provider"),
        (NOW + timedelta(days=365), ago(1), NOW, True, "that of the provider"),
    ],
)
def test_a_clock_is_doubted_where_something_speaks_against_it(
    clock: datetime, last: datetime | None, index: datetime, built: bool, words: str | None
) -> None:
    said = doubt(clock, stamp_of(last) if last else "", int(index.timestamp()), built)
    assert said is None if words is None else said is not None and words in said and "mdbackup clock" in said


def test_a_doubt_is_in_the_log_of_the_first_step_and_the_status_until_a_run_has_none(
    pair: Pair, set_clock: SetClock
) -> None:
    runs_at(pair, set_clock, ago(5))
    set_clock(ago(9))
    pair.put("file", b"new")
    pair.build_index()
    run = pair.new_run()
    assert "but the last commit was at" in (pair.fetch(run).clock or "")
    pair.pull(run, pair.diff(run))
    assert "but the last commit was at" in (pair.finish(run).clock or "")
    found = check_health(pair.mirror, None, datetime.now(UTC))
    assert found.state == Health.CLOCK and found.message.startswith(
        "in the last run the clock of this machine"
    )
    set_clock(NOW)
    assert pair.backup().clock is None
    assert check_health(pair.mirror, None, datetime.now(UTC)).state == Health.GOOD


def test_a_clock_that_is_right_again_is_not_doubted_for_what_the_last_commit_says(
    pair: Pair, set_clock: SetClock
) -> None:
    """The provider's clock agrees with it. Also where there is nothing new, so that the last commit stays."""
    runs_at(pair, set_clock, ago(3), AHEAD)
    set_clock(NOW)
    assert pair.backup().clock is None
    assert check_health(pair.mirror, None, datetime.now(UTC)).state == Health.GOOD


@pytest.mark.parametrize("hours", [0, 3, 40])
def test_an_index_that_the_run_had_built_is_as_old_as_the_build_is_past(pair: Pair, hours: int) -> None:
    """A fetch may be tried again hours later, or have waited for a worker."""
    pair.put("file", b"1")
    pair.build_index()

    def told(behind: float, built: float | None) -> str | None:
        """Return the doubt of a fetch, the provider's clock being so many hours behind."""
        written = time.time() - (hours + behind) * 3600
        os.utime(pair.index, (written, written))
        return pair.fetch(pair.new_run(), built=built).clock

    then = time.time() - hours * 3600
    assert told(0, then) is told(0.9, then) is told(-0.9 if hours else 0, then) is None
    (doubted,) = {told(1.1, then) is None, told(40, then) is None}
    assert not doubted
    assert "that of the provider" in (told(-hours - 1.1, then) or "")
    assert told(1.1, None) is None  # which another did, whenever that was
    # By a clock that was set back since, the build is yet to come.
    assert told(-hours, time.time() + 7200) is None


def test_no_index_says_a_time_that_nobody_can_read() -> None:
    assert doubt(NOW, "", 999_999_999_999, True) is not None
    assert doubt(NOW, "", -5, False) is None


@pytest.mark.parametrize("wrong", ["the clock now", "the last commit"])
def test_nothing_is_pruned_while_the_last_commit_is_yet_to_come(
    pair: Pair, set_clock: SetClock, wrong: str
) -> None:
    """Nobody can tell which is wrong. With a clock that is behind, all later commits would be of one day."""
    runs_at(pair, set_clock, *(ago(day) for day in range(12, 0, -1)))
    if wrong == "the last commit":
        runs_at(pair, set_clock, AHEAD)
    set_clock(NOW if wrong == "the last commit" else ago(20))
    for carry_out in (False, True):
        refused = pytest.raises(DestinationRefused, match=r"nothing is pruned: .*mdbackup clock --set")
        with refused, pruning(pair.mirror, Selection(), KeepRules(daily=30), carry_out=carry_out):
            raise AssertionError


def test_an_index_that_is_too_old_has_the_clocks_looked_at(pair: Pair) -> None:
    pair.put("file", b"1")
    pair.build_index()
    with pytest.raises(IndexRefused, match="Are both clocks right"):
        pair.fetch(pair.new_run(), max_age=-10)
