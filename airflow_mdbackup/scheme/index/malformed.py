"""Explains why a line is not an index line, to whoever made the list with another tool.

Sources: md5(1) of FreeBSD, ``src/cksum.c`` of GNU coreutils (``--tag``, ``--zero``), dgst(1) of OpenSSL, and
what ``rclone md5sum`` and PowerShell's ``>`` and ``Get-FileHash`` write.
"""

from __future__ import annotations

import re

from airflow_mdbackup.scheme.common.paths import to_text

HOW = (
    ". To write a correct list on A: cd CHROOT && find ./backups -type f -exec md5sum {} + > LIST, where "
    "CHROOT is what backupop sees as /, and md5sum is from GNU coreutils"
)
_CR_LINE_ENDS = "its lines end in CR alone, as on an old Mac, not in LF: convert it (tr '\\r' '\\n')"
_MAX_QUOTED = 40  # bytes of a line that a message quotes
_MAGIC = {  # longer ones first
    b"\xef\xbb\xbf": "it begins with a byte order mark (BOM) of UTF-8: remove it",
    b"\xff\xfe\0\0": "it begins with the byte order mark (BOM) of UTF-32: convert it to UTF-8",
    b"\0\0\xfe\xff": "it begins with the byte order mark (BOM) of UTF-32: convert it to UTF-8",
    b"\xff\xfe": "it begins with the byte order mark (BOM) of UTF-16, as of PowerShell: convert it to UTF-8",
    b"\xfe\xff": "it begins with the byte order mark (BOM) of UTF-16: convert it to UTF-8",
    b"\x1f\x8b": "it is compressed by gzip: decompress it",
    b"\xfd7zXZ\0": "it is compressed by xz: decompress it",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: decompress it",
    b"BZh": "it is compressed by bzip2: decompress it",
    b"PK\x03\x04": "it is a ZIP archive: unpack it",
}
# ASCII characters, padded with NULs. As lines are split after LF, a line may begin with the NULs of an LF.
_WIDE = {
    re.compile(rb"\0{0,3}(?:[\x01-\x7f]\0{3})+"): "it is UTF-32: convert it to UTF-8",
    re.compile(rb"\0?(?:[\x01-\x7f]\0)+"): "it is UTF-16, as PowerShell writes it: convert it to UTF-8",
}
_TAGGED = re.compile(rb"\\?([A-Z][A-Za-z0-9/-]{1,20}) ?\(.*\) ?= ", re.DOTALL)
_GET_FILE_HASH = re.compile(rb'\s*"?Algorithm\b')
_CR_ALONE = re.compile(rb"\r\\?[0-9a-fA-F]{32}[ \t]")
_BLANK_SUM = re.compile(rb" {32}.*\S", re.DOTALL)
# Including unusual and invisible ones, in UTF-8 or as the single byte of ISO 8859.
_BLANKS = re.compile(
    rb"((?:[ \t\v\f\xa0]|\xc2\xa0|\xe2\x80[\x80-\x8f\xa8-\xaf]|\xe2\x81[\x9f\xa0]|\xe3\x80\x80"
    rb"|\xef\xbb\xbf)+)\\?[0-9a-fA-F]{32}(?![0-9a-fA-F])"
)
_DIGITS = re.compile(rb"\\?((?:[0-9a-fA-F]{8}(?![^ \t]))|[0-9a-fA-F]{32,})")
_SUMS = {8: "CRC-32", 40: "SHA-1", 56: "SHA-224", 64: "SHA-256", 96: "SHA-384", 128: "SHA-512 or BLAKE2b"}


def why_malformed(line: bytes, following: bytes = b"") -> str:
    """Return what is wrong with a line, given without its line end, that is not an index line.

    :param following: the next line that is not blank, if this one is.
    """
    line = line if line.strip() else b""
    why = _why_other_text(line, following)
    if not line and not why:
        return "a blank line"
    return (why or _why_no_sum(line)) + HOW


def _why_other_text(line: bytes, following: bytes) -> str:
    """Return what kind of list or file a line comes from; an empty text if that is unknown."""
    for mark, why in _MAGIC.items():
        if line.startswith(mark):
            return why
    for wide, why in _WIDE.items():
        if wide.match(line):
            return why
    if ends_in_cr_alone(line):
        return _CR_LINE_ENDS
    if _GET_FILE_HASH.match(line or following):
        return "it is what Get-FileHash of PowerShell prints"
    if tag := _TAGGED.match(line):
        of_other = "" if tag[1] == b"MD5" else f" and of {tag[1].decode()}, not MD5"
        return f"it is in the tagged form of BSD and openssl, `{tag[1].decode()} (file) = ...`{of_other}"
    return ""


def _why_no_sum(line: bytes) -> str:
    """Return what is wrong with the md5 of a line, or with the separator after it."""
    if blanks := _BLANKS.match(line):
        before = to_text(blanks[1][:_MAX_QUOTED])
        return f"`{before}` stands before the 32 hexadecimal digits of the md5: the line must begin with them"
    if _BLANK_SUM.match(line):
        return "there are blanks in place of the md5, as `rclone md5sum` writes if it knows no md5 of a file"
    digits = _DIGITS.match(line)
    if digits is None:
        begin = to_text(line[:_MAX_QUOTED])
        return f"it does not begin with the 32 hexadecimal digits of an md5, but with `{begin}`"
    number = len(digits[1])
    if number in _SUMS:
        return f"its sum has {number} hexadecimal digits, like {_SUMS[number]}; an md5 has 32"
    if number != 32:
        return f"its sum has {number} hexadecimal digits, not the 32 hexadecimal digits of an md5"
    if digits[1] != digits[1].lower():
        return "upper-case digits in the md5"
    rest = line[digits.end() :][:_MAX_QUOTED]
    return "no two blanks and absolute path after the md5" + (f", but `{to_text(rest)}`" if rest else "")


def ends_in_cr_alone(line: bytes) -> bool:
    """Whether a line, as split at LF, is in fact several lines separated by CR alone."""
    return _CR_ALONE.search(line) is not None


def why_too_long(line: bytes, longest: int) -> str:
    """Return what is wrong with a line, given its beginning, that is longer than index lines can be."""
    if re.search(rb"\0\\?[0-9a-f]{32} ", line):
        return "its lines end in NUL, as `md5sum --zero` writes them" + HOW
    if ends_in_cr_alone(line):
        return _CR_LINE_ENDS + HOW
    return f"the line is over {longest} bytes long"
