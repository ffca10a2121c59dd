"""Moments are read as people write them, and what can only be guessed is refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.scheme.common.times import NoSuchTime, format_time, parse_time, stamp_of
from tests.pair import Pair
from tests.unit.common.present import NOW
from tests.unit.recovery.somebody import mdbackup


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("now", NOW),
        ("3 days ago", NOW - timedelta(days=3)),
        ("1 hour ago", NOW - timedelta(hours=1)),
        ("20261123T031500.123456Z", datetime(2026, 11, 23, 3, 15, 0, 123456, tzinfo=UTC)),
        ("2026-11-23T14:00+01:00", datetime(2026, 11, 23, 13, 0, 0, 999999, tzinfo=UTC)),
        ("2026-11-23 14:00:05 +0000", datetime(2026, 11, 23, 14, 0, 5, 999999, tzinfo=UTC)),
        ("23 Nov 2026 14:00 UTC", datetime(2026, 11, 23, 14, 0, 0, 999999, tzinfo=UTC)),
        ("november 23, 2026 14:00:05.25Z", datetime(2026, 11, 23, 14, 0, 5, 250000, tzinfo=UTC)),
        ("20261123T1400+0100", datetime(2026, 11, 23, 13, 0, 0, 999999, tzinfo=UTC)),
        ("2026-11-20 10:00 UTC-5", datetime(2026, 11, 20, 15, 0, 0, 999999, tzinfo=UTC)),
        ("2026-11-20 14:00 gmt+0330", datetime(2026, 11, 20, 10, 30, 0, 999999, tzinfo=UTC)),
        ("  yesterday   9:05  Z ", datetime(2026, 11, 27, 9, 5, 0, 999999, tzinfo=UTC)),
    ],
)
def test_moments_are_read_as_people_write_them(text: str, moment: datetime) -> None:
    assert parse_time(text, NOW) == moment


def test_a_moment_without_a_zone_is_local_and_yesterday_is_the_day_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert parse_time("yesterday 14:00", NOW) == datetime(2026, 11, 27, 13, 0, 0, 999999, tzinfo=UTC)
        assert parse_time("14:00", NOW) == datetime(2026, 11, 28, 13, 0, 0, 999999, tzinfo=UTC)
        assert parse_time("2026-07-01", NOW) == datetime(2026, 6, 30, 22, 0, 0, 999999, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


@contextmanager
def zone(name: str) -> Iterator[None]:
    """Let this machine be in a time zone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        try:
            yield
        finally:
            patch.undo()
            time.tzset()


@pytest.mark.parametrize(
    "text",
    [
        *("", "soon", "sunday", "2026-11-23 14:00 EST", "2026-13-01", "yesterday soon"),
        *("99999999999 days ago", "01.02.2026", "1/2/2026", "5m", "7", "10:20 5", "10:20 03/04/2026"),
        *("10:20 3.4.2026", "yesterday 10:20 03/04", "March 2026", "2026 March", "yesterday 2026-11-01"),
        *("2026-07-23 14:00 CET", "2026-11-23 14:00 CEST", "2026-11-20T10:00Z-0500", "2026-11-20 24:00"),
        *("2026-11-20 10", "2026-11-20 10:00 +15", "2026-11-20 10:00 +1:75", "31 Feb 2026", "Nov 2026 3"),
        *("2026-11-20 10:00 AM", "20261120 1000", "2026-11-20T10:00:61", "2026-1-2", "3 dec", "-1 days ago"),
        *(
            "2026-11-20\n10:00\n2026",
            "\u0662026-11-20",
            "tomorrow",
            "1 fortnight ago",
            "latest",
            "today today",
        ),
    ],
)
def test_what_is_no_moment_says_how_to_write_one(text: str) -> None:
    with pytest.raises(NoSuchTime, match=r"write 2026-11-23T14:00|there is no such day, time"):
        parse_time(text, NOW)


def test_the_distant_past_is_before_all_backups() -> None:
    assert stamp_of(parse_time("0999-01-01", NOW)) < "2026"


@pytest.mark.parametrize("text", ["2030-01-01", "tomorrow", "today 23:59"])
def test_what_is_yet_to_come_is_no_moment_of_the_past(text: str) -> None:
    with pytest.raises(NoSuchTime, match=r"in the future|write 2026"):
        parse_time(text, NOW)


ZONES = ("UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Pacific/Apia")
FORMS = (
    *("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S %z", "%Y%m%dT%H%M%S%z", "%d %b %Y %H:%M:%S UTC%z"),
    *("%B %d, %Y %H:%M:%S GMT%z", "%b %d %Y %H:%M:%S.000001 %z"),
)


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2037, 12, 31)),
    st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    st.sampled_from(FORMS),
)
def test_what_is_understood_is_what_was_written(moment: datetime, offset: timezone, form: str) -> None:
    written = moment.replace(microsecond=0, tzinfo=offset)
    read = parse_time(written.strftime(form), datetime(2040, 1, 1, tzinfo=UTC))
    assert read.replace(microsecond=0) == written
    assert read.microsecond == (1 if ".000001" in form else 999_999)


@pytest.mark.parametrize("name", ZONES)
def test_what_commands_print_is_read_as_that_moment(name: str) -> None:
    """Also where clocks go back, for there is the offset behind it."""
    with zone(name):
        for hour in range(0, 9000, 7):
            moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour, microseconds=999_999)
            stamp = stamp_of(moment)
            assert parse_time(format_time(stamp), datetime(2040, 1, 1, tzinfo=UTC)) == moment
            assert parse_time(stamp, datetime(2040, 1, 1, tzinfo=UTC)) == moment


@pytest.mark.parametrize(
    ("name", "day"),
    [
        *(("Africa/Cairo", "2026-04-24"), ("Asia/Beirut", "2026-03-29"), ("America/Havana", "2026-03-08")),
        *(("America/Santiago", "2026-09-06"), ("America/Sao_Paulo", "2018-11-04")),
    ],
)
def test_a_day_that_begins_at_one_begins_then(name: str, day: str) -> None:
    """Clocks go forward at midnight, so that there is none."""
    with zone(name):
        assert f"{parse_time(day, NOW):%Y-%m-%d %H:%M:%S}" == f"{day} 01:00:00"


def test_a_time_that_was_never_or_twice_is_refused_with_what_to_write() -> None:
    with zone("Europe/Berlin"):
        with pytest.raises(NoSuchTime, match="clocks went forward past 02:30 on 2026-03-29"):
            parse_time("2026-03-29 02:30", NOW)
        with pytest.raises(NoSuchTime) as told:
            parse_time("2026-10-25 02:30", NOW)
        first, second = str(told.value).partition("write ")[2].split(" or ")
        assert [f"{parse_time(text, NOW).astimezone(UTC):%H:%M}" for text in (first, second)] == [
            "00:30",
            "01:30",
        ]
        assert f"{parse_time('2026-10-25', NOW):%H:%M %z}" == "00:00 +0200"


def test_a_state_can_be_named_by_its_run_or_as_the_latest(pair: Pair, tmp_path: Path) -> None:
    """As `log` prints it; and the same for the two sides of a comparison."""
    for content in (b"one\n", b"two\n", b"three\n"):
        pair.put("file", content)
        pair.backup()
    dest, name = str(pair.mirror.dest), os.fsdecode(pair.path("file"))
    runs = [line.split()[3] for line in mdbackup("log", "--dest", dest)[1].splitlines()]
    for word, content in ((runs[1], b"two\n"), ("latest", b"three\n"), (runs[0], b"one\n")):
        target = tmp_path / word
        status, _, told = mdbackup("restore", "--dest", dest, "--to", str(target), "--as-of", word)
        assert status == 0, told
        assert Path(f"{target}{name}").read_bytes() == content
    status, told, _ = mdbackup("diff", "--dest", dest, name, "--from", runs[0], "--to", "latest")
    assert status == 0 and told.splitlines()[-2:] == ["-one", "+three"]
    status, _, told = mdbackup("restore", "--dest", dest, "--to", str(tmp_path), "--as-of", "manual__nobody")
    assert status == 2 and "'latest', or the id of a run as `mdbackup log` prints it" in told
