"""Durations, as the configuration has them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.scheme.common.units import parse_duration, write_duration
from tests.unit.config.providers_file import one_with


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("26h", timedelta(hours=26)),
        ("2d", timedelta(days=2)),
        ("8w", timedelta(weeks=8)),
        ("1y", timedelta(days=365)),
        ("1y2w1d", timedelta(days=380)),
        ("1h30m", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("1d2h3m4.5s", timedelta(days=1, hours=2, minutes=3, seconds=4.5)),
        ("3650d", timedelta(days=3650)),
    ],
)
def test_a_duration_is_numbers_with_units(text, expected):
    """Whole numbers or decimals, alone or combined, the greater unit first."""
    assert parse_duration(text) == expected


@given(st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=3650)))
def test_a_duration_that_is_written_out_reads_as_the_same_again(duration):
    """The generated files show durations in the form in which they are read."""
    assert parse_duration(write_duration(duration)) == duration


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("90", "must be a duration, but YAML reads the number 90"),
        (
            "5 min",
            "is not a duration: write numbers with units, such as `90s`, `15m`, `1h30m`, `26h`, `2d` or `1y`",
        ),
        ("30m1h", "is not a duration"),
        ('""', "is not a duration"),
        ("-5m", "is not a duration"),
        ("0s", "must be more than zero"),
        ("3651d", "at most ten years"),
        (f"{'9' * 400}d", "at most ten years"),
    ],
)
def test_what_is_no_duration_is_refused_with_examples(refusals, text, said):
    """Without unit, with words, in another order, nothing, or absurdly much."""
    assert said in refusals(f"retry_delay: {text}")["retry_delay"]


def test_each_task_has_a_time_limit_that_can_be_changed_or_taken_away(read):
    """The others keep theirs."""
    timeouts = one_with(read, "timeouts: {pull_changed: 3d, diff_indexes: null}").timeouts
    assert timeouts.pull_changed == timedelta(days=3)
    assert timeouts.diff_indexes is None
    assert timeouts.fetch_index == timedelta(hours=2)
