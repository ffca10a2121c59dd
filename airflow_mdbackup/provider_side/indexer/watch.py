"""Standard input and signals: the request, progress twice a second, and requests to stop."""

import os
import select
import signal
import time
from typing import Any, Callable

from airflow_mdbackup.provider_side.indexer.common import Failure
from airflow_mdbackup.provider_side.indexer.report import Report

REQUEST_SECONDS = 30.0
MAX_REQUEST_BYTES = 1 << 20
TICK_SECONDS = 0.5


class Input:
    """Standard input: a line with the request, and then perhaps a line ``stop``."""

    def __init__(self) -> None:
        self._unread = b""
        self._open = True
        self._stop = False

    def request(self) -> bytes:
        """Return the first line, which must arrive soon and have a reasonable length."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while b"\n" not in self._unread:
            if len(self._unread) > MAX_REQUEST_BYTES:
                raise Failure("the request is longer than 1 MiB")
            if not self._open:
                raise Failure("standard input ended before a complete line with the request")
            if time.monotonic() > deadline:
                raise Failure(f"no request came within {REQUEST_SECONDS:.0f} seconds")
            self._read(1.0)
        line, self._unread = self._unread.split(b"\n", 1)
        if len(line) > MAX_REQUEST_BYTES:
            raise Failure("the request is longer than 1 MiB")
        return line

    def stop_requested(self) -> bool:
        """Whether there was a line ``stop``."""
        if self._open and not self._stop:
            self._read(0)
        *lines, self._unread = self._unread.split(b"\n")
        self._unread = self._unread[:10]
        self._stop = self._stop or b"stop" in [line.rstrip(b"\r") for line in lines]
        return self._stop

    def close(self) -> None:
        """Stop reading."""
        self._open = False

    def _read(self, seconds: float) -> None:
        try:
            if select.select([0], [], [], seconds)[0]:
                data = os.read(0, 1 << 16)
                self._unread += data
                self._open = data != b""
        except OSError:
            self._open = False


class Watch:
    """Interrupts the build twice a second, to report progress and to look for requests to stop."""

    def __init__(self, report: Report, standard_input: Input) -> None:
        self._report = report
        self._input = standard_input
        self._reason = ""
        self._stop_requested_elsewhere: Callable[[], bool] = bool
        self._may_interrupt = False
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_tick)

    def stop_requested(self) -> bool:
        """Whether a stop was requested on standard input. Raises `Failure` after a signal to stop."""
        if self._reason:
            raise Failure(self._reason)
        return self._input.stop_requested()

    def begin(self, stop_requested_elsewhere: Callable[[], bool]) -> None:
        """From now on a request to stop interrupts the build by a `Failure`, whatever it is doing."""
        self._stop_requested_elsewhere = stop_requested_elsewhere
        self._may_interrupt = True
        signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)

    def end(self) -> None:
        """From now on nothing is interrupted."""
        self._may_interrupt = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._reason = f"stopped by signal {int(number)}"
        self._interrupt_if_stopped()

    def _on_tick(self, number: int, frame: Any) -> None:
        self._report.progress()
        if not self._reason and (self._input.stop_requested() or self._stop_requested_elsewhere()):
            self._reason = "stopped on request"
        self._interrupt_if_stopped()

    def _interrupt_if_stopped(self) -> None:
        # Never in the middle of a line; the next tick follows soon.
        if self._reason and self._may_interrupt and not self._report.writing:
            self.end()
            raise Failure(self._reason)
