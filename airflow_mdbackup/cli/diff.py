"""``mdbackup diff``: what changed in a text file between two versions."""

from __future__ import annotations

import argparse
import difflib
import sys
import unicodedata
from collections.abc import Iterable
from datetime import datetime

from airflow_mdbackup.cli.common import print_problems, print_stopped, quoted
from airflow_mdbackup.cli.mirrors import open_mirror
from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.times import NoSuchTime, format_time, requested_time
from airflow_mdbackup.scheme.history.replay import FileVersion
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.restore import read_content
from airflow_mdbackup.scheme.recovery.selection import as_path
from airflow_mdbackup.scheme.store.mirror import Mirror

DONE, WRONG = 0, 1
_LARGEST = 32 << 20  # bytes; comparing takes time and memory


def run(args: argparse.Namespace) -> int:
    """Print the difference between two versions of one file.

    :returns: 0, whether they differ or not; 1: the content of one no longer exists, or history is damaged.
    :raises UsageError: there is no such backup, file or time, or the file is too large.
    """
    mirror, words = open_mirror(args)
    if len(words) != 1:
        raise UsageError("name one path: absolute, inside the chroot")
    try:
        return _run(args, mirror, as_path(words[0]))
    except OSError as error:
        print_stopped("diff", error)
        return WRONG


def _run(args: argparse.Namespace, mirror: Mirror, path: bytes) -> int:
    below = path.rstrip(b"/") + b"/"
    with Timeline(mirror, lambda each: each == path or each.startswith(below)) as past:
        wrong = print_problems(past)
        contents = [content for content in past.contents() if content.path == path]
        if not contents and past.knows(path):
            raise UsageError(
                f"{quoted(path)} is a directory: name a file; `mdbackup history` lists all changes in it"
            )
        old, new = _pair(args, past, contents, path)
        texts = [_read(mirror, past, content) for content in (old, new)]
    lost = [content for content, text in zip((old, new), texts, strict=True) if text is None]
    for content in lost:
        print(f"{'pruned' if content.pruned else 'lost'}: {_title(content)}", file=sys.stderr)
    if lost:
        return WRONG
    before, after = (text or b"" for text in texts)
    if b"\0" in before or b"\0" in after:
        print("Binary files differ" if before != after else "Both versions have the same content")
        return wrong
    _print(
        difflib.diff_bytes(
            difflib.unified_diff,
            *(before.splitlines(keepends=True), after.splitlines(keepends=True)),
            *(_title(old).encode(), _title(new).encode()),
        )
    )
    return wrong


def _pair(
    args: argparse.Namespace, past: Timeline, contents: list[FileVersion], path: bytes
) -> tuple[FileVersion, FileVersion]:
    """Return the two versions to compare: by default the last two."""
    if not contents:
        raise UsageError(f"{quoted(path)} was never backed up")
    old = None if args.since is None else _as_of(past, contents, args.since)
    new = contents[-1] if args.until is None else _as_of(past, contents, args.until)
    if old is not None:
        return old, new
    position = contents.index(new)
    if not position:
        raise UsageError(f"{quoted(path)} has no version before the one of {format_time(new.since)}")
    return contents[position - 1], new


def _as_of(past: Timeline, contents: list[FileVersion], text: str) -> FileVersion:
    requested = requested_time(text, datetime.now().astimezone())
    if requested.understood_as is not None:
        print(requested.understood_as, file=sys.stderr)
    try:
        moment = past.find_commit(requested)
    except NoSuchTime as error:
        raise UsageError(str(error)) from error
    found = [content for content in contents if moment is not None and content.since <= moment.time]
    if not found:
        raise UsageError(
            f"it did not exist yet at {text!r}: its first version is of {format_time(contents[0].since)}"
        )
    return found[-1]


def _read(mirror: Mirror, past: Timeline, content: FileVersion) -> bytes | None:
    if (content.size or 0) > _LARGEST:
        raise UsageError(
            f"{_title(content)} has {content.size:,} bytes, too many to compare: restore both versions"
        )
    return read_content(mirror, past, content)


def _title(content: FileVersion) -> str:
    return f"{quoted(content.path)}\t{format_time(content.since) or 'at an unknown time'}"


def _print(lines: Iterable[bytes]) -> None:
    """Print lines of a file: unchanged into a pipe, escaped on a terminal."""
    output = sys.stdout.buffer
    to_terminal = sys.stdout.isatty()
    for line in lines:
        shown = _escape(line) if to_terminal else line
        output.write(shown if shown.endswith(b"\n") else shown + b"\n\\ No newline at end of file\n")
    output.flush()


def _escape(line: bytes) -> bytes:
    """Escape all bytes that could act on a terminal, or change the direction of the text."""
    text = line.decode("utf-8", "surrogateescape")
    if text.rstrip("\n").isprintable():
        return line
    return "".join(
        letter
        if letter.isprintable() or letter in "\t\n" or unicodedata.category(letter) == "Zs"
        else "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))
        for letter in text
    ).encode("utf-8", "surrogateescape")
