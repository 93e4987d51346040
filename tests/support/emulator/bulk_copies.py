"""Boxes of tensors by loops over their elements, and pieces of PTX around a bulk copy."""

import itertools

import numpy as np

from fusemesh.kernels.emulator.tensor_maps import TensorMap
from tests.support.emulated_ptx import aligned

SIZES = {"u8": 1, "f16": 2, "bf16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "u64": 8}


def tensor(shape: tuple[int, ...], element: str, extra: int = 0) -> tuple[np.ndarray, list[int]]:
    """An array of distinct elements, ``shape`` innermost first, its strides in bytes padded to 16 and more."""
    size = SIZES[element]
    strides = [size]
    for n in shape[:-1]:
        strides.append(-(-strides[-1] * n // 16) * 16 + extra)
    total = strides[-1] * shape[-1]
    data = aligned((-(-total // 8) * 8,), np.uint8)
    data[:] = np.random.default_rng(0).integers(0, 256, data.shape)
    return data, strides


def make_map(data: np.ndarray, shape, strides, box, element: str, **options) -> TensorMap:
    return TensorMap(element, data.ctypes.data, tuple(shape), tuple(strides[1:]), tuple(box), **options)


def place(offset: int, swizzle: int) -> int:
    """Where byte ``offset`` of shared memory lies after the swizzle, 16-byte piece by 16-byte piece (ISA, Table)."""
    if not swizzle:
        return offset
    piece, row = offset // 16, offset // 128
    pattern = {32: row % 2, 64: row % 4, 128: row % 8}[swizzle]
    return (piece ^ pattern) * 16 + offset % 16


def slow_box(data: np.ndarray, shape, strides, box, origin, element: str, start: int, swizzle: int, fill: bytes):
    """Yield (byte of shared memory, byte of the tensor or None, the fill's byte) of each byte of a box."""
    size = SIZES[element]
    for n, index in enumerate(itertools.product(*[range(x) for x in reversed(box)])):
        at = [o + i for o, i in zip(origin, reversed(index), strict=True)]
        inside = all(0 <= x < extent for x, extent in zip(at, shape, strict=True))
        base = sum(x * s for x, s in zip(at, strides, strict=True))
        for byte in range(size):
            yield place(start + n * size + byte, swizzle), base + byte if inside else None, fill[byte]


def prologue(bytes_expected: int) -> str:
    """Thread 0 makes an mbarrier of one arrival at shared byte 0, known to all, which expects bytes."""
    return f"""mov.b32 %r0, global_smem;
setp.eq.u32 %p0, %tid, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], {bytes_expected};"""


WAIT = """WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0;
@!%p1 bra WAIT;"""


def dump(argument: int, start: int, words: int, threads: int = 32) -> str:
    """PTX that copies words of shared memory from byte ``start`` on to an array."""
    assert words % threads == 0
    lines = ["mul.wide.u32 %d0, %tid, 4;", f"add.s64 %d0, %d0, %a{argument};", "mad.lo.s32 %r2, %tid, 4, 0;"]
    lines += ["add.s32 %r2, %r2, %r0;"]
    for n in range(words // threads):
        lines += [f"ld.shared.b32 %r3, [%r2 + {start + 4 * threads * n}];"]
        lines += [f"st.global.b32 [%d0 + {4 * threads * n}], %r3;"]
    return "\n".join(lines)


def fill(argument: int, start: int, words: int, threads: int = 32) -> str:
    """PTX that copies an array to shared memory, fenced."""
    assert words % threads == 0
    lines = ["mov.b32 %r0, global_smem;", "setp.eq.u32 %p0, %tid, 0;", "mul.wide.u32 %d0, %tid, 4;"]
    lines += [f"add.s64 %d0, %d0, %a{argument};", "mad.lo.s32 %r2, %tid, 4, 0;", "add.s32 %r2, %r2, %r0;"]
    for n in range(words // threads):
        lines += [f"ld.global.b32 %r3, [%d0 + {4 * threads * n}];"]
        lines += [f"st.shared.b32 [%r2 + {start + 4 * threads * n}], %r3;"]
    return "\n".join([*lines, "fence.proxy.async.shared::cta;", "bar.sync 0;"])


def coordinates(origin) -> tuple[str, str]:
    """PTX that puts coordinates in registers, and their vector."""
    moves = "\n".join(f"mov.b32 %r{10 + n}, {x};" for n, x in enumerate(origin))
    return moves, "{" + ", ".join(f"%r{10 + n}" for n in range(len(origin))) + "}"
