"""The totals of the status: what a walk of the disk counts, whatever happened."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.history.changes import ChangeKind, commits, pending
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.history.usage import DiskUsage, stored_totals
from airflow_mdbackup.scheme.recovery.health import check_health
from airflow_mdbackup.scheme.recovery.prune import KeepRules
from airflow_mdbackup.scheme.recovery.verify import Verification
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover.import_versions import import_versions
from airflow_mdbackup.scheme.takeover.survey import SourceTree
from tests.guarantees.crash.crash import crash_at
from tests.guarantees.whatever_happens.soundness import check_sound, digest
from tests.pair import Pair
from tests.torture import Cases, scaled
from tests.unit.common.present import NOW
from tests.unit.recovery.versions import contents, many_versions, prune, told, walked


@pytest.mark.guarantee("1. Crash at every step")
def test_totals_count_a_commit_once_wherever_it_is_killed(pair: Pair, cases: Cases) -> None:
    """Added, replaced, moved and returned files; killed at each step, recovered and resumed by a retry."""
    for name in ("same", "changed", "returns", "flips/below", "flips/changed", "file"):
        pair.put(name, name.encode())
    pair.backup()
    pair.put("flips/changed", b"changed once")
    os.unlink(pair.path("returns"))
    pair.backup()
    assert told(pair) == walked(pair)
    pair.put("changed", b"new bytes")
    pair.put("returns", b"returns")
    shutil.rmtree(pair.path("flips"))
    pair.put("flips", b"a file")
    os.unlink(pair.path("file"))
    pair.put("file/below", b"below")
    run = pair.begin()
    template = pair.mirror.dest
    for number in count(1, scaled(3, 1)):
        pair.mirror = Mirror(template.with_name("killed"), "srv1")
        shutil.copytree(template, pair.mirror.dest)
        with cases.one():
            run = pair.mirror.run(run.run_id)
            pair.archive(run)
            killed = crash_at(number, partial(pair.commit, run))
            pair.commit(run)
            check_sound(pair)
            assert told(pair) == walked(pair)
        shutil.rmtree(pair.mirror.dest)
        if not killed:
            break


@pytest.mark.parametrize("stored", ["none", "damaged", "of another time", "lost", "old"])
def test_lost_totals_are_counted_again_by_the_next_run(pair: Pair, stored: str) -> None:
    many_versions(pair)
    before = told(pair)
    status = json.loads(pair.mirror.status.read_text())
    if stored == "old":  # nor does a history of that time say what it added
        for path in commits(pair.mirror):
            header, rest = path.read_text().split("\n", 1)
            path.write_text(
                json.dumps({k: v for k, v in json.loads(header).items() if k != "disk"}) + "\n" + rest
            )
        stored = "none"
    if stored == "lost":
        pair.mirror.status.unlink()
    else:
        changed = {
            "none": None,
            "damaged": {"disk": 1},
            "of another time": {**status["totals"], "stamp": "3"},
        }
        pair.mirror.status.write_text(json.dumps({**status, "totals": changed[stored]}))
    pair.backup()
    assert told(pair) == walked(pair) == before


def test_a_run_that_changes_nothing_reads_no_history_for_the_totals(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_versions(pair)
    before = pair.mirror.read_status()["totals"]

    def refuse(*arguments: object) -> None:
        raise AssertionError("history is read")

    monkeypatch.setattr("airflow_mdbackup.scheme.history.usage.Timeline", refuse)
    monkeypatch.setattr("airflow_mdbackup.scheme.history.usage.read_header", refuse)
    pair.backup()
    assert pair.mirror.read_status()["totals"] == before


def test_growth_is_what_arrived_in_the_last_30_days(pair: Pair) -> None:
    pair.put("a", bytes(1000))
    pair.backup()
    pair.put("a", bytes(300))
    pair.backup()
    status = check_health(pair.mirror, None, NOW)
    totals = stored_totals(pair.mirror.read_status())
    assert totals is not None and sum(totals.days.values()) == 1300 == totals.disk.came
    assert status.disk == DiskUsage(1, 300, 1, 1000, 1300)
    month = totals.plus("1", "20261030", DiskUsage(came=5)).plus("2", "20261029", DiskUsage(came=7))
    assert month.came(NOW) - totals.came(NOW) == 5


def test_files_put_there_by_hand_are_counted_once_adopted(pair: Pair) -> None:
    """They were not part of a commit, so everything is counted again."""
    pair.put("a", b"a")
    pair.backup()
    for name in ("b", "c"):
        pair.put(name, name.encode())
        pair.live(name).write_bytes(name.encode())
    assert pair.backup().adopted == 2
    assert told(pair) == walked(pair) == (3, 3, 0, 0)


def test_history_has_path_md5_size_and_place_of_pruned_versions(pair: Pair) -> None:
    pair.put("a", b"first")
    pair.backup()
    pair.put("a", b"second")
    pair.backup()
    (version,) = prune(pair, KeepRules(since="9"))
    (change,) = pair.history()[-1]
    assert (change.what, change.path, change.size) == (ChangeKind.PRUNED, pair.path("a"), 5)
    assert (change.version, change.old_md5, change.md5) == (version.place, digest(b"first"), None)
    assert not any(pending(pair.mirror))


def test_versions_with_the_same_stamp_each_count(pair: Pair, tmp_path: Path) -> None:
    """As imports of several trees of one day may have."""
    pair.put("file", b"now")
    pair.backup()
    for number in range(3):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
        (tmp_path / "tree" / str(number) / "file").write_bytes(b"%d" % number)
    meant = (pair.path("file"), "20260101T000000.000000Z")
    import_versions(pair.mirror, SourceTree(tmp_path / "tree", b""), lambda path: meant, copy=True)
    prune(pair, KeepRules(last=2))
    assert len(pair.versions("file")) == 2


@pytest.mark.parametrize("how", ["repaired", "no index", "another size"])
def test_a_file_deleted_by_hand_and_copied_again_counts_once(pair: Pair, how: str) -> None:
    pair.put("file", b"file")
    pair.put("other", b"other")
    pair.backup()
    pair.live("file").unlink()
    if how == "repaired":
        with Timeline(pair.mirror) as past:
            walk = Verification(pair.mirror, past, repair=True, missing=True)
            assert len(list(walk)) == 2
        assert walk.finish() == [pair.path("file")]
        assert check_health(pair.mirror, None, NOW).files == len(pair.index_b()) == 1
    elif how == "no index":
        pair.mirror.index.unlink()
    else:
        pair.put("file", b"a longer one")
    pair.backup()
    assert told(pair) == walked(pair)
    assert [content.left for content in contents(pair) if not content.until] == ["", ""]
