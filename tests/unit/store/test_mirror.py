"""The layout below dest: whose it is, lock, stamps, run directories, and their clearing away."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.errors import DestinationBroken, DestinationBusy, DestinationRefused
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.files.syscalls import is_file
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import commits, pending
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.store import mirror as mirror_module
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.version_names import version_path
from tests.pair import Pair

STAMP = re.compile(r"\d{8}T\d{6}\.\d{6}Z")


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    mirror = Mirror(tmp_path / "b", "srv1")
    mirror.claim()
    return mirror


# --- whose it is ------------------------------------------------------------------------------------


def test_a_new_dest_is_set_up_for_its_owner_only(tmp_path: Path) -> None:
    """With its parents; the marker tells provider and format."""
    mirror = Mirror(tmp_path / "some/where/b", "srv1")
    mirror.claim()
    mirror.claim(known=True)
    assert mirror.dest.stat().st_mode & 0o777 == 0o700
    marker = json.loads((mirror.dest / ".mdbackup/provider-id").read_text())
    assert marker == {"format": 1, "provider": "srv1"}


def test_the_dest_of_another_provider_is_refused(mirror: Mirror) -> None:
    """The message names both, and what to do."""
    with pytest.raises(DestinationRefused, match=r"srv2: .* belongs to the provider 'srv1'.*dest"):
        Mirror(mirror.dest, "srv2").claim()
    assert read_header(mirror.dest / ".mdbackup/provider-id")["provider"] == "srv1"


@pytest.mark.parametrize("thing", ["photos", "index.md5", "files/x", ".hidden"])
def test_a_dest_that_holds_other_things_is_refused(tmp_path: Path, thing: str) -> None:
    """Nothing is put beside them."""
    (tmp_path / "b" / thing).parent.mkdir(parents=True)
    (tmp_path / "b" / thing).write_bytes(b"mine")
    with pytest.raises(DestinationRefused, match="is not empty"):
        Mirror(tmp_path / "b", "srv1").claim()
    assert not (tmp_path / "b/.mdbackup").exists()


def test_a_fresh_filesystem_is_empty(tmp_path: Path) -> None:
    """lost+found counts for nothing."""
    (tmp_path / "b/lost+found").mkdir(parents=True)
    Mirror(tmp_path / "b", "srv1").claim()


def test_an_empty_dest_is_refused_if_an_earlier_run_is_known(tmp_path: Path) -> None:
    """The disk is not mounted, or this is the wrong worker; nothing is created in its place."""
    (tmp_path / "b").mkdir()
    for dest in (tmp_path / "b", tmp_path / "c"):
        with pytest.raises(DestinationRefused, match=r"not mounted.*wrong worker"):
            Mirror(dest, "srv1").claim(known=True)
    assert list((tmp_path / "b").iterdir()) == [] and not (tmp_path / "c").exists()


def test_a_mount_that_is_none_is_refused(tmp_path: Path) -> None:
    """Before anything is created."""
    mount = tmp_path / "disk"
    for _ in range(2):
        with pytest.raises(DestinationRefused, match=rf"{mount} is not a mount point"):
            Mirror(mount / "b", "srv1").claim(mount=str(mount))
        assert not (mount / "b").exists()
        mount.mkdir(exist_ok=True)
    Mirror(tmp_path / "elsewhere", "srv1").claim(mount="/proc")


def test_a_set_up_that_was_killed_is_finished(tmp_path: Path) -> None:
    """The marker comes last."""
    mirror = Mirror(tmp_path / "b", "srv1")
    mirror.claim()
    (mirror.dest / ".mdbackup/provider-id").unlink()
    mirror.claim()
    mirror.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"provider": "srv1"}', '{"format": "x"}'])
def test_a_damaged_marker_is_refused(mirror: Mirror, content: str) -> None:
    """Whose it is, is then for a person to say."""
    (mirror.dest / ".mdbackup/provider-id").write_text(content)
    with pytest.raises(DestinationRefused, match="provider-id is damaged"):
        mirror.claim()


def test_a_newer_format_is_refused(mirror: Mirror) -> None:
    """The message says what to update."""
    (mirror.dest / ".mdbackup/provider-id").write_text('{"format": 2, "provider": "srv1"}')
    with pytest.raises(DestinationRefused, match="format 2, newer than this version knows: update"):
        mirror.claim()


def test_a_refusal_on_what_may_be_the_wrong_worker_names_host_and_queue(tmp_path: Path) -> None:
    """With these, whoever reads it finds out why the work was done there."""
    mirror = Mirror(tmp_path / "b", "srv1", "disks")
    attempts: list[Callable[[], None]] = [
        lambda: mirror.claim(known=True),
        lambda: mirror.claim(mount=str(tmp_path)),
        mirror.check,
    ]
    for attempt in attempts:
        with pytest.raises(DestinationRefused, match=rf"{re.escape(socket.gethostname())} \(queue 'disks'\)"):
            attempt()


def test_a_step_on_a_dest_without_a_backup_says_so(tmp_path: Path) -> None:
    """A later step may run on another worker than the one before it."""
    with pytest.raises(DestinationRefused, match="holds no backup"):
        Mirror(tmp_path / "b", "srv1").check()


@pytest.mark.parametrize("marker", ["below a file", "a directory", "a circle of links"])
def test_a_dest_whose_marker_is_no_file_holds_no_backup(mirror: Mirror, marker: str) -> None:
    """Also when that is found out because something else is missing."""
    path = mirror.dest / ".mdbackup/provider-id"
    path.unlink()
    if marker == "a directory":
        path.mkdir()
    elif marker == "a circle of links":
        path.symlink_to(path)
    else:
        shutil.rmtree(path.parent)
        path.parent.write_text("")
    for missing in (mirror.check, lambda: os.stat(mirror.dest / "nothing")):
        with (
            pytest.raises(DestinationRefused, match=r"srv1: .* holds no backup"),
            mirror.translate_os_errors(),
        ):
            missing()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, DestinationBroken), (errno.EACCES, DestinationRefused)]
)
def test_a_marker_that_cannot_be_read_is_told_plainly_where_something_is_missing(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """What is missing has the marker looked at, and that error is the one to tell."""

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(mirror_module, "read_header", refuse)
    with pytest.raises(kind, match="provider-id"), mirror.translate_os_errors():
        os.stat(mirror.dest / "nothing")


@pytest.mark.parametrize("name", ["b", "b/.mdbackup", "b/files", "b/.mdbackup/staging"])
def test_a_dest_with_a_file_in_the_place_of_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing can be set up there."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DestinationRefused, match=rf"srv1: .*{tmp_path / name} is not a directory"):
        Mirror(tmp_path / "b", "srv1").claim()


def test_a_new_dest_may_be_claimed_many_times_at_once(tmp_path: Path) -> None:
    """By runs of one provider. Of two providers one gets it, and the other one is told so."""
    for round_ in range(20):
        providers = ["srv1", "srv1", "srv2", "srv2"]
        start = threading.Barrier(len(providers))
        told: dict[int, BaseException] = {}

        def claim(number: int, provider: str, dest: Path = tmp_path / str(round_)) -> None:
            start.wait()  # noqa: B023 - the threads end within the round
            try:
                Mirror(dest, provider).claim()
            except Exception as error:
                told[number] = error  # noqa: B023

        threads = [threading.Thread(target=claim, args=each) for each in enumerate(providers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owner = read_header(tmp_path / str(round_) / ".mdbackup/provider-id")["provider"]
        assert {providers[number] for number in told} == {"srv1", "srv2"} - {owner}
        assert len(told) == 2
        for error in told.values():
            assert isinstance(error, DestinationRefused), error
            assert f"belongs to the provider '{owner}'" in str(error)


# --- lock -------------------------------------------------------------------------------------------


def test_a_lock_that_is_not_free_in_time_tells_who_holds_it(
    mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits sees the holder at once, and in the error."""
    caplog.set_level(logging.INFO)
    with (
        mirror.lock("commit_backup of manual__7"),
        pytest.raises(DestinationBusy, match=r"locked for 0 s by commit_backup of manual__7 \(process \d+"),
        mirror.lock("someone else", wait=0.3),
    ):
        pass
    assert "held by commit_backup of manual__7" in caplog.text
    with mirror.lock("next", wait=0):
        pass


def test_a_lock_is_waited_for(mirror: Mirror) -> None:
    """And taken when its holder lets go."""
    order: list[str] = []
    taken = threading.Event()

    def hold() -> None:
        with mirror.lock("first"):
            taken.set()
            time.sleep(0.4)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(5)
    with mirror.lock("second", wait=10):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_ends_with_its_process(mirror: Mirror) -> None:
    """However that one ended, nothing is left to clear away."""
    program = (
        "import os, sys; from airflow_mdbackup.scheme.store.mirror import Mirror\n"
        "with Mirror(sys.argv[1], 'srv1').lock('killed'): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(mirror.dest)], cwd=Path(__file__).parents[3])
    with mirror.lock("next", wait=0):
        pass


@pytest.mark.parametrize("target", ["elsewhere", "nowhere/at/all"])
def test_a_symlink_in_the_place_of_a_lock_is_refused_and_nothing_made_where_it_leads(
    mirror: Mirror, tmp_path: Path, target: str
) -> None:
    """Nor is it waited for."""
    run = mirror.run("manual__1")
    with run.lock("test", "srv1", make=True), mirror.lock("test"):
        pass
    for lock in (run.folder / "run.lock", mirror.dest / ".mdbackup/lock"):
        lock.unlink()
        lock.symlink_to(tmp_path / target)
    refused = pytest.raises(DestinationRefused, match=r"srv1: .* is a symlink: remove it")
    with refused, mirror.lock("test"):
        pass
    with refused, run.lock("test", "srv1"):
        pass
    with pytest.raises(OSError), run.unused():
        pass
    assert not (tmp_path / target).exists()


# --- stamps -----------------------------------------------------------------------------------------


def test_a_stamp_is_now_but_later_than_all_history(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock went back; and a run that committed nothing leaves no trace of its clock."""
    assert STAMP.fullmatch(mirror.next_stamp())
    mirror.history_path("20300101T235959.999999Z", "run").write_text("{}")
    assert mirror.next_stamp() == "20300102T000000.000000Z"
    monkeypatch.setattr(mirror_module, "now_stamp", lambda: "20400101T000000.000000Z")
    assert mirror.next_stamp() == "20400101T000000.000000Z"
    monkeypatch.setattr(mirror_module, "now_stamp", lambda: "20200101T000000.000000Z")
    assert mirror.next_stamp() == "20300102T000000.000000Z"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.pending"])
@pytest.mark.parametrize(
    ("stamp", "kind"),
    [
        ("20261323T031500.123456Z", "file"),
        ("20260230T031500.123456Z", "file"),
        ("20261123T031560.123456Z", "file"),
        ("00000101T000000.000000Z", "file"),
        ("99999999T999999.999999Z", "file"),
        ("99991231T235959.999999Z", "file"),
        ("99991231T235959.999998Z", "file"),
        ("20261123T031500.123456Z", "directory"),
        ("20261123T031500.123456Z", "fifo"),
        ("20261123T031500.123456Z", "socket"),
        ("20261123T031500.123456Z", "symlink"),
        ("20261123T031500.123456Z", "symlink to nothing"),
    ],
)
def test_what_only_has_a_name_of_history_is_left_alone_and_named(
    pair: Pair, capsys: pytest.CaptureFixture[str], stamp: str, kind: str, ending: str
) -> None:
    """Backups go on, and history is read; `log` and `verify` say what it is."""
    pair.put("file", b"1")
    pair.backup()
    (first,) = commits(pair.mirror)
    strange = pair.mirror.history_path(stamp, "run").with_suffix("")
    strange = strange.with_name(strange.name + ending)
    makers: dict[str, Callable[[], object]] = {
        "file": lambda: shutil.copy(first, strange),
        "directory": strange.mkdir,
        "fifo": lambda: os.mkfifo(strange),
        "socket": lambda: os.mknod(strange, stat.S_IFSOCK | 0o600),
        "symlink": lambda: strange.symlink_to(first),
        "symlink to nothing": lambda: strange.symlink_to("nowhere"),
    }
    makers[kind]()
    before = strange.lstat()
    pair.put("file", b"2")
    assert pair.backup().outcomes == {"pulled": 1}
    assert len(commits(pair.mirror)) == 2 and not pending(pair.mirror)
    with Timeline(pair.mirror) as past:
        assert len(past.moments) == 2
        (problem,) = past.problems
    assert f"{strange} is named like a history file but cannot be one" in problem
    assert strange.lstat() == before
    for command in ("log", "verify", "history"):
        capsys.readouterr()
        assert main([command, "--dest", str(pair.mirror.dest)]) == 1
        assert problem in capsys.readouterr().err
    for words in (["forget", "*"], ["rebuild"], ["prune", "--keep-last", "1", "--yes"]):
        main([words[0], "--dest", str(pair.mirror.dest), *words[1:]])
    assert strange.lstat() == before
    assert pair.backup().failed == 0


@pytest.mark.parametrize("last", ["", "99981231T235959.999999Z"])
def test_there_is_no_stamp_at_the_end_of_time(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """By the clock, or by the last commit: a later commit could have none."""
    if last:
        mirror.history_path(last, "run").write_text("{}")
    else:
        monkeypatch.setattr(mirror_module, "now_stamp", lambda: "99990101T000000.000000Z")
    with pytest.raises(DestinationRefused, match=r"stamp 99990101T000000.000000Z: set the clock"):
        mirror.next_stamp()


def test_runs_side_by_side_never_get_the_same_place(mirror: Mirror) -> None:
    """Without the lock on the mirror, for fetching needs none."""
    orders: list[str] = []
    threads = [
        threading.Thread(target=lambda: orders.extend(mirror.next_order() for _ in range(20))) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(orders)) == [f"n{number:012}" for number in range(1, 81)]
    assert orders[0] > "20990101T000000.000000Z", "it is behind what older backups have"


@pytest.mark.parametrize("spoilt", [None, b"", b"spoilt", bytes(12)])
def test_runs_are_counted_on_where_their_count_is_lost(pair: Pair, spoilt: bytes | None) -> None:
    """From the status, the history, and the directories of runs, whichever knows of the last one."""
    for number in range(3):
        pair.put("file", b"%d" % number)
        pair.backup()
    (pair.mirror.history / "zz copied by hand.jsonl").write_text("{}")  # which is none of ours
    pair.mirror.status.unlink()
    shutil.rmtree(pair.mirror.dest / ".mdbackup" / "runs")
    (pair.mirror.dest / ".mdbackup" / "runs").mkdir()
    for last in ("n000000000003", "n000000000004"):
        if last == "n000000000004":
            pair.build_index()
            pair.fetch(pair.new_run())
        (pair.mirror.dest / ".mdbackup" / "order").unlink()
        if spoilt is not None:
            (pair.mirror.dest / ".mdbackup" / "order").write_bytes(spoilt)
        assert pair.mirror._last_order() == int(last[1:])
        assert pair.mirror.next_order() > last
        (pair.mirror.dest / ".mdbackup" / "order").write_bytes(last[1:].encode())


# --- names ------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_any_two_run_ids_have_directories_of_their_own(run_ids: list[str]) -> None:
    """Whatever they are, the name is short and plain, and lies below the runs."""
    mirror = Mirror("/nowhere", "srv1")
    one, two = (mirror.run(run_id).folder for run_id in run_ids)
    assert one.name != two.name and one.parent == two.parent
    for folder in (one, two):
        assert re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9.-]{0,79}", folder.name)


def test_a_usual_run_id_can_be_recognised() -> None:
    """By whoever looks for it on the disk."""
    folder = Mirror("/nowhere", "srv1").run("scheduled__2026-11-23T03:15:00+00:00").folder
    assert folder.name.startswith("scheduled--2026-11-23T03-15-00-00-00-")


@given(st.binary(min_size=1, max_size=255), st.integers(0, 100))
def test_a_version_name_always_fits(name: bytes, attempt: int) -> None:
    """Beside the file, in .old, at most 255 bytes; what can be kept of the name is kept."""
    version = version_path(b"/some/" + name.replace(b"/", b"x"), "20261123T031500.123456Z", attempt)
    directory, _, last = version.rpartition(b"/")
    assert directory == b"/some/.old" and len(last) <= 255
    assert b".20261123T031500.123456Z" in last


def test_versions_of_long_names_that_begin_alike_are_told_apart() -> None:
    """Their shortened names carry a hash of the whole."""
    stamp = "20261123T031500.123456Z"
    versions = {version_path(b"/" + b"n" * 254 + bytes([end]), stamp) for end in b"abc"}
    assert len(versions) == 3
    assert version_path(b"/x", stamp) == b"/.old/x.20261123T031500.123456Z"


def test_the_real_run_id_is_in_the_run_directory(pair: Pair) -> None:
    """Its name is only a short form of it."""
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.mirror.run("manual__ä/../\n")
    pair.fetch(run)
    assert read_header(run.state)["run_id"] == "manual__ä/../\n"


def test_a_tree_sees_what_it_has_made_where_it_found_nothing(tmp_path: Path) -> None:
    """That a directory was missing is remembered, but not longer than it is true."""
    with Folder(tmp_path) as folder, Tree(tmp_path) as tree:
        for make in ("create", "put", "link"):
            path = b"/" + make.encode()
            assert tree.lstat(path + b"/below/it") is None and tree.blocker(path + b"/below/it") is None
            (tmp_path / "source").write_bytes(b"1")
            if make == "create":
                os.close(tree.create(path))
            elif make == "put":
                tree.put(folder, b"source", path)
            else:
                tree.link(b"/source", path)
            blocked = tree.blocker(path + b"/below/it")
            assert blocked is not None and blocked.at == path
            assert is_file(tree.lstat(path))
        assert tree.lstat(b"/late/file") is None
        (tmp_path / "late").write_bytes(b"made by somebody else")
        assert is_file(tree.lstat(b"/late"))
