"""Whether something came before, in at most 32 MiB, however large the plan is.

What this does not give: certainty. Some new things are taken for ones that came before; never the other way
round. Of four million things these are one in 100,000, of 10 million one in 10,000, of 40 million one in 100.
So it suits where *again* costs a little more, and nothing else.

Source: Bloom, "Space/time trade-offs in hash coding with allowable errors" (1970).
"""

from __future__ import annotations

_BITS = 64  # for each thing, while there is room
_MOST = 1 << 28  # bits for all of them
_PROBES = 4


class BloomFilter:
    """The md5s that came so far.

    :param expected: how many will come.
    """

    def __init__(self, expected: int) -> None:
        size = max(expected, 1024) * _BITS
        self._mask = min(1 << size.bit_length(), _MOST) - 1
        self._bits = bytearray((self._mask + 1) >> 3)

    def seen_before(self, md5: bytes) -> bool:
        """Whether ``md5``, in hexadecimal digits, came before; from now on it did."""
        bits, mask = self._bits, self._mask
        digits = int(md5, 16)  # any of its bits are as good as any other hash
        again = True
        for _ in range(_PROBES):
            byte, bit = (digits & mask) >> 3, 1 << (digits & 7)
            if not bits[byte] & bit:
                bits[byte] |= bit
                again = False
            digits >>= 32
        return again
