"""Suffixes that may contain when a file was displaced, as ``rclone --suffix`` and ``rsync --suffix`` add."""

from __future__ import annotations

import argparse
import os
import re
from datetime import UTC, datetime, timedelta

from airflow_mdbackup.cli.output import UsageError
from airflow_mdbackup.scheme.common.times import stamp_of

_DIGITS = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "S": 2, "y": 2, "j": 3}
_DAYS = ({"m", "d"}, {"j"})  # complete ways to give the day of a year,
_TIMES = (set[str](), {"H"}, {"H", "M"}, {"H", "M", "S"})  # and the time of day
_CLOCK_DIFFERENCE = timedelta(days=1)


def parse_suffix(args: argparse.Namespace) -> Suffix | None:
    """Return the suffix that ``args.suffix`` describes; None if it is not given.

    :raises UsageError: see :class:`Suffix`; or only the position of a suffix is given.
    """
    if args.suffix is None:
        if args.suffix_keep_extension:
            raise UsageError("--suffix-keep-extension needs --suffix FORM")
        return None
    return Suffix(args.suffix, keeps_extension=args.suffix_keep_extension)


class Suffix:
    """A suffix such as ``.%Y-%m-%d``, in the time zone of this machine, or ``~``, which has no time.

    :param form: with the directives of strptime that stand for digits: none, or enough for at least a day,
        since strptime fills in 1900-01-01 00:00:00 for what is missing.
    :param keeps_extension: whether it is before the extension (``name-2026-11-20.tar.gz``), if there is
        one, as with ``rclone --suffix-keep-extension``.
    :raises UsageError: it has other directives, skips a part of the time, or cannot end a name.
    :ivar has_time: whether it contains a time.
    """

    def __init__(self, form: str, *, keeps_extension: bool = False) -> None:
        if not form or "/" in form:
            raise UsageError(f"--suffix {form!r} cannot end a file name: write '.%Y-%m-%d', or '~'")
        self._form = form
        pieces, directives = list[bytes](), list[str]()
        for literal, directive in re.findall("([^%]+)|%(.?)", form):
            if not literal and directive not in {*_DIGITS, "%"}:
                known = ", ".join(f"%{letter}" for letter in _DIGITS)
                raise UsageError(f"--suffix {form!r} has %{directive}, but only {known} are supported")
            if literal or directive == "%":
                pieces.append(re.escape(os.fsencode(literal or "%")))
            else:
                pieces.append(b"[0-9]{%d}" % _DIGITS[directive])
                directives.append(directive)
        self.has_time = bool(directives)
        if self.has_time and not _is_complete_time(directives):
            raise UsageError(
                f"--suffix {form!r} is not a complete time: a part is missing, or given twice. It needs %Y or"
                " %y, with %m and %d or with %j; optionally %H, %H and %M, or %H, %M and %S. For example "
                "'.%Y-%m-%d', or '-%Y%m%d-%H%M%S'; for a suffix without a year: '.11-20' and --displaced"
            )
        # To rclone, the whole name of a hidden file, such as .profile, is an extension.
        name, extension = (b"[^/]*", rb"(?:\.[^/.]*)*") if keeps_extension else (b"[^/]+", b"")
        pattern = b"(.*/%b)(%b)(%b)" % (name, b"".join(pieces), extension)
        self._ending = re.compile(pattern, re.DOTALL)

    def cut(self, path: bytes) -> tuple[bytes, str] | None:
        """Return the path without the suffix, and the suffix's time as a stamp or an empty text.

        None if the path does not have this suffix.
        """
        match = self._ending.fullmatch(path)
        if match is None:
            return None
        without = match[1] + match[3]
        if without.endswith(b"/"):  # the name consists of the suffix
            return None
        if not self.has_time:
            return without, ""
        try:
            moment = datetime.strptime(os.fsdecode(match[2]), self._form).astimezone()
            # Digits that give a future time are something else; clocks and zones differ by a day at most.
            return None if moment > datetime.now(UTC) + _CLOCK_DIFFERENCE else (without, stamp_of(moment))
        except (ValueError, OverflowError):
            return None


def _is_complete_time(directives: list[str]) -> bool:
    """Whether directives give a year, its day, and no part of the time of day without the larger ones."""
    given = set(directives)
    is_year = len(given & {"Y", "y"}) == 1
    parts = given & {"m", "d", "j"} in _DAYS, given & {"H", "M", "S"} in _TIMES
    return len(given) == len(directives) and is_year and all(parts)
