"""Make ``dest.tar.gz`` and ``expected.json`` with the code of an earlier commit; see README.md."""
# mypy: ignore-errors

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from airflow_mdbackup.scheme.adopt import Source
from airflow_mdbackup.scheme.forget import forget
from airflow_mdbackup.scheme.import_versions import import_versions
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.past import Past
from airflow_mdbackup.scheme.prune import Rules, pruning
from airflow_mdbackup.scheme.restore import Selection, restore
from airflow_mdbackup.scheme.settle import settle
from airflow_mdbackup.scheme.sftp import Reader
from airflow_mdbackup.scheme.status import look
from airflow_mdbackup.scheme.verify import verify

from airflow_mdbackup.scheme import commit as commit_module
from airflow_mdbackup.scheme import fetch as fetch_module
from airflow_mdbackup.scheme import mirror as mirror_module
from airflow_mdbackup.scheme import totals as totals_module
from airflow_mdbackup.scheme.history import pending
from airflow_mdbackup.scheme.index import IndexWriter, Remark
from tests.guarantees.crash.crash import crash_at
from tests.pair import Pair

BEGIN = datetime(2026, 1, 2, 3, 15, tzinfo=UTC)  # long ago for whoever runs the test
ROOT = b"/backups"  # where the provider's paths begin
BIG = 300_000  # bytes; such a file arrives in a .part


class Clock(datetime):
    """A clock that advances by a millisecond whenever it is read."""

    current = BEGIN

    @classmethod
    def now(cls, tz=None):
        Clock.current += timedelta(milliseconds=1)
        return Clock.current.astimezone(tz)


def stop_the_clock() -> None:
    for module in (commit_module, fetch_module, mirror_module, totals_module):
        module.datetime = Clock
    time.time = lambda: Clock.now(UTC).timestamp()


class Relocated(Reader):
    """Reads below a directory what the provider calls /backups."""

    folder = b""

    def submit(self, wanted):
        super().submit(wanted._replace(path=self.relocated(wanted.path)))

    def submit_stat(self, path, key):
        super().submit_stat(self.relocated(path), key)

    def relocated(self, path: bytes) -> bytes:
        return self.folder + path[len(ROOT) :] if path.startswith(ROOT + b"/") else path


class OldPair(Pair):
    """A provider whose paths are the same wherever the files lie."""

    def path(self, name):
        return ROOT + b"/" + os.fsencode(name)

    def file(self, name: str) -> Path:
        return self.a / name

    def write(self, name: str, content: bytes) -> None:
        path = self.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (BEGIN.timestamp() - 3600,) * 2)

    def connect(self):
        super().connect()
        reader = Relocated(self.servers[-1].channel)
        reader.folder = os.fsencode(self.a)
        return reader

    def build_index(self, unreadable=(), rotten=()):
        found = {}
        for path in (path for path in self.a.rglob("*") if path.is_file()):
            name = os.fsencode(path.relative_to(self.a))
            found[ROOT + b"/" + name] = hashlib.md5(path.read_bytes()).hexdigest().encode()
        with IndexWriter(Path(os.fsdecode(self.index))) as writer:
            for path in sorted(found):
                writer.add(path, found[path])
            for path in unreadable:
                writer.add_remark(Remark.UNREADABLE, self.path(path))
        os.utime(self.index, (Clock.current.timestamp(),) * 2)

    def day(self, days: int = 1) -> None:
        Clock.current = (Clock.current + timedelta(days=days)).replace(hour=3, minute=15, second=0)


def build(pair: OldPair, folder: Path) -> None:
    """Do what a backup goes through in its first weeks, up to a kill in the middle of a commit."""
    for name in (
        "same",
        "changed",
        "gone",
        "comes back",
        "dir/file",
        "thing",
        "moves",
        "denied",
        "forgotten",
    ):
        pair.write(name, f"{name}, first".encode())
    pair.write("odd \n name \\ \xff", b"odd")
    pair.write("twin 1", b"twins")
    pair.write("twin 2", b"twins")
    pair.backup()

    pair.day()
    pair.write("changed", b"changed, second")
    pair.file("gone").unlink()
    pair.file("comes back").unlink()
    pair.file("moves").rename(pair.file("moved"))
    pair.file("thing").unlink()
    pair.write("thing/inside", b"a directory now")
    pair.write("denied", b"denied, second")
    pair.build_index()
    pair.file("denied").chmod(0)
    pair.finish(pair.prepare())
    pair.file("denied").chmod(0o644)

    pair.day()
    pair.write("comes back", b"comes back, first")
    pair.write("changed", b"changed, third")
    pair.write("new", b"new, first")
    pair.backup()

    pair.day()
    assert forget(pair.mirror, lambda path: path == pair.path("forgotten"))
    lines = pair.mirror.index.read_bytes().splitlines(keepends=True)  # "same" is dropped by hand
    kept = [line for line in lines if line[34:-1] != pair.path("same")]
    kept[-1] = kept[-1].replace(b"files=%d" % (len(lines) - 1), b"files=%d" % (len(kept) - 1))
    pair.mirror.index.write_bytes(b"".join(kept))
    pair.write("changed", b"changed, fourth")
    pair.backup()

    pair.day()
    (folder / "kept").mkdir()
    (folder / "kept" / "changed").write_bytes(b"changed, of another tool")
    os.utime(folder / "kept" / "changed", (BEGIN.timestamp() - 7200,) * 2)
    meant = pair.path("changed"), "20260101T031500.000000Z"
    assert import_versions(pair.mirror, Source(folder / "kept"), lambda path: meant, copy=True).versions == 1
    with pruning(pair.mirror, Selection(["/backups/changed"]), Rules(last=2), carry_out=True) as (_, gone):
        assert len(list(gone)) > 1
    with Past(pair.mirror) as past:
        assert any(content.pruned for content in past.contents())

    pair.day()
    import_versions(
        pair.mirror,
        Source(folder / "kept"),
        lambda path: (pair.path("new"), "20260101T041500.000000Z"),
        copy=True,
    )

    pair.day()
    pair.write("big", b"".join(b"%07d\n" % n for n in range(BIG // 8)))
    pair.build_index()
    cut_off(
        pair,
        lambda: pair.prepare(),
        lambda: any(p.stat().st_size for p in pair.mirror.staging.glob("*.part")),
    )
    pair.runs += 1

    pair.day()
    pair.file("same").unlink()
    for name in ("changed", "new", "thing/inside", "twin 1"):
        pair.write(name, f"{name}, last".encode())
    pair.write("zz last", b"zz last")
    pair.build_index()
    run = pair.prepare(exclude=["big"])
    pair.archive(run)
    cut_off(
        pair,
        lambda: pair.commit(pair.mirror.run(run.run_id)),
        lambda: (
            any(pending(pair.mirror)) and (pair.mirror.files / "backups/new").read_bytes() == b"new, last"
        ),
    )
    assert not (pair.mirror.files / "backups/zz last").exists() and len(pending(pair.mirror)) == 1


def cut_off(pair: OldPair, act, there) -> None:
    """Kill what is done at one step after the other, until ``dest`` is in the state that is wanted."""
    template, clock = pair.mirror, Clock.current
    for number in range(1, 2000):
        pair.mirror = Mirror(template.dest.with_name("crashing"), template.provider)
        shutil.rmtree(pair.mirror.dest, ignore_errors=True)
        shutil.copytree(template.dest, pair.mirror.dest)
        Clock.current = clock
        assert crash_at(number, act)
        if there():
            break
    shutil.rmtree(template.dest)
    pair.mirror.dest.rename(template.dest)
    pair.mirror = template


def record(mirror: Mirror, folder: Path) -> dict:
    """Return all that the commands show of a backup, as JSON."""
    status = look(mirror, None, Clock.current)
    with Past(mirror) as past:
        versions = [
            {
                "path": to_text(content.path),
                "md5": content.md5.decode(),
                **{name: getattr(content, name) for name in ("size", "mtime", "mode", "since", "left")},
                **{name: getattr(content, name) for name in ("taken_out", "until", "pruned")},
                "places": [to_text(place) for place in content.places],
            }
            for content in past.contents()
        ]
        states = {}
        for moment in past.moments:
            if moment.finished:
                target = folder / moment.stamp
                list(restore(mirror, past, past.state(moment), target))
                files = sorted(path for path in target.rglob("*") if path.is_file())
                states[moment.stamp] = {
                    to_text(b"/" + os.fsencode(path.relative_to(target))): hashlib.md5(
                        path.read_bytes()
                    ).hexdigest()
                    for path in files
                }
                shutil.rmtree(target)
        return {
            "log": [[moment.stamp, moment.time, moment.run_id, moment.finished] for moment in past.moments],
            "problems": past.problems,
            "versions": versions,
            "states": states,
            "verified": [
                [to_text(done.place), str(done.found)] for done in verify(mirror, past, past.contents())
            ],
            "status": {
                "files": status.files,
                "disk": status.disk and list(status.disk),
                "last_good": status.last_good and status.last_good.run_id,
                "last_commit": status.last_commit and status.last_commit.run_id,
            },
        }


def pack(dest: Path, target: Path) -> None:
    """Pack a directory so that the same files give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(dest.rglob("*")):
            info = archive.gettarinfo(path, arcname=str(path.relative_to(dest)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = int(info.mtime) if path.is_relative_to(dest / "files") else int(BEGIN.timestamp())
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                archive.addfile(info, file)
    with target.open("wb") as file, gzip.GzipFile("", "wb", mtime=0, fileobj=file) as zipped:
        zipped.write(packed.getvalue())


def main() -> None:
    where = Path(sys.argv[1])
    stop_the_clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        pair = OldPair(folder, user=65534 if os.geteuid() == 0 else None)
        build(pair, folder)
        for server in pair.servers:
            server.stop()
        pack(pair.mirror.dest, where / "dest.tar.gz")
        found = {"cut off": record(pair.mirror, folder)}
        with pair.mirror.lock("recovery"):
            settle(pair.mirror, pair.mirror.forgetting)
            pair.mirror.forgetting.unlink(missing_ok=True)
        found["recovered"] = record(pair.mirror, folder)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (where / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
