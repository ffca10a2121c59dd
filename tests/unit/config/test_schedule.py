"""Schedules, and providers that follow others."""

from __future__ import annotations

import pytest
import yaml

from airflow_mdbackup.config import load
from airflow_mdbackup.config.schedule import Assets, Timetable
from tests.unit.config.providers_file import MINIMAL, one, one_with


@pytest.mark.parametrize("schedule", ["0 3 * * *", "*/15 2-4 * * MON-FRI", "@hourly", "@quarterly", None])
def test_a_schedule_is_cron_a_preset_or_null(read, schedule):
    """It is kept as it was written, for Airflow to read."""
    text = yaml.safe_dump(
        {"providers": {"web": {"sftp_conn_id": "c", "source": "/", "dest": "/d", "schedule": schedule}}}
    )
    assert one(read(text)).schedule == schedule


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
