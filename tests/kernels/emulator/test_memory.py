"""Layer: kernels, the emulator. Loads, stores and atomic operations, each against a formula of its own; counts."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusemesh.kernels.emulator import emulate
from fusemesh.kernels.emulator.hazard import Hazard, UnknownInstruction
from fusemesh.kernels.runtime.launch import launch
from tests.support.emulated_ptx import run

EDGES = bytes([0, 1, 0x7F, 0x80, 0xFF, 0xFE, 0x55, 0xAA])


def raw(size: int, count: int = 32) -> np.ndarray:
    """Elements of ``size`` bytes, edge values among them."""
    random = np.random.default_rng(size)
    values = random.integers(0, 256, (count, size), dtype=np.uint8)
    values[: len(EDGES)] = np.frombuffer(EDGES, np.uint8)[:, None]
    values[len(EDGES), :-1], values[len(EDGES), -1] = 0, 0x80
    return values.reshape(-1).view(f"<u{size}")


# --- loads and stores

ADDRESSES = """mul.wide.u32 %d0, %tid, STRIDE;
add.s64 %d1, %d0, %a0;
mul.wide.u32 %d2, %tid, 4;
add.s64 %d2, %d2, %a1;
mul.wide.u32 %d3, %tid, 8;
add.s64 %d3, %d3, %a1;
"""


@pytest.mark.parametrize("kind", ["u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "f32"])
def test_a_load_into_a_wider_register_extends_by_its_sign(kind):
    size = int(kind[1:]) // 8
    source, out = raw(size), np.zeros(32, np.uint32)
    body = ADDRESSES.replace("STRIDE", str(size)) + f"ld.global.{kind} %r0, [%d1];\nst.global.b32 [%d2], %r0;"
    run(body, source, out)
    signed = kind[0] == "s"
    want = [int.from_bytes(x.tobytes(), "little", signed=signed) % (1 << 32) for x in source]
    assert out.tolist() == want
    wide = np.zeros(32, np.uint64)
    run(
        ADDRESSES.replace("STRIDE", str(size)) + f"ld.global.{kind} %d5, [%d1];\nst.global.b64 [%d3], %d5;",
        source,
        wide,
    )
    assert wide.tolist() == [int.from_bytes(x.tobytes(), "little", signed=signed) % (1 << 64) for x in source]


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize(
    ("vector", "bits"),
    [(1, 8), (1, 16), (1, 32), (1, 64), (2, 8), (2, 16), (2, 32), (2, 64), (4, 8), (4, 16), (4, 32)],
)
def test_vectors_pass_through_each_space(space, vector, bits):
    """Each thread copies a vector from one array to another by way of a space."""
    size = vector * bits // 8
    kind = {8: "%h", 16: "%h", 32: "%r", 64: "%d1"}[bits]
    names = [f"{kind}{n}" for n in range(vector)]
    data = names[0] if vector == 1 else "{" + ", ".join(names) + "}"
    v = "" if vector == 1 else f".v{vector}"
    where = {"global": "%d1", "shared": "%r20", "local": "local_array"}[space]
    middle = (
        ""
        if space == "global"
        else f"st.{space}{v}.b{bits} [{where}], {data};\nld.{space}{v}.b{bits} {data}, [{where}];\n"
    )
    body = f"""mul.wide.u32 %d0, %tid, {size};
add.s64 %d1, %d0, %a0;
add.s64 %d2, %d0, %a1;
mov.b32 %r20, global_smem;
mad.lo.s32 %r20, %tid, {size}, %r20;
ld.global{v}.b{bits} {data}, [%d1];
{middle}st.global{v}.b{bits} [%d2], {data};
"""
    source, out = raw(size if size <= 8 else 8, 32 * max(size // 8, 1)), np.zeros(32 * size, np.uint8)
    local = ".local .align 16 .b8 local_array[32];\n" if space == "local" else ""
    run(local + body, source, out, shared=32 * size)
    assert out.tobytes() == source.tobytes()


@pytest.mark.parametrize(("vector", "bits", "file"), [(8, 32, "%r"), (4, 64, "%d1")])
def test_vectors_of_32_bytes(vector, bits, file):
    names = "{" + ", ".join(f"{file}{n}" for n in range(vector)) + "}"
    body = "mul.wide.u32 %d0, %tid, 32;\nadd.s64 %d1, %d0, %a0;\nadd.s64 %d2, %d0, %a1;\n"
    body += f"ld.global.L1::evict_last.v{vector}.b{bits} {names}, [%d1];\nst.global.v{vector}.b{bits} [%d2], {names};"
    storage = np.zeros(32 * 4 * 2 + 4, np.uint64)
    first = -storage.ctypes.data // 8 % 4
    source, out = storage[first : first + 128], storage[first + 128 : first + 256]
    source[:] = raw(8, 128)
    run(body, source, out)
    assert (out == source).all()
    with pytest.raises(Hazard, match="alignment"):
        run(body, storage[first + 1 : first + 129], out)


CACHED = ["ca", "cg", "cs", "lu", "cv", "L1::no_allocate", "L1::evict_first", "L1::evict_last.L2::cache_hint", "nc",
          "ca.nc", "nc.L1::evict_first.L2::cache_hint", "L2::128B"]  # fmt: skip


@pytest.mark.parametrize("how", CACHED)
def test_caching_changes_no_value(how):
    source, out = raw(4), np.zeros(32, np.uint32)
    policy = ", %d9" if "cache_hint" in how else ""
    body = "createpolicy.fractional.L2::evict_last.b64 %d9, 1.0;\n" + ADDRESSES.replace("STRIDE", "4")
    run(body + f"ld.global.{how}.b32 %r0, [%d1]{policy};\nst.global.wb.b32 [%d2], %r0;", source, out)
    assert (out == source).all()


@pytest.mark.parametrize(
    "text",
    ["ld.global.v3.b32 %r0, [%d1];", "ld.b32 %r0, [%d1];", "ld.global.v2.b32 %r0, [%d1];",
     "ld.shared::cluster.b32 %r0, [%r1];", "st.global.v2.b32 [%d1], %r0;",
     "atom.global.add.s16 %r0, [%d1], 1;", "atom.global.mul.u32 %r0, [%d1], 1;"],
)  # fmt: skip
def test_an_unknown_form_is_refused_before_anything_runs(text):
    out = np.zeros(32, np.uint32)
    with pytest.raises(UnknownInstruction, match="PTX line"):
        run(f"st.global.b32 [%a0], 1;\n{text}", out)
    assert out[0] == 0


def test_local_memory_belongs_to_a_thread():
    array = ".local .align 4 .b8 local_array[8];\n"
    body = """st.local.b32 [local_array + 4], %tid;
ld.local.b32 %r0, [local_array + 4];
mul.wide.u32 %d2, %tid, 4;
add.s64 %d2, %d2, %a0;
st.global.b32 [%d2], %r0;
"""
    out = np.zeros(64, np.uint32)
    run(array + body, out, threads=64)
    assert (out == np.arange(64)).all()
    for change, kind in (
        (("ld.local.b32 %r0, [local_array + 4]", "ld.local.b32 %r0, [local_array]"), "uninitialised"),
        (("st.local.b32 [local_array + 4]", "st.local.b32 [local_array + 8]"), "address"),
        (("st.local.b32 [local_array + 4]", "st.local.b32 [local_array + 2]"), "alignment"),
    ):
        with pytest.raises(Hazard, match=kind):
            run(array + body.replace(*change), out, threads=64)


# --- atomic operations


def number(kind: str, bits: int):
    """The value of a PTX type from its bits, exactly."""
    size = int(kind[1:]) if kind[0] != "b" or kind == "b32" or kind == "b64" else 16
    if kind[0] in "ub" and kind != "bf16":
        return bits
    if kind[0] == "s":
        return bits - (1 << size) if bits >> (size - 1) else bits
    if kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return struct.unpack({16: "<e", 32: "<f", 64: "<d"}[size], bits.to_bytes(size // 8, "little"))[0]


def rounded(kind: str, value: float) -> int:
    """The bits of the nearest number of a floating type."""
    if kind == "bf16":
        return int.from_bytes(
            torch.tensor(value, dtype=torch.float64).bfloat16().view(torch.int16).numpy().tobytes(), "little"
        )
    name = {"f16": "<f2", "f32": "<f4", "f64": "<f8"}[kind]
    return int.from_bytes(np.array(value, np.float64).astype(name).tobytes(), "little")


def expected(operation: str, kind: str, old: int, b: int, c: int) -> int:
    """The new bits of an element of ``kind``."""
    bits = {"bf16": 16}.get(kind) or int(kind[1:])
    modulus = 1 << bits
    if operation in ("and", "or", "xor"):
        return {"and": old & b, "or": old | b, "xor": old ^ b}[operation]
    if operation == "exch":
        return b
    if operation == "cas":
        return c if old == b else old
    if operation == "inc":
        return 0 if old >= b else old + 1
    if operation == "dec":
        return b if old == 0 or old > b else old - 1
    x, y = number(kind, old), number(kind, b)
    if operation in ("min", "max"):
        return old if (x <= y) == (operation == "min") else b
    return (x + y) % modulus if kind[0] in "us" else rounded(kind, x + y)


CASES = [
    *(
        (op, kind)
        for op in ("add", "min", "max")
        for kind in ("u32", "s32", "u64", "s64")
        if (op, kind) != ("add", "s64")
    ),
    *((op, kind) for op in ("and", "or", "xor", "exch", "cas") for kind in ("b32", "b64")),
    ("inc", "u32"),
    ("dec", "u32"),
    *(("add", kind) for kind in ("f32", "f64", "noftz.f16", "noftz.bf16", "noftz.f16x2", "noftz.bf16x2")),
    *((op, kind) for op in ("min", "max") for kind in ("noftz.f16x2", "noftz.bf16x2", "noftz.f16")),
]


def operands(kind: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old values and two operands, edge values among them; of floating types finite and not subnormal."""
    element = kind.removeprefix("noftz.").removesuffix("x2")
    size = {"bf16": 2}.get(element) or int(element[1:]) // 8
    random = np.random.default_rng(size)
    if element[0] == "f" or element == "bf16":
        values = random.standard_normal((3, count)) * 4
        values[:, :4] = [[0.0, -0.0, 1.0, 3.0], [-0.0, 0.0, -1.0, 2.0**-9], [1, 1, 1, 1]]
        if element == "bf16":
            bits = torch.tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
        else:
            bits = values.astype(f"<f{size}").view(f"<u{size}")
        return bits[0].copy(), bits[1].copy(), bits[2].copy()
    edges = np.array([0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1), (1 << (8 * size - 1)) - 1, 5], f"u{size}")
    old = random.integers(0, 1 << 8 * size - 1, count, dtype=f"u{size}") * 2 + 1
    b, c = old[::-1].copy(), random.permutation(old)
    old[:36], b[:36] = np.repeat(edges, 6), np.tile(edges, 6)
    return old, b, c


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("operation", "kind"), CASES, ids=lambda x: x)
def test_an_atomic_operation(operation, kind, space):
    """Each thread changes a word of its own."""
    element = kind.removeprefix("noftz.").removesuffix("x2")
    pack = 2 if kind.endswith("x2") else 1
    old, b, c = operands(kind, 64 * pack)
    size = old.itemsize * pack
    file = {2: "%h", 4: "%r", 8: "%d1"}[size]
    word, reg = f"b{size * 8}", [f"{file}{n}" for n in range(4)]
    third = f", {reg[2]}" if operation == "cas" else ""
    where = "%d4" if space == "global" else "%r20"
    body = f"""mul.wide.u32 %d0, %tid, {size};
add.s64 %d4, %d0, %a0;
add.s64 %d5, %d0, %a1;
add.s64 %d6, %d0, %a2;
add.s64 %d7, %d0, %a3;
mov.b32 %r20, global_smem;
mad.lo.s32 %r20, %tid, {size}, %r20;
ld.global.{word} {reg[0]}, [%d4];
{"st.shared." + word + " [%r20], " + reg[0] + ";" if space == "shared" else ""}
ld.global.{word} {reg[1]}, [%d5];
ld.global.{word} {reg[2]}, [%d6];
atom.{space}.{operation}.{kind} {reg[3]}, [{where}], {reg[1]}{third};
{"ld.shared." + word + " " + reg[0] + ", [%r20];" if space == "shared" else "bar.sync 0;"}
{"st.global." + word + " [%d4], " + reg[0] + ";" if space == "shared" else ""}
st.global.{word} [%d7], {reg[3]};
"""
    new, before = old.copy(), np.zeros_like(old)
    machine = run(body, new, b, c, before, threads=64, shared=64 * size)
    assert (before == old).all()
    want = [expected(operation, element, int(x), int(y), int(z)) for x, y, z in zip(old, b, c, strict=True)]
    assert new.tolist() == want or all(
        number(element, int(x)) == number(element, y) == 0 for x, y in zip(new, want, strict=True) if x != y
    )
    floating = operation == "add" and element in ("f16", "bf16", "f32", "f64")
    assert machine.stats["float_atomics"] == (64 if floating else 0)


def test_sums_of_subnormal_numbers_are_flushed_in_global_memory_alone():
    tiny = np.full(32, 1, np.uint32)
    run("mul.wide.u32 %d0, %tid, 4;\nadd.s64 %d0, %d0, %a0;\nred.global.add.f32 [%d0], 0f00000005;", tiny)
    assert (tiny == 0).all()
    shared = """mov.b32 %r0, global_smem;
mad.lo.s32 %r0, %tid, 4, %r0;
mov.b32 %r1, 1;
st.shared.b32 [%r0], %r1;
red.shared.add.f32 [%r0], 0f00000005;
ld.shared.b32 %r1, [%r0];
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r1;
"""
    run(shared, tiny, shared=128)
    assert (tiny == 6).all()


@pytest.mark.parametrize("space", ["global", "shared"])
def test_lanes_that_meet_take_turns(space):
    """All threads exchange values at one word: each old value is another thread's, and one remains."""
    where = "%a1" if space == "global" else "%r20"
    body = f"""mov.b32 %r20, global_smem;
{"st.shared.b32 [%r20], 777;" if space == "shared" else ""}
bar.sync 0;
atom.{space}.exch.b32 %r0, [{where}], %tid;
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r0;
bar.sync 0;
{"ld.shared.b32 %r1, [%r20];" if space == "shared" else "ld.global.b32 %r1, [%a1];"}
{"st.global.b32 [%a1], %r1;" if space == "shared" else ""}
"""
    chains = set()
    for seed in (None, 0, 1, 2):
        old, last = np.zeros(64, np.uint32), np.full(1, 777, np.uint32)
        run(body, old, last, threads=64, shared=16, seed=seed)
        assert sorted([*old.tolist(), int(last[0])]) == [*range(64), 777]
        chains.add(tuple(old.tolist()))
    assert len(chains) == 4


def test_vectors_of_fp32_are_added_as_one():
    out = np.zeros(128, np.float32)
    body = "mul.wide.u32 %d0, %tid, 16;\nadd.s64 %d0, %d0, %a0;\ncvt.rn.f32.u32 %r0, %tid;\n"
    body += "red.global.add.v4.f32 [%d0], {%r0, %r0, 0f3f800000, %r0};"
    run(body, out)
    t = np.arange(32, dtype=np.float32)
    assert (out.reshape(32, 4) == np.stack([t, t, t * 0 + 1, t], 1)).all()


def test_an_atomic_operation_races_with_other_accesses():
    atom = "atom.global.add.u32 %r0, [%a0], 1;\n"
    run(atom, np.zeros(1, np.uint32), threads=64, grid=(3, 1, 1))
    for other in ("ld.global.b32 %r1, [%a0];\n", "st.global.b32 [%a0], 5;\n"):
        for body in (atom + other, other + atom):
            with pytest.raises(Hazard, match="race"):
                run(body, np.zeros(1, np.uint32), threads=64)
    shared = "mov.b32 %r9, global_smem;\nst.shared.b32 [%r9], 5;\nbar.sync 0;\natom.shared.add.u32 %r0, [%r9], 1;\n"
    run(shared, threads=64, shared=16)
    for body in (shared + "ld.shared.b32 %r1, [%r9];", shared.replace("bar.sync 0;\n", "")):
        with pytest.raises(Hazard, match=r"race|uninitialised"):
            run(body, threads=64, shared=16)


# --- counts


@pytest.mark.parametrize(
    ("stride", "offset", "vector", "sectors", "ideal"),
    [(4, 0, 1, 4, 4), (4, 4, 1, 5, 4), (8, 0, 1, 8, 4), (32, 0, 1, 32, 4), (0, 0, 1, 1, 1), (16, 0, 4, 16, 16),
     (32, 0, 4, 32, 16)],
)  # fmt: skip
def test_sectors_of_global_memory(stride, offset, vector, sectors, ideal):
    memory = np.zeros(400, np.float32)
    first = -memory.ctypes.data // 4 % 8
    registers = "{" + ", ".join(f"%r{n}" for n in range(vector)) + "}" if vector > 1 else "%r0"
    v = f".v{vector}" if vector > 1 else ""
    body = f"mul.wide.u32 %d0, %tid, {stride};\nadd.s64 %d0, %d0, %a0;\nld.global{v}.b32 {registers}, [%d0 + {offset}];"
    machine = run(body, memory[first : first + 260], stats=True)
    assert (machine.stats["sectors"], machine.stats["sectors_ideal"]) == (sectors, ideal)


@pytest.mark.parametrize(
    ("stride", "vector", "passes", "ideal"),
    [(4, 1, 1, 1), (8, 1, 2, 1), (128, 1, 32, 1), (0, 1, 1, 1), (132, 1, 1, 1), (16, 4, 4, 4), (32, 4, 8, 4),
     (8, 2, 2, 2)],
)  # fmt: skip
def test_passes_over_the_banks(stride, vector, passes, ideal):
    registers = "{" + ", ".join(f"%r{n + 1}" for n in range(vector)) + "}" if vector > 1 else "%r1"
    v = f".v{vector}" if vector > 1 else ""
    body = f"mov.b32 %r0, global_smem;\nmad.lo.s32 %r0, %tid, {stride}, %r0;\n"
    body += "".join(f"mov.b32 %r{n + 1}, 7;\n" for n in range(vector)) + f"st.shared{v}.b32 [%r0], {registers};"
    machine = run(body, shared=8192, stats=True)
    assert (machine.stats["bank"], machine.stats["bank_ideal"]) == (passes, ideal)


@pytest.mark.parametrize(("pitch", "passes"), [(16, 4), (128, 32), (144, 4)])
def test_passes_of_ldmatrix(pitch, passes):
    body = f"""mov.b32 %r0, global_smem;
mad.lo.s32 %r1, %tid, {pitch}, %r0;
mov.b32 %r2, 0;
st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r1];
"""
    stored = run(body.split("bar.sync")[0], shared=32 * 144, stats=True)
    machine = run(body, shared=32 * 144, stats=True)
    assert machine.stats["bank"] - stored.stats["bank"] == passes
    assert machine.stats["bank_ideal"] - stored.stats["bank_ideal"] == 4


# --- kernels of Triton whose programs hear of each other


@triton.jit
def ordered_kernel(p_x, p_turn, p_out, BLOCK: tl.constexpr, HAS_BARRIER: tl.constexpr, SEM: tl.constexpr):
    """out = 2 out + x of each program, in their order; unordered sums beside it."""
    i = tl.program_id(0)
    o_n = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i * BLOCK + o_n, eviction_policy="evict_first")
    tl.atomic_add(p_out + BLOCK + o_n, b_x, sem="relaxed")
    while tl.atomic_cas(p_turn, i, i, sem=SEM) != i:
        pass
    b_out = tl.load(p_out + o_n, cache_modifier=".cg")
    tl.store(p_out + o_n, 2 * b_out + b_x)
    if HAS_BARRIER:
        tl.debug_barrier()
    tl.atomic_xchg(p_turn, i + 1)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_programs_that_take_turns(target):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(256)
    for row in x:
        want = 2 * want + row
    for seed in (None, 0, 1):
        turn, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, 256)
        with emulate(target, seed=seed, resident=4) as emulated:
            launch(ordered_kernel, (4,), x, turn, out, BLOCK=256, HAS_BARRIER=True, SEM="acq_rel")
        assert torch.equal(out[0], want) and torch.allclose(out[1], x.sum(0), atol=1e-5)
        assert emulated.log[0]["float_atomics"] == 1024
    for has_barrier, sem in ((False, "acq_rel"), (True, "relaxed")):
        # From triton 3.9 on an atomic that releases comes behind a barrier of its program.
        orders = triton.__version__ >= "3.9" and sem == "acq_rel"
        hazard = contextlib.nullcontext() if orders else pytest.raises(Hazard, match="race")
        out.zero_(), turn.zero_()
        with emulate(target, resident=4), hazard:
            launch(ordered_kernel, (4,), x, turn, out, BLOCK=256, HAS_BARRIER=has_barrier, SEM=sem)
        assert torch.equal(out[0], want) == orders
