"""Standard output and standard error of a command, whose errors are told as theirs.

An OSError does not say whose file it is about: of a full disk under standard output, a command would say that
``dest`` is full, and stop in the middle of what it does. So what writes to these two streams never raises an
OSError::

    only reads      the first error ends the command at once
    changes things  the error is noted, further output is dropped, and the command goes on to its end

and then the error is told on standard error, with an exit status of its own. A reader that has closed the
pipe, as ``head`` does, is no error: nothing is said.

What this does not give: an error that a disk reports only after ``close``, as NFS may; and the errors of
streams without a file descriptor, as tests have.
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
"""What a shell tells of a program that SIGPIPE ended, as that of a Unix tool does."""


class OutputFailed(Exception):
    """Standard output or standard error cannot be written. No OSError, lest it be taken for one of a disk."""


class Output:
    """A context manager in which ``sys.stdout`` and ``sys.stderr`` are such streams.

    It ends the ``with`` block on :class:`OutputFailed`, which nobody outside of it sees.

    :param goes_on: whether the command is to go on when they cannot be written.
    """

    def __init__(self, *, goes_on: bool) -> None:
        self._goes_on = goes_on
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
        except OSError:  # such as one that a test catches
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            return cast(TextIO, stream)
        raw.raises = not self._goes_on
        self._raws.append(raw)
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        kind = _BehindOutput if name == "standard error" else io.TextIOWrapper
        return kind(
            io.BufferedWriter(raw),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",  # where a terminal knows ASCII only
            line_buffering=name == "standard error" or raw.isatty(),
        )

    def status(self, name: str, status: int) -> int:
        """Tell what could not be written, and return the exit status of the command.

        :param name: of the command, as messages have it.
        :param status: what it returned, which stays if it says that the command was not done.
        """
        failed = [(raw.label, raw.failed) for raw in self._raws if raw.failed is not None]
        lost = [(stream, error) for stream, error in failed if error.errno != errno.EPIPE]
        for stream, error in lost:
            done = "the command was carried out to its end, but " if self._goes_on and status < 2 else ""
            why = f"{stream} cannot be written: {error.strerror}; {done}its output is incomplete"
            print(f"{name}: {why}", file=self._stderr, flush=True)
        if status >= 2 or not failed:
            return status
        if lost:
            return OUTPUT_FAILED
        return status if self._goes_on else READER_GONE


class _BehindOutput(io.TextIOWrapper):
    """Standard error, in the order in which things are printed where both go to the same file."""

    def write(self, text: str, /) -> int:
        if sys.stderr is self:
            sys.stdout.flush()
        return super().write(text)


class _Raw(io.FileIO):
    """The file descriptor of a stream.

    :ivar failed: the first error; what is written after it is dropped.
    :ivar raises: whether that error is raised, too.
    """

    def __init__(self, stream: TextIO | None, label: str) -> None:
        # Python has no stream where the descriptor was closed. To write to this fails as to that would.
        descriptor = os.open(os.devnull, os.O_RDONLY) if stream is None else stream.fileno()
        super().__init__(descriptor, "w", closefd=stream is None)
        self.label = label
        self.failed: OSError | None = None
        self.raises = False

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                while (written := super().write(data)) is None:  # somebody made it non-blocking
                    select.select([], [self.fileno()], [])
                return written
            except OSError as error:
                self.failed = error
                if self.raises:
                    raise OutputFailed(self.label) from error
        return memoryview(data).nbytes


def printable(text: str) -> str:
    """Return `text` with all but line ends escaped that could act on a terminal, wherever it comes from."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )


class UsageError(Exception):
    """What was asked for cannot be done like this; the message says what to write instead. Exit status 2."""
