"""What `mdbackup versions` says of contents that are not where they were: never what is not so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.common.times import format_time
from airflow_mdbackup.scheme.store.version_names import stamp_of_file
from tests.pair import Pair
from tests.unit.recovery.damage import rot
from tests.unit.recovery.somebody import mdbackup, two_runs


def versions(pair: Pair, *words: str) -> str:
    """Return what `mdbackup versions` prints."""
    return mdbackup("versions", "--dest", str(pair.mirror.dest), *words)[1]


def versions_as_json(pair: Pair, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in versions(pair, "--format", "json", *words).splitlines()]


def test_a_file_that_is_not_there_is_said_to_be_missing(pair: Pair) -> None:
    """Whoever took it away."""
    two_runs(pair)
    pair.live("same").unlink()
    listed = versions(pair, "same")
    assert listed.splitlines()[-1] == f"    missing: {pair.live('same')} does not exist"
    (said,) = versions_as_json(pair, "same")
    assert said["file"] is None and said["same"] is None


def test_versions_says_who_took_an_entry_out_of_the_index(pair: Pair) -> None:
    """A file of which that is said has not gone from the provider; once it came again, nothing is said."""
    two_runs(pair)
    assert mdbackup("forget", "--dest", str(pair.mirror.dest), os.fsdecode(pair.path("same")))[0] == 0
    stamp = pair.mirror.last_commit()
    listed = versions(pair, "same")
    assert f"removed from the index by `mdbackup forget` on {format_time(stamp)}" in listed
    assert "gone from the provider" not in listed and str(pair.live("same")) in listed
    (said,) = versions_as_json(pair, "same")
    assert (said["left"], said["taken_out"], said["until"]) == (stamp, "forget", None)
    (said,) = versions_as_json(pair, "gone")
    assert said["left"] and said["taken_out"] is None
    assert "gone from the provider since" in versions(pair, "gone")
    pair.backup()
    (said,) = versions_as_json(pair, "same")
    assert (said["left"], said["taken_out"]) == (None, None)


def test_versions_and_restore_say_of_what_was_taken_out_whether_a_run_can_copy_it_again(
    pair: Pair, tmp_path: Path
) -> None:
    """Not once the provider has it no more: then no run will."""
    two_runs(pair)
    dest = str(pair.mirror.dest)
    paths = [os.fsdecode(pair.path(name)) for name in ("new", "same", "twin")]
    assert mdbackup("forget", "--dest", dest, *paths)[0] == 0

    def said(name: str) -> str:
        return versions(pair, name).splitlines()[1].partition("`mdbackup forget` on ")[2][25:].split(": ")[0]

    def excluded() -> list[str]:
        told = mdbackup("restore", "--dest", dest, "--to", str(tmp_path / "target"), "--dry-run")[2]
        return [line for line in told.splitlines() if " excluded: " in line]

    waits = ", so that the next run fetches it again"
    assert said("same") == said("new") == waits
    (told,) = excluded()
    assert told.startswith("3 files excluded") and "no run has pulled them since" in told
    os.unlink(pair.path("same"))
    run = pair.begin()  # and is not finished
    assert said("same") == said("new") == waits
    pair.finish(run)
    fetched = format_time(stamp_of_file(run.state))
    assert said("same") == f"; the provider's index of {fetched} no longer has it"
    (told,) = excluded()
    assert told.startswith("1 file excluded") and "no run has pulled" not in told
    assert f"the provider's index of {fetched} no longer has it; --include-gone" in told
    assert mdbackup("forget", "--dest", dest, paths[0], paths[2])[0] == 0
    assert said("new") == waits and "no longer has it" in said("same")
    assert [line.split(" excluded")[0] for line in excluded()] == ["2 files", "1 file"]
    for spoil in (lambda: run.index.write_bytes(b""), run.index.unlink, lambda: shutil.rmtree(run.folder)):
        spoil()
        assert said("same") == waits and len(excluded()) == 1


def test_versions_says_of_what_was_taken_out_that_a_run_had_it_and_did_not_copy_it(pair: Pair) -> None:
    two_runs(pair)
    assert mdbackup("forget", "--dest", str(pair.mirror.dest), os.fsdecode(pair.path("same")))[0] == 0
    rot(pair.live("same"))
    pair.build_index()
    pair.put("same", b"other bytes than the index says")
    pair.finish(pair.prepare())
    assert "has it, but that run did not fetch it again" in versions(pair, "same")


def test_versions_says_of_bytes_that_rotted_and_came_again_that_they_are_live(pair: Pair) -> None:
    """Nobody took them away: the file had rotted, `verify --repair` had it copied again."""
    two_runs(pair)
    live = pair.live("same")
    rot(live)
    assert mdbackup("verify", "--dest", str(pair.mirror.dest), "--repair")[0] == 1
    assert "removed from the index by a repair (`verify`) on " in versions(pair, "same")
    pair.backup()
    came, rotten, again = versions_as_json(pair, "same")
    assert came["md5"] == again["md5"] != rotten["md5"]
    assert came["taken_out"] == "repair" and came["file"] is None
    assert came["same"] == again["same"] == again["file"] == str(live)
    listed = versions(pair, "same")
    assert f"    the same content is in the live file: {live}" in listed.splitlines()
    assert "hands" not in listed and "gone from" not in listed and "missing" not in listed


def test_versions_finds_bytes_that_a_version_has_too(pair: Pair) -> None:
    pair.put("file", b"one")
    pair.backup()
    pair.put("file", b"two")
    pair.backup()
    pair.put("file", b"one")
    pair.backup()
    first, _, last = versions_as_json(pair, "file")
    os.unlink(last["file"])
    assert versions(pair, "file").endswith(f"    the same content is in another version: {first['file']}\n")


def test_a_path_that_is_too_long_for_one_call_is_not_said_to_be_missing(pair: Pair) -> None:
    """With `dest` before it, it has more than PATH_MAX bytes; A's own is just short enough."""
    room = 4090 - len(pair.path("x"))
    directories = ["d" * 200] * (room // 201)
    name = "/".join([*directories, "f" * (room % 201 or 1)])
    pair.put(name, b"deep")
    pair.backup()
    listed = versions(pair, "*")
    assert len(os.fsencode(pair.live(name))) > 4096
    assert listed.splitlines()[-1].strip() == str(pair.live(name))
    (said,) = versions_as_json(pair, "*")
    assert said["file"] == str(pair.live(name))


def test_versions_of_a_disk_that_was_rescued_without_its_files(pair: Pair) -> None:
    two_runs(pair)
    shutil.rmtree(pair.mirror.files)
    assert "does not exist" in versions(pair, "same")


def test_restore_says_of_bytes_that_rotted_no_more_than_history_knows(pair: Pair, tmp_path: Path) -> None:
    """It tells that the file had other bytes, and accuses nobody."""
    two_runs(pair)
    stamp = pair.mirror.last_commit()
    rot(pair.live("same"))
    pair.put("same", b"newer")
    pair.backup()
    words = ("same", "--to", str(tmp_path / "new"), "--as-of", stamp)
    status, told, _ = mdbackup("restore", "--dest", str(pair.mirror.dest), *words)
    assert status == 1 and "its file was missing or had other content" in told
    assert "lost: its file had other content, or was not there, when it should" in versions(pair, "same")
