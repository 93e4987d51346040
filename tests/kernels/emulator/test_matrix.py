"""mma and wgmma against loops over the fragments as the PTX ISA draws them, in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from bench.gpu.programs.matrices import MMA, codes, place_a, place_b, place_c, value, words
from fusemesh.kernels.emulator.hazard import UnknownInstruction
from tests.support.emulated_ptx import load, registers, run, store


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
