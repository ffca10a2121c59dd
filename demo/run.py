"""The main job, to be seen: a real Airflow backs up a provider, a real SSH server, three times.

``python -m demo.run`` works in .demo below the project, stops everything that it started, and exits with 1
when anything is not as it should be. With KEEP=1 in the environment both servers stay up for a look.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from demo import checks
from demo.airflow_client import AirflowClientError
from demo.checks import NotAsItShouldBe
from demo.run_report import RunFailed, back_up, console
from demo.scene import DAG_ID, REPOSITORY, Scene, SceneTaken, empty_folder, offer_standard_library, scene
from demo.sshd import ProviderServer, ProviderServerError
from demo.stack import AirflowStackError

FOLDER = REPOSITORY / ".demo"

# Files of every standard library since Python 3.11.
CHANGED, DELETED, MOVED, LOST = "bisect.py", "this.py", "_pydecimal.py", "antigravity.py"
ADDED, MOVED_TO = "added.txt", "moved/decimal_in_python.py"

WAYS = {
    "namespace": "backupop is chrooted, without shell, read-only; its account exists for this sshd only",
    "users": "backupop is chrooted, without shell, read-only; its account is removed at the end",
    "own": "without root there is [bold]no chroot[/]: backupop is you, with a key for reading only",
}


def main() -> int:
    """Play the demo; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        with empty_folder(FOLDER), ProviderServer(FOLDER / "server") as server:
            console.print("[bold]The two servers[/]")
            console.print(f"  A  OpenSSH on 127.0.0.1, port {server.port}")
            console.print(f"     {WAYS[server.way]}")
            files = offer_standard_library(server.tree / "backups")
            console.print(f"     it offers the Python standard library, {files:,} files")
            console.print("  B  Airflow on SQLite is starting, which takes about 20 s ...")
            started = time.monotonic()
            with scene(FOLDER, server) as both:
                _tell_where(both, f"it took {time.monotonic() - started:.0f} s")
                play(both)
                if os.environ.get("KEEP", "") not in ("", "0"):
                    _keep(both)
                console.print("\nStopping both servers ...")
    except SceneTaken as error:
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted, everything is stopped.")
        return 130
    except (
        AirflowClientError,
        AirflowStackError,
        NotAsItShouldBe,
        ProviderServerError,
        RunFailed,
    ) as error:
        console.print("[bold red]The demo failed.[/] Its servers are stopped, their logs are in .demo")
        console.print(str(error), markup=False)
        return 1
    console.print(
        "All is as it should be, and everything is stopped. The backup stays in .demo/b until the next time."
    )
    return 0


def play(both: Scene) -> None:
    """Back up three times, with changes between, and look at the disk.

    :raises NotAsItShouldBe: it does not show what it should.
    :raises RunFailed: a run of the DAG failed.
    """
    source = both.source
    back_up(both, "Run 1: all is new")
    checks.everything_is_backed_up(both)

    before = (source / CHANGED).read_bytes()
    (source / CHANGED).write_bytes(b"# This line is new on A.\n" + before)
    (source / ADDED).write_text("This file is new on A.\n")
    (source / DELETED).unlink()
    (source / MOVED_TO).parent.mkdir()
    (source / MOVED).rename(source / MOVED_TO)
    both.on_mirror(LOST).unlink()
    console.print("\n[bold]Then, by hand[/]")
    console.print(f"  on A: {CHANGED} changed, {ADDED} added, {DELETED} deleted, {MOVED} moved to {MOVED_TO}")
    console.print(f"  on B: {LOST} deleted from the mirror")

    second = back_up(both, "Run 2: a few files have changed")
    checks.old_version_is_kept(both, CHANGED, before)
    checks.deleted_on_provider_stays(both, DELETED)
    checks.deleted_by_hand_is_not_copied(both, LOST)
    checks.moved_file_is_not_transferred(both, MOVED_TO, second.transferred, (CHANGED, ADDED))
    checks.show_mirror(
        both,
        {
            CHANGED: "changed",
            ADDED: "new",
            DELETED: "deleted on A, kept",
            MOVED: "moved on A, kept",
            MOVED_TO: "copied from there",
        },
    )

    commits = checks.history(both)
    third = back_up(both, "Run 3: nothing has changed")
    checks.nothing_was_done(both, third, commits)
    checks.md5sum_agrees(both, without=LOST)


def _tell_where(both: Scene, note: str) -> None:
    airflow = both.airflow
    console.print(
        f"     {airflow.url}/dags/{DAG_ID}   login [bold]{airflow.user} {airflow.password}[/] ({note})"
    )


def _keep(both: Scene) -> None:
    console.print("\n[bold]Both servers stay up for a look[/] (KEEP)")
    _tell_where(both, "the run of the DAG that you trigger is real, too")
    environment = FOLDER / "env"
    exports = [
        f"export {name}={shlex.quote(value)}\n"
        for name, value in sorted(both.airflow.environment.items())
        if name.startswith("AIRFLOW")
    ]
    with open(environment, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.writelines(exports)
    here = Path(os.path.relpath(FOLDER))
    console.print(f"  what A offers:        {os.path.relpath(both.source)}", markup=False)
    console.print(f"  the backup:           .venv/bin/mdbackup log --dest {here / 'b'}", markup=False)
    console.print(f"  airflow's own command: . {here / 'env'} && .venv/bin/airflow dags list", markup=False)
    console.print(f"  {LOST}, deleted on B, is still missing there: mdbackup verify and restore report it")
    with suppress(EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            input("  Enter stops them. ")
        else:
            console.print(f"  To stop them: kill {os.getpid()}")
            signal.pause()


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
