"""A dest that belongs to somebody else, and whose its files are."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.transfer.rate_limit import RateLimiter
from tests.guarantees.crash.crash import in_a_child
from tests.guarantees.disks.scene import STEPS, Scene, check_words, pair_at
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair
from tests.torture import Cases

pytestmark = pytest.mark.real_disk
guarantee = pytest.mark.guarantee("4. Disks that fail")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


NOBODY = 65534


@contextmanager
def pair_of_nobody() -> Iterator[Pair]:
    """A pair all of whose files belong to nobody in particular, who can get at them."""
    with tempfile.TemporaryDirectory(prefix="pair-") as folder:
        os.chmod(folder, 0o755)
        with pair_at(Path(folder)) as pair:
            yield pair


def give(*paths: Path, to: int = NOBODY) -> None:
    for path in paths:
        os.chown(path, to, to, follow_symlinks=False)


NOT_NEEDED = [
    *((".mdbackup/runs/*", "fetch"), (".mdbackup/lock", "fetch"), (".mdbackup/lock", "pull")),
    *(("index.md5", "fetch"), ("index.md5", "pull"), ("index.md5", "archive")),
]


def as_nobody(act: Callable[[], object]) -> None:
    def act_so() -> None:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        act()

    in_a_child(act_so)


@only_root
@guarantee
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("of_root", ["", ".mdbackup", ".mdbackup/runs/*", ".mdbackup/lock", "index.md5"])
def test_a_dest_of_somebody_else_is_refused_with_the_command_that_mends_it(
    cases: Cases, of_root: str, step: str
) -> None:
    """In words in any step that needs it, and nothing is changed; when it is given back, the step goes on."""
    with pair_of_nobody() as pair, cases.one():
        scene = Scene(pair)
        scene.forward(before=step)
        folder = pair.mirror.dest.parent
        give(folder, *folder.rglob("*"))
        taken = list(pair.mirror.dest.glob(of_root)) if of_root else [pair.mirror.dest]
        modes = [path.stat().st_mode for path in taken]
        give(*taken, to=0)
        for path in taken:
            path.chmod(0o700 if path.is_dir() else 0o600)

        def act() -> None:
            try:
                scene.act(step)
            except DestinationRefused as told:
                user = pwd.getpwuid(NOBODY).pw_name
                give_back = f"As root: chown -R {user} {pair.mirror.dest}"
                check_words(told, pair, f"cannot be used by {user}", give_back)
            else:
                assert (of_root, step) in NOT_NEEDED

        as_nobody(act)
        scene.check()
        give(*taken)
        for path, mode in zip(taken, modes, strict=True):
            path.chmod(mode & 0o7777)
        as_nobody(lambda: scene.rest(after=step))
        scene.check_end()


@only_root
@guarantee
def test_a_new_dest_in_a_directory_of_somebody_else_is_refused_with_the_command_that_makes_it(
    cases: Cases,
) -> None:
    """The most frequent mistake of a first run."""
    with pair_of_nobody() as pair, cases.one():

        def act() -> None:
            with pytest.raises(DestinationRefused) as told:
                pair.mirror.claim()
            user = pwd.getpwuid(NOBODY).pw_name
            check_words(told.value, pair, f"As root: install -d -o {user} -m 700 {pair.mirror.dest}")

        as_nobody(act)
        assert not pair.mirror.dest.exists()


@only_root
@guarantee
def test_files_in_a_directory_of_somebody_else_fail_alone(cases: Cases) -> None:
    """Within the mirror; all others arrive, and these do when it is given back."""
    with pair_of_nobody() as pair, cases.one():
        for name in ("a", "d/b", "e"):
            pair.put(name, b"old " + name.encode())
        pair.backup()
        for name in ("a", "d/b", "d/c", "e"):
            os.chmod(pair.put(name, b"new " + name.encode()), 0o644)
        folder = pair.mirror.dest.parent
        give(folder, *folder.rglob("*"))
        give(pair.live("d"), to=0)
        pair.live("d").chmod(0o700)

        def act() -> None:
            summary = pair.backup()
            assert summary.outcomes == {"pulled": 2, "failed": 2}
            assert all("Permission denied on this side" in failure for failure in summary.failures)

        as_nobody(act)
        check_sound(pair)
        give(pair.live("d"))
        as_nobody(pair.backup)
        assert pair.index_b() == pair.index_a()
        assert pair.versions("d/b") == [b"old d/b"]


@only_root
@pytest.mark.parametrize(
    "words",
    [
        ["verify", "--limit", "1GB"],
        ["verify", "--fraction", "1/2"],
        ["forget", "*"],
        ["rebuild"],
        ["prune", "--keep-last", "1", "--yes"],
    ],
)
def test_what_a_command_of_root_makes_in_a_dest_belongs_to_its_owner(words: list[str]) -> None:
    """Or else the tasks cannot use it afterwards, as they use the file that keeps a limit."""
    with pair_of_nobody() as pair:
        for content in (b"1", b"2", b"3"):
            os.chmod(pair.put("file", content), 0o644)
            pair.backup()
        if words == ["rebuild"]:
            commits(pair.mirror)[1].unlink()
        folder = pair.mirror.dest.parent
        give(folder, *folder.rglob("*"))
        before = os.umask(0o077)
        try:
            assert main([*words, "--dest", str(pair.mirror.dest)]) == 0
        finally:
            os.umask(before)
        assert [path for path in folder.rglob("*") if path.stat().st_uid != NOBODY] == []
        os.chmod(pair.put("file", b"4"), 0o644)
        pair.build_index()
        as_nobody(lambda: pair.finish(pair.prepare()))
        as_nobody(lambda: main(["verify", "--limit", "1GB", "--dest", str(pair.mirror.dest)]) and os._exit(1))
        assert pair.live("file").read_bytes() == b"4"


@only_root
def test_a_file_that_is_linked_into_a_dest_is_not_given_away(tmp_path: Path) -> None:
    """Who owns the directory might have linked root's file there."""
    secret, linked = tmp_path / "secret", tmp_path / "of nobody" / "verifying"
    secret.write_bytes(b"")
    linked.parent.mkdir()
    os.link(secret, linked)
    give(linked.parent)
    RateLimiter(linked, lambda: 10**9)(1)
    assert secret.stat().st_uid == 0
