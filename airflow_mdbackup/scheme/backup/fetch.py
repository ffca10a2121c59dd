"""The provider's index comes to the consumer, and is checked before anything believes it.

::

    begun          is noted, with the run's place among all: for nothing else may come of it
    fetched        as the backup account sees it, into the run directory, up to a limit
    without end line (somebody's own md5sum job): it must hold still for 5 s, else it is fetched again
    canonicalised  strictly; one bad line refuses the whole, and nothing is changed
    told           the run's state: digest, counts, age, and that place again

Whatever the provider sends, no more than the limit of it comes to the disk, and with the canonical form and
what sorting takes no more than seven times the limit. After a refusal nothing of it stays.

What this does not give: a limit in time. A provider that sends its index slowly, though not as slowly as the
reader gives up, holds up its own backup for as long as Airflow lets the task run.

Source: the seed's section "Copy Process", step 3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.times import time_of_stamp
from airflow_mdbackup.scheme.common.units import format_two_durations
from airflow_mdbackup.scheme.errors import (
    AccessRefused,
    ConnectionLost,
    DestinationRefused,
    IndexRefused,
    NotOnProvider,
)
from airflow_mdbackup.scheme.files.jsonl import write_state
from airflow_mdbackup.scheme.files.syscalls import not_followed
from airflow_mdbackup.scheme.history.clock import doubt, last_claimed
from airflow_mdbackup.scheme.index.canonical import MalformedIndex, digest
from airflow_mdbackup.scheme.index.received import IndexSummary, canonicalise
from airflow_mdbackup.scheme.store.mirror import Mirror
from airflow_mdbackup.scheme.store.run import Run
from airflow_mdbackup.scheme.transfer.sftp import Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched, Stated, Stream, Wanted
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Code, Refusal

log = logging.getLogger(__name__)

_STILL = 5.0  # seconds that an index without end line must hold still
_TRIES = 12
MAX_SIZE = 4 << 30
"""Bytes that an index may have unless told otherwise: some 40 million files."""


@dataclass(frozen=True, slots=True)
class FetchedIndex:
    """The provider index of a run.

    :ivar size: bytes of all files, if the index tells.
    :ivar time: Unix seconds by A's clock; what changed on A since then may differ from the index.
    :ivar age: seconds since it was written, by the consumer's clock.
    :ivar complete: whether it had an end line.
    :ivar clock: for people: why the clock of the consumer may be wrong, if anything speaks for that.
    """

    files: int
    unreadable: int
    rotten: int
    size: int | None
    digest: str
    time: int
    age: int
    complete: bool
    clock: str | None = None


def fetch_index(
    mirror: Mirror,
    run: Run,
    connect: Callable[[], Reader],
    index: bytes,
    *,
    max_age: float | None = None,
    max_size: int = MAX_SIZE,
    still: float = _STILL,
    attempt: int = 0,
    built: float | None = None,
) -> FetchedIndex:
    """Fetch and check the provider index, and begin the run's directory with it.

    :param index: its path, as the backup account sees it.
    :param max_age: seconds that the index may be old, or None.
    :param max_size: bytes that the index may have.
    :param still: seconds that an index without end line must hold still.
    :param attempt: counts the tries of this run's fetch. One that was thought dead, and goes on once a later
        one has its index, would take that away from the steps that go on from it.
    :param built: when this run had it built, in Unix seconds by the consumer's clock; None if it did not.
    :raises NotOnProvider: there is none.
    :raises AccessRefused: it cannot be read.
    :raises IndexRefused: it is malformed, truncated, too large, or too old.
    :raises ConnectionLost: the connection broke, or the index never held still.
    :raises DestinationRefused: a symlink stands where the run's directory belongs.
    :raises DestinationBusy: an earlier try of this run does not end, or a later one has ended.
    :raises DestinationFull, DestinationRefused, DestinationBroken, WorkerExhausted: see
        :meth:`.Mirror.translate_os_errors`.
    """
    with mirror.translate_os_errors():
        if run.folder.is_symlink():
            raise DestinationRefused(
                f"{mirror.provider}: {run.folder} is a symlink: remove it, and try again"
            )
        with run.lock("fetch_index", mirror.provider, make=True):
            if (later := run.made_by(run.state) if run.index.exists() else 0) > attempt:
                raise run.comes_late(mirror.provider, "fetched the index", attempt, later)
            try:
                return _fetch_index(mirror, run, connect, index, max_age, max_size, still, attempt, built)
            except BaseException:
                run.index.unlink(missing_ok=True)
                raise
            finally:
                run.received.unlink(missing_ok=True)


def _fetch_index(
    mirror: Mirror,
    run: Run,
    connect: Callable[[], Reader],
    index: bytes,
    max_age: float | None,
    max_size: int,
    still: float,
    attempt: int,
    built: float | None,
) -> FetchedIndex:
    run.begin_again()
    order = mirror.next_order()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    write_state(run.begun, {"run_id": run.run_id, "provider": mirror.provider, "order": order, "at": at})
    reader = connect()
    fetched = _fetch(mirror.provider, run, reader, index, max_age, max_size, still)
    written = round(time.time()) - fetched.age
    since = timedelta(seconds=0 if built is None else time.time() - built)
    clock = doubt(time_of_stamp(mirror.now()), last_claimed(mirror), written, built is not None, since)
    fetched = replace(fetched, clock=clock)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"attempt": attempt, "fetched": at, "round_trip": reader.round_trip}
    _write_run(run, mirror.provider, fetched, order=order, **told)
    return fetched


def fetch_to_look(
    provider: str,
    run: Run,
    connect: Callable[[], Reader],
    index: bytes,
    *,
    max_age: float | None = None,
    max_size: int = MAX_SIZE,
    still: float = _STILL,
) -> FetchedIndex:
    """Fetch and check the provider index for whoever only looks. No mirror is needed, or touched.

    :param run: one with a directory of its own elsewhere, which is there.
    :raises NotOnProvider, AccessRefused, IndexRefused, ConnectionLost: see :func:`fetch_index`.
    :raises OSError: that directory cannot take it.
    """
    try:
        fetched = _fetch(provider, run, connect(), index, max_age, max_size, still)
    finally:
        run.received.unlink(missing_ok=True)
    _write_run(run, provider, fetched)
    return fetched


def take_index(provider: str, run: Run, file: Path) -> FetchedIndex:
    """Check a provider index that lies in a local file, for whoever only looks.

    :param run: see :func:`fetch_to_look`.
    :raises IndexRefused: it is malformed, or truncated.
    :raises OSError: it cannot be read.
    """
    where = f"{provider}: index {file}"
    try:
        summary = canonicalise(file, run.index, name=where)
    except MalformedIndex as error:
        raise IndexRefused(f"{error}. Nothing was changed. Build the index again.") from None
    fetched = _fetched(run, summary, int(file.stat().st_mtime))
    _write_run(run, provider, fetched)
    return fetched


def _write_run(run: Run, provider: str, index: FetchedIndex, **more: Any) -> None:
    write_state(run.state, {"run_id": run.run_id, "provider": provider, **more, "index": asdict(index)})


def _fetch(
    provider: str,
    run: Run,
    reader: Reader,
    index: bytes,
    max_age: float | None,
    max_size: int,
    still: float,
) -> FetchedIndex:
    where = f"{provider}: index {to_text(index)}"
    for _ in range(_TRIES):
        began = time.monotonic()
        attributes = _receive(reader, run, index, where, max_size)
        refusal = None
        try:
            summary = canonicalise(run.received, run.index, name=where)
            if summary.complete:
                break
        except MalformedIndex as error:
            refusal = error
        time.sleep(max(0.0, still - (time.monotonic() - began)))
        again = _stat(reader, index, where)
        if (again.size, again.mtime) != (attributes.size, attributes.mtime):
            log.info("%s was being written; fetching it again", where)
        elif refusal is not None:
            raise IndexRefused(f"{refusal}. Nothing was changed. Rebuild the index on the provider.")
        else:
            log.warning("%s has no end line; it held still for %.0f s and is taken as whole", where, still)
            break
    else:
        raise ConnectionLost(f"{where} changed each time that it was fetched; is it written in place?")
    fetched = _fetched(run, summary, attributes.mtime or 0)
    if max_age is not None and fetched.age > max_age:
        age, most = format_two_durations(timedelta(seconds=fetched.age), timedelta(seconds=max_age))
        raise IndexRefused(
            f"{where} is {age} old, more than the allowed {most} (max_index_age). "
            "Does the job that builds it on the provider still run? Are the clocks of both right? Here it "
            f"is {datetime.now().astimezone():%Y-%m-%d %H:%M %z}. Nothing was changed."
        )
    return fetched


def _fetched(run: Run, summary: IndexSummary, written: int) -> FetchedIndex:
    """Return what there is to say of the run's index, which was written then, in Unix seconds."""
    return FetchedIndex(
        *(summary.files, summary.unreadable, summary.rotten, summary.size, digest(run.index)),
        time=written if summary.started is None else summary.started,
        age=round(time.time() - written),
        complete=summary.complete,
    )


def _receive(reader: Reader, run: Run, index: bytes, where: str, max_size: int) -> Attributes:
    """Write the index as it comes to the run directory, and return its attributes, with the size that came.

    :raises IndexRefused: it has more than ``max_size`` bytes, by what the provider says or by what comes.
    """
    with open(run.received, "wb", opener=not_followed) as file:

        def begin(attributes: Attributes) -> Stream:
            _check_size(attributes.size or 0, max_size, where)
            return Stream(write)

        def write(data: bytes | memoryview) -> None:
            _check_size(file.tell() + len(data), max_size, where)
            file.write(data)

        reader.submit(Wanted(index, None, begin))
        (answer,) = reader.wait()
        assert isinstance(answer, Fetched)
        write(answer.content or b"")
    if answer.refusal is not None:
        raise _not_there(answer.refusal, where)
    assert answer.before is not None
    return answer.before._replace(size=answer.size)


def _check_size(size: int, max_size: int, where: str) -> None:
    if size > max_size:
        raise IndexRefused(
            f"{where} has {size:,} bytes, more than the allowed {max_size:,} (max_index_size). Is that the "
            "index? If it is, and is meant to be so large, allow more. Nothing was changed."
        )


def _stat(reader: Reader, index: bytes, where: str) -> Attributes:
    reader.submit_stat(index, None)
    (answer,) = reader.wait()
    assert isinstance(answer, Stated)
    if answer.attributes is None:
        assert answer.refusal is not None
        raise _not_there(answer.refusal, where)
    return answer.attributes


def _not_there(refusal: Refusal, where: str) -> NotOnProvider | AccessRefused:
    if refusal.code == Code.NO_SUCH_FILE:
        return NotOnProvider(
            f"{where} is not there. Has it been built yet? Check `index`, and `chroot` if "
            "build_provider_index made it: both sides must mean the same file."
        )
    if refusal.code in (Code.PERMISSION_DENIED, Code.SPECIAL):
        return AccessRefused(
            f"{where} cannot be read by the backup account ({refusal.message}). It must have mode 0644, and "
            "its directory 0755."
        )
    return NotOnProvider(f"{where} could not be read on the provider ({refusal.message}). Look at its disk.")
