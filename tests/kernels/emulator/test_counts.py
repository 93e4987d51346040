"""Layer: emulator. What a launch is counted to have done, against numbers worked out by hand."""

from __future__ import annotations

import re

import pytest
import torch

from fusemesh.kernels.emulator.launch.counts import CLASSES, LaunchCounts, class_of, table
from fusemesh.kernels.emulator.machine import Machine
from tests.support.emulated_ptx import aligned, run

OPCODES = {
    "matrix": "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "sync": "bar.sync mbarrier.try_wait.parity.shared::cta.b64 fence.proxy.async.shared::cta wgmma.fence.sync.aligned "
    "wgmma.wait_group.sync.aligned cp.async.commit_group cp.async.wait_group cp.async.bulk.commit_group membar.gl",
    "copy": "cp.async.cg.shared.global cp.async.bulk.tensor.2d.global.shared::cta.bulk_group",
    "shared": "ld.shared.v4.b32 st.shared.b16 ldmatrix.sync.aligned.m8n8.x4.shared.b16 atom.shared.add.f32",
    "global": "ld.global.L1::evict_last.v4.b32 st.global.b32 red.global.add.f32 "
    "atom.global.gpu.acq_rel.add.u32 ld.local.b32",
    "warp": "shfl.sync.bfly.b32 redux.sync.max.s32 elect.sync vote.sync.any.pred",
    "special": "ex2.approx.ftz.f32 div.full.f32 rcp.approx.ftz.f32 sqrt.rn.f64",
    "float": "add.f32 fma.rn.f32 mul.rn.bf16x2 sub.f64 neg.f32 fma.rn.f32x2",
    "control": "bra bra.uni ret brx.idx",
    "integer": "add.s32 mad.lo.s32 mov.b32 mov.f32 ld.param.b64 setp.lt.f32 selp.f32 cvt.rn.bf16x2.f32 max.f32 and.b32 "
    "div.s32 cvta.param.u64",
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_opcode_is_of_one_class(name: str) -> None:
    assert {opcode: class_of(opcode) for opcode in OPCODES[name].split()} == dict.fromkeys(OPCODES[name].split(), name)


def counted(body: str, threads: int = 32, shared: int = 4096) -> Machine:
    return run(body, aligned((1024,), "u4"), threads=threads, shared=shared, stats=True)


def test_an_instruction_counts_once_for_each_warp_that_runs_it() -> None:
    """Of four warps one takes the branch, with half of its lanes."""
    body = """
setp.ge.u32 %p0, %tid, 16;
@%p0 bra $after;
add.f32 %r1, %r2, %r3;
add.f32 %r1, %r1, %r3;
$after:
bar.sync 0;
"""
    for options in ({}, {"seed": 3}):
        machine = run("mov.b32 %r2, 0;\nmov.b32 %r3, 0;\n" + body, aligned((4,), "u4"), threads=128, **options)
        counts = machine.executed()
        assert (counts["setp.ge.u32"], counts["bra"], counts["bar.sync"]) == (4, 4, 4), options
        assert counts["add.f32"] == 2, options


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(4, 0, 4), (4, 4, 5), (8, 0, 8), (32, 0, 32), (64, 0, 32), (0, 0, 1)],
    ids=["dense", "shifted", "every second", "a sector each", "every second sector", "one word"],
)
def test_sectors_of_global_memory(stride: int, offset: int, sectors: int) -> None:
    body = f"""
mul.wide.u32 %d0, %tid, {stride};
add.s64 %d0, %d0, %a0;
ld.global.b32 %r1, [%d0 + {offset}];
"""
    machine = counted(body)
    words = 32 if stride else 1
    assert (machine.stats["sectors"], machine.stats["sectors_ideal"]) == (sectors, -(-words * 4 // 32))


@pytest.mark.parametrize(
    ("stride", "passes", "ideal"),
    [(4, 1, 1), (8, 2, 1), (128, 32, 1), (132, 1, 1), (0, 1, 1)],
    ids=["dense", "every second bank", "one bank", "padded rows", "one word"],
)
def test_passes_over_the_banks_of_shared_memory(stride: int, passes: int, ideal: int) -> None:
    body = f"""
mul.lo.u32 %r0, %tid, {stride};
mov.b32 %r1, global_smem;
add.s32 %r0, %r0, %r1;
st.shared.b32 [%r0], %r1;
"""
    machine = counted(body, shared=8192)
    assert (machine.stats["bank"], machine.stats["bank_ideal"]) == (passes, ideal)


def test_wide_accesses_take_a_pass_for_each_128_bytes() -> None:
    body = """
mul.lo.u32 %r0, %tid, 16;
mov.b32 %r1, global_smem;
add.s32 %r0, %r0, %r1;
st.shared.v4.b32 [%r0], {%r1, %r1, %r1, %r1};
"""
    machine = counted(body)
    assert (machine.stats["bank"], machine.stats["bank_ideal"]) == (4, 4)


def test_the_table_has_a_line_for_each_launch() -> None:
    opcodes = {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 12, "add.f32": 3, "mov.b32": 5, "ret": 1}
    one = LaunchCounts("a_kernel", (2, 1, 1), 2, 128, opcodes, 40, 20, 7, 7, 0.25)
    other = LaunchCounts("b_kernel", (1, 1, 1), 1, 64, {"ret": 2}, 0, 0, 0, 0, 1.5)
    assert one.instructions == 21 and one.classes["matrix"] == 12 and list(one.classes) == list(CLASSES)
    head, *lines = (re.split(r"  +", line) for line in table([one, other]).splitlines())
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert [row["kernel"] for row in rows] == ["a_kernel", "b_kernel"]
    assert (rows[0]["instr"], rows[0]["matrix"], rows[0]["float"], rows[0]["integer"]) == ("21", "12", "3", "5")
    assert (rows[0]["sectors (ideal)"], rows[0]["passes (ideal)"], rows[0]["s"]) == ("40 (20)", "7 (7)", "0.25")
    assert (rows[1]["sectors (ideal)"], rows[1]["control"]) == ("-", "2")


@pytest.mark.aot
def test_a_launch_of_attention_is_counted() -> None:
    import fusemesh

    q = torch.randn(1, 1, 64, 64).bfloat16()
    with fusemesh.emulate("sm_80", counts=True) as run_:
        fusemesh.flash_attention(q, q, q, backend="triton")
    (counts,) = run_.counts
    assert counts.kernel == "attention_forward_kernel" and counts.ctas == 1 and counts.seconds > 0
    assert counts.classes["matrix"] > 0 and counts.instructions > 1000
    assert counts.sectors >= counts.sectors_ideal >= 4 * 64 * 64 * 2 // 32  # q, k, v and out
    assert counts.passes >= counts.passes_ideal > 0
    assert "attention_forward_kernel" in run_.table()
