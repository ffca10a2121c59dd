"""Fetching the provider index: only a whole one is believed, and nothing changes before that."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from airflow_mdbackup.scheme.backup import fetch as fetch_module
from airflow_mdbackup.scheme.backup.fetch import fetch_index
from airflow_mdbackup.scheme.errors import (
    AccessRefused,
    ConnectionLost,
    DestinationBusy,
    IndexRefused,
    NotOnProvider,
    RunIncomplete,
)
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes
from tests.guarantees.transport.channels import ATTRS, FAILURE, CutChannel, ScriptedServer, packet, status
from tests.pair import Pair, ServerProcess

EMPTY = b"d41d8cd98f00b204e9800998ecf8427e"
END = b"# mdbackup end format=1 files=1 unreadable=0 bytes=5\n"


def index_file(pair: Pair) -> Path:
    return Path(os.fsdecode(pair.index))


def fetch(pair: Pair, **options: Any) -> Any:
    run = pair.new_run()
    try:
        return pair.fetch(run, **{"still": 0.2, **options})
    finally:
        if not run.state.exists():
            with pytest.raises(RunIncomplete, match="fetch_index"):
                pair.diff(run)


def test_a_whole_index_is_taken_at_once(pair: Pair) -> None:
    """Without waiting; what later steps read is told by its digest."""
    index_file(pair).write_bytes(b"# mdbackup started 1795402800\n%s  /b/a\n" % EMPTY + END)
    began = time.monotonic()
    fetched = fetch(pair, still=60)
    assert time.monotonic() - began < 20
    assert (fetched.files, fetched.unreadable, fetched.size, fetched.complete) == (1, 0, 5, True)
    assert fetched.time == 1795402800 and abs(fetched.age) < 60
    run = pair.mirror.run("manual__1")
    assert run.index.read_bytes().splitlines()[0] == EMPTY + b"  /b/a"
    assert not run.received.exists()


def test_a_missing_index_says_where_it_was_looked_for(pair: Pair) -> None:
    """And what to check."""
    with pytest.raises(NotOnProvider, match=r"srv1: index .*index\.md5 does not exist.*chroot"):
        fetch(pair)


def test_an_index_in_a_missing_directory_is_missing_too(pair: Pair) -> None:
    """Nothing is known of the tree on A."""
    pair.index = os.fsencode(pair.a) + b"/missing/index"
    with pytest.raises(NotOnProvider, match="does not exist"):
        fetch(pair)


def test_an_index_that_may_not_be_read_says_which_mode_it_needs(limited_pair: Pair) -> None:
    """An ordinary account is denied."""
    index_file(limited_pair).write_bytes(END)
    index_file(limited_pair).chmod(0o600 if os.geteuid() == 0 else 0)
    with pytest.raises(AccessRefused, match=r"Permission denied.*mode 0644"):
        fetch(limited_pair)


def test_an_index_that_the_server_fails_to_read_is_worth_another_try(pair: Pair) -> None:
    """It is no matter of rights."""

    class Failing(ScriptedServer):
        def on_read(self, number: int, body: bytes) -> bytes:
            return status(number, FAILURE, b"Input/output error")

    pair.mirror.claim()
    with pytest.raises(NotOnProvider, match=r"could not be read on the provider .Input/output error"):
        fetch_index(pair.mirror, pair.new_run(), lambda: Reader(Failing({pair.index: b"x"})), pair.index)


def test_an_index_that_is_a_directory_is_refused(pair: Pair) -> None:
    """With the server's word."""
    index_file(pair).mkdir()
    with pytest.raises(AccessRefused, match="cannot be read"):
        fetch(pair)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"%s  /a\n%s  /b\n" % (EMPTY, EMPTY) + END, "line 3: truncated or edited"),
        (b"%s  /a\n%s  /b" % (EMPTY, EMPTY), "line 2: the last line has no line end"),
        (b"%s  /a\n%s  /b/../c\n" % (EMPTY, EMPTY) + END, r"line 2: the component '\.\.'"),
        (b"%s  /a\r\n" % EMPTY, "line 1: the line ends in CR LF"),
        (b"<html>404</html>\n", "line 1: it does not begin with"),
    ],
)
def test_a_bad_index_is_refused_with_the_line_and_nothing_is_changed(
    pair: Pair, content: bytes, why: str
) -> None:
    """It held still, so that it is not being written just now. The last good run stays as it is."""
    pair.put("alpha", b"1")
    pair.backup()
    before = pair.mirror.index.read_bytes()
    index_file(pair).write_bytes(content)
    with pytest.raises(IndexRefused, match=rf"srv1: index .*{why}.*Nothing was changed") as caught:
        fetch(pair)
    assert os.fsdecode(pair.index) in str(caught.value)
    assert pair.mirror.index.read_bytes() == before
    pair.put("alpha", b"2")
    assert pair.backup().outcomes == {"pulled": 1}


def test_an_index_without_end_line_is_taken_after_it_held_still(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody's own md5sum job; with a warning."""
    index_file(pair).write_bytes(b"%s /backups/alpha\n" % EMPTY)
    began = time.monotonic()
    fetched = fetch(pair, still=0.5)
    assert time.monotonic() - began >= 0.5
    assert fetched.files == 1 and not fetched.complete and fetched.size is None
    assert fetched.time == int(index_file(pair).stat().st_mtime)
    assert "has no end line" in caplog.text


@pytest.mark.parametrize("end", [b"", b"half a line"])
def test_an_index_that_is_being_written_is_fetched_again(pair: Pair, end: bytes) -> None:
    """Until it is whole: what was there at first is never taken for all."""
    index_file(pair).write_bytes(b"%s  /a\n" % EMPTY + end)

    def write_on() -> None:
        time.sleep(0.15)
        for number in range(5):
            time.sleep(0.1)
            content = b"".join(b"%s  /%d\n" % (EMPTY, n) for n in range(number + 3))
            index_file(pair).write_bytes(content + end)
        index_file(pair).write_bytes(content + b"%s  /a\n" % EMPTY)

    writer = threading.Thread(target=write_on)
    writer.start()
    fetched = fetch(pair, still=0.4)
    writer.join()
    assert fetched.files == 8


def test_an_index_that_never_holds_still_can_be_tried_again_later(pair: Pair) -> None:
    """It is an error that a retry may mend."""
    index_file(pair).write_bytes(b"%s  /a\n" % EMPTY)
    stop = threading.Event()

    def write_on() -> None:
        while not stop.wait(0.005):
            with index_file(pair).open("ab") as file:
                file.write(b"# more\n")

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        with pytest.raises(ConnectionLost, match="changed each time"):
            fetch(pair, still=0.05)
    finally:
        stop.set()
        writer.join()


def test_an_index_that_is_too_old_is_refused(pair: Pair) -> None:
    """The job on A may have stopped long ago; the message says how old it is, and what is allowed."""
    index_file(pair).write_bytes(b"%s  /a\n" % EMPTY + END)
    then = time.time() - 30 * 3600 - 20
    os.utime(pair.index, (then, then))
    with pytest.raises(IndexRefused, match="30 h old, more than the allowed 26 h"):
        fetch(pair, max_age=26 * 3600.0)
    with pytest.raises(IndexRefused, match=r"30 h .+ old, more than the allowed 30 h"):
        fetch(pair, max_age=30 * 3600.0)
    assert fetch(pair, max_age=31 * 3600.0).age >= 30 * 3600 - 60


def test_a_connection_that_breaks_leaves_no_index(pair: Pair) -> None:
    """A retry begins anew."""
    index_file(pair).write_bytes(b"%s  /a\n" % EMPTY + b"# filler\n" * 20_000)
    pair.mirror.claim()
    run = pair.new_run()

    def connect() -> Reader:
        server = ServerProcess()
        pair.servers.append(server)
        return Reader(CutChannel(server.channel, 100_000))

    with pytest.raises(ConnectionLost):
        fetch_index(pair.mirror, run, connect, pair.index)
    assert not run.state.exists()
    assert pair.fetch(run, still=0.1).files == 1


def test_fetching_again_takes_back_an_older_plan(pair: Pair) -> None:
    """So that a run can never commit a plan that was made of another index."""
    run = pair.planned(alpha=(None, b"1"))
    assert run.plan.exists()
    index_file(pair).write_bytes(b"nonsense\n")
    with pytest.raises(IndexRefused):
        pair.fetch(run, still=0.1)
    with pytest.raises(RunIncomplete):
        pair.commit(run)


def test_a_try_that_was_thought_dead_takes_nothing_from_its_retry(pair: Pair) -> None:
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run, attempt=2)
    plan = pair.diff(run)
    with pytest.raises(DestinationBusy, match="try 2 of manual__1 has fetched the index"):
        pair.fetch(run, attempt=1)
    pair.pull(run, plan)
    assert pair.finish(run).added == 1
    # The same id may be of another run, in an Airflow whose database was made anew.
    assert pair.fetch(run, attempt=1).files == 1


def test_a_plan_that_was_thought_dead_takes_nothing_from_its_retry(pair: Pair) -> None:
    """Another run may have been committed meanwhile, so that it would be another plan."""
    other = pair.planned(alpha=(b"1", b"2"))
    pair.put("alpha", b"3")
    pair.build_index()
    run = pair.new_run()
    pair.fetch(run)
    plan = pair.diff(run, attempt=2)
    pair.pull(run, plan)
    pair.finish(other)
    with pytest.raises(DestinationBusy, match="try 2 of manual__3 has made the plan"):
        pair.diff(run, attempt=1)
    assert not pair.finish(run).failed


@pytest.mark.parametrize("fetched_before", [False, True])
@pytest.mark.parametrize("refusal", ["too old", "never still", "connection lost"])
def test_of_an_index_that_is_refused_no_later_step_can_make_use(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fetched_before: bool, refusal: str
) -> None:
    """Nothing of it stays, nor of one that the same run had before; also if their bytes are the same."""
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.new_run()
    if fetched_before:
        pair.fetch(run)
    if refusal == "too old":
        os.utime(pair.index, (1_000_000_000, 1_000_000_000))
        with pytest.raises(IndexRefused, match="max_index_age"):
            pair.fetch(run, max_age=3600.0)
    elif refusal == "never still":
        index_file(pair).write_bytes(b"%s  /a\n" % EMPTY)
        monkeypatch.setattr(fetch_module, "_stat", lambda *_: Attributes(None, None, None))
        with pytest.raises(ConnectionLost, match="changed each time"):
            pair.fetch(run, still=0.0)
    else:
        monkeypatch.setattr(pair, "connect", lambda: Reader(CutChannel(ServerProcess().channel, 100)))
        with pytest.raises(ConnectionLost):
            pair.fetch(run)
    assert not run.index.exists() and not run.received.exists()
    with pytest.raises(RunIncomplete, match="clear its task fetch_index"):
        pair.diff(run)


def test_an_index_that_was_altered_after_the_fetch_is_refused(pair: Pair) -> None:
    """Later steps trust the file by its digest alone."""
    run = pair.planned(alpha=(None, b"1"))
    run.index.write_bytes(b"%s  /evil\n" % EMPTY + END)
    with pytest.raises(IndexRefused, match="not the file that fetch_index wrote"):
        pair.diff(run)
    with pytest.raises(RunIncomplete, match="diff_indexes"):
        pair.commit(run)


def test_a_server_that_keeps_no_times_is_no_reason_to_fail(pair: Pair) -> None:
    """A time that is not told is the beginning of time."""

    class Timeless(ScriptedServer):
        def on_fstat(self, number: int, body: bytes) -> bytes:
            content, _ = self.content(body)
            return packet(ATTRS, number, b"\0\0\0\1" + len(content).to_bytes(8, "big"))

    pair.mirror.claim()
    server = Timeless({b"/i": b"%s  /a\n" % EMPTY + END})
    fetched = fetch_index(pair.mirror, pair.new_run(), lambda: Reader(server), b"/i")
    assert fetched.time == 0


def test_the_round_trip_is_kept_for_the_pull(pair: Pair) -> None:
    """So that it need not be found out again, with another login."""
    pair.put("alpha", b"1")
    pair.build_index()
    run = pair.new_run()
    assert run.round_trip is None
    pair.fetch(run)
    assert run.round_trip is not None and 0 < run.round_trip < 1
