"""A provider and a consumer in one process: the whole scheme over a real sftp-server, without SSH."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mdbackup.scheme.backup.archive import ArchiveSummary, archive
from airflow_mdbackup.scheme.backup.commit import commit
from airflow_mdbackup.scheme.backup.commit_summary import CommitSummary
from airflow_mdbackup.scheme.backup.diff import make_plan
from airflow_mdbackup.scheme.backup.fetch import FetchedIndex, IndexLimits, fetch_index
from airflow_mdbackup.scheme.backup.plan import Plan, PlanOptions, read_plan
from airflow_mdbackup.scheme.backup.pull import PullSummary, pull
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.history.changes import Change, commits
from airflow_mdbackup.scheme.index.canonical import IndexWriter, Remark, read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from tests.unit.cli.terminal import Terminal

if TYPE_CHECKING:
    from tests.isolation import Scratch

SFTP_SERVER = "/usr/lib/openssh/sftp-server"


def md5(content: bytes) -> bytes:
    return hashlib.md5(content).hexdigest().encode()


class ServerProcess:
    """OpenSSH's own sftp-server on a socket, read-only, cut down as the account of a provider is."""

    def __init__(self, user: int | None = None) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(20)
        command = [SFTP_SERVER, "-R", "-p", "open,close,read,fstat,stat,lstat,realpath,limits"]
        if user is not None:
            # Ten times as fast as Popen's own `user`, which copies all pages of this process.
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
        with theirs:
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())

    def stop(self) -> None:
        self.channel.close()
        self.process.wait(10)


def _take(options: dict[str, Any], record: type[Any]) -> dict[str, Any]:
    """Remove the options that are fields of a dataclass, and return them."""
    return {field.name: options.pop(field.name) for field in fields(record) if field.name in options}


class Pair:
    """Server A and server B of one provider, whose backed-up files lie below :attr:`a`.

    :param user: the uid as which the SFTP server reads them, or None for the one of the tests.
    """

    def __init__(self, folder: Path, user: int | None = None) -> None:
        self.user = user
        self.a = folder / "a"
        self.a.mkdir()
        self.index = os.fsencode(folder / "index.md5")
        self.mirror = Mirror(folder / "b", "srv1")
        self.servers: list[ServerProcess] = []
        self.runs = 0
        self.outcome = CommitSummary()
        self.plan = Plan()
        self.transferred = 0  # bytes, in the last run

    # --- server A -----------------------------------------------------------------------------------

    def path(self, name: bytes | str) -> bytes:
        """Return the provider's path of a file given relative to :attr:`a`."""
        return os.fsencode(self.a) + b"/" + os.fsencode(name)

    def put(self, name: bytes | str, content: bytes = b"") -> bytes:
        """Write a file on A."""
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        return path

    def build_index(
        self, unreadable: Sequence[bytes] = (), rotten: Mapping[bytes, bytes] = MappingProxyType({})
    ) -> None:
        """Write A's index as it is now.

        :param rotten: files that rotted, with the md5 that each had before.
        """
        found = {}
        for folder, _, names in os.walk(os.fsencode(self.a)):
            for name in names:
                path = folder + b"/" + name
                with open(path, "rb") as file:
                    found[path] = hashlib.file_digest(file, "md5").hexdigest().encode()
        with IndexWriter(Path(os.fsdecode(self.index))) as writer:
            for path in sorted(found):
                writer.add(path, rotten.get(path, found[path]))
            for path in sorted(unreadable):
                writer.add_remark(Remark.UNREADABLE, path)
            for path in sorted(rotten):
                writer.add_remark(Remark.ROTTEN, path)
            writer.size = sum(map(os.path.getsize, found))

    # --- server B -----------------------------------------------------------------------------------

    def connect(self) -> Reader:
        server = ServerProcess(self.user)
        self.servers.append(server)
        return Reader(server.channel)

    def new_run(self) -> Run:
        self.runs += 1
        return self.mirror.run(f"manual__{self.runs}")

    def fetch(self, run: Run, **options: object) -> FetchedIndex:
        self.mirror.claim()
        limits = IndexLimits(**_take(options, IndexLimits))
        return fetch_index(self.mirror, run, self.connect, self.index, limits, **options)  # type: ignore[arg-type]

    def diff(self, run: Run, **options: object) -> Plan:
        how = PlanOptions(**_take(options, PlanOptions))
        return make_plan(self.mirror, run, how, **options)  # type: ignore[arg-type]

    def pull(self, run: Run, plan: Plan) -> list[PullSummary]:
        summaries = [pull(self.mirror, run, shard, self.connect) for shard in range(len(plan.shards))]
        self.transferred = sum(summary.transferred for summary in summaries)
        return summaries

    def prepare(self, **options: object) -> Run:
        """Do a run with A's index as it is, up to the point where the mirror would change."""
        run = self.new_run()
        self.fetch(run)
        self.plan = self.diff(run, **options)
        self.pull(run, self.plan)
        return run

    def begin(self, **options: object) -> Run:
        """Prepare a run with A as it is now."""
        self.build_index()
        return self.prepare(**options)

    def planned(self, **files: bytes | tuple[bytes | None, bytes | None]) -> Run:
        """Back up files as they were, and prepare a run with them as they are now.

        :param files: by name, what each held and holds, None being no file; or one content that stays.
        """
        states = {name: held if isinstance(held, tuple) else (held, held) for name, held in files.items()}
        before = {name: old for name, (old, _) in states.items() if old is not None}
        for name, content in before.items():
            self.put(name, content)
        if before:
            self.backup()
        for name, (old, content) in states.items():
            if content is None:
                os.unlink(self.path(name))
            elif content != old:
                self.put(name, content)
        return self.begin()

    def archive(self, run: Run) -> ArchiveSummary:
        return archive(self.mirror, run)

    def commit(self, run: Run) -> CommitSummary:
        self.outcome = commit(self.mirror, run)
        return self.outcome

    def finish(self, run: Run) -> CommitSummary:
        """Archive and commit a run that :meth:`prepare` began."""
        self.archive(run)
        return self.commit(run)

    def backup(
        self,
        *,
        unreadable: Sequence[bytes] = (),
        rotten: Mapping[bytes, bytes] = MappingProxyType({}),
        **options: object,
    ) -> CommitSummary:
        """Do a whole run with A as it is now."""
        self.build_index(unreadable, rotten)
        return self.finish(self.prepare(**options))

    # --- what to see there --------------------------------------------------------------------------

    def staged(self, md5: bytes) -> Path:
        """Return where verified content waits for a commit."""
        return self.mirror.staging / md5.decode()

    def part(self, md5: bytes) -> Path:
        """Return where a large file lies while it is pulled."""
        return self.mirror.staging / f"{md5.decode()}.part"

    def live(self, name: bytes | str) -> Path:
        """Return where a file lies in the mirror."""
        return Path(os.fsdecode(os.fsencode(self.mirror.files) + self.path(name)))

    def versions(self, name: str) -> list[bytes]:
        """Return the contents of the versions of a file, oldest first."""
        live = self.live(name)
        return [p.read_bytes() for p in sorted((live.parent / ".old").glob(f"{live.name}.*"))]

    def index_b(self) -> dict[bytes, bytes]:
        return dict(read_entries(self.mirror.index))

    def index_a(self) -> dict[bytes, bytes]:
        return dict(read_entries(Path(os.fsdecode(self.index))))

    def history(self) -> list[list[Change]]:
        return [list(read_records(path, Change)) for path in commits(self.mirror)]


def _stopped_after(pair: Pair) -> Iterator[Pair]:
    yield pair
    for server in pair.servers:
        server.stop()


# What the tasks of a DAG do with a run, in their order.
STEPS: dict[str, Callable[[Pair, Run], object]] = {
    "fetch_index": lambda pair, run: pair.fetch(run),
    "diff_indexes": lambda pair, run: pair.diff(run),
    "pull_changed": lambda pair, run: pair.pull(run, read_plan(run)),
    "archive_old": lambda pair, run: pair.archive(run),
    "commit_backup": lambda pair, run: pair.commit(run),
}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    yield from _stopped_after(Pair(tmp_path))


@pytest.fixture
def limited_pair(request: pytest.FixtureRequest, scratch: Scratch) -> Iterator[Pair]:
    """A pair whose SFTP server has no more rights than an ordinary account, so that files can be denied."""
    where = scratch.disk if request.node.get_closest_marker("real_disk") else scratch.quick
    with tempfile.TemporaryDirectory(prefix="pair-", dir=where) as folder:
        os.chmod(folder, 0o755)
        yield from _stopped_after(Pair(Path(folder), user=65534 if os.geteuid() == 0 else None))


@pytest.fixture
def terminal(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(pair, tmp_path, capsys)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem without hard links."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
