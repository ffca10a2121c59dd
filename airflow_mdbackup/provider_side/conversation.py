"""What the consumer says and hears while a provider builds its index. Input and output are the caller's.

::

    conversation = Conversation(request, "connection web_index", log)
    while True:
        run conversation.command over SSH, send conversation.opening, leave standard input open
        conversation.listen()
        send what conversation.hear(piece) returns for each piece of output
        give up once conversation.patience() is used up
        if conversation.ends(status): break
    done = conversation.result()

A shell account is sent the whole program, an account with a forced command only the request: the other side
says which it wants. :data:`.STOP`, sent once there is output, stops the build; an input that merely ends does
not.
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

READY_WITHIN = 60.0  # seconds in which the other side should have said what it wants
SILENT_FOR = 180.0  # seconds; it says something every 5, and every 60 where it waits for another build

_SHOWN = 20  # lines of each kind of a provider's output that are shown
_LINE = 8192  # bytes that one line of output may have
# What a command may write, whatever it is, and more for each second: an indexer says something every 5.
_LINES = 10_000
_BYTES = 16 << 20
_LINES_A_SECOND = 1
_BYTES_A_SECOND = 16 << 10


class Log(Protocol):
    """What is used of a logger, Airflow's or another."""

    def info(self, message: str, /, *values: Any) -> Any: ...

    def warning(self, message: str, /, *values: Any) -> Any: ...


class Conversation:
    """One build of an index, from the first word to the last.

    :param request: what to index.
    :param where: what messages call the other side.
    :param log: gets progress, and what is of interest.
    :ivar command: what is to be run over SSH now.
    :ivar opening: what is to be sent to it at once.
    :ivar begun: the other side has been given the request.
    :ivar answered: an indexer was heard.
    :ivar reached: files and bytes that it has passed by, so far as it told.
    """

    def __init__(self, request: IndexRequest, where: str, log: Log) -> None:
        self.command = python_command()
        self.opening = b""
        self.begun = False
        self.answered = False
        self.reached = (0, 0)
        self._began = self._heard = time.monotonic()  # when the other side last made sense
        self._lines = 0  # that came
        self._bytes = 0
        self._request = request
        self._where = where
        self._log = log
        self._rest = b""  # the beginning of a line
        self._last: Done | Failed | None = None
        self._status: int | None = None
        self._stray: list[str] = []
        self._warned = 0
        self._informed = 0
        self._pace = ReportTimer()

    def listen(self) -> None:
        """Count the time that the other side is silent from now."""
        self._heard = time.monotonic()

    def patience(self) -> float:
        """Return the seconds for which to wait for more.

        :raises ConnectionLost: it has been waited for long enough, or the other side has written far more
            than an indexer does. Lines that mean nothing do not count.
        """
        if self._is_too_much():
            flood = f"wrote {self._lines:,} lines and {self._bytes:,} bytes, far more than an indexer does"
            said = f": {' / '.join(self._stray)[:500]}" if self._stray else ""
            who = "the other side" if self.begun else "nothing answers there as an indexer does: the command"
            raise ConnectionLost(f"{self._where}: {who} {flood}{said}")
        left = self._heard + (SILENT_FOR if self.begun else READY_WITHIN) - time.monotonic()
        if left > 0:
            return left
        if not self.begun:
            raise ConnectionLost(f"{self._where}: nothing answers there as an indexer does")
        raise ConnectionLost(
            f"{self._where}: nothing was heard of the build for {SILENT_FOR:.0f} seconds. It may go on, and "
            "a retry joins it; if that hears nothing either, see whether the indexer hangs on the provider, "
            "in a read of a dead disk or server."
        )

    def hear(self, data: bytes) -> bytes:
        """Take in output of the other side, and return what to send to it.

        What is too much is not looked at; :meth:`patience` then says so.
        """
        self._lines += data.count(b"\n")
        self._bytes += len(data)
        if self._is_too_much():
            return b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LINE:]
        return b"".join(map(self._answer, lines))

    def _is_too_much(self) -> bool:
        """Whether the other side has written so much that it is no indexer, or means ill."""
        seconds = max(0.0, time.monotonic() - self._began)
        return (
            self._lines > _LINES + seconds * _LINES_A_SECOND
            or self._bytes > _BYTES + seconds * _BYTES_A_SECOND
        )

    def _answer(self, line: bytes) -> bytes:
        line = line.rstrip(b"\r")
        if not self.begun:  # a greeting need not have ended its line
            line = line[max(0, line.rfind(b"mdbackup ready ")) :]
        if not line.startswith(b"mdbackup "):
            self._show(line)
            return b""
        report = parse_report(line.decode("ascii", "backslashreplace"))
        if report is not None and (self.begun or isinstance(report, Ready)):
            self.answered = True
            self.listen()
        if isinstance(report, Ready):
            if self.begun:
                return b""
            self.begun = True
            return python_input(self._request) if report.program else request_line(self._request)
        if isinstance(report, Done | Failed):
            self._last = report
        elif isinstance(report, Progress):
            self.reached = (report.files, report.bytes)
            if self._pace.due():
                self._log.info(
                    "%s files so far, %s of them hashed; %.1f MB in %.0f s",
                    *(report.files, report.hashed, report.bytes / 1e6, report.seconds),
                )
        elif isinstance(report, Unreadable):
            self._warn("Unreadable on the provider: %s (%s)", to_text(report.path), report.reason)
        elif isinstance(report, Rotten):
            self._warn("Rotten on the provider, content changed but times did not: %s", to_text(report.path))
        elif isinstance(report, Waiting):
            self._inform("Waiting on the provider: %s", report.text)
        elif isinstance(report, Joined):
            self._inform("Joined on the provider: %s", report.text)
        elif isinstance(report, Note):
            self._inform("The provider: %s", report.text)
        else:
            self._show(line)
        return b""

    def _show(self, line: bytes) -> None:
        """Log the first of the lines that are no report, as a login shell's greeting is none."""
        if len(self._stray) < _SHOWN and (stray := to_text(line)):
            self._stray.append(stray)
            self._log.info("The provider says: %s", stray)

    def _warn(self, message: str, *values: str) -> None:
        self._warned += 1
        if self._warned <= 2 * _SHOWN:
            self._log.warning(message, *values)

    def _inform(self, message: str, text: str) -> None:
        """Log what is seldom said, unless by a provider that means ill; a long wait is still seen."""
        self._informed += 1
        if self._informed <= 2 * _SHOWN or self._pace.due():
            self._log.info(message, text[:_LINE])

    def ends(self, status: int | None) -> bool:
        """Take in that the command has ended, and return whether that is the end of it all.

        :param status: its exit status; None if the server told none.
        """
        if self._rest:
            self.hear(b"\n")
        if status == NO_PYTHON and not self.begun:
            self._log.info("The provider has no Python 3.6 or newer; using sh, find and md5sum")
            self.command, self.opening, self.begun = shell_command(), shell_input(self._request), True
            return False
        self._status = status
        return True

    def result(self) -> Done:
        """Return what the build came to.

        :raises NotOnProvider: the index could not be built; the old one is still there.
        :raises AccessRefused: the account runs no indexer.
        """
        if isinstance(self._last, Done):
            return self._last
        what = f"{self._where}: the provider index was not built"
        said = " / ".join(self._stray)[:500] or "no output"
        if self._last is None and self.answered:
            raise NotOnProvider(
                f"{what}: the indexer ended without a result (exit status {self._status}): {said}. Was it "
                "killed, as where memory is short? The log of the provider's system may tell. The old index, "
                "if any, is unchanged."
            )
        if self._last is None:
            raise AccessRefused(
                f"{what}: the account did not run the indexer (exit status {self._status}): {said}. Is it "
                "the index account, and may it use a shell or has its key the forced command?"
            )
        message = self._last.message[:_LINE].rstrip(".")
        raise NotOnProvider(
            f"{what}: {message}. The old index, if any, is unchanged. Check `chroot`, "
            "`source` and `index`, and what the account may read and write."
        )
