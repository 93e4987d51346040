"""Tensor maps of bulk copies: which elements of a tensor a box holds, and where each lies in shared memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

# Numbered as in tensormap.replace.elemtype.
ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32.ftz", "f64", "bf16", "tf32", "tf32.ftz")
_SIZES = {"u8": 1, "u16": 2, "f16": 2, "bf16": 2, "u64": 8, "s64": 8, "f64": 8}
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
SWIZZLES = (0, 32, 64, 128)
_MAGIC = 0x46555345
# Magic number, element, rank - 1, swizzle, fill, address, sizes, strides, box, steps of elements, interleaving.
_FORMAT = struct.Struct("<I4BQ5I4Q5H5BB")
# Of each field of tensormap.replace: its place in the encoding, its bytes, and how often it is there.
FIELDS = {
    "elemtype": (4, 1, 1),
    "rank": (5, 1, 1),
    "swizzle_mode": (6, 1, 1),
    "fill_mode": (7, 1, 1),
    "global_address": (8, 8, 1),
    "global_dim": (16, 4, 5),
    "global_stride": (36, 8, 4),
    "box_dim": (68, 2, 5),
    "element_stride": (78, 1, 5),
    "interleave_layout": (83, 1, 1),
}
MAGIC = _MAGIC.to_bytes(4, "little")


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map: 1 to 5 dimensions, the innermost first, without interleaving."""

    element: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, of all dimensions but the innermost, whose elements are neighbours
    box: tuple[int, ...]
    swizzle: int = 0  # bytes, within which 16-byte pieces are permuted
    nan: bool = False  # fill with NaN, not zeros, what lies outside the tensor

    def __post_init__(self) -> None:
        """Check what cuTensorMapEncodeTiled checks."""
        rank = len(self.shape)
        if self.element not in _SIZES and self.element not in ("u32", "s32", "f32"):
            raise NotImplementedError(f"a tensor map of {self.element}")
        inner = self.box[0] * self.size
        faults = {
            "1 to 5 dimensions": not 1 <= rank <= 5,
            "as many dimensions of the box, and one stride less": (len(self.box), len(self.strides))
            != (rank, rank - 1),
            "an address that is a multiple of 16": self.address % 16 != 0,
            "strides that are multiples of 16 below 2^40": any(s % 16 or not 0 <= s < 1 << 40 for s in self.strides),
            "sizes from 1 to 2^32": not all(1 <= n <= 1 << 32 for n in self.shape),
            "a box of 1 to 256 elements a dimension": not all(1 <= n <= 256 for n in self.box),
            "an innermost box of a multiple of 16 bytes": inner % 16 != 0,
            f"a swizzle of {SWIZZLES} bytes": self.swizzle not in SWIZZLES,
            "an innermost box no wider than the swizzle": bool(self.swizzle) and inner > self.swizzle,
            "numbers, to fill with NaN": self.nan and self.element not in _NAN,
        }
        for expected, wrong in faults.items():
            if wrong:
                raise ValueError(f"tensor map: expected {expected}, received {self}")

    @property
    def size(self) -> int:
        """Return the bytes of an element."""
        return _SIZES.get(self.element, 4)

    @property
    def nbytes(self) -> int:
        """Return the bytes of a box."""
        return int(np.prod(self.box)) * self.size

    def pack(self) -> bytes:
        """Return the map as the 128 bytes of a kernel's parameter, in the emulator's own encoding."""
        rank = len(self.shape)
        fill = (0,) * (5 - rank)
        return _FORMAT.pack(
            _MAGIC,
            ELEMENTS.index(self.element),
            rank - 1,
            SWIZZLES.index(self.swizzle),
            self.nan,
            self.address,
            *(n % (1 << 32) for n in self.shape),
            *fill,
            *self.strides,
            *fill,
            *self.box,
            *fill,
            *(1,) * 5,
            0,
        ).ljust(128, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> TensorMap:
        """Return the map that :meth:`pack` made."""
        magic, element, last, swizzle, nan, address, *rest = _FORMAT.unpack(raw[: _FORMAT.size])
        rank = last + 1
        if magic != _MAGIC or rank > 5:
            raise ValueError("these 128 bytes are no tensor map of the emulator")
        if any(x != 1 for x in rest[14 : 14 + rank]) or rest[19] or swizzle >= len(SWIZZLES):
            raise NotImplementedError("a tensor map with steps between elements, interleaving, or a swizzle of its own")
        return cls(
            ELEMENTS[element],
            address,
            tuple(n or 1 << 32 for n in rest[:rank]),
            tuple(rest[5 : 4 + rank]),
            tuple(rest[9 : 9 + rank]),
            SWIZZLES[swizzle],
            bool(nan),
        )

    def rows(self, origin: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the address of the first element of each row of a box at ``origin``, and which rows lie inside."""
        address = np.zeros((1,), np.int64) + self.address
        inside = np.ones((1,), bool)
        for start, count, extent, stride in zip(
            origin[1:], self.box[1:], self.shape[1:], self.strides, strict=True
        ):  # the outer dimension comes last, and varies slowest
            at = start + np.arange(count)
            address = (address[None, :] + (at * stride)[:, None]).reshape(-1)
            inside = (inside[None, :] & ((at >= 0) & (at < extent))[:, None]).reshape(-1)
        return address + origin[0] * self.size, inside

    def pieces(self, origin: list[int]) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Return how a box at ``origin`` lies in global memory, piece by piece.

        Returns:
            Bytes of a piece (16, 4 or an element's), the rows of those pieces that lie inside the tensor, their places
            in the row, and their addresses.
        """
        address, inside = self.rows(origin)
        first, end, width = origin[0] * self.size, self.shape[0] * self.size, self.box[0] * self.size
        piece = next(n for n in (16, 4, self.size) if n <= self.size or (first % n == 0 and end % n == 0))
        at = np.arange(width // piece)
        within = (first + at * piece >= 0) & (first + (at + 1) * piece <= end)
        row, column = np.nonzero(inside[:, None] & within[None, :])
        return piece, row, column, (address[row] + column * piece).astype(np.uint64)

    def fill(self) -> np.ndarray:
        """Return a box of what lies outside the tensor, as bytes [rows, bytes of a row]."""
        kind = f"u{self.size}"
        box = np.full((int(np.prod(self.box[1:])), self.box[0]), _NAN[self.element] if self.nan else 0, kind)
        return box.view(np.uint8)

    def words(self, start: int) -> np.ndarray:
        """Return the words of shared memory, [rows, words of a row], of a box that starts at byte ``start``."""
        width = self.box[0] * self.size
        byte = start + np.arange(0, self.nbytes, 4).reshape(-1, width // 4)
        return (byte ^ (((byte >> 7) & (self.swizzle // 16 - 1 if self.swizzle else 0)) << 4)) >> 2
