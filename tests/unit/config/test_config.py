"""What the configuration accepts, what it refuses, and that each refusal says what to write instead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.config import (
    Configuration,
    ConfigurationError,
    Provider,
    load,
    providers_file,
    raise_for_problems,
)
from airflow_mdbackup.config.bandwidth import BandwidthLimit, parse_bandwidth_limit
from airflow_mdbackup.config.schedule import Assets, Timetable
from airflow_mdbackup.scheme.common.units import (
    parse_duration,
    parse_fraction,
    parse_rate,
    write_duration,
    write_size,
)
from demo import generate_docs

MINIMAL = "sftp_conn_id: web_backupop, source: /backups, dest: /srv/web"


@pytest.fixture
def read(tmp_path):
    """Return a function that writes its argument to a file and loads it."""

    def write_and_load(content: str | bytes) -> Configuration:
        file = tmp_path / "providers.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load(file)

    return write_and_load


@pytest.fixture
def refusals(read):
    """Return a function that loads one provider with the keys given, and returns its problems by key."""

    def write_and_load(keys: str, given: str = MINIMAL) -> dict[str | None, str]:
        configuration = read(f"providers:\n  web: {{{', '.join(filter(None, [given, keys]))}}}\n")
        assert configuration.providers == ()
        assert {problem.provider for problem in configuration.problems} == {"web"}
        return {problem.key: problem.message for problem in configuration.problems}

    return write_and_load


def one(configuration: Configuration) -> Provider:
    assert [str(problem) for problem in configuration.problems] == []
    (provider,) = configuration.providers
    return provider


def names(configuration: Configuration) -> list[str]:
    return [provider.name for provider in configuration.providers]


# What is accepted


def test_a_provider_with_the_required_keys_only_has_the_documented_defaults(read):
    """Connection, source and dest are enough; a path that stands alone is a list of one."""
    provider = one(read(f"providers: {{web: {{{MINIMAL}}}}}"))
    assert provider.name == "web"
    assert provider.source == ("/backups",)
    assert provider.index == "/.mdbackup/index.md5"
    assert (provider.ssh_conn_id, provider.chroot, provider.mount) == (None, None, None)
    assert (provider.queue, provider.pool, provider.bandwidth_limit) == (None, None, None)
    assert (provider.exclude, provider.tags) == ((), ())
    assert (provider.schedule, provider.shards, provider.retries) == ("@daily", 1, 2)
    assert provider.retry_delay == timedelta(minutes=5)
    assert provider.stall_timeout == timedelta(seconds=60)
    assert (provider.guard.share, provider.guard.number, provider.guard.above) == (0.5, None, 100)
    assert (provider.on_guard, provider.allow_empty) == ("fail", False)


def test_the_age_of_an_index_is_limited_unless_each_run_rebuilds_it(read):
    """26 hours without `ssh_conn_id`, none with it; what is written, `null` too, always holds."""
    index_account = "ssh_conn_id: web_index, chroot: /"
    expected = {
        "": timedelta(hours=26),
        "ssh_conn_id: null": timedelta(hours=26),
        "max_index_age: null": None,
        "max_index_age: 2d": timedelta(days=2),
        index_account: None,
        f"{index_account}, max_index_age: 1h": timedelta(hours=1),
    }
    for keys, age in expected.items():
        assert one(read(f"providers: {{web: {{{MINIMAL}, {keys}}}}}")).max_index_age == age, keys


def test_the_defaults_of_a_file_hold_where_a_provider_says_nothing_else(read):
    """A provider's own value replaces the default as a whole, and null takes a default back."""
    configuration = read("""
defaults:
  sftp_conn_id: shared
  queue: backup
  exclude: ["*.tmp", "*.bak"]
  guard: {share: 10%, above: 5}
providers:
  a: {source: /a, dest: /srv/a}
  b: {source: /b, dest: /srv/b, queue: null, exclude: ["*.log"], guard: {number: 7}, sftp_conn_id: own}
""")
    assert configuration.problems == ()
    a, b = configuration.providers
    assert (a.sftp_conn_id, a.queue, a.exclude) == ("shared", "backup", ("*.tmp", "*.bak"))
    assert (a.guard.share, a.guard.above) == (0.1, 5)
    assert (b.sftp_conn_id, b.queue, b.exclude) == ("own", None, ("*.log",))
    assert (b.guard.share, b.guard.number, b.guard.above) == (0.5, 7, 100)


def test_indexer_is_asked_for_what_the_configuration_says(read):
    """The share of files that are hashed again becomes words, or percent."""
    plain = one(read(f"providers: {{web: {{{MINIMAL}}}}}"))
    assert plain.deferrable is None
    unset = {"jobs": None, "nice": 10, "limit": None, "rehash": "changed", "one_file_system": False}
    assert plain.indexer.options() == unset
    keys = "deferrable: true, indexer: {jobs: 2, nice: 19, limit: 50MB, rehash: 1%, one_file_system: true}"
    full = one(read(f"providers: {{web: {{{MINIMAL}, {keys}}}}}"))
    assert full.deferrable is True
    assert full.indexer.options() == {
        **{"jobs": 2, "nice": 19, "limit": 50_000_000, "rehash": 1.0, "one_file_system": True}
    }
    everything = one(read(f"providers: {{web: {{{MINIMAL}, indexer: {{rehash: 100%}}}}}}"))
    assert everything.indexer.options()["rehash"] == "all"


def test_anchors_and_merge_keys_of_yaml_work(read):
    """A key that overrides one that `<<` brings is not a key given twice."""
    configuration = read("""
providers:
  a: &a {sftp_conn_id: c, source: /a, dest: /srv/a}
  b: {<<: *a, dest: /srv/b}
""")
    assert configuration.problems == ()
    assert [provider.dest for provider in configuration.providers] == ["/srv/a", "/srv/b"]


def test_a_provider_cannot_be_changed(read):
    """Whoever holds a provider may rely on it."""
    provider = one(read(f"providers: {{web: {{{MINIMAL}}}}}"))
    with pytest.raises(ValueError, match="frozen"):
        provider.dest = "/elsewhere"


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
    ("text", "share"), [("50%", 0.5), ("12.5%", 0.125), ("0.25", 0.25), ("0", 0), ("1", 1)]
)
def test_a_share_is_a_percentage_or_a_number_up_to_one(read, text, share):
    """`50%` and `0.5` mean the same."""
    assert one(read(f"providers: {{web: {{{MINIMAL}, guard: {{share: {text}}}}}}}")).guard.share == share


@pytest.mark.parametrize("schedule", ["0 3 * * *", "*/15 2-4 * * MON-FRI", "@hourly", "@quarterly", None])
def test_a_schedule_is_cron_a_preset_or_null(read, schedule):
    """It is kept as it was written, for Airflow to read."""
    text = yaml.safe_dump(
        {"providers": {"web": {"sftp_conn_id": "c", "source": "/", "dest": "/d", "schedule": schedule}}}
    )
    assert one(read(text)).schedule == schedule


def test_mount_may_be_dest_or_any_directory_above_it(read):
    """What must be mounted is where the backup lies."""
    for mount in ("/srv", "/srv/web"):
        assert one(read(f"providers: {{web: {{{MINIMAL}, mount: {mount}}}}}")).mount == mount


def test_chroot_is_allowed_and_unused_without_an_index_account(read):
    """Whoever changes over to a self-indexing provider need not remove it."""
    assert one(read(f"providers: {{web: {{{MINIMAL}, chroot: /home/backupop}}}}")).chroot == "/home/backupop"


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


# What is refused, and what the message says


def test_a_problem_is_printed_with_file_provider_key_and_what_to_write(read, tmp_path):
    """One line of text says where it is, what is wrong and what to do."""
    (problem,) = read(f"providers: {{web: {{{MINIMAL}, guard: {{share: 50}}}}}}").problems
    assert str(problem) == (
        f"{tmp_path}/providers.yaml: provider `web`: `guard.share`: the number 50 is not a valid percentage:"
        " write `0%` to `100%`, or a number from 0 to 1"
    )


def test_an_unknown_key_is_refused_and_the_similar_one_named(refusals):
    """A misspelled key never silently means nothing."""
    wrong = refusals("sftp_con_id: x, guard: {shares: 10%}, colour: red")
    assert wrong["sftp_con_id"] == "is not a key; did you mean `sftp_conn_id`?"
    assert wrong["guard.shares"] == "is not a key; did you mean `share`?"
    assert wrong["colour"].startswith("is not a key; the keys are `sftp_conn_id`, ")
    assert "`name`" not in wrong["colour"]


@pytest.mark.parametrize("key", ["max_ages: 2d", "name: web"])
def test_keys_that_a_provider_does_not_have_are_refused(refusals, key):
    """Also those which one might expect."""
    assert "is not a key" in refusals(key)[key.partition(":")[0]]


def test_each_required_key_that_is_missing_is_named_with_an_example(refusals):
    """All at once, not one after the other."""
    assert refusals("retries: 1", given="") == {
        "sftp_conn_id": "is missing: write for example `sftp_conn_id: web_backupop`",
        "source": "is missing: write for example `source: [/backups, /etc]`",
        "dest": "is missing: write for example `dest: /srv/backups/web`",
    }


def test_chroot_is_required_with_an_index_account_and_told_beside_other_problems(refusals):
    """The indexer must know where the paths of `backupop` are."""
    wrong = refusals("ssh_conn_id: web_index, shards: 0")
    assert wrong["chroot"].startswith("is missing, and `ssh_conn_id` needs it: write the directory")
    assert wrong["shards"] == "must be at least 1, but is the number 0: write for example `shards: 4`"


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ("queue: 1:30", "queue", "must be text, but YAML reads the number 90: put it in quotes"),
        ("queue: no", "queue", "must be text, but YAML reads the boolean false: put it in quotes"),
        ("tags: [on]", "tags", "must be text, but YAML reads the boolean true: put it in quotes"),
        ("pool: 0755", "pool", "must be text, but YAML reads the number 493: put it in quotes"),
        (
            "stall_timeout: 1:30",
            "stall_timeout",
            "YAML reads the number 90 (as it does for an unquoted `1:30`)",
        ),
        ("on: 1", None, "a key must be text, but YAML reads the boolean true: put it in quotes"),
        ('allow_empty: "yes"', "allow_empty", "must be `true` or `false`, but is the text 'yes'"),
        (
            'retries: "3"',
            "retries",
            "must be a whole number, but is the text '3': write for example `retries: 5`",
        ),
        ("retries: true", "retries", "must be a whole number, but is the boolean true"),
        ("shards: 2.0", "shards", "must be a whole number, but is the number 2.0"),
        ("indexer: {limit: 50}", "indexer.limit", "must be a rate, but YAML reads the number 50"),
        ("indexer: {jobs: 0}", "indexer.jobs", "1"),
        ("indexer: {nice: 20}", "indexer.nice", "19"),
        ("indexer: {rehash: 120%}", "indexer.rehash", "is not a valid percentage"),
        ("indexer: {job: 1}", "indexer.job", "is not a key; did you mean `jobs`?"),
        ("deferrable: 1", "deferrable", "true"),
        ("on_guard: off", "on_guard", "must be 'fail' or 'approve', but is the boolean false"),
    ],
)
def test_what_yaml_reads_as_something_else_is_named_as_what_yaml_made_of_it(refusals, keys, key, said):
    """Nothing is converted: whoever wrote `1:30` never meant 90."""
    assert said in refusals(keys)[key]


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ("shards: 65", "shards", "must be at most 64"),
        ("shards: null", "shards", "must be a whole number, but is nothing (null)"),
        (f"shards: 0x{'f' * 5000}", "shards", "must be at most 64, but is a huge number"),
        ("mount: 2026-13-45", "mount", "'2026-13-45' is not absolute"),
        ("retries: -1", "retries", "must be at least 0"),
        ('queue: ""', "queue", "must not be empty: write for example `queue: backup`"),
        (f"tags: [{'x' * 101}]", "tags", "must have at most 100 characters"),
        ("tags: production", "tags", "must be a list, but is the text 'production': write for example"),
        ("exclude: null", "exclude", "or leave the key out"),
        ("on_guard: ask", "on_guard", "must be 'fail' or 'approve', but is the text 'ask'"),
        (
            "guard: 50%",
            "guard",
            "must be a mapping, but is the text '50%': write for example `guard: {share: 25%}`",
        ),
        ("guard: {1: 2}", "guard", "a key must be text, but YAML reads the number 1"),
        ("guard: {share: true}", "guard.share", "must be a percentage, but YAML reads the boolean true"),
        ("guard: {share: 120%}", "guard.share", "is not a valid percentage: write `0%` to `100%`"),
        ("guard: {share: .nan}", "guard.share", "is not a valid percentage"),
        ("guard: {number: many}", "guard.number", "must be a whole number"),
        ("guard: {above: -1}", "guard.above", "must be at least 0"),
        ("mount: /mnt", "mount", "`/mnt` is neither `dest` (`/srv/web`) nor a directory above it"),
        ("mount: /sr", "mount", "is neither `dest`"),
        ("mount: /", "mount", "must not be `/` itself"),
        ("index: /", "index", "must not be `/` itself"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_fits(refusals, keys, key, said):
    """The message names the key, shows the value and gives an example."""
    assert said in refusals(keys)[key]


def test_a_mistake_made_in_many_elements_of_a_list_is_told_once(read):
    """One line is enough."""
    (problem,) = read(f"providers: {{web: {{{MINIMAL}, tags: [[], [], []]}}}}").problems
    assert problem.message == "must be text, but is a list: write for example `tags: [production]`"


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


def one_with(read, keys: str) -> Provider:
    """Return the provider that has these keys besides what it must have."""
    return one(read(f"providers: {{web: {{{MINIMAL}, {keys}}}}}"))


def test_a_schedule_may_name_assets_or_a_timetable(read):
    """Whether they are there shows when the DAG is made."""
    named = one_with(read, "schedule: {assets: [s3://other, name]}").schedule
    assert named == Assets(("s3://other", "name"))
    assert one_with(read, "schedule: {assets: s3://other}").schedule == Assets(("s3://other",))
    made = one_with(read, "schedule: {timetable: some.module.Class, arguments: {cron: 0 3 * * *}}").schedule
    assert made == Timetable("some.module.Class", {"cron": "0 3 * * *"})


@pytest.mark.parametrize(
    ("asset", "said"),
    [
        ("mdbackup://databse", "a provider here, and is never updated: did you mean `mdbackup://database`?"),
        ("MDBACKUP://x/", "`MDBACKUP://x/` is not the backup of a provider here, and is never updated: the"),
        ("mdbackup://x", "the providers are `web`, `database`, `wrong`"),
        ("mdbackup://database", None),
        ("mdbackup://database/", None),
        ("mdbackup://wrong", None),
        ("mdbackup_x", None),
        ("s3://x", None),
    ],
)
def test_provider_that_follows_one_that_does_not_exist_is_refused_alone(read, asset, said):
    """Airflow would wait for ever. Following one that is refused is no mistake; it will be corrected."""
    found = read(
        f"providers:\n  web: {{{MINIMAL}, schedule: {{assets: ['s3://b', '{asset}']}}}}\n"
        f"  database: {{{MINIMAL}2}}\n  wrong: {{}}\n"
    )
    problems = [problem for problem in found.problems if problem.provider == "web"]
    assert [problem.key for problem in problems] == (["schedule"] if said else [])
    assert not said or said in problems[0].message
    assert ("web" in [provider.name for provider in found.providers]) == (said is None)
    assert "database" in [provider.name for provider in found.providers]


def test_provider_may_follow_one_of_another_file_also_while_that_cannot_be_read(tmp_path):
    """What a broken file defines is not known, and its mistake must not spread."""
    (tmp_path / "a.yaml").write_text(
        f"defaults: {{schedule: {{assets: mdbackup://database}}}}\nproviders: {{web: {{{MINIMAL}}}}}\n"
    )
    for text, names in (
        (f"providers: {{database: {{{MINIMAL}2}}}}", ["web", "database"]),
        ("providers: {", ["web"]),
    ):
        (tmp_path / "b.yaml").write_text(text)
        assert [provider.name for provider in load(tmp_path).providers] == names
    (tmp_path / "b.yaml").unlink()
    (problem,) = load(tmp_path).problems
    assert (problem.provider, problem.key) == ("web", "defaults.schedule")


def test_each_task_has_a_time_limit_that_can_be_changed_or_taken_away(read):
    """The others keep theirs."""
    timeouts = one_with(read, "timeouts: {pull_changed: 3d, diff_indexes: null}").timeouts
    assert timeouts.pull_changed == timedelta(days=3)
    assert timeouts.diff_indexes is None
    assert timeouts.fetch_index == timedelta(hours=2)


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


@pytest.mark.parametrize("text", ["{rate: 5MB, rate: 6MB}", "[{rate: 5MB, rate: 6MB}, 50MB]"])
def test_a_key_given_twice_in_a_bandwidth_limit_is_refused(refusals, text):
    """Also in an entry of a list."""
    assert "is given twice, on line 2" in refusals(f"bandwidth_limit: {text}")["bandwidth_limit.rate"]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ('"0 3 * *"', "is not a cron expression of five fields: write a cron expression such as `0 3 * * *`"),
        ('"0 3 * * * *"', "is not a cron expression of five fields"),
        ('"61 * * * *"', "is not a schedule"),
        ('"0 0 30 2 *"', "is not a schedule"),
        ('"R 3 * * *"', "is not a cron expression"),
        ('"H 3 * * *"', "is not a schedule"),
        ('"@dayly"', "is not one of the presets @hourly, @daily, @weekly, @monthly, @quarterly, @yearly"),
        ("daily", "a preset such as '@daily' (quoted)"),
        ("5", "must be text, a mapping or null, but YAML reads the number 5"),
        ("[a, b]", "must be text, a mapping or null, but YAML reads a list"),
        ("{timetable: x}", "'x' is not the dotted path of a class"),
        ("{timetable: 5}", "`timetable` must be a dotted path"),
        ("{timetable: a.B, arguments: [1]}", "`arguments` a mapping of names"),
        ("{timetable: a.B, arguments: {1: 2}}", "`arguments` a mapping of names"),
        ("{assets: []}", "`assets` must be a list of URIs or names"),
        ("{assets: [5]}", "`assets` must be a list of URIs or names"),
        ("{assets: a, cron: b}", "is either `{assets: [...]}` or `{timetable: package.module.Class"),
        ("{}", "is either `{assets: [...]}` or `{timetable: package.module.Class"),
    ],
)
def test_what_is_no_schedule_is_refused(refusals, schedule, said):
    """Whatever Airflow would refuse, or run at other times than was meant, is refused here."""
    assert said in refusals(f"schedule: {schedule}")["schedule"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("backups", "'backups' is not absolute: write the whole path, starting with `/`"),
        ("~/backups", "begins with `~`, which is not expanded"),
        ("/a/../b", "has `.` or `..` as a component"),
        ("/a/./b", "has `.` or `..` as a component"),
        ("/a//b", "has an empty component"),
        ("/a/", "has an empty component: write single slashes, and none at the end"),
        ('""', "is not absolute"),
        ('"/a\\0"', "contains a NUL character"),
        (f"/{'a' * 256}", "is too long"),
    ],
)
@pytest.mark.parametrize("key", ["source", "index", "dest", "chroot", "mount"])
def test_a_path_is_absolute_and_written_in_the_only_way(refusals, key, path, said):
    """Every path key, on either side, has the same rules."""
    given = {"sftp_conn_id": "c", "source": "/a", "dest": "/b"}
    given.pop(key, None)
    text = ", ".join(f"{name}: {value}" for name, value in given.items())
    assert said in refusals(f"{key}: {path}", given=text)[key]


def test_source_may_be_everything_but_dest_may_not(refusals, read):
    """`/` is the whole of what `backupop` sees; on the consumer it would be the whole machine."""
    assert one(read("providers: {web: {sftp_conn_id: c, source: /, dest: /srv/web}}")).source == ("/",)
    wrong = refusals("", given="sftp_conn_id: c, source: /a, dest: /")
    assert wrong == {"dest": "must not be `/` itself: name something below it"}


@pytest.mark.parametrize("source", ["[/a, /a]", "[/a/b, /a]", "[/, /a]"])
def test_a_source_inside_another_is_refused(refusals, source):
    """It would be hashed twice."""
    assert "already contains" in refusals("", given=f"sftp_conn_id: c, dest: /d, source: {source}")["source"]


def test_an_empty_source_is_refused(refusals):
    """A provider without source backs nothing up."""
    assert refusals("", given="sftp_conn_id: c, dest: /d, source: []") == {
        "source": "must not be empty: write for example `source: [/backups, /etc]`"
    }


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("!", "is not a gitignore pattern"),
        ("[z-a]", "is not a gitignore pattern"),
        ("a\\", "is not a gitignore pattern"),
        ("", "matches nothing"),
        ("/", "matches nothing"),
        ("#name", "is a comment in gitignore: write `\\#`"),
    ],
)
def test_a_pattern_that_excludes_nothing_is_refused(refusals, pattern, said):
    """Whoever wrote it meant something."""
    assert said in refusals(f"exclude: ['*.tmp', '{pattern}']")["exclude"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Web", "consists of lowercase letters, digits, `_` and `-`"),
        ("-web", "begins with a letter or digit"),
        ("web.server", "rename it"),
        ("x" * 101, "at most 100 characters"),
        ('"web\\n"', "consists of lowercase letters"),
        ("watchdog", "are reserved"),
        ("restore", "are reserved"),
        ("verify", "are reserved"),
        ("verify_web", "names that begin with `verify_` are reserved"),
        ("no", "a provider's name must be text, but YAML reads the boolean false: put it in quotes"),
        ("12", "YAML reads the number 12"),
        ("null", "YAML reads nothing (null)"),
    ],
)
def test_a_name_that_a_provider_cannot_have_is_refused(read, name, said):
    """And its other keys are judged all the same."""
    configuration = read(f"providers: {{? {name} : {{{MINIMAL}, shards: 0}}}}")
    about_name, about_shards = configuration.problems
    assert about_name.key is None
    assert said in about_name.message
    assert about_shards.key == "shards"
    assert about_name.provider == about_shards.provider


def test_two_names_that_are_no_text_and_a_huge_number_are_reported(read):
    """Python refuses to print a number of so many digits."""
    huge = f"? 0x{'f' * 5000}\n"
    configuration = read(f"providers: {{.nan: {{}}, .nan: {{}}, {huge} : {{}}}}\n{huge}: 1")
    assert {problem.provider for problem in configuration.problems} == {"the number nan", "a huge number"}
    assert "a huge number" in {problem.key for problem in configuration.problems}


def test_names_that_merely_resemble_reserved_ones_are_accepted(read):
    """Only `verify_` at the beginning is reserved."""
    assert one(read(f"providers: {{verify-web: {{{MINIMAL}}}}}")).name == "verify-web"


def test_a_provider_without_keys_is_refused(read):
    """A name alone is an unfinished thought."""
    (problem,) = read("providers:\n  web:\n").problems
    assert str(problem).endswith("provider `web`: must be a mapping of keys, but is nothing (null)")


# One fault stops no other provider


def test_an_invalid_provider_stops_no_other_one(read):
    """The good ones keep their order."""
    configuration = read(f"""
providers:
  a: {{sftp_conn_id: c, source: /, dest: /srv/a}}
  b: {{{MINIMAL}, shards: none}}
  c: [nonsense]
  d: {{sftp_conn_id: c, source: /, dest: /srv/d}}
""")
    assert names(configuration) == ["a", "d"]
    assert list(configuration.refused) == ["b", "c"]


def test_a_provider_given_twice_in_a_file_is_refused_with_both_lines(read):
    """YAML itself would silently keep the last."""
    configuration = read(f"""\
providers:
  web: {{{MINIMAL}}}
  db: {{sftp_conn_id: c, source: /, dest: /srv/db}}
  "web": {{sftp_conn_id: c, source: /, dest: /srv/other}}
""")
    assert names(configuration) == ["db"]
    (problem,) = configuration.problems
    assert (problem.provider, problem.key) == ("web", None)
    assert problem.message == "is given twice, on lines 2 and 4: remove or rename one of them"


def test_a_key_given_twice_refuses_its_provider_only(read):
    """Also inside `guard`."""
    configuration = read("""\
providers:
  web:
    sftp_conn_id: c
    source: /
    dest: /srv/web
    dest: /srv/other
    guard: {above: 1, above: 2}
  db: {sftp_conn_id: c, source: /, dest: /srv/db}
""")
    assert names(configuration) == ["db"]
    assert [(problem.provider, problem.key) for problem in configuration.problems] == [
        ("web", "dest"),
        ("web", "guard.above"),
    ]
    assert "on lines 5 and 6" in configuration.problems[0].message


@pytest.mark.parametrize(
    ("top", "key", "said"),
    [
        ("defaults: {retires: 1}", "defaults.retires", "is not a key; did you mean `retries`?"),
        ("defaults: {retries: many}", "defaults.retries", "must be a whole number, but is the text 'many'"),
        ("defaults: {guard: {share: 7}}", "defaults.guard.share", "is not a valid percentage"),
        ("defaults: {1: 2}", "defaults", "a key must be text, but YAML reads the number 1"),
        ("defaults: {name: x}", "defaults.name", "is not a key"),
        ("defaults: {retries: 1, retries: 2}", "defaults.retries", "is given twice, on line 1: remove"),
        ("defaults: []", "defaults", "must be a mapping, but is a list"),
        ("default: {retries: 1}", "default", "is not a key; did you mean `defaults`?"),
    ],
)
def test_a_fault_in_what_a_file_shares_refuses_its_providers_and_no_others(tmp_path, top, key, said):
    """Which settings were meant is not known, so that no provider of the file runs without them."""
    (tmp_path / "a.yaml").write_text(f"{top}\nproviders: {{web: {{{MINIMAL}}}}}\n")
    (tmp_path / "b.yaml").write_text("providers: {db: {sftp_conn_id: c, source: /, dest: /srv/db}}\n")
    configuration = load(tmp_path)
    assert names(configuration) == ["db"]
    (problem,) = configuration.problems
    assert (problem.file.name, problem.provider, problem.key) == ("a.yaml", "web", key)
    assert said in problem.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: b: c", "line 1, column 5: is not valid YAML: mapping values are not allowed"),
        ("providers:\n  web:\n    schedule: @daily", "line 3, column 15: is not valid YAML"),
        ("providers:\n  web:\n    schedule: */5 * * * *", "text that begins with `@`, `*`, `&`"),
        ("providers:\n\tweb:", "tabs do not indent"),
        ("providers:\n  web:\n    dest: {{ dest }}", "`{` needs quotes"),
        (b"a: 1\nb: \xfc", "line 2: is not UTF-8 text"),
        ("a: 1\nb: \x07", "is not valid YAML: "),
        (
            "providers: {}\n---\nproviders: {}",
            "line 2, column 1: is not valid YAML: expected a single document",
        ),
        ("a: !!bool x", "remove explicit tags"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("", "must be a mapping with the key `providers`, but holds nothing (null)"),
        ("- web", "must be a mapping with the key `providers`, but holds a list"),
        ("defaults: {}", "is missing: write the providers as a mapping"),
        ("providers:", "is nothing (null): write the providers as a mapping"),
        ("providers: [web]", "is a list: write the providers as a mapping"),
        ("provider: {web: {}}", "is not a key; did you mean `providers`?"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem_of_the_file(read, content, said):
    """Which providers it has is not known; where it is wrong is told by line and column."""
    configuration = read(content)
    assert configuration.providers == ()
    assert {problem.provider for problem in configuration.problems} == {None}
    assert said in configuration.problems[0].message or said in configuration.problems[-1].message


def test_a_file_without_providers_on_purpose_is_no_problem(read):
    """`providers: {}` says so."""
    assert read("providers: {}") == Configuration((), ())


def test_a_file_saved_with_a_byte_order_mark_is_read(read):
    """Some editors write one."""
    assert read(b"\xef\xbb\xbfproviders: {}") == Configuration((), ())


@given(st.binary() | st.text().map(str.encode) | st.text("{}[]:-#&*!|>'\"%@`?,<= \n\tab1").map(str.encode))
def test_no_content_makes_load_raise(tmp_path_factory, content):
    """Whatever is in the file."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    for problem in load(file).problems:
        assert str(problem)


KEYS = st.sampled_from([*Provider.model_fields, "share", "number", "above", "other"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS | SCALARS, VALUES | st.dictionaries(KEYS, VALUES)))
def test_no_values_make_load_raise(tmp_path_factory, defaults, providers):
    """Also where the file is valid YAML, with the right keys and any values."""
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    file.write_text(yaml.safe_dump({"defaults": defaults, "providers": providers}, allow_unicode=True))
    configuration = load(file)
    assert configuration.problems or not providers
    for problem in configuration.problems:
        assert str(problem)


# Files and directories


def test_a_directory_is_read_file_by_file_in_the_order_of_names(tmp_path):
    """Defaults hold in their own file; hidden and other files are left alone; `.yml` is not forgotten."""
    (tmp_path / "b.yaml").write_text("providers: {b: {sftp_conn_id: c, source: /, dest: /srv/b}}")
    (tmp_path / "a.yaml").write_text(
        "defaults: {retries: 9}\nproviders: {z: {sftp_conn_id: c, source: /, dest: /srv/z}}"
    )
    (tmp_path / ".hidden.yaml").write_text("]")
    (tmp_path / "README").write_text("]")
    (tmp_path / "c.yml").write_text("providers: {}")
    configuration = load(tmp_path)
    assert [(provider.name, provider.retries) for provider in configuration.providers] == [("z", 9), ("b", 2)]
    (problem,) = configuration.problems
    assert str(problem) == (
        f"{tmp_path}/c.yml: is not read, since its name does not end in `.yaml`: rename it"
    )


def test_a_broken_file_of_a_directory_stops_no_other_file(tmp_path):
    """Its own problem names it."""
    (tmp_path / "a.yaml").write_text("]")
    (tmp_path / "b.yaml").write_text(f"providers: {{web: {{{MINIMAL}}}}}")
    (tmp_path / "c.yaml").symlink_to("nowhere")
    (tmp_path / "d.yaml").mkdir()
    configuration = load(tmp_path)
    assert names(configuration) == ["web"]
    assert [problem.file.name for problem in configuration.problems] == ["a.yaml", "c.yaml", "d.yaml"]
    assert "cannot be read (No such file or directory)" in configuration.problems[1].message
    assert "cannot be read (Is a directory)" in configuration.problems[2].message


def test_a_directory_without_files_is_a_problem(tmp_path):
    """Nothing would be backed up, and nobody would notice."""
    (problem,) = load(tmp_path).problems
    assert problem.message.startswith("is a directory without any `*.yaml` file: write one, ")


def test_a_missing_file_is_a_problem_that_tells_how_to_begin(tmp_path, read):
    """It names the place, the option, and a beginning that itself is valid."""
    (problem,) = load(tmp_path / "providers.yaml").problems
    assert str(problem).startswith(f"{tmp_path}/providers.yaml: does not exist: write one, ")
    assert "AIRFLOW__MDBACKUP__PROVIDERS_FILE" in problem.message
    assert one(read(re.search("`(providers: .*?)`", problem.message)[1])).name == "web"


def test_the_same_name_in_two_files_refuses_both(tmp_path):
    """Even if one of them is invalid anyway: which one was meant is not known."""
    (tmp_path / "a.yaml").write_text(f"providers: {{web: {{{MINIMAL}}}}}")
    (tmp_path / "b.yaml").write_text("providers: {web: {}, db: {sftp_conn_id: c, source: /, dest: /srv/db}}")
    configuration = load(tmp_path)
    assert names(configuration) == ["db"]
    told = [str(problem) for problem in configuration.problems if "of this name" in problem.message]
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    action = "rename one; until then none of them is backed up"
    assert told == [
        f"{a}: provider `web`: a provider of this name is also in {b}: {action}",
        f"{b}: provider `web`: a provider of this name is also in {a}: {action}",
    ]


# Clashing destinations


def clash(read, *dests: str | os.PathLike) -> tuple[list[str], dict[str, str]]:
    """Load a provider p0, p1, ... for each dest; return the valid names, and why the others are refused."""
    lines = [f"  p{n}: {{sftp_conn_id: c, source: /, dest: {dest}}}" for n, dest in enumerate(dests)]
    configuration = read("providers:\n" + "\n".join(lines))
    assert {problem.key for problem in configuration.problems} <= {"dest"}
    return names(configuration), {p.provider: p.message for p in configuration.problems}


def test_equal_destinations_refuse_both_and_each_names_the_other(read):
    """A backup of two providers into one tree is dangerous whichever of them runs."""
    valid, refused = clash(read, "/srv/a", "/srv/b", "/srv/a")
    assert valid == ["p1"]
    assert refused["p0"].startswith("`/srv/a` is the same as `dest` of provider `p2` (`/srv/a`, in ")
    assert refused["p2"].startswith("`/srv/a` is the same as `dest` of provider `p0` (`/srv/a`, in ")
    assert refused["p0"].endswith(": give each its own directory; until then neither is backed up")


@pytest.mark.parametrize("inner", ["/srv/a/b", "/srv/a/b/c"])
def test_a_destination_at_any_depth_inside_another_refuses_both(read, inner):
    """In whichever order they stand."""
    valid, refused = clash(read, inner, "/srv/ab", "/srv/a")
    assert valid == ["p1"]
    assert refused["p0"].startswith(f"`{inner}` is inside `dest` of provider `p2` (`/srv/a`, in ")
    assert refused["p2"].startswith(f"`/srv/a` is around `dest` of provider `p0` (`{inner}`, in ")


def test_destinations_that_only_share_a_beginning_do_not_clash(read):
    """`/srv/a` does not contain `/srv/ab`."""
    assert clash(read, "/srv/a", "/srv/ab", "/srv/a-b") == (["p0", "p1", "p2"], {})


def test_destinations_that_symbolic_links_make_one_refuse_both(read, tmp_path):
    """The message says that links are the reason, since the text does not show it."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    valid, refused = clash(read, tmp_path / "real", tmp_path / "link/inner/new", "/srv/c")
    assert valid == ["p2"]
    assert "is around `dest` of provider `p1`" in refused["p0"]
    assert f"is inside `dest` of provider `p0` (`{tmp_path}/real`" in refused["p1"]
    assert "seen through symbolic links" in refused["p1"]


def test_a_link_to_the_root_is_around_everything(read, tmp_path):
    """An absurd configuration is refused like any other."""
    (tmp_path / "all").symlink_to("/")
    assert clash(read, tmp_path / "all", "/srv/a")[0] == []


def test_a_provider_that_is_refused_anyway_clashes_with_nobody(read):
    """It does not run, so the other one may."""
    configuration = read(f"providers: {{web: {{{MINIMAL}}}, db: {{{MINIMAL}, shards: 0}}}}")
    assert names(configuration) == ["web"]


# Telling it


def test_refused_has_all_problems_of_each_provider_that_a_dag_can_be_named_after(read):
    """Reserved names belong to other DAGs, and no DAG id has a blank; `problems` has them all."""
    configuration = read(
        "providers: {Web.1: {dest: x, source: /, sftp_conn_id: c},"
        " watchdog: {}, verify_x: {}, 'a b': {}, ä: {}}"
    )
    assert {name: len(problems) for name, problems in configuration.refused.items()} == {"Web.1": 2}
    assert {p.provider for p in configuration.problems} == {"Web.1", "watchdog", "verify_x", "a b", "ä"}


def test_raise_for_problems_tells_all_of_them_and_what_is_shared_once(read):
    """The text is what people read among the import errors of Airflow."""
    configuration = read(
        "defaults: {retires: 1}\nproviders:\n"
        + "".join(f"  p{n}: {{sftp_conn_id: c, source: /, dest: /srv/{n}}}\n" for n in range(3))
        + "  web: {sftp_conn_id: c, source: relative, dest: /srv/web}\n"
    )
    with pytest.raises(ConfigurationError) as raised:
        raise_for_problems(configuration)
    heading, shared, own = str(raised.value).splitlines()
    assert heading == "2 problems in the configuration of the backups:"
    assert shared.startswith("- ")
    assert "provider `p0`: `defaults.retires`" in shared
    assert shared.endswith("(and the same for `p1`, `p2`, `web`)")
    assert "provider `web`: `source`: 'relative' is not absolute" in own


def test_raise_for_problems_does_nothing_without_problems():
    """So that the file that calls it is green when all is well."""
    raise_for_problems(Configuration((), ()))


def test_no_name_of_a_file_garbles_a_message(read):
    """Control characters in names and keys are shown, not obeyed."""
    configuration = read('providers: {"a\\e[31m\\nb": {"c\\nd": 1}}')
    assert configuration.problems
    for problem in configuration.problems:
        assert str(problem).isprintable()


# Where the configuration is, what it costs, and its documentation


def test_loading_a_hundred_providers_takes_well_under_half_a_second(tmp_path):
    """The DAG file is parsed again and again."""
    file = tmp_path / "providers.yaml"
    keys = "sftp_conn_id: c, ssh_conn_id: s, chroot: /home/backupop, source: [/a, /b], exclude: ['*.tmp']"
    lines = [f"  p{n}: {{{keys}, dest: /srv/{n}, schedule: '{n % 60} 3 * * *'}}" for n in range(100)]
    file.write_text("providers:\n" + "\n".join(lines))
    load(file)
    begun = time.process_time()
    assert len(load(file).providers) == 100
    assert time.process_time() - begun < 0.25


def test_importing_the_configuration_imports_no_airflow():
    """So that a command line can read it where no Airflow is."""
    program = (
        "import sys, airflow_mdbackup.config;"
        " print([name for name in sys.modules if name.split('.')[0] == 'airflow'])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (None, "{home}/mdbackup/providers.yaml"),
        ("", "{home}/mdbackup/providers.yaml"),
        ("/etc/mdbackup.d", "/etc/mdbackup.d"),
        ("~/providers.yaml", f"{Path.home()}/providers.yaml"),  # Airflow itself expands it
        ("backups/providers.yaml", "{home}/backups/providers.yaml"),
    ],
)
def test_the_providers_file_is_named_by_an_airflow_option(tmp_path, monkeypatch, option, expected):
    """Without it, and relative to it, by AIRFLOW_HOME."""
    monkeypatch.setattr("airflow.configuration.AIRFLOW_HOME", str(tmp_path))
    monkeypatch.delenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", raising=False)
    if option is not None:
        monkeypatch.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", option)
    assert str(providers_file()) == expected.format(home=tmp_path)


@pytest.mark.parametrize(("zone", "hours"), [("Asia/Tokyo", 9), ("utc", 0), ("system", -7)])
def test_the_local_time_is_that_of_the_default_time_zone_of_airflow(tmp_path, zone, hours):
    """In which schedules are read too; `system` is that of the machine. AIRFLOW_HOME holds as well."""
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "TZ": "America/Phoenix"}
    environment["AIRFLOW__CORE__DEFAULT_TIMEZONE"] = zone
    environment.pop("AIRFLOW__MDBACKUP__PROVIDERS_FILE", None)
    program = (
        "from airflow_mdbackup.config.airflow_options import *; print(providers_file()); print(local_time())"
    )
    expected = datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=hours)
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    *_, file, now = printed.splitlines()
    assert file == f"{tmp_path}/mdbackup/providers.yaml"
    found = datetime.combine(expected, time_of_day.fromisoformat(now))
    assert (found - expected) % timedelta(days=1) < timedelta(minutes=1)


def test_the_reference_and_the_sample_are_what_the_schema_says():
    """`python -m demo.generate_docs` writes them."""
    assert generate_docs.main(["--check"]) == 0


def test_the_check_of_the_generated_files_fails_when_one_is_out_of_date(tmp_path, monkeypatch, capsys):
    """It names the file and the command, and changes nothing."""
    monkeypatch.setattr(generate_docs, "SAMPLE", tmp_path / "sample.yaml")
    monkeypatch.setattr(generate_docs, "REFERENCE", tmp_path / "new" / "reference.md")
    assert generate_docs.main([]) == 0
    assert generate_docs.main(["--check"]) == 0
    generate_docs.SAMPLE.write_text("old")
    assert generate_docs.main(["--check"]) == 1
    assert "sample.yaml is out of date: run `python -m demo.generate_docs`" in capsys.readouterr().err
    assert generate_docs.SAMPLE.read_text() == "old"


def test_the_sample_is_valid_as_it_is_and_with_every_key_in_use(read):
    """Whoever removes a comment mark gets a valid file, and every key is in it."""
    text = generate_docs.SAMPLE.read_text()
    assert one(load(generate_docs.SAMPLE)).name == "web"
    complete = re.sub(r"(?m)^( +)#(?=[a-z_]+:)", r"\1", text)
    assert one(read(complete)).shards == 4
    web = yaml.safe_load(complete)["providers"]["web"]
    assert {"name", *web} == set(Provider.model_fields)


def test_every_key_has_a_description_and_an_example_that_is_valid(read):
    """The reference is only as good as the schema."""
    base = {"sftp_conn_id": "c", "source": "/a", "dest": "/srv/backups/x", "chroot": "/"}
    for key, field in Provider.model_fields.items():
        assert field.description, key
        assert field.examples, key
        if key != "name":
            for example in field.examples:
                assert one(read(yaml.safe_dump({"providers": {"web": {**base, key: example}}}))), key
