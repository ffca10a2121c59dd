"""Path bytes as text, for logs, JSON and people, and back without loss.

Printable characters stand for themselves, a backslash is ``\\\\``, and every other byte (control
characters, invalid UTF-8, unusual blanks, marks that change the writing direction) is ``\\xNN``. So no name
from a provider can affect a terminal, and :func:`from_text` returns the exact bytes. Nor can it affect the
display of logs: see :func:`unfolded`.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\(?:\\|x([0-9a-f]{2}))")
_FOLD = re.compile(":(?=(?:end)?group:)")


def to_text(path: bytes) -> str:
    """Return ``path`` as printable text that :func:`from_text` turns back into the same bytes."""
    text = path.decode("utf-8", "surrogateescape")
    if not text.isprintable() or "\\" in text:
        text = "".join(map(_escape, text))
    return unfolded(text) if "group:" in text else text


def unfolded(text: str) -> str:
    """Return escaped text that never yields ``::group::`` or ``::endgroup::``, whatever surrounds it.

    Airflow's log page hides a line with either of them: it begins or ends a part that
    is folded. The colon before such a word becomes ``\\x3a``, which :func:`from_text` turns back.
    """
    return _FOLD.sub(r"\\x3a", text)


def _escape(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def from_text(text: str) -> bytes:
    """Return the bytes that :func:`to_text` was given.

    :raises ValueError: a backslash does not begin an escape.
    """
    if "\\" not in text:
        return text.encode()
    if "\\" in _ESCAPE.sub("", text):
        raise ValueError(f"not an escaped path: {text!r}")
    parts = _ESCAPE.split(text)
    # Plain texts and escapes alternate; None is the backslash.
    parts[1::2] = ["5c" if digits is None else digits for digits in parts[1::2]]
    return b"".join(bytes.fromhex(p) if n % 2 else p.encode() for n, p in enumerate(parts))
