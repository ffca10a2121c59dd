"""The command that prunes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.prune import KeepRules
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from tests.guarantees.whatever_happens.soundness import files_of
from tests.kept import files_in
from tests.pair import Pair
from tests.unit.recovery.versions import call, many_versions, prune


def test_the_command_shows_first_and_deletes_on_request(
    pair: Pair, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In text and in JSON; and what log, history, versions and restore say afterwards."""
    many_versions(pair)
    dest = ("--dest", str(pair.mirror.dest))
    status, out, said = call(capsys, "prune", *dest, "--keep-last", "1")
    assert status == 0 and "12 versions of 5 paths would be pruned: " in said and "--yes deletes them" in said
    assert sum(int(line.split()[0]) for line in out.splitlines()) == 12 and len(out.splitlines()) == 5
    assert call(capsys, "prune", *dest, "--keep-last", "1", "--dry-run") == (status, out, said)
    listed = [
        json.loads(line)
        for line in call(capsys, "prune", *dest, "--keep-last", "1", "--format", "json")[1].splitlines()
    ]
    assert {each["fate"] for each in listed} == {"goes", "kept"}
    assert all(Path(each["file"]).stat().st_size == each["bytes"] for each in listed)
    assert all(Path(each["file"]).stat().st_blocks * 512 == each["room"] for each in listed)
    assert len(files_of(pair)) == 22
    words = [os.fsdecode(pair.path(name)) for name in ("changes", "gone")]
    status, _, said = call(capsys, "prune", *dest, *words, "--keep-last", "1", "--yes")
    assert status == 0 and "pruned: " in said and len(files_of(pair)) == 22 - 4
    first, last = (call(capsys, "log", *dest)[1].splitlines()[n] for n in (0, -1))
    assert "4 pruned" in last and "bytes freed" in last and "freed" not in first
    logged = json.loads(call(capsys, "log", *dest, "--format", "json")[1].splitlines()[-1])
    assert logged["changes"] == {"pruned": 4} and logged["freed"] > 0 == logged["bytes"]
    told_of = call(capsys, "history", *dest, words[0])[1].splitlines()
    assert sum("  pruned     " in line and " <- " in line for line in told_of) == 2
    assert call(capsys, "versions", *dest, words[0])[1].count("    pruned on 20") == 2
    facts = [
        json.loads(line)
        for line in call(capsys, "versions", *dest, words[0], "--format", "json")[1].splitlines()
    ]
    assert [bool(each["pruned"]) for each in facts] == [True, True, False, False]
    assert [each["file"] is None for each in facts] == [True, True, False, False]
    status, _, said = call(capsys, "diff", *dest, words[0], "--from", facts[0]["since"])
    assert status == 1 and said.splitlines()[-1].startswith("pruned: ")
    assert call(capsys, "verify", *dest)[0] == 0
    with Timeline(pair.mirror) as past:
        moment = past.moments[0].stamp
    command = ("restore", *dest, "--to", str(tmp_path / "target"), "--as-of", moment)
    for more in (("--dry-run",), ()):
        status, out, said = call(capsys, *command, *more)
        assert (
            status == 1 and "2 pruned" in said and f"{pair.path('gone').decode()}: it was pruned on 20" in out
        )


def test_pruned_content_is_restored_from_another_copy(pair: Pair, tmp_path: Path) -> None:
    pair.put("a", b"bytes")
    pair.put("b", b"bytes")
    pair.backup()
    pair.put("a", b"other")
    pair.backup()
    prune(pair, KeepRules(since="9"))
    with Timeline(pair.mirror) as past:
        came = list(restore(pair.mirror, past, past.state(past.moments[0]), tmp_path / "target"))
    assert {each.outcome for each in came} == {RestoreOutcome.RESTORED}
    assert {file.content for file in files_in(tmp_path / "target").values()} == {b"bytes"}


def test_no_other_version_is_mistaken_for_a_pruned_one(pair: Pair, tmp_path: Path) -> None:
    """Of the same path and size; nor by a dry run."""
    for content in (b"first", b"other", b"third"):
        pair.put("a", content)
        pair.backup()
    prune(pair, KeepRules(last=1))
    for dry_run in (True, False):
        with Timeline(pair.mirror) as past:
            state = past.state(past.moments[0])
            (came,) = restore(pair.mirror, past, state, tmp_path / "target", dry_run=dry_run)
        assert came.outcome == RestoreOutcome.PRUNED


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say what to keep"),
        (("--keep-within", "6m"), "is less than a day (m are minutes)"),
        (("--keep-within", "soon"), "is not a duration"),
        (("--keep-last", "0"), "must be at least 1"),
        (("--keep-last", "1", ""), "a path is empty"),
        (("--keep-last", "1", "--yes", "--dry-run"), "use only one"),
    ],
)
def test_a_rule_is_needed_and_must_be_meant(
    pair: Pair, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    many_versions(pair)
    before = files_of(pair)
    status, _, told = call(capsys, "prune", "--dest", str(pair.mirror.dest), "--yes", *words)
    assert status == 2 and said in told and files_of(pair) == before


def test_a_path_that_was_never_backed_up_is_reported(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    many_versions(pair)
    status, _, said = call(
        capsys, "prune", "--dest", str(pair.mirror.dest), "--keep-within", "1y", "/nowhere"
    )
    assert status == 1 and "no versions would be pruned" in said and "under '/nowhere'" in said
