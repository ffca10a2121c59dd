"""Endings of names that tell when a file was displaced, as ``rclone --suffix`` and ``rsync --suffix`` add."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta

from airflow_mdbackup.cli import UsageError
from airflow_mdbackup.scheme.moments import stamp_of

_DIGITS = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "S": 2, "y": 2, "j": 3}
_AHEAD = timedelta(days=1)


class Suffix:
    """An ending such as ``.%Y-%m-%d``, in the time zone of this machine, or ``~``, which tells no time.

    :param form: with the directives of strptime that are digits.
    :raises UsageError: it has others, or is no ending of a name.
    :ivar has_time: whether it tells when.
    """

    def __init__(self, form: str) -> None:
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
        self._ending = re.compile(b"(.*/[^/]+?)(" + b"".join(pieces) + b")", re.DOTALL)

    def cut(self, path: bytes) -> tuple[bytes, str] | None:
        """Return the path without the ending, and the stamp that this tells or an empty text.

        None if it has no such ending.
        """
        match = self._ending.fullmatch(path)
        if match is None:
            return None
        if not self.has_time:
            return match[1], ""
        try:
            moment = datetime.strptime(os.fsdecode(match[2]), self._form).astimezone()
            # A number that looks like a time to come is none; clocks and time zones differ by a day at most.
            return None if moment > datetime.now(UTC) + _AHEAD else (match[1], stamp_of(moment))
        except (ValueError, OverflowError):
            return None
