"""wgmma against exact products of matrices that loops place in shared memory, core matrix by core matrix."""

import itertools

import numpy as np
import pytest

from bench.gpu.programs.matrices import BITS, codes, place_a, value, words
from fusemesh.kernels.emulator.hazard import Hazard, UnknownInstruction
from fusemesh.kernels.emulator.shared_memory import Shared
from tests.support.emulated_ptx import fill_shared, load, registers, run, store

SHARED = 64 * 1024
MODES = {"none": (0, 0), "32": (3, 1), "64": (2, 2), "128": (1, 3)}  # number in the descriptor, bits that are permuted


def swizzled(address: int, bits: int, base: int = 0) -> int:
    """Bits 4 and up exchanged by those from bit 7 on, ``bits`` of them."""
    for n in range(bits):
        row = (address >> 7) - base
        if row >> n & 1:
            address ^= 1 << (4 + n)
    return address


def place(matrix: np.ndarray, size: int, mode: str, mn_major: bool, lead: int, stride: int, start: int, base: int = 0):
    """(address, code) of the elements of [MN, K], by walking over the 8 x 16 byte core matrices.

    ``start`` is the address of element (0, 0) before any swizzle. K-major: core matrices are rows of 8 along MN.
    """
    bits = MODES[mode][1]
    pitch = 16 << bits  # from row to row of a core matrix
    per = 16 // size
    out = []
    for i, j in itertools.product(*map(range, matrix.shape)):
        along, across = (i, j) if mn_major else (j, i)  # along: the direction in which elements are neighbours
        core, inner = divmod(along, per)
        group, row = divmod(across, 8)
        at = start + row * pitch + inner * size
        if bits == 0:  # each core matrix is 128 bytes by itself
            # K-major: leading between cores along K, stride along MN; MN-major: stride along MN, leading along K.
            at += core * (stride if mn_major else lead) + group * (lead if mn_major else stride)
        else:
            panel, within = divmod(core, 1 << bits)
            at += within * 16 + panel * lead + group * stride
        out.append((swizzled(at, bits, base), int(matrix[i, j])))
    return out


def raw(elements: list[tuple[int, int]], size: int) -> np.ndarray:
    """Shared memory that holds elements, those within it; each byte is written once."""
    memory, used = np.full(SHARED, 0xFF, np.uint8), np.zeros(SHARED, bool)
    for address, code in elements:
        at = address - Shared.BASE
        if at >= SHARED:
            continue
        assert not used[at : at + size].any()
        used[at : at + size] = True
        memory[at : at + size] = np.frombuffer(code.to_bytes(size, "little"), np.uint8)
    return memory.view(np.uint32)


def descriptor(start: int, lead: int, stride: int, mode: str, base: int = 0) -> int:
    return start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | base << 49 | MODES[mode][0] << 62


def offsets(mode: str, mn: int, k: int, size: int, mn_major: bool) -> tuple[int, int]:
    """Leading and stride byte offset of a dense operand."""
    width = 16 << MODES[mode][1]
    if not mn_major:
        return (mn * 16, 128) if mode == "none" else (0, 8 * width)
    if mode == "none":
        return mn * size * 8, 128
    return 8 * width * max(k // 8, 1), 8 * width


def place_d(thread: int, i: int) -> tuple[int, int]:
    """Row and column of element ``i`` of a thread's accumulator."""
    lane = thread % 32
    return thread // 32 * 16 + (lane >> 2) + (8 if i & 2 else 0), (i >> 2) * 8 + (lane % 4) * 2 + (i & 1)


def product(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    kinds: tuple[str, str, str],
    *,
    mode: tuple[str, str] = ("128", "128"),
    major: tuple[bool, bool] = (False, False),
    a_registers: bool = False,
    scale_d: str = "1",
    signs: tuple[int, int] = (1, 1),
    starts: tuple[int, int] = (0, 32 * 1024),
    bases: tuple[int, int] = (0, 0),
    **options,
) -> np.ndarray:
    """C + A B^T of codes [64, K] and [N, K] by one wgmma; C and the result [64, N] as fp32, fp16 or int32."""
    d_kind, a_kind, _ = kinds
    n, k = b.shape
    size = BITS[a_kind] // 8
    elements, described = [], []
    for x, m, mn_major, start, base in zip((a, b), mode, major, starts, bases, strict=True):
        lead, stride = offsets(m, len(x), k, size, mn_major)
        start += Shared.BASE
        described.append(descriptor(start, lead, stride, m, base))
        if not (a_registers and x is a):
            elements += place(x, size, m, mn_major, lead, stride, start, base)
    fragment = np.zeros((128, 4 * 32 // BITS[a_kind]), np.uint32)
    for thread, i in itertools.product(range(128), range(fragment.shape[1])):
        row, column = place_a(a_kind, k, thread % 32, i)
        fragment[thread, i] = a[thread // 32 * 16 + row, column]
    sums = n // 2
    at = np.array([[place_d(thread, i) for i in range(sums)] for thread in range(128)])
    dtype = {"f16": np.float16, "f32": np.float32, "s32": np.int32}[d_kind]
    packed = np.ascontiguousarray(c.astype(dtype)[at[..., 0], at[..., 1]]).view(np.uint32)
    count = packed.shape[1]
    first = registers(20, 4) if a_registers else "%d10"
    immediate = "" if d_kind == "s32" else f", {signs[0]}, {signs[1]}"
    if size == 2:
        immediate += f", {int(major[1])}" if a_registers else f", {int(major[0])}, {int(major[1])}"
    shape = f"m64n{n}k{k}.{'.'.join(kinds)}"
    run(
        f"""{fill_shared(0, SHARED // 4)}
{load(1, 50, count)}
{load(2, 20, 4)}
ld.global.b64 %d10, [%a3];
ld.global.b64 %d11, [%a3 + 8];
setp.ne.b32 %p1, {scale_d}, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.{shape} {registers(50, count)}, {first}, %d11, %p1{immediate};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{store(1, 50, count)}""",
        raw(elements, size),
        packed,
        words(a_kind, fragment),
        np.array(described, np.uint64),
        threads=128,
        shared=SHARED,
        **options,
    )
    got = packed.view(dtype)
    assert got.shape == (128, sums)
    out = np.zeros((64, n), dtype)
    out[at[..., 0], at[..., 1]] = got
    return out


def operands(kinds: tuple[str, str, str], n: int, k: int, seed: int):
    """Random codes of A, B and numbers for C, and the exact products."""
    rng = np.random.default_rng(seed)
    a, b = codes(kinds[1], 64 * k, rng).reshape(64, k), codes(kinds[2], n * k, rng).reshape(n, k)
    tables = [
        np.vectorize({c: float(value(kind, c)) for c in np.unique(x).tolist()}.get)(x)
        for kind, x in zip(kinds[1:], (a, b), strict=True)
    ]
    c = rng.integers(-8, 8, (64, n)).astype(float)
    return a, b, c, tables[0] @ tables[1].T


def as_kind(x: np.ndarray, kind: str) -> np.ndarray:
    return x.astype({"f16": np.float16, "f32": np.float32, "s32": np.int32}[kind])


CASES = [
    (("f32", "bf16", "bf16"), 16, (8, 64, 128, 256)),
    (("f32", "f16", "f16"), 16, (40,)),
    (("f16", "f16", "f16"), 16, (16, 64)),
    (("f32", "tf32", "tf32"), 8, (8, 96)),
    (("f32", "e4m3", "e5m2"), 32, (64, 128)),
    (("f16", "e5m2", "e4m3"), 32, (24,)),
    (("s32", "s8", "u8"), 32, (8, 48)),
    (("s32", "u8", "s8"), 32, (24,)),
]


@pytest.mark.parametrize(("kinds", "k", "sizes"), CASES, ids=["_".join(x[0]) for x in CASES])
def test_wgmma_multiplies_what_its_descriptors_describe(kinds, k, sizes):
    modes = list(MODES)
    for number, n in enumerate(sizes):
        a, b, c, exact = operands(kinds, n, k, number)
        for a_registers in (False, True):
            mode = (modes[number % 4], modes[(number + 1 + a_registers) % 4])
            got = product(a, b, c, kinds, mode=mode, a_registers=a_registers)
            assert (got == as_kind(exact + c, kinds[0])).all(), (n, mode, a_registers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("major", [(False, False), (True, False), (False, True), (True, True)])
def test_every_layout(mode, major):
    kinds = ("f32", "f16", "f16")
    for n in (128, 32):
        a, b, c, exact = operands(kinds, n, 16, 3)
        got = product(a, b, c, kinds, mode=(mode, mode), major=major)
        assert (got == as_kind(exact + c, "f32")).all()


def test_a_second_step_of_k_begins_inside_the_swizzle():
    kinds = ("f32", "bf16", "bf16")
    a, b, c, exact = operands(kinds, 64, 16, 4)
    got = product(a, b, c, kinds, starts=(32, 32 * 1024 + 96))
    assert (got == as_kind(exact + c, "f32")).all()


@pytest.mark.parametrize("mode", ["32", "64", "128"])
def test_a_pattern_that_begins_off_its_boundary_states_a_base_offset(mode):
    kinds = ("f32", "bf16", "bf16")
    a, b, c, exact = operands(kinds, 64, 16, 5)
    start = 32 * 1024 + 256 + 128
    base = (start + Shared.BASE) >> 7 & 7
    assert base
    got = product(a, b, c, kinds, mode=(mode, mode), starts=(0, start), bases=(0, base))
    assert (got == as_kind(exact + c, "f32")).all()


@pytest.mark.parametrize("kinds", [("f32", "bf16", "bf16"), ("f16", "f16", "f16")])
def test_signs_and_the_choice_to_accumulate(kinds):
    a, b, c, exact = operands(kinds, 16, 16, 6)
    assert (product(a, b, c, kinds, signs=(-1, 1)) == as_kind(c - exact, kinds[0])).all()
    assert (product(a, b, c, kinds, signs=(-1, -1)) == as_kind(c + exact, kinds[0])).all()
    assert (product(a, b, np.full_like(c, np.nan), kinds, scale_d="0") == as_kind(exact, kinds[0])).all()
    assert (product(a, b, c, kinds, signs=(1, -1), a_registers=True) == as_kind(c - exact, kinds[0])).all()


@pytest.mark.parametrize("options", [{"asynchrony": "early"}, {"asynchrony": "random", "seed": 3}])
def test_operands_read_early_or_late_are_the_same(options):
    kinds = ("f32", "bf16", "bf16")
    a, b, c, exact = operands(kinds, 64, 16, 7)
    assert (product(a, b, c, kinds, **options) == as_kind(exact + c, "f32")).all()


def test_descriptors_that_leave_shared_memory_or_set_reserved_bits():
    kinds = ("f32", "bf16", "bf16")
    a, b, c, _ = operands(kinds, 64, 16, 8)
    with pytest.raises(Hazard, match="leaves shared memory") as error:
        product(a, b, c, kinds, starts=(0, SHARED - 1024), a_registers=True, mode=("128", "128"))
    assert error.value.kind == "address"
    with pytest.raises(Hazard, match="reserved"):
        product(a, b, c, kinds, bases=(0, 8))


@pytest.mark.parametrize(
    "form",
    [
        "m64n12k16.f32.bf16.bf16",  # N
        "m64n40k32.s32.s8.s8",  # N of integers
        "m64n8k8.f32.bf16.bf16",  # K
        "m64n8k16.f16.bf16.bf16",  # accumulator
        "m64n8k256.s32.b1.b1.and.popc",
    ],
)
def test_other_forms_are_refused_by_name(form):
    with pytest.raises(UnknownInstruction, match="wgmma"):
        run(
            f"wgmma.mma_async.sync.aligned.{form} {registers(0, 4)}, %d0, %d1, 1, 1, 1, 0, 0;",
            threads=128,
            shared=1024,
        )
