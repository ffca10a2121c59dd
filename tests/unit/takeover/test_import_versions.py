"""Old versions that another tool kept become versions of the mirror."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.cli.suffix import Suffix
from airflow_mdbackup.scheme.common.times import parse_time, stamp_of
from airflow_mdbackup.scheme.files import folder as folder_module
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.history.changes import commits, pending
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.verify import VerifyOutcome, unknown_files, verify
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.takeover import import_versions
from airflow_mdbackup.scheme.takeover.import_versions import _Importer
from airflow_mdbackup.scheme.takeover.survey import Survey
from tests.guarantees.crash.crash import PowerCut, crash_at, mixed
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of, digest
from tests.pair import Pair
from tests.torture import LONG
from tests.unit.cli.terminal import GOOD, REFUSED, WRONG, Terminal, disk_of, on_disk, rsynced


def with_backup_dir(pair: Pair, folder: Path) -> Path:
    """Have rsync keep what it displaced, adopt its tree, and return where the old files are."""
    for name in ("changed", "sub/changed", "deleted", "same"):
        pair.put(name, b"old " + name.encode())
    copy, kept = rsynced(pair, folder), folder / "kept"
    time.sleep(0.01)  # or else rsync takes a file of the same size for the same
    for name in ("changed", "sub/changed"):
        pair.put(name, b"newer " + name.encode())
    os.unlink(pair.path("deleted"))
    command = ["rsync", "-a", "--delete", "--backup", f"--backup-dir={kept}", f"{pair.a}/", f"{copy}/"]
    subprocess.run(command, check=True)
    pair.build_index()
    return kept


DISPLACED = ("--displaced", "2026-11-20T03:15:00Z")
STAMP = "20261120T031500.999999Z"


def adopted(terminal: Terminal, folder: Path, *words: str) -> None:
    terminal.run("adopt", "--tree", folder / "rsynced", "--at", terminal.pair.a, *words)


@pytest.mark.parametrize("copy", [False, True])
def test_what_rsync_kept_becomes_versions(pair: Pair, terminal: Terminal, tmp_path: Path, copy: bool) -> None:
    """Moved, or copied; also of a path that no longer exists. Everything that reads history knows them."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    before, index = on_disk(kept), pair.index_b()
    words = ["import", kept, "--at", pair.a, *DISPLACED, *(["--copy"] if copy else [])]
    terminal.run(*words, "--dry-run", index=False)
    assert "3 versions, 37 B, would be imported" in terminal.told
    assert on_disk(kept) == before and len(commits(pair.mirror)) == 1
    terminal.run(*words, index=False)
    assert "3 versions, 37 B, imported" in terminal.told
    assert on_disk(kept) == before if copy else not [p for p in kept.rglob("*") if p.is_file()]
    for name in ("changed", "sub/changed", "deleted"):
        (version,) = (pair.live(name).parent / ".old").glob(f"{Path(name).name}.*")
        assert (version.name, version.read_bytes()) == (f"{Path(name).name}.{STAMP}", f"old {name}".encode())
        assert version.stat().st_mtime_ns == before[str(kept / name)][1]
    assert pair.index_b() == index
    check_sound(pair)
    assert disk_of(pair)[2:] == (3, 37)
    with Timeline(pair.mirror) as past:
        assert not past.problems
        assert {found.outcome for found in verify(pair.mirror, past, past.contents())} == {
            VerifyOutcome.SOUND
        }
        assert not list(unknown_files(pair.mirror, past))
    lines = terminal.run("versions", f"{pair.a}/changed", "--format", "json", index=False).splitlines()
    old, new = map(json.loads, lines)
    assert (old["until"], old["since"], old["md5"]) == (STAMP, None, digest(b"old changed").decode())
    assert (new["until"], new["size"]) == (None, 13)
    words_again = terminal.run(*words, index=False, status=GOOD if copy else WRONG)
    assert "already in the backup: 3" in terminal.told if copy else "No old versions" in terminal.told
    assert words_again == ""
    assert pair.backup().outcomes == {}
    pair.put("changed", b"newest")
    pair.backup()
    assert pair.versions("changed") == [b"old changed", b"newer changed"]
    check_sound(pair)


def test_a_time_before_the_first_backup_has_no_state(
    pair: Pair, terminal: Terminal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which files there were then is not known, and nothing is made up; the present state is as it was."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    terminal.run("import", kept, "--at", pair.a, *DISPLACED, index=False)
    back = ("restore", "--dest", str(pair.mirror.dest), "--to", str(tmp_path / "back"))
    assert main([*back, "--as-of", "2026-11-21T00:00Z"]) == REFUSED
    assert "of imported files only the versions are known" in capsys.readouterr().err
    assert main([*back, "--as-of", "now", "--include-gone"]) == GOOD
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert found == {"changed": b"newer sub/changed", "same": b"old same"} | {"changed": found["changed"]}
    assert found["changed"].startswith(b"newer")


def test_an_import_overwrites_no_version(pair: Pair, terminal: Terminal, tmp_path: Path) -> None:
    """For the same time, the next name is used; the same content is not imported twice."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    there = pair.live(".old") / f"changed.{STAMP}"
    there.parent.mkdir()
    there.write_bytes(b"somebody's")
    again = tmp_path / "again"
    shutil.copytree(kept, again)
    for tree in (kept, again):
        terminal.run("import", tree, "--at", pair.a, *DISPLACED, index=False)
    assert "no versions, 0 B, imported; already in the backup: 3" in terminal.told
    assert there.read_bytes() == b"somebody's"
    assert there.with_name(f"{there.name}.1").read_bytes() == b"old changed"
    check_sound(pair)


@pytest.mark.parametrize("cut_off", [False, True])
def test_two_equal_imports_at_once_record_each_version_once(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_off: bool
) -> None:
    """The second one starts and ends while the first hashes; or is cut off as the first reads history."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    words = ["import", kept, "--at", pair.a, *DISPLACED, "--copy"]
    hashing = Survey.hash

    def hash_late(survey: Survey, *arguments: Any) -> None:
        monkeypatch.setattr(Survey, "hash", hashing)
        terminal.run(*words, index=False)
        hashing(survey, *arguments)

    settling = import_versions._recover

    def settle_early(mirror: Mirror) -> bool:
        monkeypatch.setattr(import_versions, "_recover", settling)
        finished = settling(mirror)
        terminal.cut_off(lambda: any(pending(mirror)), *words, index=False)
        return finished

    if cut_off:
        monkeypatch.setattr(import_versions, "_recover", settle_early)
    else:
        monkeypatch.setattr(Survey, "hash", hash_late)
    terminal.run(*words, index=False)
    assert "no versions, 0 B, imported; already in the backup: 3" in terminal.told
    assert len(commits(pair.mirror)) == 2 and disk_of(pair)[2:] == (3, 37)
    check_sound(pair)


def test_files_with_a_suffix_become_versions_of_those_without(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """As `rclone --suffix` leaves them beside the others; a file of A with such a name is not a version."""
    for name in ("a", "sub/b", "notes.2026-01-02", "other.2026-99-99"):
        pair.put(name, b"live")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    for name in ("a.2026-11-20", "a.2026-11-21", "sub/b.2026-11-20", "gone.2026-11-20"):
        (copy / name).write_bytes(name.encode())
    adopted(terminal, tmp_path, "--suffix", ".%Y-%m-%d")
    assert "4 not adopted, passed over" in terminal.told
    assert set(pair.index_b()) == set(pair.index_a())
    terminal.run("import", "--suffix", ".%Y-%m-%d", index=False)
    assert pair.versions("a") == [b"a.2026-11-20", b"a.2026-11-21"]
    assert pair.versions("sub/b") == [b"sub/b.2026-11-20"]
    assert pair.versions("gone") == [b"gone.2026-11-20"]
    check_sound(pair)
    with Timeline(pair.mirror) as past:
        assert not list(unknown_files(pair.mirror, past))
        a = [content.until[:8] for content in past.contents() if content.path == pair.path("a")]
    assert a[2] == "" and a == [*sorted(a[:2]), ""]
    assert pair.backup().outcomes == {}


def test_no_live_file_in_the_index_is_mistaken_for_a_version(
    pair: Pair, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its history is lost, or a run brought it only since the survey."""
    pair.put("lost~", b"lost")
    pair.backup()
    commits(pair.mirror)[0].unlink()
    pair.live("new~").write_bytes(b"new")
    pair.live("old~").write_bytes(b"old")

    def after_a_run(importing: _Importer) -> None:
        pair.put("new~", b"new")
        os.utime(pair.path("new~"), (1_600_000_000, 1_600_000_000))
        assert pair.backup().outcomes == {"adopted": 1}
        commit(importing)

    commit = _Importer.commit
    os.utime(pair.live("new~"), (1_600_000_000, 1_600_000_000))
    words = ["import", "--suffix", "~", *DISPLACED]
    terminal.run(*words, "--dry-run", index=False)
    assert "2 versions" in terminal.told
    monkeypatch.setattr(_Importer, "commit", after_a_run)
    terminal.run(*words, index=False)
    assert "1 version" in terminal.told
    assert pair.versions("old") == [b"old"]
    assert {name: pair.live(name).read_bytes() for name in ("lost~", "new~")} == {
        "lost~": b"lost",
        "new~": b"new",
    }
    assert set(pair.index_b()) == {pair.path("lost~"), pair.path("new~")}


def test_nothing_is_imported_into_the_place_of_versions(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    before = on_disk(kept)
    words = ["import", kept, "--at", f"{pair.a}/.old", *DISPLACED]
    terminal.run(*words, index=False, status=WRONG)
    assert "3 not imported, reserved" in terminal.told
    assert on_disk(kept) == before


def test_an_import_that_is_killed_at_any_step_loses_and_forgets_nothing(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the power fails; also where a rename always overwrites. The next run or command finishes it."""
    template = tmp_path / "x"
    with_backup_dir(pair, template)
    pair.mirror = Mirror(template / "b", "srv1")
    terminal.configure()
    adopted(terminal, template)
    for number in count(1, 1 if LONG else 17):
        folder = tmp_path / f"killed-{number}"
        subprocess.run(["cp", "-a", template, folder], check=True)
        kept = folder / "kept"
        contents = {path.read_bytes() for path in kept.rglob("*") if path.is_file()} | contents_of(pair)
        pair.mirror = Mirror(folder / "b", "srv1")
        terminal.configure()
        copy = ["--copy"] if number % 2 else []
        words = ("import", kept, "--at", pair.a, *DISPLACED, *copy)
        cut = PowerCut(folder, mixed(number)) if number % 4 > 1 else None
        with monkeypatch.context() as patched:
            if number % 5 < 2:
                for module in (folder_module, syscalls_module):
                    patched.setattr(module, "rename_if_free", lambda *names: False)
            killed = crash_at(number, partial(terminal.run, *words, index=False), cut)
        left = {path.read_bytes() for path in kept.rglob("*") if path.is_file()}
        assert left | contents_of(pair) >= contents
        if killed and number % 3:
            pair.backup()
        if killed and any(path.is_file() for path in kept.rglob("*")):
            terminal.run(*words, index=False)
        pair.backup()
        check_sound(pair)
        for name in ("changed", "sub/changed", "deleted"):
            assert pair.versions(name) == [f"old {name}".encode()]
        with Timeline(pair.mirror) as past:
            assert not list(unknown_files(pair.mirror, past))
        if not killed:
            break


@pytest.mark.parametrize("overwrites", [False, True])
def test_an_import_that_was_cut_off_in_its_commit_is_finished_by_the_next(
    pair: Pair, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    """Before it looks for more; an empty file that got a version's name first is ignored."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    words = ("import", kept, "--at", pair.a, *DISPLACED)
    version = pair.live(".old") / f"changed.{STAMP}"
    terminal.cut_off(lambda: any(pending(pair.mirror)), *words, index=False)
    assert not version.exists()
    if overwrites:
        for module in (folder_module, syscalls_module):
            monkeypatch.setattr(module, "rename_if_free", lambda *names: False)
        version.parent.mkdir()
        version.touch()
    terminal.run(*words, index=False)
    assert "Finished a commit that had been interrupted first" in terminal.told
    assert disk_of(pair)[2:] == (3, 37)
    assert pair.versions("changed") == [b"old changed"]
    check_sound(pair)


def test_files_that_changed_since_an_import_was_cut_off_are_not_recorded_as_what_they_were(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """Nor is what has the version's name by then. Both stay in place until the next import."""
    kept = with_backup_dir(pair, tmp_path)
    adopted(terminal, tmp_path)
    words = ("import", kept, "--at", pair.a, *DISPLACED)
    terminal.cut_off(lambda: any(pending(pair.mirror)), *words, index=False)
    (kept / "changed").write_bytes(b"other")
    somebodys = pair.live("sub/.old") / f"changed.{STAMP}"
    somebodys.parent.mkdir()
    somebodys.write_bytes(b"somebody's")
    assert pair.backup().outcomes == {}
    assert pair.versions("changed") == [] and (kept / "changed").read_bytes() == b"other"
    assert pair.versions("deleted") == [b"old deleted"]
    check_sound(pair)
    terminal.run(*words, index=False)
    assert pair.versions("changed") == [b"other"]
    assert pair.versions("sub/changed") == [b"somebody's", b"old sub/changed"]
    check_sound(pair)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "name the DIR"),
        (("DIR",), "--at PATH is missing"),
        (("DIR", "--at", "/x"), "give the time"),
        (("DIR", "--at", "/x", "--displaced", "today", "--suffix", ".%Y%j"), "give the time"),
        (("DIR", "--at", "/x", "--suffix", "~"), "give the time"),
        (("DIR", "--at", "/x", "--suffix", ".%B"), "only %Y, %m"),
        (("DIR", "--at", "/x", "--suffix", ".%m-%d"), "For example '.%Y-%m-%d'"),
        (("nowhere", "--at", "/x", "--displaced", "today"), "is not a directory"),
        (("DIR", "--at", "/x", "--displaced", "today"), "has no index yet"),
    ],
)
def test_an_import_that_makes_no_sense_is_refused(
    pair: Pair, terminal: Terminal, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    pair.mirror.claim()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/x~").write_bytes(b"")
    given = [word.replace("DIR", str(tmp_path / "tree")) for word in words]
    terminal.run("import", *given, index=False, status=REFUSED)
    assert told in terminal.told


@pytest.mark.parametrize(
    ("form", "path", "cut"),
    [
        (".%Y-%m-%d", b"/a/x.2026-11-20", (b"/a/x", "2026-11-20 00:00:00")),
        ("-%Y%m%d-%H%M%S", b"/x-20261120-031500", (b"/x", "2026-11-20 03:15:00")),
        ("%%.%j.%Y", b"/x%.001.2026", (b"/x", "2026-01-01 00:00:00")),
        ("~", b"/a/x~", (b"/a/x", None)),
        (".%Y-%m-%d", b"/a/x.2026-13-20", None),
        (".%Y-%m-%d", b"/a/.2026-11-20", None),
        (".%Y%m%d", b"/a/x.29990101", None),  # yet to come: a number of some other kind
        (".%Y-%m-%d", b"/a.2026-11-20/x", None),
    ],
)
def test_a_suffix_shows_the_path_and_the_time(
    form: str, path: bytes, cut: tuple[bytes, str | None] | None
) -> None:
    """In local time; a name that is nothing but the suffix has none."""
    found = Suffix(form).cut(path)
    if cut is None:
        assert found is None
        return
    assert found is not None and found[0] == cut[0]
    if cut[1] is None:
        assert found[1] == ""
    else:
        moment = parse_time(cut[1], datetime.now().astimezone())
        assert found[1][:15] == f"{moment.astimezone(UTC):%Y%m%dT%H%M%S}"


@pytest.mark.parametrize(
    ("form", "path", "cut"),
    [
        ("-%Y-%m-%d", b"/a/x-2026-11-20.txt", b"/a/x.txt"),
        ("-%Y-%m-%d", b"/a/x-2026-11-20.tar.gz", b"/a/x.tar.gz"),
        ("-%Y-%m-%d", b"/a/x.v1-2026-11-20.gz", b"/a/x.v1.gz"),  # v1 is the extension of nothing
        ("-%Y-%m-%d", b"/a/x-2026-11-20", b"/a/x"),
        ("-%Y-%m-%d", b"/a/x-2026-11-20.", b"/a/x."),
        ("-%Y-%m-%d", b"/a/-2026-11-20.profile", b"/a/.profile"),
        ("-%Y-%m-%d", b"/a/x-2026-11-19.log-2026-11-20.gz", b"/a/x-2026-11-19.log.gz"),
        ("-bak", b"/a/x-bak.txt", b"/a/x.txt"),
        (".%Y-%m-%d", b"/a/x.2026-11-20.txt", b"/a/x.txt"),
        ("-%Y-%m-%d", b"/a/-2026-11-20", None),
        ("-%Y-%m-%d", b"/a/x-2026-11-20-txt", None),
        ("-%Y-%m-%d", b"/a-2026-11-20.d/x", None),
    ],
)
def test_a_suffix_may_stand_before_the_extension(form: str, path: bytes, cut: bytes | None) -> None:
    """As `rclone --suffix-keep-extension` puts it."""
    found = Suffix(form, keeps_extension=True).cut(path)
    assert (None if found is None else found[0]) == cut


def test_files_with_a_suffix_before_the_extension_become_versions(
    pair: Pair, terminal: Terminal, tmp_path: Path
) -> None:
    """A suffix that begins with a dash, as all in the manual of rclone do, is a word like any other."""
    words = "--suffix", "-%Y-%m-%d", "--suffix-keep-extension"
    pair.put("a.tar.gz", b"live")
    pair.put("b", b"live")
    copy = rsynced(pair, tmp_path)
    pair.build_index()
    for name in ("a-2026-11-20.tar.gz", "b-2026-11-20"):
        (copy / name).write_bytes(name.encode())
    adopted(terminal, tmp_path, *words)
    assert "2 not adopted, passed over" in terminal.told
    terminal.run("import", *words, index=False)
    assert pair.versions("a.tar.gz") == [b"a-2026-11-20.tar.gz"]
    assert pair.versions("b") == [b"b-2026-11-20"]
    check_sound(pair)


@pytest.mark.parametrize("words", [("--suffix", "-bak"), ("--suffix=-bak",), ("--suffix", "--bak")])
def test_a_suffix_may_begin_with_a_dash(pair: Pair, terminal: Terminal, words: tuple[str, ...]) -> None:
    pair.put("a", b"live")
    pair.backup()
    name = "a" + words[-1].removeprefix("--suffix=")
    pair.live(name).write_bytes(b"old")
    terminal.run("import", *words, *DISPLACED, index=False)
    assert pair.versions("a") == [b"old"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--suffix", "--copy"), "expected one argument"),
        (("--suffix",), "expected one argument"),
        (("/proc", "--at", "/x", "--suffix-keep-extension", *DISPLACED), "needs --suffix FORM"),
    ],
)
def test_a_missing_suffix_is_reported(
    terminal: Terminal, words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["import", "srv1", "--providers-file", str(terminal.file), *words])
    except SystemExit as error:
        assert isinstance(error.code, int)
        status = error.code
    assert status == REFUSED and why in capsys.readouterr().err


@pytest.mark.parametrize("form", ["", "a/b", ".%q", "%"])
def test_what_is_no_suffix_is_refused(form: str) -> None:
    with pytest.raises(UsageError):
        Suffix(form)


@pytest.mark.parametrize(
    "form",
    [
        *(".%m-%d", ".%j", "~%d", "-%H%M%S", ".%Y", ".%y", ".%Y-%m", ".%Y-%d", ".%Y%H", ".%Y%m%H%M"),
        *(
            ".%Y%m%d%M",
            ".%Y%m%d%H%S",
            ".%Y%j%S",
            ".%Y%y%m%d",
            ".%Y%m%d%j",
            ".%Y%m%j",
            ".%Y%Y%m%d",
            ".%%Y%m%d",
        ),
    ],
)
def test_a_suffix_that_skips_a_part_of_the_time_is_refused(form: str) -> None:
    """Else strptime would take it for that of the first of January 1900."""
    with pytest.raises(UsageError, match=r"a part is missing, .* For example '\.%Y-%m-%d'"):
        Suffix(form)


@pytest.mark.parametrize(
    ("form", "path", "moment"),
    [
        (".%d.%m.%y", b"/x.20.11.25", "2025-11-20"),  # in any order
        (".%y%j%H", b"/x.2532403", "2025-11-20 03:00"),
        ("-%H%M-%Y-%m-%d", b"/x-0315-2025-11-20", "2025-11-20 03:15"),
        (".%Y%%m%m%d", b"/x.2025%m1120", "2025-11-20"),
    ],
)
def test_a_suffix_with_a_day_may_include_the_time_to_the_second(form: str, path: bytes, moment: str) -> None:
    there = stamp_of(datetime.fromisoformat(moment).astimezone())
    assert Suffix(form).cut(path) == (b"/x", there)
