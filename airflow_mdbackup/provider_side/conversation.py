"""What B sends and receives while a provider builds its index. Input and output are the caller's.

::

    conversation = Conversation(request, "connection web_index", log)
    while True:
        run conversation.command over SSH, send conversation.opening, leave standard input open
        conversation.restart_timer()
        send what conversation.receive(piece) returns for each piece of output
        give up once conversation.seconds_left() raises
        if conversation.is_over(status): break
    done = conversation.result()

A shell account is sent the whole program, an account with a forced command only the request: the provider
says which one it needs. :data:`.STOP`, sent once there is output, stops the build; the end of the
input does not.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from airflow_mdbackup.provider_side.programs import (
    NO_PYTHON,
    python_command,
    python_input,
    shell_command,
    shell_input,
)
from airflow_mdbackup.provider_side.report import (
    Done,
    Failed,
    Joined,
    Note,
    Progress,
    Ready,
    Rotten,
    Unreadable,
    Waiting,
    parse_report,
)
from airflow_mdbackup.provider_side.request import IndexRequest, request_line
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.common.progress import ReportTimer
from airflow_mdbackup.scheme.errors import AccessRefused, ConnectionLost, NotOnProvider

READY_WITHIN = 60.0  # seconds in which the provider should have said what it needs
SILENT_FOR = 180.0  # seconds; an indexer reports every 5, and every 60 while it waits for another build

_MAX_LOGGED = 20  # lines of each kind of a provider's output
_MAX_LINE = 8192  # bytes
# What a command may write in any case, and per second: an indexer reports every 5 seconds.
_MAX_LINES = 10_000
_MAX_BYTES = 16 << 20
_LINES_PER_SECOND = 1
_BYTES_PER_SECOND = 16 << 10


class Log(Protocol):
    """The part of a logger that is used, Airflow's or another."""

    def info(self, message: str, /, *values: Any) -> Any: ...

    def warning(self, message: str, /, *values: Any) -> Any: ...


class Conversation:
    """One build of an index, from the command to the result.

    :param request: what to index.
    :param where: what messages call the provider.
    :param log: gets progress, and what the provider reports.
    :ivar command: the command to run over SSH now.
    :ivar opening: what to send to it at once.
    :ivar started: the provider has been sent the request.
    :ivar answered: the provider has answered as an indexer.
    :ivar progress: files and bytes that the indexer has processed, as last reported.
    """

    def __init__(self, request: IndexRequest, where: str, log: Log) -> None:
        self.command = python_command()
        self.opening = b""
        self.started = False
        self.answered = False
        self.progress = (0, 0)
        self._began = self._last_report = time.monotonic()
        self._lines = 0  # received
        self._bytes = 0
        self._request = request
        self._where = where
        self._log = log
        self._incomplete = b""  # line
        self._last: Done | Failed | None = None
        self._status: int | None = None
        self._stray: list[str] = []  # the first lines that are not an indexer's
        self._warnings = 0
        self._infos = 0
        self._timer = ReportTimer()

    def restart_timer(self) -> None:
        """Count the seconds without output from now."""
        self._last_report = time.monotonic()

    def seconds_left(self) -> float:
        """Return for how many seconds to wait for more output.

        :raises ConnectionLost: for none, or the provider has written far more than an indexer does. Lines
            that are not an indexer's do not count as output.
        """
        if self._is_flooded():
            flood = f"wrote {self._lines:,} lines and {self._bytes:,} bytes, far more than an indexer does"
            output = f": {' / '.join(self._stray)[:500]}" if self._stray else ""
            who = "the provider" if self.started else "no indexer answers there: the command"
            raise ConnectionLost(f"{self._where}: {who} {flood}{output}")
        left = self._last_report + (SILENT_FOR if self.started else READY_WITHIN) - time.monotonic()
        if left > 0:
            return left
        if not self.started:
            raise ConnectionLost(f"{self._where}: no indexer answers there")
        raise ConnectionLost(
            f"{self._where}: no output from the build for {SILENT_FOR:.0f} seconds. It may still be running, "
            "and a retry joins it. If the retry gets no output either, check whether the indexer hangs on "
            "the provider, reading from a dead disk or server."
        )

    def receive(self, data: bytes) -> bytes:
        """Process output of the provider, and return what to send to it.

        Once there is too much output it is ignored, and :meth:`seconds_left` raises.
        """
        self._lines += data.count(b"\n")
        self._bytes += len(data)
        if self._is_flooded():
            return b""
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        self._incomplete = self._incomplete[-_MAX_LINE:]
        return b"".join(map(self._answer, lines))

    def _is_flooded(self) -> bool:
        """Whether there is so much output that it is not from an indexer, or is malicious."""
        seconds = max(0.0, time.monotonic() - self._began)
        return (
            self._lines > _MAX_LINES + seconds * _LINES_PER_SECOND
            or self._bytes > _MAX_BYTES + seconds * _BYTES_PER_SECOND
        )

    def _answer(self, line: bytes) -> bytes:
        """Process a line, and return what to send."""
        line = line.rstrip(b"\r")
        if not self.started:  # a greeting may lack its line end
            line = line[max(0, line.rfind(b"mdbackup ready ")) :]
        report = None
        if line.startswith(b"mdbackup "):
            report = parse_report(line.decode("ascii", "backslashreplace"))
        if report is not None and (self.started or isinstance(report, Ready)):
            self.answered = True
            self.restart_timer()
        match report:
            case None:
                self._log_stray(line)
            case Ready(program) if not self.started:
                self.started = True
                return python_input(self._request) if program else request_line(self._request)
            case Done() | Failed():
                self._last = report
            case Progress():
                self._log_progress(report)
            case Unreadable(path, reason):
                self._warn("Unreadable on the provider: %s (%s)", to_text(path), reason)
            case Rotten(path):
                self._warn("Bit rot on the provider, content changed but times did not: %s", to_text(path))
            case Waiting(text):
                self._inform("Waiting on the provider: %s", text)
            case Joined(text):
                self._inform("Joined on the provider: %s", text)
            case Note(text):
                self._inform("Note from the provider: %s", text)
        return b""

    def _log_progress(self, report: Progress) -> None:
        self.progress = (report.files, report.bytes)
        if self._timer.due():
            self._log.info(
                "%s files so far, %s of them hashed; %.1f MB in %.0f s",
                *(report.files, report.hashed, report.bytes / 1e6, report.seconds),
            )

    def _log_stray(self, line: bytes) -> None:
        """Log the first of the lines that are not an indexer's, such as a login shell's greeting."""
        if len(self._stray) < _MAX_LOGGED and (stray := to_text(line)):
            self._stray.append(stray)
            self._log.info("Output on the provider: %s", stray)

    def _warn(self, message: str, *values: str) -> None:
        self._warnings += 1
        if self._warnings <= 2 * _MAX_LOGGED:
            self._log.warning(message, *values)

    def _inform(self, message: str, text: str) -> None:
        """Log the first of these, which are rare unless a provider is malicious; after that, at intervals."""
        self._infos += 1
        if self._infos <= 2 * _MAX_LOGGED or self._timer.due():
            self._log.info(message, text[:_MAX_LINE])

    def is_over(self, status: int | None) -> bool:
        """Return whether the conversation is over now that the command has ended, or another one must be run.

        :param status: its exit status; None if the server sent none.
        """
        if self._incomplete:
            self.receive(b"\n")
        if status == NO_PYTHON and not self.started:
            self._log.info("The provider has no Python 3.6 or newer; using sh, find and md5sum")
            self.command, self.opening, self.started = shell_command(), shell_input(self._request), True
            return False
        self._status = status
        return True

    def result(self) -> Done:
        """Return the result of the build.

        :raises NotOnProvider: the index could not be built; the old one is still there.
        :raises AccessRefused: the account does not run an indexer.
        """
        if isinstance(self._last, Done):
            return self._last
        what = f"{self._where}: the provider index was not built"
        output = " / ".join(self._stray)[:500] or "no output"
        if self._last is None and self.answered:
            raise NotOnProvider(
                f"{what}: the indexer ended without a result (exit status {self._status}): {output}. It may "
                "have been killed for lack of memory: check the provider's system log. The old index, if "
                "any, is unchanged."
            )
        if self._last is None:
            raise AccessRefused(
                f"{what}: the account did not run the indexer (exit status {self._status}): {output}. Check "
                "that this is the index account, and that it may use a shell, or its key has the forced "
                "command."
            )
        message = self._last.message[:_MAX_LINE].rstrip(".")
        raise NotOnProvider(
            f"{what}: {message}. The old index, if any, is unchanged. Check `chroot`, "
            "`source` and `index`, and what the account may read and write."
        )
