"""A crash at every step of a whole run, by a kill and by a cut of the power, over every kind of entry.

At the crash, before anything is mended, four promises must hold: each live file is whole, old or new; every
version that ever was is there; the consumer index claims nothing that the disk lacks; the history can be
read, and leads to the index. Then the next run, or a retry of the one that crashed, must end as if nothing
had been.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Callable
from itertools import count, product
from pathlib import Path

import pytest

from airflow_mdbackup.scheme.errors import DestinationBusy
from airflow_mdbackup.scheme.files.jsonl import read_header
from airflow_mdbackup.scheme.store.mirror import Mirror
from tests.guarantees.crash.crash import PowerCut, crash_at, steps_of
from tests.guarantees.crash.scene import (
    Scene,
    changes_only,
    empty,
    every_kind,
    first_run,
    half,
    half_crashed,
    harsh,
    mixed_cut,
    only_forgotten,
    zeros,
)
from tests.pair import Pair
from tests.torture import Cases, scaled

# --- a kill, a cut of the power -----------------------------------------------------------------------


ALL = (every_kind, half_crashed, first_run, only_forgotten)

NEXT_RUN, RETRY, IN_TURN = Scene.next_run, Scene.retry, Scene.in_turn
Make = Callable[[Pair], None]
Heal = Callable[[Scene, int], None]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.usefixtures("disk_in_memory")
@pytest.mark.parametrize(
    ("make", "heal"),
    scaled(
        [(every_kind, NEXT_RUN), (every_kind, RETRY), (first_run, IN_TURN), (only_forgotten, IN_TURN)],
        list(product(ALL, [NEXT_RUN, RETRY])),
    ),
    ids=name_of,
)
def test_a_run_killed_at_any_step_loses_nothing_and_is_mended(
    limited_pair: Pair, cases: Cases, make: Make, heal: Heal
) -> None:
    """The promises hold at the kill; the next run, or a retry, ends as if there had been none."""
    Scene(limited_pair, make).each(cases, heal)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.usefixtures("disk_in_memory", "no_links")
@pytest.mark.parametrize("heal", scaled([RETRY], [NEXT_RUN, RETRY]), ids=name_of)
def test_a_run_killed_at_any_step_loses_nothing_where_there_are_no_hard_links(
    limited_pair: Pair, cases: Cases, heal: Heal
) -> None:
    """Versions are copies then, which a kill may leave incomplete, but never under a version's name."""
    Scene(limited_pair, scaled(changes_only, every_kind)).each(cases, heal)


@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.usefixtures("disk_in_memory", "no_noreplace")
@pytest.mark.parametrize("heal", [NEXT_RUN, RETRY], ids=name_of)
def test_a_run_killed_at_any_step_loses_nothing_where_renaming_always_overwrites(
    limited_pair: Pair, cases: Cases, heal: Heal
) -> None:
    """An empty placeholder takes the name first, as on NFS."""
    Scene(limited_pair, scaled(changes_only, every_kind)).each(cases, heal)


@pytest.mark.guarantee("1. Power cut at every step")
@pytest.mark.usefixtures("disk_in_memory", "no_links")
def test_a_power_cut_at_any_step_loses_nothing_where_there_are_no_hard_links(
    limited_pair: Pair, cases: Cases
) -> None:
    """No version is there by name before its bytes are."""
    Scene(limited_pair, scaled(changes_only, every_kind)).each(cases, IN_TURN, mixed_cut)


@pytest.mark.guarantee("1. Power cut at every step")
@pytest.mark.usefixtures("disk_in_memory")
@pytest.mark.parametrize(
    ("make", "cutter"),
    scaled(
        [(every_kind, mixed_cut), (every_kind, harsh), (first_run, harsh)],
        list(product(ALL, [empty, half, zeros, mixed_cut, harsh])),
    ),
    ids=name_of,
)
def test_a_power_cut_at_any_step_loses_nothing_and_is_mended(
    limited_pair: Pair, cases: Cases, make: Make, cutter: Callable[[Path, int], PowerCut]
) -> None:
    """What was not synced by then is empty, cut short, zeros, a mixed lot, or gone with its name."""
    Scene(limited_pair, make).each(cases, IN_TURN, cutter)


@pytest.mark.guarantee("4. Disks that fail")
@pytest.mark.usefixtures("disk_in_memory")
@pytest.mark.parametrize("make", scaled([every_kind], ALL), ids=name_of)
def test_a_disk_that_refuses_at_any_step_what_was_written_is_believed_nothing(
    limited_pair: Pair, cases: Cases, make: Make
) -> None:
    """It says so once, to whoever is there to hear it; memory still has what the disk has not."""
    Scene(limited_pair, make).each_refusal(cases)


@pytest.mark.guarantee("1. Power cut at every step")
def test_a_kill_never_sets_the_order_of_runs_back(pair: Pair, cases: Cases) -> None:
    """At each step of giving a place out."""
    pair.mirror.claim()
    last = pair.mirror.next_order()
    for number in count(1):
        with cases.one():
            crashed = crash_at(number, pair.mirror.next_order)
            before, last = last, pair.mirror.next_order()
            assert last > before
        if not crashed:
            break
    assert number > 3


@pytest.mark.guarantee("1. Power cut at every step")
@pytest.mark.parametrize("content", [b"", bytes(500), b"\xff" * 500, b"2099", b"20261324T000000.000000Z"])
def test_spoilt_files_that_are_written_in_place_stop_nothing(
    pair: Pair, cases: Cases, content: bytes
) -> None:
    """Runs are counted on from the last one that is known; the lock is a lock whatever its file says."""
    pair.put("alpha", b"1")
    pair.backup()
    state, before = pair.mirror.dest / ".mdbackup", pair.mirror.last_commit()
    with cases.one():
        order = read_header(pair.mirror.status)["order"]
        for name in ("order", "lock"):
            (state / name).write_bytes(content)
        with (state / "lock").open() as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(DestinationBusy), pair.mirror.lock("test", wait=0.1):
                pass
        pair.put("alpha", b"2")
        assert pair.backup().outcomes == {"pulled": 1}
        assert pair.versions("alpha") == [b"1"] and pair.mirror.last_commit() > before
        assert read_header(pair.mirror.status)["order"] > order


# --- whether the steps are all --------------------------------------------------------------------------


# What strace calls whatever may change a file, and what a step of that is called.
_CALLS = {
    **{"open": "open", "openat": "open", "creat": "open", "write": "write", "rename": "rename"},
    **{"renameat": "rename", "renameat2": "renameat2", "link": "link", "linkat": "link", "unlink": "unlink"},
    **{"unlinkat": "unlink", "rmdir": "rmdir", "mkdir": "mkdir", "mkdirat": "mkdir", "chmod": "chmod"},
    **{"fchmod": "chmod", "fchmodat": "chmod", "utimensat": "utime", "ftruncate": "truncate"},
    **{"fsync": "fsync", "syncfs": "syncfs", "ioctl": "clone"},
}
_OTHER_CALLS = (
    *("pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice", "fallocate"),
    *("truncate", "fdatasync", "sync_file_range", "symlink", "symlinkat", "mknod", "mknodat", "chown"),
    *("fchown", "fchownat", "lchown", "setxattr", "fsetxattr", "lsetxattr", "utime", "utimes", "futimesat"),
)


@pytest.mark.real_disk
@pytest.mark.guarantee("1. Crash at every step")
@pytest.mark.parametrize("make", [every_kind, first_run])
def test_a_crash_is_tried_at_every_system_call_that_changes_the_disk(
    limited_pair: Pair, cases: Cases, tmp_path: Path, make: Callable[[Pair], None]
) -> None:
    """In their order, as strace sees them. So a call that some later code makes cannot be missed."""
    make(limited_pair)
    told = tmp_path / "steps"
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            told.write_text("\n".join(steps_of(lambda: limited_pair.finish(limited_pair.prepare()))))
        finally:
            os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    trace = tmp_path / "trace"
    calls = ",".join([*_CALLS, *_OTHER_CALLS])
    command = ["strace", "-y", "-e", f"trace={calls}", "-o", os.fspath(trace), "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        os.kill(child, signal.SIGCONT)
    os.waitpid(child, 0)
    seen = [step for line in trace.read_text().splitlines() if (step := _step(line, limited_pair.mirror))]
    assert len(seen) > 100
    assert told.read_text().splitlines() == seen
    cases.add(len(seen))


def _step(line: str, mirror: Mirror) -> str | None:
    """Return what changes the disk, of a line of strace; None if it does not, or not below ``dest``."""
    call, _, arguments = line.partition("(")
    nameless = "(deleted)" in line or "O_TMPFILE" in line
    if os.fspath(mirror.dest) not in arguments or nameless:
        return None
    if call in ("open", "openat") and not re.search("O_(WRONLY|RDWR|CREAT|TRUNC)", arguments):
        return None
    if call == "ioctl" and "FICLONE" not in arguments:
        return None
    return "rmdir" if "AT_REMOVEDIR" in arguments else _CALLS.get(call, call)
