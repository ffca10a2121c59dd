"""Rates, and the limits of bandwidth by the time of the day."""

from __future__ import annotations

from datetime import time as time_of_day

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.config.bandwidth import BandwidthLimit, parse_bandwidth_limit
from airflow_mdbackup.scheme.common.units import parse_rate, write_size
from tests.unit.config.providers_file import MINIMAL, one


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1KB", 1000),
        ("500KB", 500_000),
        ("500kB", 500_000),
        ("20MB", 20_000_000),
        ("20MB/s", 20_000_000),
        ("1.5GB", 1_500_000_000),
        ("10KiB", 10_240),
        ("10MiB/s", 10 * 2**20),
        ("1GiB", 2**30),
        ("0.0015MB", 1500),
        ("1000GB", 10**12),
    ],
)
def test_a_rate_is_a_size_for_each_second(read, text, rate):
    """Decimal or binary units, with or without `/s`; alone it holds at all hours."""
    limit = one(read(f"providers: {{web: {{{MINIMAL}, bandwidth_limit: {text}}}}}")).bandwidth_limit
    assert {limit.at(time_of_day(hour)) for hour in range(24)} == {rate}


@given(st.integers(1000, 10**12))
def test_a_rate_that_is_written_out_reads_as_the_same_again(rate):
    """The log and the page of a DAG show it as it may stand in the file."""
    assert parse_rate(write_size(rate)) == rate
    assert parse_rate(f"{write_size(rate)}/s") == rate


DAY = '{rate: 5MB, from: "08:00", to: "18:30"}'
NIGHT = '{rate: 80MB, from: "22:00", to: "06:00"}'


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        (DAY, {"07:59": None, "08:00": 5, "12:00": 5, "18:29": 5, "18:30": None, "00:00": None}, ""),
        (NIGHT, {"21:59": None, "22:00": 80, "00:00": 80, "05:59": 80, "06:00": None, "12:00": None}, ""),
        ('{rate: 5MB, from: "22:00", to: "00:00"}', {"21:59": None, "23:59": 5, "00:00": None}, ""),
        ("{rate: 5MB}", {"00:00": 5, "12:00": 5}, "5MB/s"),
        (
            f"[{DAY}, {NIGHT}, 40MB]",
            {"08:00": 5, "18:30": 40, "22:00": 80, "05:00": 80, "06:00": 40},
            "5MB/s from 08:00 to 18:30, else 80MB/s from 22:00 to 06:00, else 40MB/s",
        ),
        (
            f'[{{rate: 1MB, from: "12:00", to: "13:00"}}, {DAY}]',
            {"11:59": 5, "12:00": 1, "13:00": 5, "19:00": None},
            "1MB/s from 12:00 to 13:00, else 5MB/s from 08:00 to 18:30",
        ),
        (f"[{DAY}, {{rate: 40MB}}]", {"12:00": 5, "19:00": 40}, ""),
    ],
)
def test_a_bandwidth_limit_may_depend_on_the_time_of_day(read, text, expected, said):
    """The first entry that fits holds, up to before its end; where none fits, there is no limit."""
    limit = one(read(f"providers: {{web: {{{MINIMAL}, bandwidth_limit: {text}}}}}")).bandwidth_limit
    found = {time: limit.at(time_of_day.fromisoformat(time)) for time in expected}
    assert found == {time: rate and rate * 1_000_000 for time, rate in expected.items()}
    assert said in str(limit)


def test_a_bandwidth_limit_can_be_taken_back_and_cannot_be_changed(read):
    """`null` is no limit, whatever the defaults say."""
    configuration = read(
        "defaults: {sftp_conn_id: c, source: /, bandwidth_limit: 20MB}\n"
        "providers: {a: {dest: /srv/a}, b: {dest: /srv/b, bandwidth_limit: null}}"
    )
    a, b = (provider.bandwidth_limit for provider in configuration.providers)
    assert a == parse_bandwidth_limit("20MB") == parse_bandwidth_limit(a)
    assert b is None
    with pytest.raises(AttributeError):
        a.rates = ()
    assert isinstance(a, BandwidthLimit) and hash(a)


HOW = "write bytes (not bits) per second, such as `500KB`, `20MB`, `1.5GB` or `10MiB`"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("50", f"must be a rate, but YAML reads the number 50: {HOW}"),
        ("true", f"must be a rate, but YAML reads the boolean true: {HOW}"),
        ('""', f"the text '' is not a rate: {HOW}"),
        ("50M", f"the text '50M' is not a rate: {HOW}"),
        ("50Mb", "is not a rate"),
        ("50Mbit/s", "is not a rate"),
        ("50mb", "is not a rate"),
        ("50 MB", "is not a rate"),
        ("50MB/h", "is not a rate"),
        ("-5MB", "is not a rate"),
        ("1e3MB", "is not a rate"),
        ("0MB", "the text '0MB' must be at least `1KB` and at most `1000GB`"),
        ("0.9KB", "must be at least `1KB`"),
        ("1001GB", "at most `1000GB`"),
        (f"{'9' * 400}GB", "at most `1000GB`"),
        ("[]", "must not be an empty list: write a rate such as `20MB`, or `null` for no limit"),
        ("[[20MB]]", "entry 1: must be a rate, but YAML reads a list"),
        ("{}", '`rate` is missing: write for example `{rate: 5MB, from: "08:00", to: "18:00"}`'),
        ('{from: "08:00", to: "18:00"}', "`rate` is missing"),
        ("{rate: null}", "`rate`: must be a rate, but YAML reads nothing (null)"),
        ("{rate: 5}", "`rate`: must be a rate, but YAML reads the number 5"),
        ("{rate: 5MB, form: 1}", "`form` is not a key; did you mean `from`?"),
        ("{rate: 5MB, hours: 1}", "`hours` is not a key; the keys are `rate`, `from`, `to`"),
        ("{rate: 5MB, on: 1}", "a key must be text, but YAML reads the boolean true"),
        ('{rate: 5MB, from: "08:00"}', "`from` is given and `to` is missing: write both, as in `{rate: "),
        ('{rate: 5MB, to: "08:00"}', "`to` is given and `from` is missing"),
        (
            '{rate: 5MB, from: "08:00", to: "08:00"}',
            "`from` and `to` are both `08:00`: for a whole day write neither",
        ),
        (
            "{rate: 5MB, from: 08:00, to: 18:00}",
            "`to`: must be a time of day, but YAML reads the number 1080 (as it does for an unquoted `18:00`)"
            ': write it in quotes, as `"18:00"`',
        ),
        (
            '{rate: 5MB, from: 8:05, to: "18:00"}',
            "`from`: must be a time of day, but YAML reads the number 485 (as it does for an unquoted `8:05`)"
            ': write it in quotes, as `"08:05"`',
        ),
        (
            '{rate: 5MB, from: 18:00:00, to: "20:00"}',
            'YAML reads the number 64800: write it in quotes, as `"08:00"`',
        ),
        (
            '{rate: 5MB, from: null, to: "20:00"}',
            "`from`: must be a time of day, but YAML reads nothing (null)",
        ),
        (
            '{rate: 5MB, from: "20:00", to: "24:00"}',
            '`to`: the text \'24:00\' is not a time of day: write `"00:00"` to `"23:59"`',
        ),
        ('{rate: 5MB, from: "8:00", to: "20:00"}', "`from`: the text '8:00' is not a time of day"),
        ('{rate: 5MB, from: "08:60", to: "20:00"}', "is not a time of day"),
        ('{rate: 5MB, from: "8am", to: "20:00"}', "is not a time of day"),
        ('{rate: 5MB, from: "08:00\\n", to: "20:00"}', "is not a time of day"),
        (f"[{DAY}, 50]", "entry 2: must be a rate, but YAML reads the number 50"),
        (f"[40MB, {DAY}]", "entry 1 has no hours, so those after it would never apply: put it last, or"),
        (f"[{DAY}, {{rate: 40MB}}, 80MB]", "entry 2 has no hours"),
    ],
)
def test_what_is_no_bandwidth_limit_is_refused(refusals, text, said):
    """With the entry and the key that are wrong, what YAML made of it, and what to write."""
    assert said in refusals(f"bandwidth_limit: {text}")["bandwidth_limit"]


@pytest.mark.parametrize("text", ["{rate: 5MB, rate: 6MB}", "[{rate: 5MB, rate: 6MB}, 50MB]"])
def test_a_key_given_twice_in_a_bandwidth_limit_is_refused(refusals, text):
    """Also in an entry of a list."""
    assert "is given twice, on line 2" in refusals(f"bandwidth_limit: {text}")["bandwidth_limit.rate"]
