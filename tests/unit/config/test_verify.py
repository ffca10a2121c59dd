"""How much of a backup is verified, and when."""

from __future__ import annotations

from fractions import Fraction

import pytest

from airflow_mdbackup.scheme.common.units import parse_fraction
from tests.unit.config.providers_file import one_with


def test_each_backup_is_verified_a_thirtieth_a_day_unless_the_configuration_says_else(read):
    """`null` is for whoever wants no such DAG."""
    verify = one_with(read, "retries: 1").verify
    assert (verify.schedule, verify.part, verify.limit) == ("@daily", "1/30", None)
    assert (verify.repair, verify.missing) == (False, False)
    verify = one_with(
        read, "verify: {schedule: null, part: 0.1, limit: 50MB, repair: true, missing: true}"
    ).verify
    assert (verify.schedule, verify.part, verify.limit) == (None, "0.1", 50_000_000)
    assert (verify.repair, verify.missing) == (True, True)
    assert one_with(read, "verify: null").verify is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("1/30", Fraction(1, 30)),
        ("0.1", Fraction(1, 10)),
        ("1", Fraction(1)),
        ("5%", Fraction(1, 20)),
        ("50GB", 50 * 10**9),
        ("all", None),
    ],
)
def test_a_part_is_a_fraction_a_size_or_all(text, part):
    assert parse_fraction(text) == part


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        (
            "{part: 2}",
            "part",
            "the number 2 must be more than 0 and at most all: write a fraction",
        ),
        ("{part: 0/30}", "part", "must be more than 0 and at most all"),
        ("{part: 1/0}", "part", "must be more than 0 and at most all"),
        ("{part: 1/30/2}", "part", "is not a fraction: write a fraction"),
        ("{part: some}", "part", "is not a fraction: write a fraction"),
        ("{part: true}", "part", "must be a fraction, but YAML reads the boolean true"),
        ("{part: 5000GB}", "part", "at most `1000GB`"),
        ("{limit: 5}", "limit", "must be a rate"),
        ("{schedule: daily}", "schedule", "is not a cron expression"),
        ("{schedule: {assets: ['mdbackup://wob']}}", "schedule", "is not the backup of a provider here"),
        ("{missing: true}", "missing", "only works with `repair`: also write `repair: true`"),
        ("{repair: 1}", "repair", "must be `true` or `false`"),
        ("{parts: 1/3}", "parts", "is not a key; did you mean `part`?"),
    ],
)
def test_what_is_no_verification_is_refused_with_what_to_write(refusals, keys, key, said):
    assert said in refusals(f"verify: {keys}")[f"verify.{key}"]
