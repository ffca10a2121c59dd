"""Commands that root gives, on a backup that belongs to the user of the workers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import COMMANDS, main
from airflow_mdbackup.scheme.files import folder as folder_module
from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.files.folder import Folder
from airflow_mdbackup.scheme.files.tree import Tree
from airflow_mdbackup.scheme.history.changes import commits, pending
from airflow_mdbackup.scheme.history.journal import Transaction
from airflow_mdbackup.scheme.recovery.restore import RestoreOutcome, restore
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.recovery.state import state_of
from tests.guarantees.crash.crash import in_a_child
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

WORKER = 65534


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A pair of which everything belongs to the user of the workers."""
    with tempfile.TemporaryDirectory(prefix="pair-") as name:
        os.chmod(name, 0o755)
        pair = Pair(Path(name))
        yield pair
        for server in pair.servers:
            server.stop()


def as_worker(pair: Pair, act: Callable[[], object]) -> None:
    give(pair)
    datetime.strptime("2026", "%Y")  # imports what that user may not be able to read

    def act_so() -> None:
        os.setgroups([])
        os.setresgid(WORKER, WORKER, WORKER)
        os.setresuid(WORKER, WORKER, WORKER)
        act()

    in_a_child(act_so)


def give(pair: Pair) -> None:
    """Give all that lies beside A's index and the backup to the user of the workers, but not the backup."""
    folder = pair.a.parent
    for path in (folder, pair.a, *pair.a.rglob("*"), *folder.glob("*.md5")):
        os.chown(path, WORKER, WORKER, follow_symlinks=False)


def of_root(pair: Pair) -> list[str]:
    dest = pair.mirror.dest
    return [str(path.relative_to(dest)) for path in dest.rglob("*") if path.lstat().st_uid == 0]


def backed_up(pair: Pair) -> None:
    """Let two runs end, so that there is a version, and some of history is lost."""
    pair.put("file", b"1")
    pair.put("dir/file", b"1")
    for content in (b"2", b"3"):
        as_worker(pair, pair.backup)
        pair.runs += 1
        pair.put("dir/file", content)
    as_worker(pair, pair.backup)
    pair.runs += 1


def cut_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run of the workers cut off when its history is written ahead, and nothing is in place.

    It makes directories, also for what it moves, and has copies of one content.
    """
    os.unlink(pair.path("file"))
    pair.put("file/is/a/directory/now", b"new")
    pair.put("new/directory/one", b"same")
    pair.put("new/directory/two", b"same")

    def run() -> None:
        def die(*arguments: object, **options: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(Transaction, "carry_out", die)
        with pytest.raises(KeyboardInterrupt):
            pair.backup(override=True)

    as_worker(pair, run)
    pair.runs += 1
    assert pending(pair.mirror)


def damage_history(pair: Pair) -> None:
    commits(pair.mirror)[1].unlink()


def damage_live(pair: Pair) -> None:
    """Have a live file rot: its time stays."""
    live = pair.live("dir/file")
    status = live.stat()
    live.write_bytes(b"?")
    os.utime(live, ns=(status.st_atime_ns, status.st_mtime_ns))


def old_files(pair: Pair) -> Path:
    """Return a directory with files of root's that another tool kept, also of directories that went."""
    olds = pair.a.parent / "olds"
    for name in ("dir/file", "gone/with/it"):
        (olds / name).parent.mkdir(parents=True, exist_ok=True)
        (olds / name).write_bytes(b"0")
    return olds


COMMANDS_OF_ROOT: dict[str, tuple[Callable[[Pair], object], tuple[str, ...]]] = {
    "forget": (lambda pair: None, ("--dest", "{dest}", "*")),
    "prune": (lambda pair: None, ("--dest", "{dest}", "--keep-last", "1", "--yes")),
    "verify": (damage_live, ("--dest", "{dest}", "--repair", "--limit", "1GB")),
    "verify part": (lambda pair: None, ("--dest", "{dest}", "--fraction", "1/2", "--let-go")),
    "rebuild": (damage_history, ("--dest", "{dest}")),
    "clock": (lambda pair: None, ("--dest", "{dest}", "--set", "manual__1", "2026-01-01 00:00 UTC")),
    "import": (old_files, ("srv1", "{olds}", "--at", "{a}", "--displaced", "2026-01-05")),
    "import copy": (old_files, ("srv1", "{olds}", "--at", "{a}", "--displaced", "2026-01-05", "--copy")),
}


def give_command(pair: Pair, command: str, words: tuple[str, ...]) -> int:
    places = {"dest": pair.mirror.dest, "a": pair.a, "olds": pair.a.parent / "olds"}
    provider = {"sftp_conn_id": "nowhere", "source": str(pair.a), "dest": str(pair.mirror.dest)}
    file = pair.a.parent / "providers.yaml"
    file.write_text(json.dumps({"providers": {"srv1": provider}}))
    return main([command, *(word.format(**places) for word in words), "--providers-file", str(file)])


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("pends", [False, True])
@pytest.mark.parametrize("name", COMMANDS_OF_ROOT)
def test_what_a_command_of_root_makes_belongs_to_the_workers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str, pends: bool, umask: int
) -> None:
    """Also what it makes for a commit of theirs that it finds cut off; and so their next run goes well."""
    prepare, words = COMMANDS_OF_ROOT[name]
    backed_up(pair)
    prepare(pair)
    if pends:
        with monkeypatch.context() as patched:
            cut_off(pair, patched)
    assert not of_root(pair)
    before = os.umask(umask)
    try:
        give_command(pair, name.split()[0], words)
    finally:
        os.umask(before)
    assert not of_root(pair)
    for path in ("new/directory/three", "gone/again", "dir/file", *(["file/is/a/new"] if pends else [])):
        pair.put(path, b"last")

    def next_run() -> None:
        assert not pair.backup(override=True).failures
        check_sound(pair)

    as_worker(pair, next_run)


def test_every_command_that_changes_a_backup_is_tried_as_root() -> None:
    """But for those that look, and those that write elsewhere."""
    elsewhere = {"provision", "audit", "init", "test-alert", "status", "plan", "restore", "versions"}
    elsewhere |= {"history", "diff", "log", "adopt"}  # which has a test of its own
    tried = {name.split()[0] for name in COMMANDS_OF_ROOT}
    assert {command.name for command in COMMANDS} == tried | elsewhere


@pytest.mark.parametrize("above", ["dest", "directory above"])
def test_what_root_adopts_can_be_backed_up_by_the_workers(pair: Pair, above: str) -> None:
    """Dest is there, or only the directory in which it is made; the tree is the workers' already."""
    dest, tree = pair.mirror.dest, pair.a.parent / "tree"
    pair.put("deep/down/file", b"1")
    tree.mkdir()
    (tree / "file").write_bytes(b"1")
    if above == "dest":
        dest.mkdir()
        os.chown(dest, WORKER, WORKER)
    give(pair)
    for path in (tree, tree / "file"):
        os.chown(path, WORKER, WORKER)
    pair.build_index()
    words = ("srv1", "--tree", str(tree), "--at", "{a}/deep/down", "--index", os.fsdecode(pair.index))
    assert give_command(pair, "adopt", words) == 0
    assert not of_root(pair)
    assert dest.stat().st_uid == WORKER
    pair.put("deep/other", b"2")

    def next_run() -> None:
        assert pair.backup().outcomes == {"pulled": 1}

    as_worker(pair, next_run)


def test_a_run_of_root_leaves_nothing_that_the_workers_cannot_use(pair: Pair) -> None:
    """As one that somebody tries by hand, with ``airflow dags test``."""
    backed_up(pair)
    pair.put("big", bytes(range(256)) * 4096)
    pair.put("copied", b"3")
    pair.put("deep/down", b"1")
    assert pair.backup().failures == []
    assert not of_root(pair)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_placeholder_of_root_belongs_to_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """If root is killed before the renaming."""
    os.chown(tmp_path, WORKER, WORKER)
    (tmp_path / "thing").mkdir() if kind == "directory" else (tmp_path / "thing").touch()
    for module in (folder_module, syscalls_module):
        monkeypatch.setattr(module, "rename_if_free", lambda *names: False)

    def killed() -> None:
        monkeypatch.setattr(os, "rename", lambda *names, **options: os._exit(0))
        with Tree(tmp_path) as tree:
            tree.move(b"/thing", b"/made/place")
        raise AssertionError

    in_a_child(killed)
    assert {path.stat().st_uid for path in (tmp_path / "made", tmp_path / "made/place")} == {WORKER}


def test_nothing_is_given_away_that_root_did_not_make(tmp_path: Path) -> None:
    """No file with another name, and no directory with something in it: they may have come from elsewhere."""
    os.chown(tmp_path, WORKER, WORKER)
    (tmp_path / "secret").write_bytes(b"root's")
    os.link(tmp_path / "secret", tmp_path / "lock")
    (tmp_path / "full/of").mkdir(parents=True)
    for name in ("lock", "full"):
        descriptor = os.open(tmp_path / name, os.O_RDONLY)
        syscalls_module.give_to_owner(descriptor, str(tmp_path))
        os.close(descriptor)
        assert (tmp_path / name).stat().st_uid == 0
    with Folder(tmp_path) as folder, pytest.raises(FileExistsError):
        syscalls_module.make_new_directory(b"full", directory=folder.descriptor)


def test_what_root_restores_is_roots(pair: Pair, tmp_path: Path) -> None:
    """Directories too, whoever has the one that they come into: files come back with the modes they had."""
    backed_up(pair)
    os.chown(tmp_path, WORKER, WORKER)
    with state_of(pair.mirror, Selection()) as state:
        came = [each.outcome for each in restore(pair.mirror, state.timeline, state.contents(), tmp_path)]
    assert set(came) == {RestoreOutcome.RESTORED}
    assert {path.stat().st_uid for path in tmp_path.rglob("*")} == {0}
