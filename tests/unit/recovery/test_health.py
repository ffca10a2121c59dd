"""How old the backups are, and which of them are good."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.config import load
from airflow_mdbackup.config.schedule import default_max_age
from airflow_mdbackup.scheme.backup.fetch import fetch_index
from airflow_mdbackup.scheme.common import times as moments
from airflow_mdbackup.scheme.common.units import format_duration, format_two_durations, parse_duration
from airflow_mdbackup.scheme.errors import GuardTripped
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.recovery.health import Health, LastCommit, check_health, is_reminder_due, judge
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair
from tests.unit.recovery.health import HOUR, NOW, set_up


@pytest.mark.parametrize(
    ("last_good", "since", "state", "said"),
    [
        (NOW - 26 * HOUR, None, Health.GOOD, ""),
        (NOW - 27 * HOUR, None, Health.STALE, "the last good run was 27 h ago, more than 26 h"),
        (NOW + 30 * HOUR, None, Health.STALE, "30 h in the future"),
        (NOW + timedelta(minutes=5), None, Health.GOOD, ""),
        (None, None, Health.NEVER, "there has been no good run yet"),
        (None, NOW - 26 * HOUR, Health.GOOD, ""),
        (None, NOW - 27 * HOUR, Health.NEVER, "no good run yet, in the 27 h since the watchdog first saw it"),
        (NOW - 27 * HOUR, NOW, Health.STALE, "27 h ago"),
    ],
)
def test_backup_is_good_up_to_its_max_age_and_then_stale(
    last_good: datetime | None, since: datetime | None, state: Health, said: str
) -> None:
    """A first backup has that long from when its provider is first seen; a wrong clock hides nothing."""
    judged, message = judge(last_good, 26 * HOUR, NOW, since)
    assert judged == state
    assert said in message and bool(said) == bool(message)


@pytest.mark.parametrize(
    ("max_age", "over", "said"),
    [
        (timedelta(minutes=3), timedelta(seconds=20), "was 3 min 20 s ago, more than 3 min"),
        (timedelta(minutes=3), timedelta(milliseconds=1), "was 3 min 1 s ago, more than 3 min"),
        (timedelta(seconds=90), timedelta(seconds=10), "was 1 min 40 s ago, more than 1 min 30 s"),
        (26 * HOUR, timedelta(seconds=59), "was 26 h 59 s ago, more than 26 h"),
        (timedelta(days=5), timedelta(minutes=59), "was 5 d 59 min ago, more than 5 d"),
        (timedelta(days=5), HOUR, "was 5 d 1 h ago, more than 5 d"),
    ],
)
def test_an_age_and_its_limit_are_never_the_same_in_words(
    max_age: timedelta, over: timedelta, said: str
) -> None:
    assert said in judge(NOW - max_age - over, max_age, NOW)[1]


def test_a_whole_age_and_a_limit_of_less_than_a_second_differ() -> None:
    assert format_two_durations(timedelta(seconds=0.4), timedelta(seconds=0.2)) == ("1 s", "0 s")


def test_without_a_max_age_any_good_run_will_do() -> None:
    """`max_age: null` switches the alarm off, but a backup that never succeeded is still reported."""
    assert judge(NOW - 9000 * HOUR, None, NOW) == (Health.GOOD, "")
    assert judge(None, None, NOW)[0] == Health.NEVER
    assert judge(None, None, NOW, since=NOW - 9000 * HOUR) == (Health.GOOD, "")


def test_reminders_are_sent_at_once_and_then_once_a_day() -> None:
    """By an hourly check that may run some minutes early; a clock that was set back does not silence it."""
    assert is_reminder_due(None, NOW)
    assert [hours for hours in range(1, 26) if is_reminder_due(NOW - hours * HOUR, NOW)] == [24, 25]
    assert is_reminder_due(NOW - 24 * HOUR + timedelta(minutes=5), NOW)
    assert is_reminder_due(NOW + HOUR, NOW)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12, "12 s"), (300, "5 min"), (3600, "1 h"), (5400, "1 h 30 min"), (93600, "26 h"), (273600, "3 d 4 h")],
)
def test_durations_are_written_in_their_two_largest_units(seconds: int, text: str) -> None:
    """As people write them."""
    assert format_duration(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("@hourly", "26h"),
        ("@daily", "26h"),
        ("15 3 * * *", "26h"),
        ("*/10 * * * *", "26h"),
        ("@weekly", "170h"),
        ("0 3 * * 0", "170h"),
        ("0 3 * * 1-5", "74h"),
        ("*/5 8-18 * * 1-5", "74h"),
        ("0 3 1 * *", "746h"),
        ("0 3 1-20 * *", "290h"),
        ("0 3 * 6 *", "8066h"),
        (None, None),
    ],
)
def test_max_age_follows_the_longest_time_between_two_runs(
    schedule: str | None, expected: str | None
) -> None:
    """A weekly backup is not stale on Tuesday, one of weekdays not on Monday; by hand, it never is."""
    assert default_max_age(schedule) == (parse_duration(expected) if expected else None)


def test_max_age_of_the_configuration_wins_over_the_schedule(tmp_path: Path) -> None:
    """Also `null`, and that of `defaults`."""
    keys = "sftp_conn_id: a, source: /b"
    (tmp_path / "p.yaml").write_text(
        "providers:\n"
        f"  daily: {{{keys}, dest: /x/1}}\n"
        f"  weekly: {{{keys}, dest: /x/2, schedule: '@weekly'}}\n"
        f"  said: {{{keys}, dest: /x/3, max_age: 3h}}\n"
        f"  never: {{{keys}, dest: /x/4, max_age: null}}\n"
        f"  wrong: {{{keys}, dest: /x/5, schedule: '@often'}}\n"
    )
    (tmp_path / "q.yaml").write_text(
        f"defaults: {{max_age: 2d}}\nproviders:\n  other: {{{keys}, dest: /x/6, schedule: '@weekly'}}\n"
    )
    configuration = load(tmp_path)
    ages = {provider.name: provider.max_age for provider in configuration.providers}
    expected = {"daily": 26 * HOUR, "weekly": 170 * HOUR, "said": 3 * HOUR, "never": None, "other": 48 * HOUR}
    assert ages == expected
    (problem,) = configuration.problems
    assert problem.key == "schedule"


def test_status_is_what_a_real_run_left(pair: Pair) -> None:
    """Fresh after it, stale later; reading changes nothing on the disk."""
    pair.put("one", b"1")
    pair.put("two", b"2")
    pair.backup()
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in pair.mirror.dest.rglob("*"))
    status = check_health(pair.mirror, 26 * HOUR, datetime.now(UTC))
    assert (status.state, status.files, status.message) == (Health.GOOD, 2, "")
    assert status.last_good == status.last_commit is not None
    assert status.last_good is not None and status.last_good.outcomes == {"pulled": 2}
    later = check_health(pair.mirror, 26 * HOUR, datetime.now(UTC) + 27 * HOUR)
    assert later.state == Health.STALE
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in pair.mirror.dest.rglob("*")) == before


def told_of(pair: Pair, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what `mdbackup status` prints of a pair, which is good."""
    file = pair.a.parent / "providers.yaml"
    keys = {"sftp_conn_id": "a", "source": "/b", "dest": str(pair.mirror.dest)}
    file.write_text(json.dumps({"providers": {"srv1": keys}}))
    assert main(["status", "--providers-file", str(file), *words]) == 0
    return capsys.readouterr().out


def test_a_run_that_failed_before_its_commit_is_reported_until_another_finishes(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here its diff fails, by the guard; then one that did nothing but start."""
    for number in range(101):
        pair.put(f"{number}", b"%d" % number)
    pair.backup()
    assert told_of(pair, capsys).startswith("1 of 1 backups good\n")
    for number in range(101):
        pair.put(f"{number}", b"other")
    with pytest.raises(GuardTripped):
        pair.backup()
    with pytest.raises(ConnectionRefusedError):
        fetch_index(pair.mirror, pair.new_run(), refusing, pair.index)
    begun = in_words_of(read_header(pair.mirror.run("manual__3").begun)["at"])
    told = f"the run manual__3, started {begun}, did not finish"
    first, line = told_of(pair, capsys).splitlines()
    assert first == f"1 of 1 backups good; srv1: {told}"
    assert line.split()[1] == "good" and line.endswith(f"; {told}")
    (said,) = json.loads(told_of(pair, capsys, "--format", "json"))["providers"]
    since = said["unfinished"].pop("since")
    assert said["state"] == "good" and said["unfinished"] == {"run_id": "manual__3", "at_work": False}
    assert in_words_of(since) == begun
    for number in range(101):
        pair.put(f"{number}", b"%d" % number)
    pair.backup()
    assert told_of(pair, capsys).startswith("1 of 1 backups good\n")


def refusing() -> Reader:
    raise ConnectionRefusedError


def in_words_of(text: str) -> str:
    return moments.format_time(moments.stamp_of(datetime.fromisoformat(text)))


def test_a_time_that_the_status_prints_means_that_run_to_other_commands(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as exact as in `log`, and in the same time zone."""
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        pair.put("file", b"1")
        pair.backup()
        line = told_of(pair, capsys).splitlines()[1]
        at = line.partition("last good ")[2].partition(" (")[0]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \+0545", at)
        dest, target = str(pair.mirror.dest), tmp_path / "target"
        assert main(["restore", "--dest", dest, "--to", str(target), "--as-of", at]) == 0
        assert Path(f"{target}{os.fsdecode(pair.path('file'))}").read_bytes() == b"1"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_failed_first_run_is_reported_in_addition_to_the_lack_of_a_good_one(pair: Pair) -> None:
    pair.mirror.claim()
    with pytest.raises(ConnectionRefusedError):
        fetch_index(pair.mirror, pair.new_run(), refusing, pair.index)
    status = check_health(pair.mirror, None, datetime.now(UTC))
    assert status.state == Health.NEVER
    assert status.unfinished is not None and status.unfinished.run_id == "manual__1"


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_in_progress_is_not_reported_as_failed(
    pair: Pair, capsys: pytest.CaptureFixture[str], shared: bool
) -> None:
    """A task of it holds a lock; shards share theirs. Between two tasks this cannot be known here."""
    pair.put("one", b"1")
    pair.backup()
    run = pair.begin()
    with run.lock("a step", "srv1", shared=shared):
        first, line = told_of(pair, capsys).splitlines()
        assert first == "1 of 1 backups good"
        assert "; running since 20" in line and line.endswith(" (manual__2)")
        assert "has not come" not in line
    assert "manual__2, started 20" in told_of(pair, capsys).splitlines()[0]
    pair.finish(run)
    assert "manual__2" not in told_of(pair, capsys).splitlines()[0]


def test_a_run_older_than_the_last_commit_is_not_reported(pair: Pair) -> None:
    """Nor is a damaged run, or what is not one; and reading changes nothing."""
    pair.put("one", b"1")
    pair.begin()
    pair.backup()
    assert check_health(pair.mirror, None, datetime.now(UTC)).unfinished is None
    run = pair.prepare()
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in pair.mirror.dest.rglob("*"))
    assert check_health(pair.mirror, None, datetime.now(UTC)).unfinished is not None
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in pair.mirror.dest.rglob("*")) == before
    (run.folder / "run.lock").unlink()
    assert check_health(pair.mirror, None, datetime.now(UTC)).unfinished is not None
    for text in (
        "",
        '{"format": 1, "order": "n9"}\n',
        '{"format": 1, "order": "n9", "run_id": 1, "at": "x"}\n',
    ):
        run.begun.write_text(f"{text}\n")
        status = check_health(pair.mirror, None, datetime.now(UTC))
        assert (status.state, status.unfinished) == (Health.GOOD, None)
    run.begun.unlink()
    run.begun.mkdir()
    pair.prepare()
    status = check_health(pair.mirror, None, datetime.now(UTC))
    assert status.unfinished is not None and status.unfinished.run_id == "manual__4"


def test_a_destination_without_a_good_run_is_reported_as_never_backed_up(tmp_path: Path) -> None:
    """Missing, empty (a disk that is not mounted), set up, or with runs that all failed."""
    failed = {"run_id": "r", "at": "2026-11-24T03:00:00+00:00", "outcomes": {"denied": 3}}
    (tmp_path / "empty").mkdir()
    for mirror in (
        Mirror(tmp_path / "missing", "web"),
        Mirror(tmp_path / "empty", "web"),
        set_up(tmp_path / "new"),
        set_up(tmp_path / "failed", files=0, last_commit=failed),
    ):
        status = check_health(mirror, HOUR, NOW)
        assert status.state == Health.NEVER and status.message
    assert status.last_commit == LastCommit("r", datetime(2026, 11, 24, 3, tzinfo=UTC), {"denied": 3})


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '{"format": 2}',
        '{"format": 1, "last_good": 1}',
        '{"format": 1, "last_good": {"run_id": "r", "at": "yesterday", "outcomes": {}}}',
        '{"format": 1, "last_good": {"run_id": "r", "at": "2026-11-24T03:00:00", "outcomes": {}}}',
        '{"format": 1, "files": "many"}',
    ],
)
def test_a_damaged_status_is_reported_as_unreadable_and_never_raised(tmp_path: Path, text: str) -> None:
    """One backup that cannot be judged must not hide the others."""
    mirror = set_up(tmp_path / "dest")
    mirror.status.write_text(text)
    status = check_health(mirror, HOUR, NOW)
    assert status.state == Health.UNREADABLE and str(mirror.status) in status.message


def test_the_destination_of_another_provider_is_reported_as_unreadable(tmp_path: Path) -> None:
    """Its good runs are not this one's."""
    set_up(tmp_path / "dest")
    status = check_health(Mirror(tmp_path / "dest", "other"), HOUR, NOW)
    assert status.state == Health.UNREADABLE and "belongs to the provider 'web'" in status.message


def test_an_unreadable_destination_is_reported_as_such(tmp_path: Path) -> None:
    """The message says that the user is wrong, and not that there is no backup."""
    mirror = set_up(tmp_path / "dest")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    else:
        mirror.dest.chmod(0)
    try:
        status = check_health(mirror, HOUR, NOW)
    finally:
        if root:
            os.seteuid(0)
        mirror.dest.chmod(0o700)
    assert status.state == Health.UNREADABLE and "run this as the user of the workers" in status.message
