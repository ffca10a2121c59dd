"""What `mdbackup status` says of the backups, in each format, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pendulum
import pytest
from airflow.timetables.trigger import CronTriggerTimetable

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.cli.status_formats import Report, as_prometheus, as_text
from airflow_mdbackup.config import schedule as schedule_module
from airflow_mdbackup.config.airflow_options import default_timezone
from airflow_mdbackup.config.schedule import Assets, Timetable
from airflow_mdbackup.scheme.files.jsonl import write_state
from airflow_mdbackup.scheme.recovery.health import (
    Health,
    LastCommit,
    ProviderHealth,
    Unfinished,
    check_health,
)
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.pair import Pair
from tests.unit.recovery.health import HOUR, NOW, set_up


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
