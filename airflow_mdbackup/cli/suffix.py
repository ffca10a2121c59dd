"""Endings of names that tell when a file was displaced, as ``rclone --suffix`` and ``rsync --suffix`` add."""

from __future__ import annotations

import argparse
import os
import re
from datetime import UTC, datetime, timedelta

from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.times import stamp_of

_DIGITS = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "S": 2, "y": 2, "j": 3}
_DAYS = ({"m", "d"}, {"j"})  # what tells the day of a year, and
_TIMES = (set[str](), {"H"}, {"H", "M"}, {"H", "M", "S"})  # the time of a day
_AHEAD = timedelta(days=1)


def suffix_of(args: argparse.Namespace) -> Suffix | None:
    """Return the ending that ``args.suffix`` names, if it does.

    :raises UsageError: see :class:`Suffix`; or it is said where an ending stands, and not which.
    """
    if args.suffix is None:
        if args.suffix_keep_extension:
            raise UsageError("--suffix-keep-extension goes with --suffix FORM: name the suffix, too")
        return None
    return Suffix(args.suffix, keeps_extension=args.suffix_keep_extension)


class Suffix:
    """An ending such as ``.%Y-%m-%d``, in the time zone of this machine, or ``~``, which tells no time.

    :param form: with the directives of strptime that are digits: none, or such as tell at least a day, for
        strptime takes what is missing for that of 1900-01-01 00:00:00.
    :param keeps_extension: whether it stands before the extension (``name-2026-11-20.tar.gz``), if there is
        one, as with ``rclone --suffix-keep-extension``.
    :raises UsageError: it has others, skips a part of the time, or is no ending of a name.
    :ivar has_time: whether it tells when.
    """

    def __init__(self, form: str, *, keeps_extension: bool = False) -> None:
        if not form or "/" in form:
            raise UsageError(f"--suffix {form!r} is no ending of a name: write '.%Y-%m-%d', or '~'")
        self._form = form
        pieces, directives = list[bytes](), list[str]()
        for literal, directive in re.findall("([^%]+)|%(.?)", form):
            if not literal and directive not in {*_DIGITS, "%"}:
                known = ", ".join(f"%{letter}" for letter in _DIGITS)
                raise UsageError(f"--suffix {form!r} has %{directive}; only {known} can be read")
            if literal or directive == "%":
                pieces.append(re.escape(os.fsencode(literal or "%")))
            else:
                pieces.append(b"[0-9]{%d}" % _DIGITS[directive])
                directives.append(directive)
        self.has_time = bool(directives)
        if self.has_time and not _tell_a_time(directives):
            raise UsageError(
                f"--suffix {form!r} tells no moment: it skips a part, or has one twice. It needs %Y or %y, "
                "with %m and %d or with %j; then, if at all, %H, %H and %M, or %H, %M and %S. For example "
                "'.%Y-%m-%d', or '-%Y%m%d-%H%M%S'; for a suffix without a year: '.11-20' and --displaced"
            )
        # A hidden file's name, such as .profile, is all extension to rclone.
        name, extension = (b"[^/]*", rb"(?:\.[^/.]*)*") if keeps_extension else (b"[^/]+", b"")
        pattern = b"(.*/%b)(%b)(%b)" % (name, b"".join(pieces), extension)
        self._ending = re.compile(pattern, re.DOTALL)

    def cut(self, path: bytes) -> tuple[bytes, str] | None:
        """Return the path without the ending, and the stamp that this tells or an empty text.

        None if it has no such ending.
        """
        match = self._ending.fullmatch(path)
        if match is None:
            return None
        without = match[1] + match[3]
        if without.endswith(b"/"):  # the name is nothing but the ending
            return None
        if not self.has_time:
            return without, ""
        try:
            moment = datetime.strptime(os.fsdecode(match[2]), self._form).astimezone()
            # A number that looks like a time to come is none; clocks and time zones differ by a day at most.
            return None if moment > datetime.now(UTC) + _AHEAD else (without, stamp_of(moment))
        except (ValueError, OverflowError):
            return None


def _tell_a_time(directives: list[str]) -> bool:
    """Whether directives tell a year, its day, and of the time of day no part without those above it."""
    given = set(directives)
    is_year = len(given & {"Y", "y"}) == 1
    parts = given & {"m", "d", "j"} in _DAYS, given & {"H", "M", "S"} in _TIMES
    return len(given) == len(directives) and is_year and all(parts)
