"""Throw-away PostgreSQL and Redis servers: on a free port of 127.0.0.1, with a password, nothing kept."""

from __future__ import annotations

import glob
import os
import pwd
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg2
import redis

from demo import processes

START_TIMEOUT = 60.0


class Database(NamedTuple):
    """An empty database of a running PostgreSQL.

    :ivar url: for SQLAlchemy, with `psycopg2`.
    :ivar programs: the directory of PostgreSQL's programs.
    """

    url: str
    programs: Path

    def dump(self) -> bytes:
        """Return everything in it, as SQL, and again with what stands there in hexadecimal digits decoded."""
        address = self.url.replace("+psycopg2", "")
        sql = subprocess.check_output([self.programs / "pg_dump", "--inserts", f"--dbname={address}"])
        binary = re.findall(rb"'\\\\x((?:[0-9a-f]{2})+)'", sql)
        return b"\n".join([sql, *(bytes.fromhex(digits.decode()) for digits in binary)])


@contextmanager
def postgresql() -> Iterator[Database]:
    """Run PostgreSQL, and give an empty database of it.

    As root it runs as the user `postgres`, whom Debian's package makes: it refuses root.
    """
    programs = _postgresql_programs()
    password = secrets.token_hex(16)
    # Not below pytest's own folders, which the user `postgres` cannot enter.
    with tempfile.TemporaryDirectory(prefix="mdbackup-postgresql-") as name:
        folder = Path(name)
        (folder / "password").write_text(password)
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
            # Becoming another user makes the kernel forget the death signal: it is set once more.
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            as_user += ["--pdeathsig", "INT"]
        identity = ["--username=airflow", f"--pwfile={folder}/password", "--auth=scram-sha-256"]
        subprocess.run(
            [*as_user, programs / "initdb", *identity, "--no-sync", f"--pgdata={folder}/data"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        port = processes.free_port()
        settings = ["listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off"]
        options = [word for setting in settings for word in ("-c", setting)]
        log = folder / "log"
        server = processes.start(
            [*as_user, programs / "postgres", "-D", folder / "data", *options], log=log, death_signal="INT"
        )
        try:
            address = f"airflow:{password}@127.0.0.1:{port}/postgres"
            _wait(server, log, lambda: psycopg2.connect(f"postgresql://{address}").close())
            yield Database(f"postgresql+psycopg2://{address}", programs)
        finally:
            processes.stop([server])


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run Redis in `folder`, which is made, and give its URL."""
    folder.mkdir()
    port, password = processes.free_port(), secrets.token_hex(16)
    settings = ["bind 127.0.0.1", f"port {port}", f"requirepass {password}", 'save ""', f"dir {folder}"]
    configuration = folder / "redis.conf"
    configuration.write_text("\n".join(settings) + "\n")
    server = processes.start(["redis-server", configuration], log=folder / "log")
    try:
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        _wait(server, folder / "log", lambda: redis.Redis.from_url(url).ping())
        yield url
    finally:
        processes.stop([server])


def _postgresql_programs() -> Path:
    """Return the directory of `initdb` and `postgres`, which Debian does not put into PATH."""
    places = [os.path.dirname(os.path.realpath(found))] if (found := shutil.which("initdb")) else []
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    if not places:
        raise RuntimeError("PostgreSQL is missing: run `make system-packages` (Debian: postgresql).")
    return Path(places[0])


def _wait(server: subprocess.Popen[bytes], log: Path, call: Callable[[], object]) -> None:
    """Wait until `call` does not raise."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            call()
            return
        except (psycopg2.OperationalError, redis.ConnectionError, redis.BusyLoadingError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"No answer: {error}\n{log.read_text(errors='replace')}") from error
        time.sleep(0.1)
