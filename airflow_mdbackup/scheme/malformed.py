"""Why a line is none of an index, for the person who made the list by another tool.

Sources: md5(1) of FreeBSD, ``src/cksum.c`` of GNU coreutils (``--tag``, ``--zero``), dgst(1) of OpenSSL, and
what PowerShell's ``>`` writes.
"""

from __future__ import annotations

import re

from airflow_mdbackup.scheme.names import to_text

HOW = (
    ". To write such a list on A: cd CHROOT && find ./backups -type f -exec md5sum {} + > LIST, where CHROOT "
    "is what backupop sees as /, and md5sum that of GNU coreutils"
)
_SHOWN = 40  # bytes of a line
_MARKS = {
    b"\xef\xbb\xbf": "it begins with a byte order mark (BOM) of UTF-8: remove it",
    b"\xff\xfe": "it begins with the byte order mark (BOM) of UTF-16, as of PowerShell: convert it to UTF-8",
    b"\xfe\xff": "it begins with the byte order mark (BOM) of UTF-16: convert it to UTF-8",
    b"\x1f\x8b": "it is compressed by gzip: decompress it",
}
_TAGGED = re.compile(rb"\\?([A-Z][A-Za-z0-9/-]{1,20}) ?\(.*\) ?= ", re.DOTALL)
_DIGITS = re.compile(rb"\\?([0-9a-fA-F]+)(?![^ \t])")
_SUMS = {8: "CRC-32", 40: "SHA-1", 56: "SHA-224", 64: "SHA-256", 96: "SHA-384", 128: "SHA-512 or BLAKE2b"}


def why_malformed(line: bytes) -> str:
    """Return what is wrong with a line that does not look like one of an index, without its line end."""
    for mark, why in _MARKS.items():
        if line.startswith(mark):
            return why + HOW
    if not line.strip():
        return "a blank line"
    if re.match(rb"(?:\0[0-9a-fA-F]){4}|(?:[0-9a-fA-F]\0){4}", line):
        return "it is UTF-16, as PowerShell writes it: convert it to UTF-8" + HOW
    if tag := _TAGGED.match(line):
        of_other = "" if tag[1] == b"MD5" else f" and of {tag[1].decode()}, not MD5"
        return (
            f"it is in the tagged form of BSD and openssl, `{tag[1].decode()} (file) = ...`{of_other}" + HOW
        )
    digits = _DIGITS.match(line)
    if digits and len(digits[1]) in _SUMS:
        number = len(digits[1])
        return f"its sum has {number} hexadecimal digits, as of {_SUMS[number]}; an md5 has 32" + HOW
    if not digits or len(digits[1]) != 32:
        begin = to_text(line[:_SHOWN])
        return f"it does not begin with the 32 hexadecimal digits of an md5, but with `{begin}`" + HOW
    if digits[1] != digits[1].lower():
        return "upper-case digits in the md5" + HOW
    return "no two blanks and absolute path after the md5" + HOW


def why_too_long(line: bytes, longest: int) -> str:
    """Return what is wrong with the beginning of a line that is longer than any of an index."""
    if re.search(rb"\0\\?[0-9a-f]{32} ", line):
        return "its lines end in NUL, as of `md5sum --zero`" + HOW
    return f"the line is over {longest} bytes long"
