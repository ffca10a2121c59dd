"""The indexer for providers without Python: its tools, its lock, its end, and its installed form."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from airflow_mdbackup.provider_side.programs import STOP, shell_input, shell_program
from airflow_mdbackup.provider_side.report import Done, Failed, Note, Progress, Ready, Waiting
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from tests.unit.provider_side.indexing import (
    FOLDER,
    INDEX,
    Indexer,
    beside_index,
    finish,
    make_large,
    md5,
    read_index,
    read_until,
    spawn,
    wait_for_temporary,
    wanted,
    write,
)

# What macOS and FreeBSD have instead: other programs, fewer options, counts with blanks before them.
BSD = {
    "md5": """
        [ "$1" = -r ] || exit 64
        shift
        if [ $# -eq 0 ]; then set -- "$(MD5SUM)"; echo "${1%% *}"; exit; fi
        for file; do
            case $file in -*) exit 64 ;; esac
            if line=$(MD5SUM <"$file"); then echo "${line%% *} $file"; else echo "md5: $file" >&2; fi
        done""",
    "sync": "[ $# -eq 0 ] || exec SYNC; exec SYNC",
    "wc": 'WC "$@" | sed "s/^/       /"',
    "uniq": 'UNIQ "$@"',
    "find": 'case " $* " in *" -printf "* | *" -print0 "*) exit 64 ;; esac; exec FIND "$@"',
    "xargs": 'case " $1 $2 $3 " in *" -r "* | *" -d "* | *" --"*) exit 64 ;; esac; exec XARGS "$@"',
    "sort": 'case " $* " in *" -z "* | *" --"*) exit 64 ;; esac; exec SORT "$@"',
    "head": 'case " $* " in *" -c "* | *" -z "*) exit 64 ;; esac; exec HEAD "$@"',
    "sed": 'case " $* " in *" -i "* | *" -z "* | *" -E "*) exit 64 ;; esac; exec SED "$@"',
    "grep": 'case " $* " in *" -P "* | *" -z "*) exit 64 ;; esac; exec GREP "$@"',
}
COMMON = "awk cat chmod cut date dd id ls mkdir mv od ps printf rm rmdir renice sh sleep tr uname echo kill"


@pytest.fixture(params=["dash", "busybox"])
def shell(request, programs, monkeypatch):
    """The shell indexer in either shell."""
    from tests.unit.provider_side import indexing

    program = shutil.which("sh", path=programs[request.param])
    monkeypatch.setattr(indexing, "shell_command", lambda: f"exec {program} -s")
    return Indexer(request.param, programs[request.param])


def install(shell: Indexer, request: IndexRequest, tmp_path: Path, *arguments: str) -> subprocess.Popen:
    """Start the indexer as it is installed."""
    path = tmp_path / "indexer.sh"
    path.write_bytes(shell_program(request))
    return spawn([shutil.which("sh", path=shell.path), str(path), *arguments], shell.path)


def test_shell_indexer_works_with_the_tools_of_bsd_and_macos(chroot, tmp_path, monkeypatch):
    """No md5sum, no option that only GNU has: a PATH of tools that refuse those."""
    from tests.unit.provider_side import indexing

    folder = tmp_path / "bsd"
    folder.mkdir()
    for name, text in BSD.items():
        for tool in ("md5sum", *BSD):
            real = shutil.which(tool, path="/usr/bin:/bin")
            if real:
                text = text.replace(tool.upper(), real)
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    for name in COMMON.split():
        (folder / name).symlink_to(shutil.which(name, path="/usr/bin:/bin"))
    monkeypatch.setattr(indexing, "shell_command", lambda: f"exec {shutil.which('dash')} -s")
    names = [b"plain", b"with  blanks ", b"new\nline", b"back\\slash", b"\xff", b"-dash", b"d/e/f"]
    for name in names:
        write(chroot + b"/backups/" + name, name)
    write(chroot + b"/backups/closed")
    os.chmod(chroot + b"/backups/closed", 0)
    drop = ("/usr/bin/setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    run = Indexer("bsd", str(folder)).run(wanted(chroot), drop)
    assert (run.status, run.report[-1].files) == (3, len(names))
    assert read_index(chroot)[0] == {b"/backups/" + name: md5(name) for name in names}
    assert b"\n# mdbackup unreadable /backups/closed\n" in Path(os.fsdecode(chroot + INDEX)).read_bytes()


def held_up(shell: Indexer, tmp_path: Path) -> tuple[Indexer, Path]:
    """Return an indexer whose md5sum waits as long as a file is there, and that file."""
    hold, folder = tmp_path / "hold", tmp_path / "slow"
    hold.touch()
    folder.mkdir()
    sh, md5sum = (shutil.which(name, path=shell.path) for name in ("sh", "md5sum"))
    waiting = f"while [ -e {hold} ]; do sleep 0.1; done"
    (folder / "md5sum").write_text(f'#!{sh}\n{waiting}\nexec {md5sum} "$@"\n')
    (folder / "md5sum").chmod(0o755)
    return Indexer(shell.name, f"{folder}:{shell.path}"), hold


@pytest.mark.parametrize("second", ["run 1", "run 2"])
def test_second_build_waits_and_then_builds_again(chroot, shell, tmp_path, second):
    """Also the same request again: it does not join, which costs time and nothing else."""
    shell, hold = held_up(shell, tmp_path)
    write(chroot + b"/backups/old")
    first = shell.start(wanted(chroot, id="run 1"))
    wait_for_temporary(chroot)
    process = shell.start(wanted(chroot, id=second))
    read_until(process, Waiting)
    write(chroot + b"/backups/new")
    hold.unlink()
    assert finish(first).status == 0
    assert list(read_index(chroot)[0]) == [b"/backups/old"]
    os.unlink(chroot + b"/backups/old")
    assert finish(process).status == 0
    assert list(read_index(chroot)[0]) == [b"/backups/new"]
    assert beside_index(chroot) == [b"index.md5"]


def test_stop_on_standard_input_ends_the_build(chroot, shell):
    """At once, with the tools that are running; and the old index stays."""
    write(chroot + b"/backups/file")
    assert shell.run(wanted(chroot)).status == 0
    before = read_index(chroot)
    make_large(chroot + b"/backups/large")
    process = shell.start(wanted(chroot))
    wait_for_temporary(chroot)
    process.stdin.write(b"stop it\n")
    process.stdin.flush()
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.write(STOP)
    process.stdin.flush()
    run = finish(process)
    assert (run.status, run.report[-1]) == (1, Failed("stopped on request"))
    assert read_index(chroot) == before
    assert beside_index(chroot) == [b"index.md5"]
    wait_until_alone(process.pid)


def wait_until_alone(pid):
    """Wait until nothing of a process group is left: a process may need a moment to end."""
    deadline = time.monotonic() + 2
    while left := group(pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_nothing_is_left_running_after_a_build(chroot, shell):
    """Not what listens for a stop, either, although standard input is still open."""
    write(chroot + b"/backups/file")
    process = shell.start(wanted(chroot))
    process.stdout.read()
    assert process.wait() == 0
    wait_until_alone(process.pid)
    process.communicate()


def test_output_ends_with_the_build_even_without_ps(chroot, shell, tmp_path):
    """What still listens for a stop cannot be found and ended then; but it holds nobody's output."""
    tools = set(COMMON.split()) | {*BSD, "md5sum"}
    for tool in tools - {"ps", "md5"}:
        (tmp_path / tool).symlink_to(shutil.which(tool))
    write(chroot + b"/backups/file")
    command = ["/usr/bin/env", f"PATH={tmp_path}", shutil.which("sh", path=shell.path), "-s"]
    process = spawn(command, shell.path, stderr=subprocess.STDOUT)
    process.stdin.write(shell_input(wanted(chroot)))
    process.stdin.flush()
    ended = threading.Timer(20, process.stdin.close)  # which would end it
    ended.start()
    output = process.stdout.read()
    assert b"mdbackup done files=1 " in output
    assert ended.is_alive()
    ended.cancel()
    process.stdin.close()
    process.wait()


def test_output_ends_if_no_request_comes(chroot, shell, tmp_path):
    """Although standard input is still open, and something reads from it."""
    path = tmp_path / "indexer.sh"
    path.write_bytes(shell_program(wanted(chroot)).replace(b"sleep 30 ", b"sleep 1 "))
    process = spawn([shutil.which("sh", path=shell.path), str(path)], shell.path, stderr=subprocess.STDOUT)
    ended = threading.Timer(20, process.stdin.close)
    ended.start()
    assert b"mdbackup error no request came" in process.stdout.read()
    assert ended.is_alive()
    ended.cancel()
    process.stdin.close()
    process.wait()


def group(number: int) -> list[str]:
    """Give the processes of a group that still run."""
    found = subprocess.check_output(["ps", "-eo", "pgid=,stat=,args="], text=True).splitlines()
    return [line for line in found if line.split()[0] == str(number) and line.split()[1][0] != "Z"]


def test_endless_input_does_not_fill_the_memory(chroot, shell):
    """A line that never ends is no stop, and is not kept."""
    make_large(chroot + b"/backups/large")
    process = shell.start(wanted(chroot))
    wait_for_temporary(chroot)
    for _ in range(200):
        process.stdin.write(b"x" * 4096)
    process.stdin.write(b"\nstop here\n")
    process.stdin.flush()
    time.sleep(1)
    assert process.poll() is None
    process.stdin.write(STOP)
    process.stdin.flush()
    assert finish(process).report[-1] == Failed("stopped on request")


def test_lock_of_a_killed_build_is_taken_over_at_once(chroot, shell):
    """Its process is gone, which is known if it ran under the same account on the same machine."""
    make_large(chroot + b"/backups/large")
    process = shell.start(wanted(chroot))
    wait_for_temporary(chroot)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.unlink(chroot + b"/backups/large")
    assert os.path.isdir(chroot + FOLDER + b"/.index.md5.lock.d")
    run = shell.run(wanted(chroot))
    assert (run.status, [type(report) for report in run.report]) == (0, [Done])
    assert beside_index(chroot) == [b"index.md5"]


def test_lock_of_a_killed_build_is_taken_over_while_its_parent_waits_for_it(chroot, shell, tmp_path):
    """As cron does in a ``$(...)``, which ends when nobody holds the output any more, nor a heartbeat."""
    make_large(chroot + b"/backups/large")
    path = tmp_path / "indexer.sh"
    path.write_bytes(shell_program(wanted(chroot)))
    sh = shutil.which("sh", path=shell.path)
    cron = spawn([sh, "-c", f"said=$(exec {sh} {path} --no-request) || echo failed"], shell.path)
    wait_for_temporary(chroot)
    holder = Path(os.fsdecode(chroot + FOLDER + b"/.index.md5.lock.d/holder"))
    os.kill(int(holder.read_text().split()[0]), signal.SIGKILL)
    hashing = ["pkill", "-KILL", "-g", str(cron.pid), "md5sum"]
    assert subprocess.run(hashing).returncode == 0
    os.unlink(chroot + b"/backups/large")
    assert cron.wait(60) == 0
    assert shell.run(wanted(chroot)).status == 0
    assert beside_index(chroot) == [b"index.md5"]


def test_lock_without_a_heartbeat_is_taken_over_in_the_end(chroot, shell, monkeypatch):
    """Its process number may be another process's by now: here it is that of this test."""
    from tests.unit.provider_side import indexing

    monkeypatch.setattr(indexing, "shell_input", lambda r: shell_input(r).replace(b"-ge 30", b"-ge 3"))
    holder = f"{os.getpid()} {os.getuid()} {os.uname().nodename}\n"
    write(chroot + FOLDER + b"/.index.md5.lock.d/holder", holder.encode())
    begun = time.monotonic()
    run = shell.run(wanted(chroot))
    assert time.monotonic() - begun > 2
    assert [type(report) for report in run.report] == [Waiting, Done]


def test_lock_whose_holder_is_alive_is_never_taken(chroot, shell, monkeypatch):
    """A build shows every few seconds that it is there, however long it takes."""
    from tests.unit.provider_side import indexing

    monkeypatch.setattr(indexing, "shell_input", lambda r: shell_input(r).replace(b"-ge 30", b"-ge 8"))
    make_large(chroot + b"/backups/large")
    first = shell.start(wanted(chroot))
    wait_for_temporary(chroot)
    # As if its process could not be looked for.
    holder = Path(os.fsdecode(chroot + FOLDER + b"/.index.md5.lock.d/holder"))
    holder.write_text("1 0 elsewhere\n")
    second = shell.start(wanted(chroot))
    read_until(second, Waiting)
    time.sleep(14)
    assert second.poll() is None
    for process in (second, first):
        process.stdin.write(STOP)
        process.stdin.flush()
        assert finish(process).report[-1] == Failed("stopped on request")


def test_options_that_need_python_are_named_in_a_note(chroot, shell):
    """Excluded files are in the index then, and the consumer leaves them out."""
    write(chroot + b"/backups/x.tmp")
    run = shell.run(wanted(chroot, exclude=("*.tmp",), limit=10**9, nice=3))
    assert [type(report) for report in run.report] == [Note, Done]
    assert "no exclude and no limit" in run.report[0].text
    assert list(read_index(chroot)[0]) == [b"/backups/x.tmp"]


def test_files_of_a_python_build_beside_the_index_are_not_indexed(chroot, shell):
    """The provider may have had Python before."""
    for name in (b"cache", b"lock", b"report", b"stop", b"cache.1.2.tmp"):
        write(chroot + FOLDER + b"/.index.md5." + name)
    assert shell.run(wanted(chroot, b"/")).status == 0
    assert read_index(chroot)[0] == {}


def test_installed_shell_indexer_builds_what_is_baked_in(chroot, shell, tmp_path):
    """As a forced command, on a provider that has no Python; what is in the request does not matter."""
    write(chroot + b"/backups/file")
    write(chroot + b"/secret/file")
    process = install(shell, wanted(chroot), tmp_path)
    assert read_until(process, Ready) == [Ready(program=False)]
    asked = IndexRequest(b"/", (b"/secret",), b"/elsewhere", id='run "1"\\; touch pwned')
    process.stdin.write(request_line(asked))
    process.stdin.flush()
    run = finish(process)
    assert (run.status, [type(report) for report in run.report]) == (0, [Done])
    assert list(read_index(chroot)[0]) == [b"/backups/file"]
    assert not os.path.exists("/elsewhere")


def test_installed_shell_indexer_can_be_stopped(chroot, shell, tmp_path):
    """The line comes after the request, on the same standard input."""
    make_large(chroot + b"/backups/large")
    process = install(shell, wanted(chroot), tmp_path)
    process.stdin.write(request_line(wanted(chroot)))
    process.stdin.flush()
    wait_for_temporary(chroot)
    process.stdin.write(STOP)
    process.stdin.flush()
    assert finish(process).report[-1] == Failed("stopped on request")
    process = install(shell, wanted(chroot), tmp_path)
    process.stdin.write(request_line(wanted(chroot)) + STOP)
    process.stdin.flush()
    assert finish(process).report == [Failed("stopped on request")]


def test_installed_shell_indexer_runs_from_cron(chroot, shell, tmp_path):
    """It asks for nothing then."""
    write(chroot + b"/backups/file")
    run = finish(install(shell, wanted(chroot), tmp_path, "--no-request"))
    assert (run.status, [type(report) for report in run.report]) == (0, [Done])
    assert list(read_index(chroot)[0]) == [b"/backups/file"]


@pytest.mark.parametrize(
    "line", [b"\n", b"x\n", bytes(100) + b"\n", b"x" * (2 << 20)], ids=["blank", "x", "nul", "huge"]
)
def test_hostile_request_to_an_installed_shell_indexer_is_an_error(chroot, shell, tmp_path, line):
    """Nothing is built for it."""
    process = install(shell, wanted(chroot), tmp_path)
    read_until(process, Ready)
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        pass
    run = finish(process)
    assert (run.status, [type(report) for report in run.report]) == (1, [Failed])
    assert not os.path.exists(chroot + INDEX)


def test_progress_of_the_shell_indexer_has_all_numbers(chroot, shell):
    """All that it passes by it hashes."""
    write(chroot + b"/backups/a")
    make_large(chroot + b"/backups/b")
    process = shell.start(wanted(chroot))
    progress = read_until(process, Progress)[-1]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert progress.files == progress.hashed


@pytest.mark.parametrize("name", [".index.md5.1.1.tmp", ".index.md5.2026.tmp", ".index.md5.1.2.3.tmp"])
def test_nothing_of_somebody_else_is_taken_for_a_left_over(chroot, shell, tmp_path, name):
    """A symlink that has the name of one is not followed, and other names are not touched."""
    write(chroot + b"/backups/file")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    folder = Path(os.fsdecode(chroot + FOLDER))
    folder.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside)
    other = folder / name.replace(".1.1.", ".20.")
    if not other.is_symlink():
        other.mkdir()
        (other / "kept").write_text("x")
    assert shell.run(wanted(chroot)).status == 0
    assert (outside / "kept").exists() and (other / "kept").exists()


def test_a_left_over_of_a_killed_build_is_removed(chroot, shell):
    write(chroot + b"/backups/file")
    left = chroot + FOLDER + b"/.index.md5.1.1.tmp"
    write(left + b"/list")
    assert shell.run(wanted(chroot)).status == 0
    assert not os.path.exists(left)
