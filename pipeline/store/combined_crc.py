"""The CRC of a whole, computed from those of its parts, so that different processes can check the parts.

A CRC is a polynomial over GF(2) modulo the generator: appending n bytes multiplies it by x^(8n). Values are reflected,
as in zlib and google_crc32c: bit 31 is the coefficient of x^0.

Hand-written, since neither `zlib` nor `google_crc32c` has it in Python.
"""

from __future__ import annotations

import functools

CRC32C = 0x82F63B78
"""Castagnoli's polynomial, that of `google_crc32c`."""

_ONE = 1 << 31
_X_TO_8 = 1 << 23


def combined_crc(first: int, second: int, second_bytes: int, polynomial: int) -> int:
    """The CRC of A + B, given those of A and of B and the length of B."""
    return _product(first, _shift(second_bytes, polynomial), polynomial) ^ second


@functools.lru_cache(maxsize=4096)
def _shift(count: int, polynomial: int) -> int:
    """x^(8 * count), by squaring."""
    power, factor = _ONE, _X_TO_8
    while count:
        if count & 1:
            power = _product(power, factor, polynomial)
        factor = _product(factor, factor, polynomial)
        count >>= 1
    return power


def _product(left: int, right: int, polynomial: int) -> int:
    total, coefficient = 0, _ONE
    while coefficient:
        if left & coefficient:
            total ^= right
        right = (right >> 1) ^ (polynomial if right & 1 else 0)
        coefficient >>= 1
    return total
