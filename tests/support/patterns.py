"""Contents of images: that of the cases in the semantics, and one of any size."""

from __future__ import annotations

import os

from tests.support.mounted import K64, MIB

SIZE = 64 * MIB
PATTERNS = {0: 0x5D, MIB: 0xD5, 32 * MIB: 0xDC, SIZE - K64: 0xCD}
OVERWRITES = (0, MIB - K64 // 2, 32 * MIB + K64 // 2, SIZE - 2 * K64)


def patterned() -> bytearray:
    content = bytearray(SIZE)
    for offset, value in PATTERNS.items():
        content[offset : offset + K64] = bytes([value]) * K64
    return content


def pattern(size: int) -> bytes:
    """Data, zeros written as such, and a tail that ends in the middle of a sector."""
    content = bytearray(size + K64)
    content[0:K64] = os.urandom(K64)
    content[size // 2 : size // 2 + K64] = os.urandom(K64)
    content[max(0, size - 7) : size] = b"tailend"[: min(7, size)]
    return bytes(content[:size])
