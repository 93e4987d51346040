"""Layer: kernels, ahead of time. The compiler's report is true (toy kernels), and what it says of attention's tiles."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from fusemesh.kernels import aot, compat
from fusemesh.kernels.attention.gpu import tiles
from fusemesh.kernels.runtime import fences
from fusemesh.kernels.runtime.launch import TARGETS, Target, launch
from fusemesh.kernels.runtime.launches import attention_launches
from fusemesh.kernels.runtime.named_target import NamedTarget
from tests.support.ptxas_log import ptxas_log

pytestmark = pytest.mark.aot


@triton.jit(do_not_specialize=["M", "K"])
def product_kernel(
    p_a,
    p_b,
    p_c,
    strides,
    M,
    K,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_ATOMIC: tl.constexpr,
):
    """c [M, BLOCK_N] = scale * a [M, K] b [K, BLOCK_N]; strides are three pairs."""
    o_m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m = o_m[:, None] < M
    # [BLOCK_M, BLOCK_N]
    b_c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        b_a = tl.load(p_a + o_m[:, None] * strides[0][0] + o_k[None, :] * strides[0][1], mask=m_m, other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * strides[1][0] + o_n[None, :] * strides[1][1])
        b_c = tl.dot(b_a, b_b, b_c)
    p_bc = p_c + o_m[:, None] * strides[2][0] + o_n[None, :] * strides[2][1]
    if IS_ATOMIC:
        tl.atomic_add(p_bc, b_c * scale, mask=m_m)
    else:
        tl.store(p_bc, b_c * scale, mask=m_m)


def product(
    block_m: int = 64,
    block_n: int = 64,
    *,
    warps: int = 4,
    stages: int = 3,
    atomic: bool = False,
    offset: int = 0,
    times: int = 1,
) -> Callable[[], None]:
    def run() -> None:
        a = torch.empty(300 * 256 + offset, dtype=torch.bfloat16)[offset:].view(300, 256)
        b = torch.empty(256, block_n, dtype=torch.bfloat16)
        c = torch.empty(300, block_n)
        for _ in range(times):
            launch(
                product_kernel,
                (triton.cdiv(300, block_m),),
                a,
                b,
                c,
                (a.stride(), b.stride(), c.stride()),
                300,
                256,
                0.5,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=64,
                IS_ATOMIC=atomic,
                num_warps=warps,
                num_stages=stages,
            )

    return run


@pytest.mark.parametrize(
    ("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")]
)
def test_report_of_a_clean_kernel(target: str, opcode: str) -> None:
    (report,) = aot.compile_launches(product(times=2), target)
    assert report.kernel == "product_kernel" and report.target == target and report.launches == 2
    assert report.tile == "64x64x64 w4 s3"
    assert 16 < report.registers <= 255 and report.instructions > 100
    assert report.spill_stores == report.spill_loads == 0
    # Two operands of 64 x 64 bf16, in flight at least once.
    assert 2 * 64 * 64 * 2 <= report.shared_memory <= report.shared_memory_limit and report.fits
    assert report.tensor_core and all(name.startswith(opcode) for name in report.tensor_core)
    assert report.atomics == {}


def test_the_versions_that_leave_fences_out_are_those_said() -> None:
    (item,) = aot.record_launches(product(), TARGETS["sm_90"])
    with compat.driver(NamedTarget(TARGETS["sm_90"])):
        ptx = compat.compile_launch(item.kernel, item.grid, item.args, item.kwargs).asm["ptx"]
    assert "cp.async" in ptx and "wgmma.mma_async" in ptx
    assert ("fence.proxy.async" in ptx) != fences.LEFT_OUT.value


UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def spills_allowed(op: str, target: str, dtype: torch.dtype, d: int) -> int:
    """Bytes that a thread may spill inside the loops over tiles, all loops of the kernel together.

    16-bit: a few addresses and bounds, one more (written and read) beside the fences that the kernels issue for older
    versions of Triton. fp32 is multiplied as three tf32 products (NVIDIA), whose halves of q, k, v or do the compiler
    keeps in registers for all of the loop: 2 * D of them a row, too many from 128 on for any tile. For sm_80 ptxas
    gives up on dbias of 256, and leaves all but 32 registers unused.
    """
    if dtype != torch.float32 or d == 64:
        return 96 + 8 * (fences.LEFT_OUT.value and target == "sm_90")
    if d == 128:
        return 1200
    return 20000 if op == "dbias" and target == "sm_80" else 1800


def check_attention(target: str, dtype: torch.dtype, d: int, *, has_tiles: bool) -> None:
    """Compile forward and backward with the shipped tiles: in three loops with a mask and a bias, or causal in two."""
    if has_tiles:
        fn = attention_launches(dtype, d, causal=True, window=(100, None), mask=True, bias="HQK")
    else:
        fn = attention_launches(dtype, d, causal=True)
    reports = aot.compile_launches(fn, target)
    ops = [report.kernel.removeprefix("attention_").removesuffix("_kernel") for report in reports]
    # Passes whose tiles have one shape share the kernel that lists them.
    assert {*ops} == {"forward", "delta", "dkdv", "dq", *(("dbias", "mask_tiles") if has_tiles else ())}
    for op, report in zip(ops, reports, strict=True):
        assert report.fits and not report.atomics, report
        if op == "mask_tiles":
            assert report.spill_stores + report.spill_loads == 0, report
            continue
        if op == "delta":
            # It has no loop; ptxas spills a pointer or two of fp32 rows on sm_100.
            assert report.spill_stores + report.spill_loads <= 64, report
            continue
        # Gradients are asked for: what rounding takes from a 16-bit output is kept.
        tile = tiles.get(op, TARGETS[target], dtype, d, d, has_tiles, keep_rest=op == "forward" and dtype.itemsize == 2)
        assert report.shared_memory <= tiles.shared_memory(tile, op, TARGETS[target], dtype, d, d, has_tiles), report
        rows = tile.block_n if op == "dkdv" else tile.block_m
        # wgmma and tcgen05 multiply 64 rows or more.
        units = UNITS[target] if target == "gfx942" or rows >= 64 else "HMMA"
        assert report.tensor_core and all(name.startswith(units) for name in report.tensor_core), report
        assert report.loop_spills <= spills_allowed(op, target, dtype, d), report


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_attention_tiles(target: str) -> None:
    check_attention(target, torch.bfloat16, 128, has_tiles=False)


def test_attention_tiles_with_mask_and_bias() -> None:
    check_attention("sm_90", torch.bfloat16, 64, has_tiles=True)


@pytest.mark.slow
@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("d", tiles.HEAD_DIMS)
@pytest.mark.parametrize("dtype", tiles.DTYPES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_attention_tile(target: str, dtype: torch.dtype, d: int, has_tiles: bool) -> None:
    check_attention(target, dtype, d, has_tiles=has_tiles)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_atomics_are_found(target: str) -> None:
    (report,) = aot.compile_launches(product(atomic=True), target)
    assert sum(report.atomics.values()) >= 8, report


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_spills_are_found(target: str) -> None:
    # 256 x 128 fp32 accumulators over 4 warps are 256 registers a thread.
    (report,) = aot.compile_launches(product(256, 128, warps=4), target)
    assert report.spill_stores > 500 and report.spill_loads > 500, report
    # The accumulators live in the loop.
    assert 500 < report.loop_spills <= report.spill_stores + report.spill_loads


def test_spills_count_where_matrix_instructions_repeat() -> None:
    sass = """
.L_outer:
        /*0000*/                   LDL.64 R2, [R1+0x8] ;
.L_inner:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_wait:
        /*0020*/              @!P1 BRA `(.L_wait) ;
        /*0030*/                   STL.128 [R1], R4 ;
        /*0040*/                   LDL R4, [R1] ;
        /*0050*/              @!P0 BRA `(.L_inner) ;
        /*0060*/               @P2 BRA `(.L_outer) ;
.L_copy:
        /*0070*/                   STL [R1], R4 ;
        /*0080*/               @P2 BRA `(.L_copy) ;
        /*0090*/              @!P0 BRA `(.L_end) ;
.L_end:
        /*00a0*/                   EXIT ;
"""
    inside = aot._in_matrix_loops(aot._SASS_LINE.findall(sass))
    assert inside == ["HMMA.16816.F32.BF16", "BRA", "STL.128", "LDL", "BRA"]
    assert aot._spilled(inside, "STL", "LDL") == 20 and aot._spilled(inside, "STL") == 16
    gcn = """
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tscratch_store_dwordx4 off, v[0:3], s32
\ts_cbranch_scc1 .LBB0_1
\tscratch_load_dword v0, off, s32
"""
    inside = aot._in_matrix_loops(aot._GCN_LINE.findall(gcn))
    assert aot._spilled(inside, "scratch_store", "scratch_load") == 16


def test_spills_and_atomics_of_amd_are_read_off_the_compilers_text() -> None:
    text = """kernel:
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tbuffer_atomic_add_f32 v1, v2, s[0:3], 0 offen
\tds_add_f32 v1, v2
\tds_read_b128 v[0:3], v4
\tscratch_store_dword off, v1, s32 ; 4-byte Folded Spill
    .sgpr_spill_count: 2
    .vgpr_count:     300
    .vgpr_spill_count: 5
"""
    read = aot._read_amd({"amdgcn": text})
    assert read == {
        "registers": 300,
        "spill_stores": 28,
        "spill_loads": 28,
        "loop_spills": 0,
        "tensor_core": {"v_mfma_f32_32x32x8_bf16": 1},
        "atomics": {"buffer_atomic_add_f32": 1, "ds_add_f32": 1},
        "instructions": 5,
    }


def test_spilled_bytes_are_those_that_ptxas_counts() -> None:
    (item,) = aot.record_launches(product(256, 128, warps=4), TARGETS["sm_80"])
    (report,) = aot.compile_launches(product(256, 128, warps=4), "sm_80")
    log = ptxas_log(item, TARGETS["sm_80"])
    match = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert match is not None
    # triton 3.9's ptxas leaves a tenth of the stack's traffic out of these numbers; older ones count as we do.
    for found, counted in ((report.spill_stores, int(match[1])), (report.spill_loads, int(match[2]))):
        assert 0 < counted <= found <= 1.2 * counted
    assert f"Used {report.registers} registers" in log


def test_shared_memory_beyond_the_device_is_flagged() -> None:
    (report,) = aot.compile_launches(product(), Target("cuda", 80, 16384))
    assert report.shared_memory > report.shared_memory_limit == 16384 and not report.fits
    assert "TOO MUCH" in aot.table([report])


def test_alignment_and_types_are_those_of_the_launch() -> None:
    (aligned,) = aot.compile_launches(product(), "sm_80")
    (misaligned,) = aot.compile_launches(product(offset=1), "sm_80")
    # Rows that do not start on 16 bytes cannot be copied asynchronously: they take no buffers, but other code.
    assert misaligned.shared_memory < aligned.shared_memory and misaligned.instructions != aligned.instructions


def test_each_machine_code_is_reported_once() -> None:
    def run() -> None:
        product(times=2)()
        product(32)()
        product()()

    reports = aot.compile_launches(run, "sm_80")
    assert [(report.tile, report.launches) for report in reports] == [("64x64x64 w4 s3", 3), ("32x64x64 w4 s3", 1)]


def test_a_grid_without_programs_is_no_launch() -> None:
    def run() -> None:
        launch(product_kernel, (0,))

    with pytest.raises(ValueError, match=r"fn: expected .* received .* none"):
        aot.compile_launches(run, "sm_90")


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target: expected one of \('sm_80'.*received 'sm_91'"):
        aot.compile_launches(product(), "sm_91")


def test_the_driver_is_put_back() -> None:
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError), compat.driver(aot.NamedTarget(TARGETS["sm_90"])):
        assert driver.active.get_current_target().arch == 90
        raise ZeroDivisionError
    assert driver._active is before


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot.env, "INTERPRET", True)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET: expected it unset .* received 1"):
        aot.compile_launches(product(), "sm_90")


def test_triton_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="triton: expected it installed"):
        aot.compile_launches(product(), "sm_90")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "sm_80", "--kernel", "linear", "--dtype", "bf16", "--no-backward"]
    assert aot.main(arguments) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["kernel", "target", "tile"] and line.split()[:2] == ["linear_forward_kernel", "sm_80"]
    assert aot.main([*arguments, "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["kernel"] == "linear_forward_kernel" and report["atomics"] == {} and report["registers"] > 0
