"""Layer: kernels, the emulator. The order of threads and of CTAs: by a seed, barriers, meeting lanes, deadlock."""

from __future__ import annotations

import numpy as np
import pytest

from fusemesh.kernels.emulator.hazard import Hazard
from tests.support.emulated_ptx import changed, run

SEEDS = (None, 0, 1, 2, 3)


def hazard(program: str, *arguments, **options) -> Hazard:
    """The hazard that a program has."""
    with pytest.raises(Hazard) as error:
        run(program, *arguments, **options)
    return error.value


# Each warp takes a number in the order of arrival.
ARRIVE = """and.b32 %r0, %tid, 31;
setp.ne.u32 %p0, %r0, 0;
shr.u32 %r1, %tid, 5;
mul.wide.u32 %d0, %r1, 4;
add.s64 %d0, %d0, %a1;
mov.b32 %r5, 0;
AGAIN:
add.s32 %r5, %r5, 1;
setp.lt.u32 %p1, %r5, 5;
@%p1 bra AGAIN;
@%p0 bra END;
atom.global.add.u32 %r2, [%a0], 1;
st.global.b32 [%d0], %r2;
END:
"""


def order(seed, **options) -> tuple[int, ...]:
    count, out = np.zeros(1, np.uint32), np.zeros(4, np.uint32)
    run(ARRIVE, count, out, threads=128, seed=seed, **options)
    assert count[0] == 4 and sorted(out) == [0, 1, 2, 3]
    return tuple(int(x) for x in out)


def test_a_seed_gives_one_order_and_seeds_give_many():
    orders = [order(seed) for seed in range(12)]
    assert orders == [order(seed) for seed in range(12)]
    assert len(set(orders)) > 5
    assert order(None) == order(None)


def test_ctas_start_in_an_order_by_seed():
    program = """setp.ne.u32 %p0, %tid, 0;
mov.u32 %r0, %ctaid.x;
mul.wide.u32 %d0, %r0, 4;
add.s64 %d0, %d0, %a1;
@%p0 bra END;
atom.global.add.u32 %r2, [%a0], 1;
st.global.b32 [%d0], %r2;
END:
"""

    def places(seed):
        count, out = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
        run(program, count, out, grid=(6, 1, 1), seed=seed)
        return tuple(int(x) for x in out)

    assert places(None) == (0, 1, 2, 3, 4, 5)
    found = [places(seed) for seed in range(6)]
    assert found == [places(seed) for seed in range(6)] and len(set(found)) > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_that_branched_meet_where_their_warp_acts_as_one(seed):
    """Odd lanes do more work; all lanes then exchange values, and vote."""
    program = """and.b32 %r0, %tid, 1;
mov.b32 %r1, %tid;
setp.eq.u32 %p0, %r0, 0;
@%p0 bra EVEN;
add.s32 %r1, %r1, 100;
mov.b32 %r5, 0;
AGAIN:
add.s32 %r5, %r5, 1;
setp.lt.u32 %p1, %r5, %tid;
@%p1 bra AGAIN;
EVEN:
shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
vote.sync.ballot.b32 %r3, %p0, -1;
mul.wide.u32 %d0, %tid, 8;
add.s64 %d0, %d0, %a0;
st.global.v2.b32 [%d0], {%r2, %r3};
"""
    out = np.zeros((96, 2), np.uint32)
    run(program, out, threads=96, seed=seed)
    t = np.arange(96) ^ 1
    assert (out[:, 0] == t + 100 * (t & 1)).all() and (out[:, 1] == 0x55555555).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_of_one_warp_may_wait_for_each_other(seed):
    """Lane 0 sets a flag on which the others spin; then they all meet."""
    program = """setp.ne.u32 %p0, %tid, 0;
@%p0 bra SPIN;
mov.b32 %r1, 1;
st.release.cta.global.b32 [%a0], %r1;
bra MEET;
SPIN:
ld.acquire.cta.global.b32 %r2, [%a0];
setp.eq.u32 %p1, %r2, 0;
@%p1 bra SPIN;
MEET:
bar.warp.sync -1;
"""
    flag = np.zeros(1, np.uint32)
    run(program, flag, seed=seed)
    error = hazard(changed(program, ("mov.b32 %r1, 1", "mov.b32 %r1, 0")), np.zeros(1, np.uint32), seed=seed)
    assert error.kind == "deadlock" and "lanes 1" in str(error) and "array 0[0]" in str(error)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("exchange", "wanted"),
    [
        ("shfl.sync.bfly.b32 %r1, %tid, 1, 31, -1;", lambda t: t ^ 1),
        ("vote.sync.ballot.b32 %r1, %p1, -1;", lambda t: 0 * t + 0xFFF8),
        ("redux.sync.add.u32 %r1, %tid, -1;", lambda t: 0 * t + 120),
        ("bar.warp.sync -1;\nmov.b32 %r1, %tid;", lambda t: t),
    ],
)
def test_nobody_waits_for_lanes_that_ended(exchange, wanted, seed):
    """PTX ISA, shfl.sync (likewise vote, redux, bar.warp): it waits for all *non-exited* threads of the mask."""
    program = f"""setp.ge.u32 %p0, %tid, 16;
setp.ge.u32 %p1, %tid, 3;
@%p0 ret;
{exchange}
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r1;
"""
    out = np.zeros(16, np.uint32)
    run(program, out, seed=seed)
    assert (out == wanted(np.arange(16))).all()
    # The lanes stay, but do not execute it; and to read an ended lane gives nothing that is defined.
    guarded = changed(program, (exchange, f"@!%p0 {exchange}"), ("@%p0 ret;\n", ""))
    for fault in (guarded, program.replace("%tid, 1, 31", "%tid, 16, 31")):
        if fault != program:
            assert hazard(fault, np.zeros(32, np.uint32), seed=seed).kind == "convergence"


@pytest.mark.parametrize("seed", SEEDS)
def test_an_indexed_branch_under_a_guard(seed):
    program = """setp.lt.u32 %p0, %tid, 5;
and.b32 %r0, %tid, 1;
mov.b32 %r1, 1;
TARGETS: .branchtargets EVEN, ODD;
@%p0 brx.idx %r0, TARGETS;
bra END;
EVEN:
mov.b32 %r1, 2;
bra END;
ODD:
mov.b32 %r1, 3;
END:
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r1;
"""
    out = np.zeros(32, np.uint32)
    run(program, out, seed=seed)
    assert out.tolist() == [2, 3, 2, 3, 2] + [1] * 27


UNIFORM = """setp.lt.u32 %p0, %tid, 32;
mov.b32 %r0, 0;
TARGETS: .branchtargets END, END;
BRANCH
END:
"""


@pytest.mark.parametrize("branch", ["@%p0 bra.uni END;", "@%p0 ret.uni;", "@%p0 brx.idx.uni %r0, TARGETS;"])
def test_lanes_part_at_no_branch_with_uni(branch):
    """PTX ISA, bra: with .uni all active threads of a warp have the same guard and the same target."""
    program = UNIFORM.replace("BRANCH", branch)
    for seed in SEEDS:
        run(program, threads=64, seed=seed)
        assert hazard(program.replace("%tid, 32", "%tid, 40"), threads=64, seed=seed).kind == "convergence"
    apart = program.replace("mov.b32 %r0, 0", "and.b32 %r0, %tid, 1")
    if "brx" in branch:
        assert hazard(apart, threads=64).kind == "convergence"


@pytest.mark.parametrize("seed", SEEDS)
def test_some_lanes_meet_by_a_mask(seed):
    program = """setp.ge.u32 %p0, %tid, 8;
@%p0 bra END;
mov.b32 %r0, global_smem;
mad.lo.s32 %r1, %tid, 4, %r0;
xor.b32 %r2, %tid, 5;
mad.lo.s32 %r2, %r2, 4, %r0;
mov.b32 %r5, 0;
AGAIN:
add.s32 %r5, %r5, 1;
setp.lt.u32 %p1, %r5, %tid;
@%p1 bra AGAIN;
st.shared.b32 [%r1], %tid;
bar.warp.sync 255;
ld.shared.b32 %r3, [%r2];
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r3;
END:
"""
    out = np.zeros(8, np.uint32)
    run(program, out, shared=32, seed=seed)
    assert (out == np.arange(8) ^ 5).all()
    run(changed(program, ("sync 255", "sync 511")), out, shared=32, seed=seed)  # lane 8 has ended
    waits = changed(program, ("sync 255", "sync 511"), ("END:\n", "END:\nbarrier.sync 1, 32;\n"))
    error = hazard(waits, out, shared=32, seed=seed)
    assert error.kind == "convergence" and "mask" in str(error)
    error = hazard(changed(program, ("sync 255", "sync 127")), out, shared=32, seed=seed)
    assert "lacks the lane itself" in str(error) or error.kind == "uninitialised"  # the others may be first
    assert hazard(changed(program, ("bar.warp.sync 255;\n", "")), out, shared=32, seed=seed).kind in (
        "race",
        "uninitialised",
    )


# --- barriers

# A producer warp fills a buffer twice for two consumer warps: full is barrier 1, empty barrier 2.
PIPELINE = """mov.b32 %r0, global_smem;
and.b32 %r1, %tid, 31;
mad.lo.s32 %r1, %r1, 4, %r0;
mov.b32 %r2, 0;
mov.b32 %r4, 0;
setp.lt.u32 %p0, %tid, 32;
@!%p0 bra CONSUME;
PRODUCE:
add.s32 %r3, %tid, %r2;
st.shared.b32 [%r1], %r3;
bar.arrive 1, 96;
bar.sync 2, 96;
add.s32 %r2, %r2, 7;
setp.lt.u32 %p1, %r2, 14;
@%p1 bra PRODUCE;
bra END;
CONSUME:
bar.sync 1, 96;
ld.shared.b32 %r3, [%r1];
bar.arrive 2, 96;
add.s32 %r4, %r4, %r3;
add.s32 %r2, %r2, 7;
setp.lt.u32 %p1, %r2, 14;
@%p1 bra CONSUME;
END:
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r4;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers(seed):
    out = np.zeros(96, np.uint32)
    run(PIPELINE, out, threads=96, shared=128, seed=seed)
    assert (out[32:] == 2 * (np.arange(64) % 32) + 7).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (("bar.arrive 1, 96;", ""), {"deadlock"}),
        (("bar.arrive 2, 96;", ""), {"deadlock"}),
        (("bar.sync 2, 96;", ""), {"race", "barrier"}),
        (("bar.sync 1, 96;", ""), {"race", "uninitialised", "barrier", "deadlock"}),
        (("bar.arrive 1, 96;", "bar.arrive 1, 64;"), {"barrier"}),
        (("bar.arrive 1, 96;", "bar.arrive 3, 96;"), {"deadlock"}),
        (("bar.arrive 1, 96;", "bar.arrive 1, 40;"), {"barrier"}),
        (("bar.arrive 1, 96;", "bar.arrive 1, 128;"), {"barrier"}),
        (("bar.sync 2, 96;", "bar.sync 16, 96;"), {"barrier"}),
        (("@%p1 bra CONSUME;", ""), {"deadlock"}),
    ],
)
def test_a_fault_in_named_barriers_is_found(change, kinds, seed):
    error = hazard(changed(PIPELINE, change), np.zeros(96, np.uint32), threads=96, shared=128, seed=seed)
    assert error.kind in kinds, error


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_ended_are_missed_only_where_a_barrier_counts(seed):
    """PTX ISA, exit: a barrier of all threads is released where exiting threads alone hold it up; barrier: a warp
    arrives when its non-exited threads do."""
    program = "setp.ge.u32 %p0, %tid, 20;\n@%p0 ret;\nbar.sync 0;\n"
    run(program, threads=64, seed=seed)
    error = hazard(program.replace("bar.sync 0;", "bar.sync 0, 64;"), threads=64, seed=seed)
    assert error.kind == "deadlock" and "barrier 0 of 64 threads; 44 threads have ended" in str(error)
    run(program.replace("bar.sync 0;", "bar.sync 0, 32;"), threads=64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("how", "wanted"), [("popc", 16), ("and", 0), ("or", 1)])
def test_a_barrier_is_released_by_threads_that_end_later(how, wanted, seed):
    """Warp 0 waits while warp 1 works, which then ends; of warp 0 the odd lanes have ended before."""
    program = f"""and.b32 %r0, %tid, 1;
setp.eq.u32 %p0, %r0, 1;
setp.ge.u32 %p1, %tid, 32;
@%p1 bra WORK;
@%p0 ret;
setp.lt.u32 %p2, %tid, {32 if how == "popc" else 9};
{"bar.red.popc.u32 %r1, 0, %p2;" if how == "popc" else f"bar.red.{how}.pred %p3, 0, %p2;"}
{"" if how == "popc" else "selp.b32 %r1, 1, 0, %p3;"}
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r1;
ret;
WORK:
mov.b32 %r5, 0;
AGAIN:
add.s32 %r5, %r5, 1;
setp.lt.u32 %p3, %r5, 9;
@%p3 bra AGAIN;
"""
    out = np.full(32, 99, np.uint32)
    run(program, out, threads=64, seed=seed)
    assert out.tolist() == [wanted, 99] * 16


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_meet_at_barrier_0_by_different_instructions(seed):
    program = "setp.ge.u32 %p0, %tid, 32;\n@%p0 bra OTHER;\nbar.sync 0;\nbra END;\nOTHER:\nbar.sync 0;\nEND:\n"
    assert hazard(program, threads=64, seed=seed).kind == "barrier"


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_of_a_warp_must_reach_an_aligned_barrier_together(seed):
    program = "setp.ge.u32 %p0, %tid, 16;\n@%p0 bra OTHER;\nbarrier.sync 1, 64;\nbra END;\n"
    program += "OTHER:\nbarrier.sync 1, 64;\nEND:\n"
    run(program, threads=64, seed=seed)
    error = hazard(program.replace("barrier.sync", "barrier.sync.aligned"), threads=64, seed=seed)
    assert error.kind == "convergence" and "the others of their warp" in str(error)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_that_reduces(seed):
    program = """setp.lt.u32 %p0, %tid, 37;
barrier.cta.red.popc.aligned.u32 %r0, 0, %p0;
barrier.cta.red.and.aligned.pred %p1, 1, 64, !%p0;
barrier.cta.red.or.aligned.pred %p2, 2, %p0;
selp.b32 %r1, 10, 0, %p1;
selp.b32 %r2, 100, 0, %p2;
add.s32 %r0, %r0, %r1;
add.s32 %r0, %r0, %r2;
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r0;
"""
    out = np.zeros(64, np.uint32)
    run(program, out, threads=64, seed=seed)
    assert (out == 37 + 100).all()
    run(program.replace("%tid, 37", "%tid, 0"), out, threads=64, seed=seed)
    assert (out == 10).all()


def test_a_loop_without_end():
    error = hazard("AGAIN:\nadd.s32 %r0, %r0, 1;\nbra AGAIN;", most_steps=1000)
    assert error.kind == "hang"


def test_a_trap_is_an_error():
    run("setp.ge.u32 %p0, %tid, 32;\n@%p0 trap;")
    assert hazard("setp.ge.u32 %p0, %tid, 31;\n@%p0 trap;").kind == "trap"


# --- CTAs

# CTA i waits until CTA i + 1 has set its flag; the last one waits for nobody.
CHAIN = """setp.ne.u32 %p0, %tid, 0;
@%p0 bra END;
mov.u32 %r0, %ctaid.x;
mov.u32 %r1, %nctaid.x;
add.s32 %r2, %r0, 1;
mul.wide.u32 %d0, %r0, 4;
add.s64 %d0, %d0, %a0;
setp.eq.u32 %p1, %r1, %r2;
@%p1 bra SET;
WAIT:
nanosleep.u32 100;
ld.acquire.gpu.global.b32 %r3, [%d0 + 4];
setp.eq.u32 %p2, %r3, 0;
@%p2 bra WAIT;
SET:
mov.b32 %r3, 1;
st.release.gpu.global.b32 [%d0], %r3;
END:
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_ctas_that_wait_for_others_run_side_by_side(seed):
    flags = np.zeros(6, np.uint32)
    run(CHAIN, flags, grid=(6, 1, 1), seed=seed, resident=6)
    assert flags.all()


def test_an_unlucky_order_of_ctas_is_a_deadlock():
    error = hazard(CHAIN, np.zeros(6, np.uint32), grid=(6, 1, 1), resident=3)
    text = str(error)
    assert error.kind == "deadlock" and "no place is left for the 3 CTAs (3, 0, 0), (4, 0, 0), (5, 0, 0)" in text
    assert "CTA (2, 0, 0): warp 0 (lanes 0): PTX line" in text and "array 0[3] = 0" in text
    # of six CTAs in any order, three at a time, some wait for one that has no place
    kinds = set()
    for seed in range(8):
        try:
            run(CHAIN, np.zeros(6, np.uint32), grid=(6, 1, 1), resident=3, seed=seed)
            kinds.add("runs")
        except Hazard as caught:
            kinds.add(caught.kind)
    assert kinds == {"runs", "deadlock"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lock_by_compare_and_swap(seed):
    """The lanes of a warp take turns; each holds the lock over a read and a write."""
    program = """TRY:
atom.acquire.gpu.global.cas.b32 %r0, [%a0], 0, 1;
setp.ne.u32 %p0, %r0, 0;
@%p0 bra TRY;
ld.global.b32 %r1, [%a1];
add.s32 %r1, %r1, 1;
st.global.b32 [%a1], %r1;
atom.release.gpu.global.exch.b32 %r2, [%a0], 0;
"""
    lock, count = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    head = "setp.ge.u32 %p1, %tid, 6;\n@%p1 bra END;\n"
    program = head + program + "END:\n"
    run(program, lock, count, grid=(2, 1, 1), seed=seed)
    assert count[0] == 12
    count[:] = 0
    never = changed(program, ("atom.release.gpu.global.exch.b32 %r2, [%a0], 0;\n", ""))
    error = hazard(never, lock, count, grid=(2, 1, 1), seed=seed)
    assert error.kind == "deadlock" and "array 0[0] = 1" in str(error)
