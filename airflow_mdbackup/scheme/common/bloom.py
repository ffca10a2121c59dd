"""Whether an md5 has been seen before, in at most 32 MiB, however large the plan is.

Limitations: some new md5s are reported as seen, never the reverse: one in 100,000 of four million, one in
10,000 of 10 million, one in 100 of 40 million. So use it only where a false *seen* costs a little work.

Source: Bloom, "Space/time trade-offs in hash coding with allowable errors" (1970).
"""

from __future__ import annotations

_BITS = 64  # per md5, up to _MOST
_MOST = 1 << 28  # bits for all of them
_PROBES = 4


class BloomFilter:
    """The md5s seen so far.

    :param expected: how many are expected.
    """

    def __init__(self, expected: int) -> None:
        size = max(expected, 1024) * _BITS
        self._mask = min(1 << size.bit_length(), _MOST) - 1
        self._bits = bytearray((self._mask + 1) >> 3)

    def seen_before(self, md5: bytes) -> bool:
        """Whether ``md5``, in hexadecimal digits, was seen before; remember it."""
        bits, mask = self._bits, self._mask
        digits = int(md5, 16)  # an md5 is already a hash: use its bits
        again = True
        for _ in range(_PROBES):
            byte, bit = (digits & mask) >> 3, 1 << (digits & 7)
            if not bits[byte] & bit:
                bits[byte] |= bit
                again = False
            digits >>= 32
        return again
