"""A command's standard output and standard error, with their errors kept apart from all others.

An OSError does not say which file it is about: if the disk under standard output were full, a command would
report that ``dest`` is full, and stop halfway. So writing to these two streams never raises an OSError. What
happens depends on the command::

    only reads      the first error ends the command at once
    changes things  the error is noted, further output is dropped, and the command runs to its end

The error is then reported on standard error, with an exit status of its own. A reader that has closed the
pipe, as ``head`` does, is not an error, and nothing is reported.

Limitations: errors that a disk reports only after ``close``, as NFS may, and errors of streams without a file
descriptor, as in tests, are missed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO, cast

OUTPUT_FAILED = 5
READER_GONE = 128 + 13
"""The status that a shell shows for a program ended by SIGPIPE."""


class OutputFailed(Exception):
    """Standard output or standard error cannot be written. Not an OSError, which would mean a disk."""


class Output:
    """A context manager in which ``sys.stdout`` and ``sys.stderr`` are such streams.

    :class:`OutputFailed` ends the ``with`` block, and does not leave it.

    :param runs_to_end: whether the command continues when they cannot be written.
    """

    def __init__(self, *, runs_to_end: bool) -> None:
        self._runs_to_end = runs_to_end
        self._raws: list[_Raw] = []
        self._before: tuple[Any, Any] = (None, None)
        self._stderr: TextIO = sys.stderr

    def __enter__(self) -> Output:
        self._before = sys.stdout, sys.stderr
        sys.stdout = self._guarded(sys.stdout, "standard output")
        sys.stderr = self._stderr = self._guarded(sys.stderr, "standard error")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for raw in self._raws:
            raw.raises = False
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = self._before
        return isinstance(error, OutputFailed)

    def _guarded(self, stream: TextIO | None, name: str) -> TextIO:
        try:
            raw = _Raw(stream, name)
        except OSError:  # it has no file descriptor, as in tests
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            return cast(TextIO, stream)
        raw.raises = not self._runs_to_end
        self._raws.append(raw)
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        kind = _BehindOutput if name == "standard error" else io.TextIOWrapper
        return kind(
            io.BufferedWriter(raw),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",  # for terminals that know ASCII only
            line_buffering=name == "standard error" or raw.isatty(),
        )

    def status(self, name: str, status: int) -> int:
        """Report what could not be written, and return the exit status of the command.

        :param name: the command's name, for the message.
        :param status: what it returned; kept if it means that the command was not done.
        """
        failed = [(raw.label, raw.failed) for raw in self._raws if raw.failed is not None]
        lost = [(stream, error) for stream, error in failed if error.errno != errno.EPIPE]
        for stream, error in lost:
            done = "the command ran to its end, but " if self._runs_to_end and status < 2 else ""
            why = f"{stream} cannot be written: {error.strerror}; {done}its output is incomplete"
            print(f"{name}: {why}", file=self._stderr, flush=True)
        if status >= 2 or not failed:
            return status
        if lost:
            return OUTPUT_FAILED
        return status if self._runs_to_end else READER_GONE


class _BehindOutput(io.TextIOWrapper):
    """Standard error, kept in order with standard output where both go to the same file."""

    def write(self, text: str, /) -> int:
        if sys.stderr is self:
            sys.stdout.flush()
        return super().write(text)


class _Raw(io.FileIO):
    """The file descriptor of a stream.

    :ivar failed: the first error; everything written after it is dropped.
    :ivar raises: whether that error is also raised.
    """

    def __init__(self, stream: TextIO | None, label: str) -> None:
        # Python has no stream if the descriptor was closed. Writing to this one fails in the same way.
        descriptor = os.open(os.devnull, os.O_RDONLY) if stream is None else stream.fileno()
        super().__init__(descriptor, "w", closefd=stream is None)
        self.label = label
        self.failed: OSError | None = None
        self.raises = False

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                while (written := super().write(data)) is None:  # another process made it non-blocking
                    select.select([], [self.fileno()], [])
                return written
            except OSError as error:
                self.failed = error
                if self.raises:
                    raise OutputFailed(self.label) from error
        return memoryview(data).nbytes


def printable(text: str) -> str:
    """Escape everything in `text` that could act on a terminal, except line ends."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )


class UsageError(Exception):
    """The command cannot do this; the message says what to write instead. Exit status 2."""


def print_note(text: str) -> None:
    """Print something that is not a result, on standard error."""
    print(printable(text), file=sys.stderr)
