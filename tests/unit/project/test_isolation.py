"""What a run of the tests selects, leaves behind when it is killed, and says when it fails."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import isolation
from tests.isolation import PREFIX, remove_abandoned
from tests.waiting import until

PROJECT = Path(__file__).parents[3]


def run_of(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a pytest of its own that runs a probe."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MDB", "PYTEST_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=PROJECT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_run_that_is_killed_leaves_nothing_but_a_directory_that_the_next_one_removes(
    tmp_path: Path,
) -> None:
    """And no process, no mount, no loop device: its servers and workers end with it."""
    probe, room = tmp_path / "probe", tmp_path / "room"
    room.mkdir()
    words = ("tests/probe.py", "-n", "2", "-k", "until_it_is_killed")
    run = run_of(*words, PROBE=str(probe), TMPDIR=str(room))
    until(lambda: probe.exists() and probe.read_text())
    (folder,) = room.glob(f"{PREFIX}*")
    text = os.fsencode(folder)
    assert len(processes_with(text)) > 2
    remove_abandoned({room})
    assert folder.exists(), "it is in use"
    run.kill()
    run.communicate()
    until(lambda: not processes_with(text))
    assert text not in Path("/proc/mounts").read_bytes()
    until(lambda: text not in b"".join(path.read_bytes() for path in loop_devices()))
    remove_abandoned({room})
    assert not folder.exists()


def processes_with(text: bytes) -> list[Path]:
    """Return the processes that name it on their command line, or work for a run that has it as TMPDIR."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text in (process / "cmdline").read_bytes() + (process / "environ").read_bytes():
                found.append(process)
        except OSError:  # it has ended
            continue
    return found


def loop_devices() -> list[Path]:
    return list(Path("/sys/block").glob("loop*/loop/backing_file"))


def test_a_run_that_fails_says_how_to_run_just_that_test_again(tmp_path: Path) -> None:
    """With a command to be pasted, and what the test wrote is still there."""
    output, _ = run_of("tests/probe.py", "-k", "that_fails", TMPDIR=str(tmp_path)).communicate()
    (command,) = [line for line in output.splitlines() if " -m pytest " in line]
    assert shlex.split(command)[-1] == "tests/probe.py::test_that_fails[it's]"
    words = shlex.split(command)
    assert words[:3] == [os.path.relpath(sys.executable, PROJECT), "-m", "pytest"]
    again, _ = run_of(*words[3:], TMPDIR=str(tmp_path)).communicate()
    assert "1 failed" in again
    assert re.search(rf"What they wrote is in {tmp_path}/{PREFIX}\w+ until", output)


def test_a_test_that_only_the_page_of_guarantees_marks_is_in_the_long_run() -> None:
    """Marked before pytest selects by marks."""
    file = "tests/guarantees/whatever_happens/test_model.py"
    output, _ = run_of("--collect-only", "-q", "-m", "guarantee", file).communicate()
    assert output.startswith(f"{file}::test_whatever_happens_the_backup_stays_sound\n"), output


def test_tests_write_to_memory_only_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By themselves, with no option."""
    monkeypatch.delenv("TMPDIR")
    monkeypatch.delenv("MDBACKUP_TESTS")
    monkeypatch.setattr(isolation, "_MEMORY", tmp_path)
    monkeypatch.setattr(isolation, "LONG", False)
    for room, parent in ((0, tmp_path), (1 << 60, Path("/var/tmp"))):
        monkeypatch.setattr(isolation, "ROOM", room)
        monkeypatch.delenv("MDBACKUP_TESTS", raising=False)
        monkeypatch.delenv("TMPDIR", raising=False)
        scratch = isolation.Scratch()
        assert scratch.quick.parent == parent and scratch.disk.parent == Path("/var/tmp")
        scratch.remove()
        assert not scratch.quick.exists() and not scratch.disk.exists()
