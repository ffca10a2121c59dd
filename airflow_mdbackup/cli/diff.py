"""``mdbackup diff``: what changed in a text from one version to another."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from datetime import datetime

from airflow_mdbackup.cli import UsageError
from airflow_mdbackup.cli.mirrors import mirror_of
from airflow_mdbackup.cli.past import quoted, tell_problems, tell_stopped
from airflow_mdbackup.scheme.mirror import Mirror
from airflow_mdbackup.scheme.moments import NoSuchMoment, in_words, moment_of, stamp_of
from airflow_mdbackup.scheme.past import Content, Past
from airflow_mdbackup.scheme.restore import as_path, bytes_of

DONE, WRONG = 0, 1
_LARGEST = 32 << 20  # bytes; comparing takes time and memory
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


def run(args: argparse.Namespace) -> int:
    """Print the difference between two versions of one file.

    :returns: 0, whether they differ or not; 1: the bytes of one are nowhere any more, or history is damaged.
    :raises UsageError: there is no such backup, file or moment, or the file is too large.
    """
    mirror, words = mirror_of(args)
    if len(words) != 1:
        raise UsageError("name one path, as backupop sees it")
    try:
        return _run(args, mirror, as_path(words[0]))
    except OSError as error:
        tell_stopped("diff", error)
        return WRONG


def _run(args: argparse.Namespace, mirror: Mirror, path: bytes) -> int:
    below = path.rstrip(b"/") + b"/"
    with Past(mirror, lambda each: each == path or each.startswith(below)) as past:
        wrong = tell_problems(past)
        contents = [content for content in past.contents() if content.path == path]
        if not contents and past.knows(path):
            raise UsageError(
                f"{quoted(path)} is a directory: name a file; `mdbackup history` tells of all in it"
            )
        old, new = _pair(args, contents, path)
        texts = [_read(mirror, past, content) for content in (old, new)]
    lost = [content for content, text in zip((old, new), texts, strict=True) if text is None]
    for content in lost:
        print(f"{'pruned' if content.pruned else 'lost'}: {_title(content)}", file=sys.stderr)
    if lost:
        return WRONG
    before, after = (text or b"" for text in texts)
    if b"\0" in before or b"\0" in after:
        print("Binary files differ" if before != after else "They are the same")
        return wrong
    _print(
        difflib.diff_bytes(
            difflib.unified_diff,
            *(before.splitlines(keepends=True), after.splitlines(keepends=True)),
            *(_title(old).encode(), _title(new).encode()),
        )
    )
    return wrong


def _pair(args: argparse.Namespace, contents: list[Content], path: bytes) -> tuple[Content, Content]:
    """Return the two versions that are meant: by default the last two."""
    if not contents:
        raise UsageError(f"nothing was ever backed up as {quoted(path)}")
    new = contents[-1] if args.until is None else _as_of(contents, args.until)
    if args.since is not None:
        return _as_of(contents, args.since), new
    position = contents.index(new)
    if not position:
        raise UsageError(f"{quoted(path)} has no version before that of {in_words(new.since)}")
    return contents[position - 1], new


def _as_of(contents: list[Content], text: str) -> Content:
    try:
        stamp = stamp_of(moment_of(text, datetime.now().astimezone()))
    except NoSuchMoment as error:
        raise UsageError(str(error)) from error
    found = [content for content in contents if content.since <= stamp]
    if not found:
        raise UsageError(f"it was not there yet at {text!r}: first at {in_words(contents[0].since)}")
    return found[-1]


def _read(mirror: Mirror, past: Past, content: Content) -> bytes | None:
    if (content.size or 0) > _LARGEST:
        raise UsageError(f"{_title(content)} has {content.size:,} bytes, too many to compare: restore both")
    return bytes_of(mirror, past, content)


def _title(content: Content) -> str:
    return f"{quoted(content.path)}\t{in_words(content.since) or 'at an unknown moment'}"


def _print(lines: Iterable[bytes]) -> None:
    """Print lines of a file: as they are into a pipe, and so that none acts on a terminal."""
    output = sys.stdout.buffer
    to_people = sys.stdout.isatty()
    for line in lines:
        shown = _CONTROL.sub(_as_text, line) if to_people else line
        output.write(shown if shown.endswith(b"\n") else shown + b"\n\\ No newline at end of file\n")
    output.flush()


def _as_text(found: re.Match[bytes]) -> bytes:
    return b"".join(b"\\x%02x" % byte for byte in found[0])
