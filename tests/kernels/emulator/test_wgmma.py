"""Hazards of wgmma: a clean program, and that program with one fault each, early and late."""

import numpy as np
import pytest

from fusemesh.kernels.emulator.hazard import UnknownInstruction
from fusemesh.kernels.emulator.shared_memory import Shared
from tests.support.emulated_ptx import changed, each_way, fault, fill_shared, load, registers, run, store

# What the planted instructions read besides.
DEFINED = "\n".join(f"mov.b32 %r{k}, 0;" for k in range(54, 78))
WGMMA = f"""{fill_shared(0, 1024)}
{DEFINED}
{load(1, 50, 4)}
ld.global.b64 %d10, [%a2];
ld.global.b64 %d11, [%a2 + 8];
mov.b32 %r5, global_smem;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {registers(50, 4)}, %d10, %d11, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{store(1, 50, 4)}
"""
WAIT_MMA = "wgmma.wait_group.sync.aligned 0;"
SECOND = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {registers(50, 4)}, %d10, %d11, 1, 1, 1, 0, 0;"
A_IN_REGISTERS = SECOND.replace("%d10", registers(60, 4)).replace(", 0, 0;", ", 0;")
FROM_SUM = (
    SECOND.replace(registers(50, 4), registers(70, 4)).replace("%d10", registers(50, 4)).replace(", 0, 0;", ", 0;")
)
WIDER = SECOND.replace("n8k", "n16k").replace(registers(50, 4), registers(50, 8))
WGMMA_FAULTS = {
    "no wait": ("async", (WAIT_MMA, "")),
    "a wait for too little": ("async", (WAIT_MMA, WAIT_MMA.replace("0;", "1;"))),
    "no commit": ("async", ("wgmma.commit_group.sync.aligned;", "")),
    "the sum is read": ("async", (WAIT_MMA, f"mov.b32 %r7, %r52;\n{WAIT_MMA}")),
    "the sum is written": ("async", (WAIT_MMA, f"mov.b32 %r53, 0;\n{WAIT_MMA}")),
    "no wgmma.fence": ("fence", ("wgmma.fence.sync.aligned;", "")),
    "a register after the fence": (
        "fence",
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\nmov.b32 %r51, 0;"),
    ),
    "no proxy fence": ("proxy", ("fence.proxy.async.shared::cta;", "")),
    "an operand is written under way": ("async", (WAIT_MMA, f"st.shared.b32 [%r5], %r5;\n{WAIT_MMA}")),
    "an operand is copied over under way": (
        "async",
        (WAIT_MMA, f"cp.async.ca.shared.global [%r5], [%a0], 4;\n{WAIT_MMA}\ncp.async.wait_all;"),
    ),
    "an operand is not there yet": (
        "async",
        ("wgmma.fence.sync", "cp.async.ca.shared.global [%r5], [%a0], 4;\nwgmma.fence.sync"),
    ),
    "an operand that nothing wrote": (
        "uninitialised",
        ("ld.global.b64 %d11, [%a2 + 8];", "ld.global.b64 %d11, [%a2 + 16];"),
    ),
    "another shape in the same registers": ("async", ("wgmma.commit_group", f"{WIDER}\nwgmma.commit_group")),
    "the sum as the next operand": ("async", ("wgmma.commit_group", f"{FROM_SUM}\nwgmma.commit_group")),
    "an operand in registers is written": (
        "async",
        ("wgmma.commit_group", f"{A_IN_REGISTERS}\nmov.b32 %r60, 0;\nwgmma.commit_group"),
    ),
    # ptxas makes one predicate of the warp of it (HGMMA has a uniform one).
    "a scale that differs": (
        "convergence",
        (SECOND, "setp.lt.u32 %p4, %tid, 7;\n" + SECOND.replace("%d11, 1", "%d11, %p4")),
    ),
    "some lanes": ("convergence", ("wgmma.wait_group", "setp.eq.u32 %p4, %tid, 3;\n@%p4 bra OUT;\nwgmma.wait_group")),
}


def multiplied() -> tuple[np.ndarray, ...]:
    memory = np.zeros(1024, np.uint32)
    memory[:] = 0x3F803F80  # ones
    # A at byte 0, [64, 16] as 8 x 2 core matrices; B behind it; the third lies where nothing is written.
    starts = [Shared.BASE, Shared.BASE + 2048, Shared.BASE + 4096]
    described = np.array([s >> 4 | 1024 >> 4 << 16 | 128 >> 4 << 32 for s in starts], np.uint64)
    return memory, np.full((128, 4), 0x3F800000, np.uint32), described


@each_way
def test_products_that_are_waited_for(options):
    memory, sums, described = multiplied()
    run(WGMMA, memory, sums, described, threads=128, shared=8192, **options)
    assert (sums.view(np.float32) == 17).all()
    memory, sums, described = multiplied()
    chain = changed(WGMMA, ("wgmma.commit_group", f"{SECOND}\nwgmma.commit_group"))
    run(chain, memory, sums, described, threads=128, shared=8192, **options)
    assert (sums.view(np.float32) == 33).all()


@each_way
@pytest.mark.parametrize("name", WGMMA_FAULTS)
def test_faults_of_wgmma(name, options):
    kind, change = WGMMA_FAULTS[name]
    program = changed(WGMMA, change) + ("OUT:\n" if "OUT" in change[1] else "")
    assert fault(program, *multiplied(), threads=128, shared=8192, **options) == kind


@each_way
def test_a_warpgroup_waits_for_its_own_products(options):
    # Two warpgroups; the second overwrites operands after its own wait alone, or after a barrier.
    program = WGMMA.replace(fill_shared(0, 1024), fill_shared(0, 1024, 256))
    program = changed(
        program, (WAIT_MMA, f"setp.ge.u32 %p4, %tid, 128;\n{WAIT_MMA}\nbar.sync 0;\n@%p4 st.shared.b32 [%r5], %r5;")
    )

    def arguments():
        memory, sums, described = multiplied()
        return memory, np.repeat(sums, 2, 0), described

    memory, sums, described = arguments()
    run(program, memory, sums, described, threads=256, shared=8192, **options)
    assert (sums.view(np.float32) == 17).all()
    race = changed(program, (f"{WAIT_MMA}\nbar.sync 0;", WAIT_MMA))
    assert fault(race, *arguments(), threads=256, shared=8192, **options) in ("race", "async", "proxy")


@each_way
def test_a_warp_knows_of_its_own_wait_alone(options):
    after = "setp.lt.u32 %p4, %tid, 32;\nbar.sync 0;\n@%p4 st.shared.b32 [%r5], %r5;"
    program = changed(WGMMA, (WAIT_MMA, f"bar.sync 0;\n{WAIT_MMA}\n{after}"))
    run(program, *multiplied(), threads=128, shared=8192, **options)
    race = changed(program, (after, after.replace("bar.sync 0;", "")))
    assert fault(race, *multiplied(), threads=128, shared=8192, **options) in ("race", "async")


REGISTERS = """setp.ge.u32 %p4, %tid, 128;
@%p4 bra SMALL;
setmaxnreg.inc.sync.aligned.u32 232;
bra DONE;
SMALL:
setmaxnreg.dec.sync.aligned.u32 104;
DONE:
"""


@each_way
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (None, ("232", "232")),
        ("deadlock", ("232", "240")),  # more than the others give
        ("deadlock", ("setmaxnreg.dec.sync.aligned.u32 104;", "")),
        ("registers", ("setmaxnreg.dec.sync.aligned.u32 104", "setmaxnreg.dec.sync.aligned.u32 176")),
        ("registers", ("setmaxnreg.inc.sync.aligned.u32 232", "setmaxnreg.inc.sync.aligned.u32 160")),
        # PTX ISA: "The same setmaxnreg instruction must be executed by all warps in a warpgroup."
        ("registers", ("%tid, 128;", "%tid, 160;")),
    ],
)
def test_registers_that_some_warps_take_are_given_by_others(kind, change, options):
    program = changed(REGISTERS, change)
    given = {"threads": 256, "head": ".maxnreg 168", **options}
    if kind is None:
        run(program, **given)
    else:
        assert fault(program, **given) == kind


@pytest.mark.parametrize(
    "instruction",
    [
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r0], 64;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r0], %d0, %d1, %r1, %p0;",
        "tcgen05.wait::ld.sync.aligned;",
        "mapa.shared::cluster.u32 %r0, %r1, 0;",
        "barrier.cluster.arrive.aligned;",
    ],
)
def test_what_is_missing_of_newer_devices_is_refused_by_name(instruction):
    with pytest.raises(UnknownInstruction, match=instruction.split(" ")[0].replace(".", r"\.").rstrip(";")):
        run(instruction, threads=128, shared=1024)
