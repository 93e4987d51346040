"""Matrix descriptors of wgmma: where the elements of an operand lie in shared memory.

The layouts are those of the PTX ISA ("Asynchronous warpgroup level matrix shared memory layout"). A start inside the
swizzle's pattern is stated by the base offset; the ISA does not say how it enters, here it is taken from the row of
128 bytes before the swizzle, so that the pattern begins where the operand's first pattern does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .hazard import Hazard

_ROW = (16, 128, 64, 32)  # by mode: bytes of a row of the swizzle's pattern; without a swizzle, of a core matrix
_XOR = (0, 7, 3, 1)  # by mode: bits of the number of a row of 128 bytes that move its pieces of 16
_RESERVED = ~((0x3FFF) | (0x3FFF << 16) | (0x3FFF << 32) | (7 << 49) | (3 << 62))


@dataclass(frozen=True)
class Descriptor:
    """The fields of a matrix descriptor, offsets in bytes."""

    start: int
    leading: int
    stride: int
    base: int
    mode: int  # 0: none, 1: 128 bytes, 2: 64, 3: 32

    @classmethod
    def decode(cls, bits: int) -> Descriptor:
        """Return the fields of a 64-bit descriptor."""
        if bits & _RESERVED:
            raise Hazard("descriptor", f"the wgmma descriptor {bits:#018x} has bits set that are reserved")
        start, leading, stride = (((bits >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, (bits >> 49) & 7, bits >> 62)

    def addresses(self, mn: int, k: int, size: int, mn_major: bool) -> np.ndarray:
        """Return the byte addresses [mn, k] of elements of ``size`` bytes: of A by M and K, of B by N and K."""
        i, j = np.arange(mn)[:, None], np.arange(k)[None, :]
        row = _ROW[self.mode]
        per = row // size  # elements of a row
        if not mn_major:
            at = (i // 8) * self.stride + (i % 8) * row + (j % per) * size + (j // per) * self.leading
        elif self.mode:
            at = (i // per) * self.leading + (i % per) * size + (j // 8) * self.stride + (j % 8) * row
        else:
            at = (i // per) * self.stride + (i % per) * size + (j // 8) * self.leading + (j % 8) * row
        at = at + self.start
        return at ^ ((((at >> 7) - self.base) & _XOR[self.mode]) << 4)
