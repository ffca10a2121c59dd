"""The indexer as it is installed on a provider: as a forced command, from cron or a timer, by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from airflow_mdbackup.provider_side.programs import STOP
from airflow_mdbackup.provider_side.report import Done, Failed, Joined, Note, Ready
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from tests.unit.provider_side.indexing import (
    INDEX,
    Run,
    finish,
    indexer,
    make_large,
    read_index,
    read_until,
    run_patched,
    spawn,
    wait_for_temporary,
    wanted,
    write,
)


@pytest.fixture
def config(chroot, tmp_path):
    """Write a configuration, and give its path."""

    def configure(text: str | None = None, mode: int = 0o644, **changed) -> bytes:
        path = tmp_path / "etc" / "provider.json"
        path.parent.mkdir(exist_ok=True)
        values = {"chroot": os.fsdecode(chroot), "source": ["/backups"], "index": INDEX.decode()} | changed
        values = {key: value for key, value in values.items() if value != "left out"}
        path.write_text(json.dumps(values) if text is None else text)
        path.chmod(mode)
        return os.fsencode(path)

    return configure


def start(*arguments: bytes) -> subprocess.Popen:
    return spawn([sys.executable, "-I", indexer.__file__, *arguments])


def serve(path: bytes, line: bytes) -> Run:
    process = start(b"--serve", b"--config", path)
    assert read_until(process, Ready) == [Ready(program=False)]
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        pass
    return finish(process)


def test_forced_command_builds_what_is_configured_whatever_is_asked(chroot, config):
    """The key can start a build and do nothing else; differences to the request are noted."""
    write(chroot + b"/backups/file")
    write(chroot + b"/backups/x.tmp")
    write(chroot + b"/secret/file")
    path = config(exclude=["*.tmp"])
    asked = IndexRequest(b"/", (b"/secret",), b"/elsewhere", id="run 1", exclude=("*.tmp",), jobs=1)
    run = serve(path, request_line(asked))
    assert run.status == 0
    notes = [report.text.split()[0] for report in run.report if isinstance(report, Note)]
    assert notes == ["source", "index"]
    assert list(read_index(chroot)[0]) == [b"/backups/file"]
    assert not os.path.exists(b"/elsewhere")
    same = serve(path, request_line(wanted(chroot, exclude=("*.tmp",))))
    assert [type(report) for report in same.report] == [Done]


def test_forced_command_can_be_joined_and_stopped(chroot, config):
    """Its id comes from the request, and so does the line that stops it."""
    make_large(chroot + b"/backups/large")
    line = request_line(wanted(chroot, id='run "1"'))
    path = config()
    processes = []
    for kind in (None, Joined):
        process = start(b"--serve", b"--config", path)
        process.stdin.write(line)
        process.stdin.flush()
        processes.append(process)
        if kind:
            read_until(process, kind)
        else:
            wait_for_temporary(chroot)
    processes[1].stdin.write(STOP)
    processes[1].stdin.flush()
    for process in processes:
        assert finish(process).report[-1] == Failed("stopped on request")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"[]\n",
        b"{\n",
        b"\xff\n",
        b'{"id": 5}\n',
        b'{"id": ""}\n',
        b'{"id": "' + b"x" * 201 + b'"}\n',
        b'{"id": "\\u001b[31m"}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (2 << 20),
        bytes(100) + b"\n",
    ],
    ids=lambda line: repr(line[:12]),
)
def test_hostile_input_to_a_forced_command_is_an_error(chroot, config, line):
    """One line says so, and nothing is built."""
    run = serve(config(), line)
    assert (run.status, [type(report) for report in run.report]) == (1, [Failed])
    assert not os.path.exists(chroot + INDEX)


def test_end_of_input_before_the_request_is_an_error(chroot, config):
    """A connection that broke that early builds nothing."""
    process = start(b"--serve", b"--config", config())
    process.stdin.close()
    assert process.wait() == 1
    assert b"mdbackup error" in process.stdout.read()
    process.stdout.close()


def test_forced_command_does_not_wait_for_ever(chroot, config):
    """Not for a request that does not come, and not for one that comes in drops."""
    patch = "indexer.REQUEST_SECONDS = 0.5"
    run = run_patched(patch, b"--serve", b"--config", config())
    assert run.report == [Failed("no request came within 0 seconds")]


def test_timer_builds_what_is_configured_and_reads_nothing(chroot, config):
    """Standard input may be anything, a terminal or nothing at all."""
    write(chroot + b"/backups/file")
    command = [sys.executable, "-I", indexer.__file__, "--config", config(nice=5, jobs=2, rehash=10.5)]
    done = subprocess.run(command, input=STOP * 1000, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"mdbackup done files=1 ")
    closed = subprocess.run(command, preexec_fn=lambda: os.closerange(0, 3))
    assert closed.returncode == 0


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_configuration_that_others_can_write_is_refused(chroot, config, mode):
    """They would decide what is indexed, by whoever's key."""
    run = finish(start(b"--config", config(mode=mode)))
    assert run.status == 1
    assert "others than root can write" in run.report[0].message
    assert "chmod go-w" in run.report[0].message


def test_configuration_in_a_directory_that_others_can_write_is_refused(chroot, config):
    """They could put another file in its place; also where a symlink leads there."""
    path = config()
    link = chroot + b"/link.json"
    os.symlink(path, link)
    os.chmod(os.path.dirname(path), 0o777)
    for name in (path, link):
        assert "others than root can write" in finish(start(b"--config", name)).report[0].message
    os.chmod(os.path.dirname(path), 0o755)
    os.chown(path, 12345, 0)
    assert "others than root can write" in finish(start(b"--config", path)).report[0].message


@pytest.mark.parametrize("on_the_way", [False, True], ids=["link", "link to a directory of links"])
def test_configuration_behind_a_link_that_others_can_replace_is_refused(chroot, config, tmp_path, on_the_way):
    """Where the link lies counts as much as where it leads, and so does every other link on the way."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "mine.json").symlink_to(os.fsdecode(config()))
    name = evil / "mine.json"
    if on_the_way:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "sound.json").symlink_to("../evil/mine.json")
        name = tmp_path / "links" / "sound.json"
    assert finish(start(b"--config", os.fsencode(name), b"--check")).status == 0
    evil.chmod(0o777)
    message = finish(start(b"--config", os.fsencode(name), b"--check")).report[0].message
    assert "others than root can write" in message and f" {evil}:" in message
    evil.chmod(0o1777)
    assert finish(start(b"--config", os.fsencode(name), b"--check")).status == 0
    os.lchown(evil / "mine.json", 12345, 12345)
    assert "others than root" in finish(start(b"--config", os.fsencode(name), b"--check")).report[0].message


def test_circular_links_are_reported(chroot, tmp_path):
    """The system's reason, as for any file that is not there; not for ever."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "a/x"):
        run = finish(start(b"--config", os.fsencode(tmp_path / name), b"--check"))
        assert "Too many levels of symbolic links" in run.report[0].message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": "{"}, "not valid JSON"),
        ({"text": "[]"}, "JSON object"),
        ({"index": "left out"}, "has no index"),
        ({"surce": []}, "unknown key 'surce'"),
        ({"id": "x"}, "id"),
        ({"source": "/backups"}, "list of paths"),
        ({"source": []}, "no source"),
        ({"source": ["relative"]}, "not an absolute path"),
        ({"jobs": 0}, "jobs"),
        ({"jobs": True}, "jobs"),
        ({"nice": 20}, "nice"),
        ({"limit": 0}, "limit"),
        ({"limit": 1.5}, "limit"),
        ({"rehash": 0}, "rehash"),
        ({"rehash": 101}, "rehash"),
        ({"rehash": "some"}, "rehash"),
        ({"exclude": [1]}, "gitignore"),
        ({"one_file_system": 1}, "one_file_system"),
        ({"chroot": "/does/not/exist"}, "is not a directory"),
        ({"index": "/" + "n" * 250}, "too long a name"),
    ],
    ids=str,
)
def test_check_says_what_is_wrong_with_a_configuration(chroot, config, changed, message):
    """Naming the file and the key, before the first night does."""
    run = finish(start(b"--config", config(**changed), b"--check"))
    assert run.status == 1
    assert message in run.report[0].message


def test_check_of_a_sound_configuration_builds_nothing(chroot, config):
    """It says that it is sound, and reads no request either."""
    run = finish(start(b"--config", config(), b"--check", b"--serve"))
    assert (run.status, [type(report) for report in run.report]) == (0, [Note])
    assert not os.path.exists(chroot + b"/.mdbackup")


def test_missing_configuration_is_reported(chroot):
    """With the system's reason."""
    run = finish(start(b"--config", chroot + b"/none"))
    assert (run.status, "No such file" in run.report[0].message) == (1, True)


def test_command_line_options_mean_what_the_configuration_means(chroot):
    """So that one can try out what to write into it."""
    for name in (b"a", b"b.tmp"):
        write(chroot + b"/backups/" + name)
    arguments = [b"--chroot", chroot, b"--source", b"/backups", b"--exclude", b"*.tmp", b"--jobs", b"1"]
    arguments += [b"--nice", b"1", b"--limit", b"1000000", b"--rehash", b"all", b"--one-file-system"]
    assert finish(start(*arguments)).status == 0
    assert list(read_index(chroot)[0]) == [b"/backups/a"]
    assert finish(start(*arguments, b"--rehash", b"half")).status == 1
