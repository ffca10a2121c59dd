"""Endings of names that tell when a file was displaced, as ``rclone --suffix`` and ``rsync --suffix`` add."""

from __future__ import annotations

import argparse
import os
import re
from datetime import UTC, datetime, timedelta

from airflow_mdbackup.cli import UsageError
from airflow_mdbackup.scheme.moments import stamp_of

_DIGITS = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "S": 2, "y": 2, "j": 3}
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

    :param form: with the directives of strptime that are digits.
    :param keeps_extension: whether it stands before the extension (``name-2026-11-20.tar.gz``), if there is
        one, as with ``rclone --suffix-keep-extension``.
    :raises UsageError: it has others, or is no ending of a name.
    :ivar has_time: whether it tells when.
    """

    def __init__(self, form: str, *, keeps_extension: bool = False) -> None:
        if not form or "/" in form:
            raise UsageError(f"--suffix {form!r} is no ending of a name: write '.%Y-%m-%d', or '~'")
        self._form = form
        pieces = []
        for literal, directive in re.findall("([^%]+)|%(.?)", form):
            if not literal and directive not in {*_DIGITS, "%"}:
                known = ", ".join(f"%{letter}" for letter in _DIGITS)
                raise UsageError(f"--suffix {form!r} has %{directive}; only {known} can be read")
            if literal or directive == "%":
                pieces.append(re.escape(os.fsencode(literal or "%")))
            else:
                pieces.append(b"[0-9]{%d}" % _DIGITS[directive])
        self.has_time = bool(re.search("%[A-Za-z]", form.replace("%%", "")))
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
