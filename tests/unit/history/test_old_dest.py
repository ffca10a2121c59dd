"""Today's code continues with a ``dest`` of an old version; see tests/data/old_dest/README.md."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.history.changes import pending
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.index.canonical import IndexWriter
from airflow_mdbackup.scheme.recovery.health import check_health
from airflow_mdbackup.scheme.recovery.restore import restore
from airflow_mdbackup.scheme.recovery.verify import verify
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Wanted
from tests.guarantees.whatever_happens.soundness import check_sound
from tests.pair import Pair

DATA = Path(__file__).parents[2] / "data" / "old_dest"
EXPECTED = json.loads((DATA / "expected.json").read_text())
ROOT = b"/backups"
BIG = b"".join(b"%07d\n" % number for number in range(300_000 // 8))


class RelocatedReader(Reader):
    """Reads in a directory of the test what the old backup knows as /backups."""

    folder = b""

    def submit(self, wanted: Wanted) -> None:
        super().submit(wanted._replace(path=self._relocated(wanted.path)))

    def submit_stat(self, path: bytes, key: Any) -> None:
        super().submit_stat(self._relocated(path), key)

    def _relocated(self, path: bytes) -> bytes:
        return self.folder + path[len(ROOT) :] if path.startswith(ROOT + b"/") else path


class OldPair(Pair):
    """The provider of the old backup, and its unpacked ``dest``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with tarfile.open(DATA / "dest.tar.gz") as archive:
            archive.extractall(self.mirror.dest, filter="tar")
        self.runs = 6

    def path(self, name: bytes | str | Path) -> bytes:
        return ROOT + b"/" + os.fsencode(name)

    def write(self, name: str, content: bytes) -> None:
        path = self.a / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def connect(self) -> Reader:
        super().connect()
        reader = RelocatedReader(self.servers[-1].channel)
        reader.folder = os.fsencode(self.a)
        return reader

    def build_index(
        self, unreadable: Sequence[bytes] = (), rotten: Mapping[bytes, bytes] = MappingProxyType({})
    ) -> None:
        files = {self.path(path.relative_to(self.a)): path for path in self.a.rglob("*") if path.is_file()}
        with IndexWriter(Path(os.fsdecode(self.index))) as writer:
            for name in sorted(files):
                writer.add(name, hashlib.md5(files[name].read_bytes()).hexdigest().encode())


def record(mirror: Mirror, folder: Path) -> dict[str, Any]:
    """Return what the commands show of a backup, as make.py recorded it."""
    status = check_health(mirror, None, datetime(2026, 1, 20, tzinfo=UTC))
    attributes = ("size", "mtime", "mode", "since", "left", "taken_out", "until", "pruned")
    with Timeline(mirror) as timeline:
        versions = [
            {
                "path": to_text(version.path),
                "md5": version.md5.decode(),
                **{name: getattr(version, name) for name in attributes},
                "places": list(map(to_text, version.places)),
            }
            for version in timeline.contents()
        ]
        states = {}
        for moment in timeline.moments:
            if moment.finished:
                list(restore(mirror, timeline, timeline.state(moment), folder / moment.stamp))
                states[moment.stamp] = md5s_below(folder / moment.stamp)
        return {
            "log": [
                [moment.stamp, moment.time, moment.run_id, moment.finished] for moment in timeline.moments
            ],
            "problems": timeline.problems,
            "versions": versions,
            "states": states,
            "verified": [
                [to_text(file.place), str(file.outcome)]
                for file in verify(mirror, timeline, timeline.contents())
            ],
            "status": {
                "files": status.files,
                "disk": list(status.disk or ()),
                "last_good": status.last_good and status.last_good.run_id,
                "last_commit": status.last_commit and status.last_commit.run_id,
            },
        }


def md5s_below(folder: Path) -> dict[str, str]:
    return {
        to_text(b"/" + os.fsencode(path.relative_to(folder))): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def old_pair(tmp_path: Path) -> Iterator[OldPair]:
    pair = OldPair(tmp_path)
    yield pair
    for server in pair.servers:
        server.stop()


def test_an_old_dest_whose_commit_was_cut_off_is_read_as_the_old_code_read_it(
    old_pair: OldPair, tmp_path: Path
) -> None:
    """Log, versions, status, verification, and the files restored as of each commit."""
    assert len(pending(old_pair.mirror)) == 1
    assert record(old_pair.mirror, tmp_path / "restored") == EXPECTED["cut off"]


def test_the_commit_that_an_old_version_left_unfinished_is_recovered_as_by_the_old_code(
    old_pair: OldPair, tmp_path: Path
) -> None:
    mirror = old_pair.mirror
    with mirror.lock("a test"):
        recover(mirror, mirror.scratch_index)
    mirror.scratch_index.unlink(missing_ok=True)
    assert record(mirror, tmp_path / "restored") == EXPECTED["recovered"]
    check_sound(old_pair)


def test_a_run_continues_with_an_old_dest(old_pair: OldPair, tmp_path: Path) -> None:
    """It recovers the commit and completes the partial file; what the history knew stays as it was."""
    live = old_pair.mirror.files / "backups"
    for name in ("comes back", "denied", "dir/file", "moved", "twin 2"):
        old_pair.write(name, (live / name).read_bytes())
    for name in ("changed", "new", "thing/inside", "twin 1"):
        old_pair.write(name, f"{name}, last".encode())
    old_pair.write("zz last", b"zz last, and changed since")
    old_pair.write("big", BIG)
    (part,) = (path.stat().st_ino for path in old_pair.mirror.staging.glob("*.part"))
    outcome = old_pair.backup()
    assert (outcome.added, outcome.replaced, outcome.failed) == (1, 1, 0)
    assert (live / "big").stat().st_ino == part
    assert not pending(old_pair.mirror) and not list(old_pair.mirror.staging.iterdir())
    check_sound(old_pair)
    found, expected = record(old_pair.mirror, tmp_path / "restored"), EXPECTED["recovered"]
    assert found["log"][:-1] == expected["log"] and found["log"][-1][2:] == ["manual__7", True]
    newest = found["states"].pop(found["log"][-1][0])
    assert found["states"] == expected["states"]
    assert newest == {to_text(path): md5.decode() for path, md5 in sorted(old_pair.index_b().items())}
    assert {result for _, result in found["verified"]} == {"sound"} and found["problems"] == []
    assert found["status"]["last_good"] == "manual__7"
