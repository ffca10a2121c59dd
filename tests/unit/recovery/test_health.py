"""How old the backups are: what `mdbackup status` says, in each format, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pendulum
import pytest
from airflow.timetables.trigger import CronTriggerTimetable

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.cli.status_formats import Report, as_prometheus, as_text
from airflow_mdbackup.config import load
from airflow_mdbackup.config import schedule as schedule_module
from airflow_mdbackup.config.airflow_options import default_timezone
from airflow_mdbackup.config.schedule import Assets, Timetable, default_max_age
from airflow_mdbackup.scheme.backup.fetch import fetch_index
from airflow_mdbackup.scheme.common import times as moments
from airflow_mdbackup.scheme.common.units import format_duration, format_two_durations, parse_duration
from airflow_mdbackup.scheme.errors import GuardTripped
from airflow_mdbackup.scheme.files.jsonl import read_header, write_state
from airflow_mdbackup.scheme.recovery.health import (
    Health,
    LastCommit,
    ProviderHealth,
    Unfinished,
    check_health,
    is_reminder_due,
    judge,
)
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.pair import Pair

HOUR = timedelta(hours=1)
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


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


def set_up(dest: Path, **status: Any) -> Mirror:
    mirror = Mirror(dest, "web")
    mirror.claim()
    if status:
        write_state(mirror.status, {"provider": "web", "order": "1", **status})
    return mirror


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


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration with a good provider, a stale one, one without a backup and one that is invalid."""
    now = datetime.now(UTC)
    for name, age in (("good", HOUR), ("stale", 50 * HOUR)):
        run = {"run_id": "r1", "at": (now - age).isoformat(), "outcomes": {"pulled": 7}, "seconds": 1.0}
        last = run if name == "good" else {**run, "run_id": "r2", "outcomes": {"denied": 3, "pulled": 1}}
        mirror = Mirror(tmp_path / name, name)
        mirror.claim()
        write_state(mirror.status, {"order": "1", "files": 7, "last_commit": last, "last_good": run})
    keys = {"sftp_conn_id": "a", "source": "/b"}
    providers: dict[str, Any] = {
        name: {**keys, "dest": str(tmp_path / name)} for name in ("good", "never", "stale")
    }
    path = tmp_path / "providers.yaml"
    path.write_text(json.dumps({"providers": {**providers, "invalid": {"nonsense": 1}}}))
    return path


def test_text_says_the_worst_first_and_fails(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line says all, for agents that show one; then a line for each, the bad ones first."""
    assert main(["status", "--providers-file", str(file)]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == (
        "3 of 4 backups not good: invalid INVALID, never NEVER, stale STALE; "
        "stale had 3 failures in its last run"
    )
    assert [line.split()[:2] for line in lines] == [
        ["invalid", "INVALID"],
        ["never", "NEVER"],
        ["stale", "STALE"],
        ["good", "good"],
    ]
    assert "the last good run was 2 d 2 h ago, more than 26 h" in lines[2]
    assert "was not good: 3 denied, 1 pulled (r2)" in lines[2]
    assert "1 h ago, at most 26 h" in lines[3] and "7 files" in lines[3]


@pytest.mark.parametrize(
    ("names", "status"),
    [(["good"], 0), (["stale"], 1), (["never"], 1), (["invalid"], 1), (["good", "stale"], 1), (["nope"], 2)],
)
def test_exit_status_is_that_of_the_providers_asked_for(file: Path, names: list[str], status: int) -> None:
    """0 only if all of them are good; 2 for a name that is not configured."""
    assert main(["status", "--providers-file", str(file), *names]) == status


@pytest.mark.parametrize("text", [None, "providers: {", "providers: {}"])
def test_no_providers_at_all_is_an_alarm(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration that is lost, broken or empty means that nothing is backed up."""
    path = tmp_path / "providers.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["status", "--providers-file", str(path), "--format", "json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["good"] is False and said["providers"] == []


def test_json_has_each_provider_with_the_same_keys(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a program relies on."""
    main(["status", "--providers-file", str(file), "--format", "json"])
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"format", "at", "good", "problems", "providers"}
    assert {p["provider"]: p["state"] for p in said["providers"]} == {
        "good": "good",
        "invalid": "invalid",
        "never": "never",
        "stale": "stale",
    }
    keys = {"provider", "state", "message", "age", "max_age", "files", "disk", "starts", "next_run"}
    keys |= {"last_good", "last_commit", "unfinished"}
    assert all(set(provider) == keys for provider in said["providers"])
    stale = said["providers"][3]
    assert (stale["disk"], stale["starts"]) == (None, "schedule @daily")
    assert stale["max_age"] == 93600 and 180000 <= stale["age"] < 180000 + 600
    assert stale["last_commit"]["outcomes"] == {"denied": 3, "pulled": 1}


def parsed(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples of a text exposition, having checked that each is announced, once and by type."""
    samples, types = {}, set()
    for line in text.splitlines():
        if line.startswith("#"):
            _, kind, name, rest = line.split(" ", 3)
            assert kind == "HELP" or rest == "gauge"
            if kind == "TYPE":
                assert name not in types
                types.add(name)
            continue
        match = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)', line)
        assert match and match[1] in types, line
        labels = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or "")
        read = frozenset((name, re.sub(r"\\.", unescaped, value)) for name, value in labels)
        assert (match[1], read) not in samples
        samples[match[1], read] = float(match[3])
    return samples


def unescaped(found: re.Match[str]) -> str:
    return {"\\\\": "\\", '\\"': '"', "\\n": "\n"}[found[0]]


def test_prometheus_file_is_replaced_in_one_step_and_readable_for_others(file: Path) -> None:
    """The collector of node_exporter runs as another user, and may read at any time."""
    output = file.parent / "mdbackup.prom"
    output.write_text("old")
    command = ["status", "--providers-file", str(file), "--format", "prometheus", "--output", str(output)]
    with output.open() as open_before:
        assert main(command) == 1
        assert open_before.read() == "old"
    samples = parsed(output.read_text())
    for provider, state in (("good", "good"), ("stale", "stale"), ("never", "never"), ("invalid", "invalid")):
        states = {s: samples["mdbackup_provider_state", of(provider=provider, state=s.value)] for s in Health}
        assert [s for s, value in states.items() if value] == [state]
    at = samples["mdbackup_last_good_timestamp_seconds", of(provider="stale")]
    assert abs(datetime.now(UTC).timestamp() - 50 * 3600 - at) < 600
    assert samples["mdbackup_last_commit_outcomes", of(provider="stale", outcome="denied")] == 3
    assert samples["mdbackup_max_age_seconds", of(provider="never")] == 93600
    assert samples["mdbackup_files", of(provider="good")] == 7
    assert samples["mdbackup_configuration_problems", of()] == 0
    assert output.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in file.parent.iterdir() if "prom" in path.name] == ["mdbackup.prom"]


def test_figures_of_a_backup_are_in_each_format(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """For people who name a provider: its disk usage, what arrived, and when the next run starts."""
    for content in (b"old", b"newer"):
        pair.put("file", content)
        pair.backup()
    keys = {"sftp_conn_id": "a", "source": "/b", "dest": str(pair.mirror.dest), "schedule": "0 3 * * *"}
    file = pair.a.parent / "providers.yaml"
    file.write_text(json.dumps({"providers": {"srv1": keys}}))
    command = ["status", "--providers-file", str(file)]
    main(command)
    assert len(capsys.readouterr().out.splitlines()) == 2
    main([*command, "srv1"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ("on the disk: 1 file (5 B), 1 version (3 B); 8 B added in the last 30 days")
    assert re.fullmatch(
        r"next run 20\d\d-\d\d-\d\d \d\d:\d\d:00 [+-]\d{4} \(schedule 0 3 \* \* \*\)", lines[3]
    )
    main([*command, "--format", "json"])
    (told,) = json.loads(capsys.readouterr().out)["providers"]
    sizes = {"live": 1, "live_bytes": 5, "versions": 1, "version_bytes": 3, "came_30_days": 8}
    assert told["disk"] == sizes and told["next_run"][11:] == "03:00:00+00:00"
    main([*command, "--format", "prometheus"])
    samples = parsed(capsys.readouterr().out)
    assert samples["mdbackup_disk_bytes", of(provider="srv1", kind="live")] == 5
    assert samples["mdbackup_disk_bytes", of(provider="srv1", kind="version")] == 3
    assert samples["mdbackup_disk_files", of(provider="srv1", kind="version")] == 1
    assert samples["mdbackup_came_bytes", of(provider="srv1")] == 8
    at = datetime.fromisoformat(told["next_run"]).timestamp()
    assert samples["mdbackup_next_run_timestamp_seconds", of(provider="srv1")] == at


@pytest.mark.parametrize(
    "totals", [1, {}, {"disk": {"odd": 1}}, {"disk": {}, "stamp": "1", "days": {"x": "y"}}]
)
def test_damaged_totals_are_ignored_and_break_nothing_else(tmp_path: Path, totals: Any) -> None:
    run = {"run_id": "r", "at": NOW.isoformat(), "outcomes": {}}
    mirror = set_up(tmp_path / "dest", last_good=run, files=3, totals=totals)
    status = check_health(mirror, HOUR, NOW)
    assert (status.state, status.files, status.disk, status.received) == (Health.GOOD, 3, None, None)


VIENNA = ZoneInfo("Europe/Vienna")


@pytest.mark.parametrize(
    ("schedule", "zone", "expected"),
    [
        ("@hourly", UTC, "2026-11-24T13:00"),
        ("@daily", UTC, "2026-11-25T00:00"),
        ("@daily", VIENNA, "2026-11-24T23:00"),
        ("@weekly", UTC, "2026-11-29T00:00"),
        ("@monthly", UTC, "2026-12-01T00:00"),
        ("@quarterly", UTC, "2027-01-01T00:00"),
        ("@yearly", UTC, "2027-01-01T00:00"),
        ("15 3 * * *", VIENNA, "2026-11-25T02:15"),
        ("0 3 * 7 *", VIENNA, "2027-07-01T01:00"),
        ("30 12 24 11 *", UTC, "2026-11-24T12:30"),
        (None, UTC, None),
    ],
)
def test_next_run_is_what_the_schedule_says_in_the_time_zone_of_airflow(
    schedule: str | None, zone: tzinfo, expected: str | None
) -> None:
    due = schedule_module.next_run(schedule, NOW, zone)
    assert (None if due is None else due.isoformat()) == (expected and f"{expected}:00+00:00")


@pytest.mark.parametrize(
    "cron", ["*/5 * * * *", "@hourly", "30 2 * * *", "15 */2 * * *", "0 3 * * *", "0 0 * * 0"]
)
def test_next_run_is_that_of_airflow_where_clocks_are_put_forward_or_back(cron: str) -> None:
    """It is never in the past, and no hour that the clock shows twice is skipped."""
    timetable = CronTriggerTimetable(cron, timezone="Europe/Vienna")
    for start in (datetime(2026, 10, 24, 22, tzinfo=UTC), datetime(2026, 3, 28, 22, tzinfo=UTC)):
        for number in range(100):
            now = start + number * timedelta(minutes=7)
            due = timetable._get_next(pendulum.instance(now))
            assert schedule_module.next_run(cron, now, VIENNA) == due, now


def test_what_starts_runs_is_described_where_no_time_is_known() -> None:
    assert (
        schedule_module.describe_schedule(Assets(("mdbackup://web", "other")))
        == "after mdbackup://web and other"
    )
    assert schedule_module.describe_schedule(Timetable("a.B", {})) == "by the timetable a.B"
    assert schedule_module.describe_schedule(None) == "by hand"
    assert schedule_module.next_run(Assets(("mdbackup://web",)), NOW, UTC) is None


def test_time_zone_is_that_of_airflow_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment, from its file, and UTC if neither has a valid one."""
    for name in ("AIRFLOW__CORE__DEFAULT_TIMEZONE", "AIRFLOW_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    assert default_timezone() is UTC
    (tmp_path / "airflow.cfg").write_text("[core]\ndefault_timezone = Europe/Vienna\nodd = %(x)s\n")
    assert default_timezone() == VIENNA
    monkeypatch.setenv("AIRFLOW__CORE__DEFAULT_TIMEZONE", "Asia/Tokyo")
    assert default_timezone() == ZoneInfo("Asia/Tokyo")
    monkeypatch.setenv("AIRFLOW__CORE__DEFAULT_TIMEZONE", "../Nowhere")
    assert default_timezone() is UTC


def of(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def test_output_that_cannot_be_written_is_a_usage_error(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the file; and leaves nothing behind if a directory has its name."""
    for output in (file.parent / "none" / "x.prom", file.parent / "good"):
        assert main(["status", "--providers-file", str(file), "--output", str(output)]) == 2
        assert f"{output} cannot be written" in capsys.readouterr().err
    assert not [path.name for path in file.parent.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("bad", "problems", "first"),
    [
        (0, 0, "2 of 2 backups good"),
        (0, 1, "2 of 2 backups good; 1 problem in the configuration"),
        (1, 2, "1 of 3 backups not good: srv0 STALE; 2 problems in the configuration"),
        (5, 0, "5 of 7 backups not good: " + ", ".join(f"srv{n} STALE" for n in range(5))),
        (
            400,
            0,
            "400 of 402 backups not good: " + "".join(f"srv{n} STALE, " for n in range(5)) + "and 395 more",
        ),
    ],
)
def test_first_line_says_which_backups_are_not_good_and_stays_short(
    bad: int, problems: int, first: str
) -> None:
    """Monitoring agents show no more."""
    statuses = [ProviderHealth(f"srv{number}", Health.STALE) for number in range(bad)]
    report = Report(NOW, (*statuses, *(ProviderHealth(n, Health.GOOD) for n in "ab")), ("wrong",) * problems)
    assert as_text(report).splitlines()[0] == first
    assert report.good == (not bad and not problems)


@pytest.mark.parametrize(
    ("outcomes", "more"),
    [
        ({"pulled": 3, "changed": 1, "vanished": 2}, ""),
        ({"denied": 1, "pulled": 3}, "; srv0 had 1 failure in its last run"),
        ({"denied": 1, "rotten": 2, "unheard of": 4}, "; srv0 had 3 failures in its last run"),
    ],
)
def test_first_line_says_that_a_last_run_failed_while_the_backup_is_still_good(
    outcomes: dict[str, int], more: str
) -> None:
    """This is no alarm yet: the exit status stays 0 until the last good run is too old."""
    last = LastCommit("r2", NOW, outcomes)
    report = Report(
        NOW, (ProviderHealth("srv0", Health.GOOD, 26 * HOUR, LastCommit("r1", NOW - HOUR), last),), ()
    )
    assert as_text(report).splitlines()[0] == f"1 of 1 backups good{more}"
    assert report.good


def test_first_line_names_few_of_many_that_failed_in_their_last_run() -> None:
    last = LastCommit("r2", NOW, {"failed": 1})
    report = Report(
        NOW, tuple(ProviderHealth(f"srv{n}", Health.GOOD, None, None, last) for n in range(400)), ()
    )
    first = as_text(report).splitlines()[0]
    assert "srv4 had 1 failure in its last run, and 395 more" in first and "srv5" not in first


def test_odd_names_cannot_break_the_formats_or_the_terminal() -> None:
    """Whatever a status file or a file of the configuration says."""
    odd = 'a"b\\c\nd\x1b[31m'
    commit = LastCommit(odd, NOW, {odd: 1})
    run = Unfinished(odd, NOW, at_work=False)
    report = Report(
        NOW, (ProviderHealth("web", Health.STALE, HOUR, None, commit, 1, odd, unfinished=run),), (odd,)
    )
    assert len(as_text(report).splitlines()) == 3
    outcomes = [labels for name, labels in parsed(as_prometheus(report)) if name.endswith("outcomes")]
    assert outcomes == [of(provider="web", outcome='a"b\\c\nd\\x1b[31m')]


def test_command_needs_no_airflow(file: Path) -> None:
    """It works when Airflow is broken, and starts in less than a second."""
    code = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert name.partition('.')[0] != 'airflow', f'{name} is imported'\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from airflow_mdbackup.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", "--providers-file", str(file), "good"],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 of 1 backups good\n")
