"""Whether something came before, in a few bytes for each thing, however large the plan is.

What this does not give: certainty. Some 15 in a million new things are taken for ones that came before; never
the other way round. So it suits where *again* costs a little more, and nothing else.

Source: Bloom, "Space/time trade-offs in hash coding with allowable errors" (1970).
"""

from __future__ import annotations

_BITS = 64  # for each thing
_PROBES = 4


class Seen:
    """The md5s that came so far.

    :param expected: how many will come.
    """

    def __init__(self, expected: int) -> None:
        size = max(expected, 1024) * _BITS
        self._mask = (1 << size.bit_length()) - 1
        self._bits = bytearray((self._mask + 1) >> 3)

    def comes_again(self, md5: bytes) -> bool:
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
