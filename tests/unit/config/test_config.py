"""What the configuration accepts, where it is, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path

import pytest

from airflow_mdbackup.config import load, providers_file
from tests.unit.config.providers_file import MINIMAL, one

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
    ("text", "share"), [("50%", 0.5), ("12.5%", 0.125), ("0.25", 0.25), ("0", 0), ("1", 1)]
)
def test_a_share_is_a_percentage_or_a_number_up_to_one(read, text, share):
    """`50%` and `0.5` mean the same."""
    assert one(read(f"providers: {{web: {{{MINIMAL}, guard: {{share: {text}}}}}}}")).guard.share == share


def test_mount_may_be_dest_or_any_directory_above_it(read):
    """What must be mounted is where the backup lies."""
    for mount in ("/srv", "/srv/web"):
        assert one(read(f"providers: {{web: {{{MINIMAL}, mount: {mount}}}}}")).mount == mount


def test_chroot_is_allowed_and_unused_without_an_index_account(read):
    """Whoever changes over to a self-indexing provider need not remove it."""
    assert one(read(f"providers: {{web: {{{MINIMAL}, chroot: /home/backupop}}}}")).chroot == "/home/backupop"


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
