"""mma and wgmma against loops over the fragments as the PTX ISA draws them, in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from fusemesh.kernels.emulator.hazard import UnknownInstruction
from tests.support.emulated_ptx import load, registers, run, store

FORMATS = {"bf16": (8, 7), "f16": (5, 10), "tf32": (8, 10), "e4m3": (4, 3), "e5m2": (5, 2)}
BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def value(kind: str, code: int) -> Fraction:
    """A finite number of a format, from its sign, exponent and fraction."""
    if kind in ("s8", "u8"):
        return Fraction(code - 256 if kind == "s8" and code > 127 else code)
    exponent_bits, fraction_bits = FORMATS[kind]
    if kind == "tf32":
        code >>= 13
    sign = -1 if code >> (exponent_bits + fraction_bits) & 1 else 1
    exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = Fraction(code & ((1 << fraction_bits) - 1), 1 << fraction_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    scale = Fraction(2) ** ((exponent or 1) - bias)
    return sign * scale * (fraction + (1 if exponent else 0))


def codes(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random codes of numbers near 1, subnormal ones and zeros among them where their products stay exact in fp64."""
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, count).astype(np.uint32)
    exponent_bits, fraction_bits = {"bf16": (8, 7), "f16": (5, 10), "tf32": (8, 23), "e4m3": (4, 3), "e5m2": (5, 2)}[
        kind
    ]
    bias = (1 << (exponent_bits - 1)) - 1
    low, high = {"e4m3": (0, 15), "e5m2": (0, 31)}.get(kind, (bias - 4, bias + 4))
    if kind == "e5m2":
        low, high = 6, 22
    exponent = rng.integers(low, high, count)
    code = rng.integers(0, 2, count) << exponent_bits | exponent
    return (code << fraction_bits | rng.integers(0, 1 << fraction_bits, count)).astype(np.uint32)


def words(kind: str, elements: np.ndarray) -> np.ndarray:
    """Elements [..., n] packed into words, the first lowest."""
    per = 32 // BITS[kind]
    shifted = elements.reshape(*elements.shape[:-1], -1, per).astype(np.uint64) << (np.arange(per) * BITS[kind]).astype(
        np.uint64
    )
    return shifted.sum(-1).astype(np.uint32)


def place_a(kind: str, k: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element ``i`` of a lane's A, by the ISA's formulas for m16n8k<k>."""
    group, t = lane >> 2, lane % 4
    if kind in ("bf16", "f16"):
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, t * 2 + (i & 1) + (8 if i >= 4 else 0)
    if kind == "tf32":
        return (group if i in (0, 2) else group + 8), t + (4 if i >= 2 else 0)
    if k == 16:
        return (group if i < 4 else group + 8), t * 4 + (i & 3)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, t * 4 + (i & 3) + (16 if i >= 8 else 0)


def place_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, t = lane >> 2, lane % 4
    if kind in ("bf16", "f16"):
        return t * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if kind == "tf32":
        return t + 4 * i, group
    return t * 4 + (i & 3) + (16 if i >= 4 else 0), group


def place_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def rounded(kind: str, exact: Fraction, saturate: bool = False) -> int:
    """The bits of an exact sum that fp64 holds, rounded once."""
    if kind == "s32":
        n = int(exact)
        if saturate:
            n = min(max(n, -(1 << 31)), (1 << 31) - 1)
        return n & 0xFFFFFFFF
    real = exact.numerator / exact.denominator
    assert Fraction(real) == exact
    return int(np.float32(real).view(np.uint32)) if kind == "f32" else int(np.float16(real).view(np.uint16))


MMA = [
    ("m16n8k16", "f32", "bf16", "bf16"),
    ("m16n8k8", "f32", "bf16", "bf16"),
    ("m16n8k16", "f32", "f16", "f16"),
    ("m16n8k8", "f32", "f16", "f16"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f16", "f16", "f16"),
    ("m16n8k8", "f32", "tf32", "tf32"),
    ("m16n8k4", "f32", "tf32", "tf32"),
    ("m16n8k32", "f32", "e4m3", "e4m3"),
    ("m16n8k32", "f32", "e4m3", "e5m2"),
    ("m16n8k32", "f32", "e5m2", "e4m3"),
    ("m16n8k32", "f16", "e5m2", "e5m2"),
    ("m16n8k32", "s32", "s8", "s8"),
    ("m16n8k32", "s32", "s8", "u8"),
    ("m16n8k16", "s32", "u8", "s8"),
    ("m16n8k16", "satfinite.s32", "u8", "u8"),
]


@pytest.mark.parametrize(("shape", "d", "a", "b"), MMA, ids=[".".join(x) for x in MMA])
def test_mma_is_the_product_of_its_fragments(shape, d, a, b):
    rng, k = np.random.default_rng(1), int(shape.split("k")[1])
    saturate, d_kind = "satfinite" in d, d.split(".")[-1]
    count_a, count_b = 16 * k // 32, 8 * k // 32
    code_a, code_b = codes(a, 32 * count_a, rng).reshape(32, -1), codes(b, 32 * count_b, rng).reshape(32, -1)
    if d_kind == "s32":
        code_c = (rng.integers(0, 8, (32, 4)) + ((1 << 31) - 4 if saturate else -4)).astype(np.uint32)
        exact_c = [[Fraction(int(x)) for x in row] for row in code_c.view(np.int32)]
    else:
        kind = "f16" if d_kind == "f16" else "bf16"
        code_c = codes(kind, 128, rng).reshape(32, 4)
        exact_c = [[value(kind, int(x)) for x in row] for row in code_c]
        code_c = code_c << 16 if d_kind == "f32" else code_c
    a_matrix, b_matrix, want = {}, {}, np.zeros((32, 4), np.uint32)
    for lane in range(32):
        for i in range(count_a):
            a_matrix[place_a(a, k, lane, i)] = value(a, int(code_a[lane, i]))
        for i in range(count_b):
            b_matrix[place_b(b, lane, i)] = value(b, int(code_b[lane, i]))
    assert len(a_matrix) == 16 * k and len(b_matrix) == 8 * k
    for lane in range(32):
        for i in range(4):
            row, column = place_c(lane, i)
            total = sum((a_matrix[row, j] * b_matrix[j, column] for j in range(k)), exact_c[lane][i])
            want[lane, i] = rounded(d_kind, total, saturate)
    pack = (lambda x: words("f16", x)) if d_kind == "f16" else (lambda x: x.astype(np.uint32))
    sums = 2 if d_kind == "f16" else 4
    x, y, z = words(a, code_a), words(b, code_b), np.ascontiguousarray(pack(code_c))
    n, m, out = x.shape[1], y.shape[1], np.zeros((32, sums), np.uint32)
    run(
        f"""{load(0, 10, n)}
{load(1, 20, m)}
{load(2, 30, sums)}
mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d_kind} {registers(40, sums)}, {registers(10, n)}, {registers(20, m)},
 {registers(30, sums)};
{store(3, 40, sums)}""",
        x,
        y,
        z,
        out,
    )
    assert (out == pack(want)).all()


@pytest.mark.parametrize(
    ("a", "kind", "shape", "infinity", "one"),
    [("bf16", "f32", "m16n8k16", 0x7F80, 0x3F80), ("f16", "f16", "m16n8k16", 0x7C00, 0x3C00)],
)
def test_infinities_and_nan_spread_as_in_arithmetic(a, kind, shape, infinity, one):
    # Row 0 of A begins with inf; column 0 of B with 0, column 1 with 1, the others with -1. Everything else is 0.
    x, y, sums = np.zeros((32, 8), np.uint32), np.zeros((32, 4), np.uint32), 2 if kind == "f16" else 4
    x[0, 0] = infinity
    for lane in range(32):
        for i in range(4):
            j, column = place_b(a, lane, i)
            if j == 0 and column:
                y[lane, i] = one | (0x8000 if column > 1 else 0)
    out = np.zeros((32, sums), np.uint32)
    run(
        f"""{load(0, 10, 4)}
{load(1, 20, 2)}
{load(2, 30, sums)}
mma.sync.aligned.{shape}.row.col.{kind}.{a}.{a}.{kind} {registers(30, sums)}, {registers(10, 4)}, {registers(20, 2)},
 {registers(30, sums)};
{store(2, 30, sums)}""",
        words(a, x),
        words(a, y),
        out,
    )
    got = out.view(np.float16 if kind == "f16" else np.float32)
    matrix = np.zeros((16, 8))
    for lane in range(32):
        for i in range(4):
            matrix[place_c(lane, i)] = got[lane, i]
    assert np.isnan(matrix[0, 0]) and matrix[0, 1] == np.inf and (matrix[0, 2:] == -np.inf).all()
    assert (matrix[1:] == 0).all()


@pytest.mark.parametrize("shape", ["m8n8k4.row.col.f64.f64.f64.f64", "m16n8k16.row.row.f32.bf16.bf16.f32"])
def test_other_forms_of_mma_are_refused_by_name(shape):
    with pytest.raises(UnknownInstruction, match=r"mma\.sync\.aligned"):
        run(f"mma.sync.aligned.{shape} {registers(0, 4)}, {registers(4, 4)}, {registers(8, 2)}, {registers(0, 4)};")
