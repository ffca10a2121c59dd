"""Fetches the provider's index, and checks it before anything relies on it.

::

    begin         record that the run has begun, and its place in the order of all runs
    fetch         the file as the backup account sees it, into the run directory, up to a limit
                  without an end line (from an md5sum job): it must not change for 5 s, else fetch it again
    canonicalise  strictly: one malformed line refuses the whole index, and nothing is changed
    record        the state of the run: digest, counts, age, and its place in the order of runs

Whatever the provider sends, the received file stays within the limit, and together with the canonical form
and the files for sorting within seven times the limit. Nothing of a refused index remains.

Limitations: there is no time limit. A provider that sends its index slowly, but not slowly enough for the
reader to give up, delays its own backup for as long as Airflow lets the task run.

Source: the seed's section "Copy Process", step 3.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
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

_TRIES = 12
MAX_SIZE = 4 << 30
"""The default limit of an index in bytes: some 40 million files."""


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """What an index must comply with.

    :ivar max_age: seconds since it was written, or None.
    :ivar max_size: bytes.
    :ivar still: seconds for which an index without an end line must not change.
    """

    max_age: float | None = None
    max_size: int = MAX_SIZE
    still: float = 5.0


DEFAULT_LIMITS = IndexLimits()


@dataclass(frozen=True, slots=True)
class FetchedIndex:
    """The provider index of a run.

    :ivar size: total bytes of the files, if the index states it.
    :ivar time: Unix seconds by A's clock; files that changed on A since then may differ from the index.
    :ivar age: seconds since it was written, by the consumer's clock.
    :ivar complete: whether it had an end line.
    :ivar clock: a message why the consumer's clock may be wrong, or None.
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
    limits: IndexLimits = DEFAULT_LIMITS,
    *,
    attempt: int = 0,
    built: float | None = None,
) -> FetchedIndex:
    """Fetch and check the provider index, and begin the run's directory with it.

    :param index: its path, as the backup account sees it.
    :param attempt: numbers the tries of this task. A try that was believed dead, and resumes after a later
        one has its index, must not take that index away from the steps that rely on it.
    :param built: when this run had the index built, in Unix seconds by the consumer's clock; None if it did
        not.
    :raises NotOnProvider: there is no index.
    :raises AccessRefused: it cannot be read.
    :raises IndexRefused: it is malformed, truncated, too large, or too old.
    :raises ConnectionLost: the connection broke, or the index kept changing.
    :raises DestinationRefused: the run's directory is a symlink.
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
                order = _begin(mirror, run)
                reader = connect()
                fetched = _fetch(mirror.provider, run, reader, index, limits)
                fetched = replace(fetched, clock=_doubt_clock(mirror, fetched, built))
                more = {
                    "order": order,
                    "attempt": attempt,
                    "fetched": _now(),
                    "round_trip": reader.round_trip,
                }
                _write_run(run, mirror.provider, fetched, more)
                return fetched
            except BaseException:
                run.index.unlink(missing_ok=True)
                raise
            finally:
                run.received.unlink(missing_ok=True)


def _begin(mirror: Mirror, run: Run) -> str:
    """Discard an earlier plan, note that the run has begun, and return its place in the order of all runs."""
    run.begin_again()
    order = mirror.next_order()
    write_state(run.begun, {"run_id": run.run_id, "provider": mirror.provider, "order": order, "at": _now()})
    return order


def _doubt_clock(mirror: Mirror, fetched: FetchedIndex, built: float | None) -> str | None:
    written = round(time.time()) - fetched.age
    since = timedelta(seconds=0 if built is None else time.time() - built)
    return doubt(time_of_stamp(mirror.now()), last_claimed(mirror), written, built is not None, since)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def fetch_for_preview(
    provider: str, run: Run, connect: Callable[[], Reader], index: bytes, limits: IndexLimits = DEFAULT_LIMITS
) -> FetchedIndex:
    """Fetch and check the provider index for a command that changes nothing. Needs no mirror.

    :param run: with an existing directory outside of the mirror.
    :raises NotOnProvider, AccessRefused, IndexRefused, ConnectionLost: see :func:`fetch_index`.
    :raises OSError: that directory cannot be written.
    """
    try:
        fetched = _fetch(provider, run, connect(), index, limits)
    finally:
        run.received.unlink(missing_ok=True)
    _write_run(run, provider, fetched, {})
    return fetched


def check_local_index(provider: str, run: Run, file: Path) -> FetchedIndex:
    """Check a provider index in a local file, for a command that changes nothing.

    :param run: see :func:`fetch_for_preview`.
    :raises IndexRefused: it is malformed, or truncated.
    :raises OSError: it cannot be read.
    """
    where = f"{provider}: index {file}"
    try:
        summary = canonicalise(file, run.index, name=where)
    except MalformedIndex as error:
        raise IndexRefused(f"{error}. Nothing was changed. Build the index again.") from None
    fetched = _describe(run, summary, int(file.stat().st_mtime))
    _write_run(run, provider, fetched, {})
    return fetched


def _write_run(run: Run, provider: str, index: FetchedIndex, more: Mapping[str, Any]) -> None:
    write_state(run.state, {"run_id": run.run_id, "provider": provider, **more, "index": asdict(index)})


def _fetch(provider: str, run: Run, reader: Reader, index: bytes, limits: IndexLimits) -> FetchedIndex:
    where = f"{provider}: index {to_text(index)}"
    for _ in range(_TRIES):
        began = time.monotonic()
        attributes = _receive(reader, run, index, where, limits.max_size)
        refusal = None
        try:
            summary = canonicalise(run.received, run.index, name=where)
            if summary.complete:
                break
        except MalformedIndex as error:
            refusal = error
        time.sleep(max(0.0, limits.still - (time.monotonic() - began)))
        again = _stat(reader, index, where)
        if (again.size, again.mtime) != (attributes.size, attributes.mtime):
            log.info("%s was being written; fetching it again", where)
        elif refusal is not None:
            raise IndexRefused(f"{refusal}. Nothing was changed. Rebuild the index on the provider.")
        else:
            log.warning(
                "%s has no end line; it did not change for %.0f s and is accepted as complete",
                *(where, limits.still),
            )
            break
    else:
        raise ConnectionLost(f"{where} changed each time it was fetched; is it written in place?")
    fetched = _describe(run, summary, attributes.mtime or 0)
    if limits.max_age is not None and fetched.age > limits.max_age:
        age, most = format_two_durations(timedelta(seconds=fetched.age), timedelta(seconds=limits.max_age))
        raise IndexRefused(
            f"{where} is {age} old, more than the allowed {most} (max_index_age). "
            "Does the job that builds it on the provider still run? Are both clocks right? Here it "
            f"is {datetime.now().astimezone():%Y-%m-%d %H:%M %z}. Nothing was changed."
        )
    return fetched


def _describe(run: Run, summary: IndexSummary, written: int) -> FetchedIndex:
    """Return what is known about the run's index, which was written at this time, in Unix seconds."""
    return FetchedIndex(
        *(summary.files, summary.unreadable, summary.rotten, summary.size, digest(run.index)),
        time=written if summary.started is None else summary.started,
        age=round(time.time() - written),
        complete=summary.complete,
    )


def _receive(reader: Reader, run: Run, index: bytes, where: str, max_size: int) -> Attributes:
    """Write the index to the run directory as it arrives; return its attributes, with the received size.

    :raises IndexRefused: it is over ``max_size`` bytes, by its stated or its received size.
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
        raise _translate(answer.refusal, where)
    assert answer.before is not None
    return answer.before._replace(size=answer.size)


def _check_size(size: int, max_size: int, where: str) -> None:
    if size > max_size:
        raise IndexRefused(
            f"{where} has {size:,} bytes, more than the allowed {max_size:,} (max_index_size). Is it "
            "really the index? If so, raise max_index_size. Nothing was changed."
        )


def _stat(reader: Reader, index: bytes, where: str) -> Attributes:
    reader.submit_stat(index, None)
    (answer,) = reader.wait()
    assert isinstance(answer, Stated)
    if answer.attributes is None:
        assert answer.refusal is not None
        raise _translate(answer.refusal, where)
    return answer.attributes


def _translate(refusal: Refusal, where: str) -> NotOnProvider | AccessRefused:
    if refusal.code == Code.NO_SUCH_FILE:
        return NotOnProvider(
            f"{where} does not exist. Has it been built yet? Check `index`, and `chroot` if "
            "build_provider_index made it: both sides must mean the same file."
        )
    if refusal.code in (Code.PERMISSION_DENIED, Code.SPECIAL):
        return AccessRefused(
            f"{where} cannot be read by the backup account ({refusal.message}). It must have mode 0644, and "
            "its directory 0755."
        )
    return NotOnProvider(f"{where} could not be read on the provider ({refusal.message}). Check its disk.")
