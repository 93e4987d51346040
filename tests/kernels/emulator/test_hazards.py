"""Layer: kernels, the emulator. For each hazard of memory a minimal clean program, and the same with one fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusemesh.kernels.emulator.hazard import Hazard
from tests.support.emulated_ptx import changed, run

SEEDS = (None, 0, 1, 2)

# Each thread of two warps writes a word of shared memory and reads that of the other warp.
EXCHANGE = """mov.b32 %r0, global_smem;
mad.lo.s32 %r1, %tid, 4, %r0;
xor.b32 %r2, %tid, 32;
mad.lo.s32 %r2, %r2, 4, %r0;
st.shared.b32 [%r1], %tid;
bar.sync 0;
ld.shared.b32 %r3, [%r2];
bar.sync 0;
st.shared.b32 [%r1], %r3;
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r3;
"""
FIRST = "st.shared.b32 [%r1], %tid;\nbar.sync 0;\n"
SECOND = "ld.shared.b32 %r3, [%r2];\nbar.sync 0;\n"
# The same by bytes: thread t writes byte 2 (t % 32) + t / 32, so that the warps share every word.
BYTES = """mov.b32 %r0, global_smem;
and.b32 %r4, %tid, 31;
shr.u32 %r5, %tid, 5;
mad.lo.s32 %r1, %r4, 2, %r0;
add.s32 %r2, %r1, 1;
sub.s32 %r2, %r2, %r5;
add.s32 %r1, %r1, %r5;
cvt.u16.u32 %h0, %tid;
st.shared.b8 [%r1], %h0;
bar.sync 0;
ld.shared.u8 %r3, [%r2];
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r3;
"""
# A lane writes in a branch what all lanes read.
LANES = """mov.b32 %r0, global_smem;
setp.ne.u32 %p0, %tid, 5;
@%p0 bra JOIN;
st.shared.b32 [%r0], %tid;
JOIN:
bar.warp.sync -1;
ld.shared.b32 %r3, [%r0];
mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
st.global.b32 [%d0], %r3;
"""
# A warp reads from global memory what the other wrote.
GLOBAL = """mul.wide.u32 %d0, %tid, 4;
add.s64 %d0, %d0, %a0;
xor.b32 %r2, %tid, 32;
mul.wide.u32 %d1, %r2, 4;
add.s64 %d1, %d1, %a0;
st.global.b32 [%d0], %tid;
bar.sync 0;
ld.global.b32 %r3, [%d1];
bar.sync 0;
add.s32 %r3, %r3, 1000;
st.global.b32 [%d0], %r3;
"""
ALL = {"exchange": EXCHANGE, "bytes": BYTES, "lanes": LANES, "global": GLOBAL}


def hazard(program: str, *arguments, **options) -> Hazard:
    """The hazard that a program has."""
    with pytest.raises(Hazard) as error:
        run(program, *arguments, **options)
    return error.value


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ALL)
def test_a_clean_program_runs(name, seed):
    threads = 32 if name == "lanes" else 64
    out = np.zeros(threads, np.uint32)
    run(ALL[name], out, threads=threads, shared=512, seed=seed)
    t = np.arange(threads)
    want = {"exchange": t ^ 32, "bytes": t ^ 32, "lanes": t * 0 + 5, "global": (t ^ 32) + 1000}
    assert (out == want[name]).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "change", "kind", "says"),
    [
        ("exchange", (FIRST, FIRST.replace("bar.sync 0;\n", "")), {"race", "uninitialised"}, "shared byte"),
        ("exchange", (SECOND, SECOND.replace("bar.sync 0;\n", "")), {"race"}, "shared byte"),
        ("exchange", ("st.shared.b32 [%r1], %tid;\n", ""), {"uninitialised"}, "that nothing wrote"),
        ("exchange", ("[%r1], %tid", "[%r1 + 2], %tid"), {"alignment"}, "4 shared bytes at 2"),
        ("exchange", ("[%r1], %tid", "[%r1 + 512], %tid"), {"address"}, "which has 512"),
        ("exchange", ("[%r1], %tid", "[%r0], %tid"), {"race"}, ""),
        ("bytes", ("bar.sync 0;\n", ""), {"race", "uninitialised"}, "shared byte"),
        ("bytes", ("add.s32 %r1, %r1, %r5;\n", ""), {"race", "uninitialised"}, "shared byte"),
        ("bytes", ("ld.shared.u8 %r3, [%r2];", "ld.shared.u8 %r3, [%r2 + 128];"), {"uninitialised"}, "nothing wrote"),
        ("lanes", ("bar.warp.sync -1;\n", ""), {"race", "uninitialised"}, ""),
        ("global", ("%tid;\nbar.sync 0;\n", "%tid;\n"), {"race"}, "array 0["),
        ("global", ("%r3, [%d1];\nbar.sync 0;\n", "%r3, [%d1];\n"), {"race"}, "array 0["),
        ("global", ("st.global.b32 [%d0], %r3;", "st.global.b32 [%d0 + 256], %r3;"), {"address"}, "array 0"),
        ("global", ("st.global.b32 [%d0], %r3;", "st.global.b32 [%d0 + 2], %r3;"), {"alignment"}, "array 0["),
        ("global", ("st.global.b32 [%d0], %r3;", "st.global.b32 [%a0], %r3;"), {"race"}, "array 0[0]"),
    ],
)
def test_a_fault_is_found_in_any_order(name, change, kind, says, seed):
    threads = 32 if name == "lanes" else 64
    program = ALL[name]
    assert program.count(change[0]) == 1
    error = hazard(changed(program, change), np.zeros(threads, np.uint32), threads=threads, shared=512, seed=seed)
    assert error.kind in kind, error
    assert says in str(error)


def test_an_error_names_everything():
    error = hazard(
        changed(GLOBAL, ("%r3, [%d1];\nbar.sync 0;\n", "%r3, [%d1];\n")), np.zeros(64, np.uint32), threads=64
    )
    text = str(error)
    # The store of the last line, after the warp's own read of the other's word.
    assert "st.global.b32 [%d0], %r3" in text and "PTX line" in text and "CTA (0, 0, 0)" in text
    assert "warp 0 writes array 0[0], which warp 1 read with nothing that orders them" in text


def test_equal_values_may_be_written_twice_and_different_ones_not():
    same = (
        "mov.b32 %r0, global_smem;\nmov.b32 %r1, 7;\nst.shared.b32 [%r0], %r1;\nbar.sync 0;\nld.shared.b32 %r1, [%r0];"
    )
    run(same, threads=64, shared=16)
    assert hazard(same.replace("mov.b32 %r1, 7", "shr.u32 %r1, %tid, 5"), threads=64, shared=16).kind == "race"


def test_lanes_in_branches_race_only_with_other_lanes():
    own = changed(LANES, ("bar.warp.sync -1;\n", "setp.ne.u32 %p1, %tid, 5;\n@%p1 bra END;\n"))
    out = np.zeros(32, np.uint32)
    run(own.replace("st.global.b32 [%d0], %r3;", "st.global.b32 [%d0], %r3;\nEND:"), out, shared=16)
    assert out.tolist() == [5 if t == 5 else 0 for t in range(32)]


# Rows of 4 fp32 of a tensor whose rows are 6 apart: the third and fourth of six belong to another tensor, or to none.
ROW = """and.b32 %r0, %tid, 3;
shr.u32 %r1, %tid, 2;
mul.lo.s32 %r1, %r1, 24;
mad.lo.s32 %r1, %r0, 4, %r1;
cvt.u64.u32 %d1, %r1;
add.s64 %d0, %a0, %d1;
ld.global.b32 %r2, [%d0];
st.global.b32 [%d0], %r2;
"""


def test_a_view_owns_its_elements_and_no_gaps():
    base = torch.arange(54, dtype=torch.float32).reshape(9, 6)
    run(ROW, base[:, :4])
    gap = hazard(changed(ROW, ("ld.global.b32 %r2, [%d0]", "ld.global.b32 %r2, [%d0 + 8]")), base[:, :4])
    assert gap.kind == "address" and "between the elements of tensor 0" in str(gap)
    # the gaps belong to another argument, so that nothing of the storage is out of bounds
    run(changed(ROW, ("ld.global.b32 %r2, [%d0]", "ld.global.b32 %r2, [%d0 + 8]")), base[:, :4], base[:, 2:])
    wide = hazard(changed(ROW, ("ld.global.b32 %r2, [%d0]", "ld.global.v2.b32 {%r2, %r3}, [%d0]")), base[:, :4])
    assert wide.kind == "alignment"


def test_what_is_undefined_must_be_written_first():
    out = torch.empty(64)
    written = (
        "mul.wide.u32 %d0, %tid, 4;\nadd.s64 %d0, %d0, %a0;\nst.global.b32 [%d0], %tid;\nld.global.b32 %r0, [%d0];"
    )
    run(written, out, threads=64, undefined=(0,))
    error = hazard(written.replace("st.global.b32 [%d0], %tid;\n", ""), out, threads=64, undefined=(0,))
    assert error.kind == "uninitialised" and "tensor 0[0]" in str(error)


# --- proxies: a bulk store reads what other threads wrote

BULK = """mov.b32 %r0, global_smem;
mad.lo.s32 %r1, %tid, 4, %r0;
st.shared.b32 [%r1], %tid;
fence.proxy.async.shared::cta;
bar.sync 0;
setp.ne.u32 %p0, %tid, 0;
@%p0 bra END;
cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r0], 256;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
END:
"""
FENCE = "fence.proxy.async.shared::cta;\n"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fence_vouches_for_what_its_warp_knows(seed):
    out = np.zeros(64, np.uint32)
    run(BULK, out, threads=64, shared=256, seed=seed)
    assert (out == np.arange(64)).all()
    # by the reader after the barrier: it knows of all writes
    run(
        changed(BULK, (FENCE, ""), ("@%p0 bra END;\n", "@%p0 bra END;\n" + FENCE)),
        out,
        threads=64,
        shared=256,
        seed=seed,
    )
    assert hazard(changed(BULK, (FENCE, "")), out, threads=64, shared=256, seed=seed).kind == "proxy"
    # by one warp alone, before the barrier: it vouches for its own writes, not for the other warp's
    alone = changed(BULK, (FENCE, "setp.ge.u32 %p1, %tid, 32;\n@!%p1 " + FENCE))
    assert hazard(alone, out, threads=64, shared=256, seed=seed).kind == "proxy"
    # by one lane of each warp: it does not know of the others' writes
    lane = changed(BULK, (FENCE, "and.b32 %r5, %tid, 31;\nsetp.eq.u32 %p1, %r5, 0;\n@%p1 " + FENCE))
    assert hazard(lane, out, threads=64, shared=256, seed=seed).kind == "proxy"


# --- CTAs

# Each CTA adds its number to a word of its own and then to the next one's, under a lock.
TICKET = """mov.u32 %r0, %ctaid.x;
setp.ne.u32 %p0, %tid, 0;
@%p0 bra END;
WAIT:
ld.acquire.gpu.global.b32 %r1, [%a0];
setp.ne.u32 %p1, %r1, %r0;
@%p1 bra WAIT;
ld.global.b32 %r2, [%a1];
mad.lo.s32 %r2, %r2, 3, %r0;
st.global.b32 [%a1], %r2;
add.s32 %r1, %r1, 1;
st.release.gpu.global.b32 [%a0], %r1;
END:
"""


def ordered(n: int) -> int:
    total = 0
    for i in range(n):
        total = total * 3 + i
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_ctas_hear_of_each_other_by_release_and_acquire(seed):
    turn, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    run(TICKET, turn, total, grid=(5, 1, 1), seed=seed, resident=5)
    assert turn[0] == 5 and total[0] == ordered(5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "change",
    [
        ("ld.acquire.gpu", "ld.relaxed.gpu"),
        ("st.release.gpu", "st.relaxed.gpu"),
        ("st.release.gpu.global", "st.volatile.global"),
        ("st.release.gpu.global.b32 [%a0], %r1;", "st.global.b32 [%a0], %r1;"),
        ("ld.acquire.gpu", "ld.acquire.cta"),
        # A kernel without clusters runs in clusters of one CTA, so that this scope reaches no other (PTX ISA, Scope).
        ("st.release.gpu", "st.release.cluster"),
    ],
)
def test_a_weaker_order_between_ctas_is_a_race(change, seed):
    turn, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    error = hazard(changed(TICKET, change), turn, total, grid=(5, 1, 1), seed=seed, resident=5)
    assert error.kind == "race" and "CTA (" in str(error)


@pytest.mark.parametrize("seed", SEEDS)
def test_fences_order_relaxed_accesses(seed):
    fenced = changed(
        TICKET,
        ("ld.acquire.gpu", "ld.relaxed.gpu"),
        ("ld.global.b32", "fence.acq_rel.gpu;\nld.global.b32"),
        ("st.release.gpu.global", "membar.gl;\nst.volatile.global"),
    )
    turn, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    run(fenced, turn, total, grid=(5, 1, 1), seed=seed, resident=5)
    assert total[0] == ordered(5)
    for fence in ("fence.acq_rel.gpu;\n", "membar.gl;\n"):
        turn[:] = total[:] = 0
        error = hazard(changed(fenced, (fence, "")), turn, total, grid=(5, 1, 1), seed=seed, resident=5)
        assert error.kind == "race"


def test_a_barrier_passes_on_what_a_thread_heard():
    """Thread 0 waits for its turn, the last thread of another warp does the work, and thread 0 passes the turn on."""
    program = """mov.u32 %r0, %ctaid.x;
setp.ne.u32 %p0, %tid, 0;
@%p0 bra WORK;
WAIT:
ld.acquire.gpu.global.b32 %r1, [%a0];
setp.ne.u32 %p1, %r1, %r0;
@%p1 bra WAIT;
WORK:
bar.sync 0;
setp.eq.u32 %p2, %tid, 63;
@%p2 ld.global.b32 %r2, [%a1];
mad.lo.s32 %r2, %r2, 3, %r0;
@%p2 st.global.b32 [%a1], %r2;
bar.sync 1;
@%p0 bra END;
red.release.gpu.global.add.u32 [%a0], 1;
END:
"""
    turn, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    for seed in SEEDS:
        turn[:] = total[:] = 0
        run(program, turn, total, grid=(4, 1, 1), threads=64, seed=seed, resident=4)
        assert total[0] == ordered(4)
        for barrier in ("bar.sync 0;\n", "bar.sync 1;\n"):
            turn[:] = total[:] = 0
            error = hazard(
                changed(program, (barrier, "")), turn, total, grid=(4, 1, 1), threads=64, seed=seed, resident=4
            )
            assert error.kind == "race", error


def test_ctas_that_share_an_output_without_order_race():
    store = "mov.u32 %r0, %ctaid.x;\nmul.wide.u32 %d0, %tid, 4;\nadd.s64 %d0, %d0, %a0;\nst.global.b32 [%d0], %tid;"
    error = hazard(store, np.zeros(32, np.uint32), grid=(2, 1, 1))
    assert error.kind == "race" and "CTA (0, 0, 0)" in str(error) and "CTA (1, 0, 0)" in str(error)
    read_first = store.replace("st.global", "setp.eq.u32 %p0, %r0, 1;\nld.global.b32 %r1, [%d0];\n@%p0 st.global")
    assert hazard(read_first, np.zeros(32, np.uint32), grid=(2, 1, 1)).kind == "race"


# --- bytes and words of the same memory: the warps share each word, or each reads what the other writes

HALVES = """mov.b32 %r0, global_smem;
and.b32 %r4, %tid, 31;
shr.u32 %r5, %tid, 5;
mad.lo.s32 %r1, %r4, 4, %r0;
mad.lo.s32 %r2, %r5, 2, %r1;
cvt.u16.u32 %h0, %tid;
st.shared.b16 [%r2], %h0;
bar.sync 0;
ld.shared.b32 %r3, [%r1];
ld.shared.u16 %r6, [%r2];
bar.sync 1;
setp.ge.u32 %p0, %tid, 32;
@%p0 bra END;
mov.b32 %r7, 9999;
st.shared.b32 [%r1], %r7;
END:
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_and_words_of_the_same_memory(seed):
    run(HALVES, threads=64, shared=128, seed=seed)
    assert hazard(changed(HALVES, ("bar.sync 0;\n", "")), threads=64, shared=128, seed=seed).kind in (
        "race",
        "uninitialised",
    )
    word = changed(HALVES, ("ld.shared.u16 %r6, [%r2];\n", ""), ("bar.sync 1;\n", ""))
    assert hazard(word, threads=64, shared=128, seed=seed).kind == "race"
    half = changed(HALVES, ("ld.shared.b32 %r3, [%r1];\n", ""), ("bar.sync 1;\n", ""))
    assert hazard(half, threads=64, shared=128, seed=seed).kind == "race"
    # a half is written over what the other warp reads as a word
    over = changed(HALVES, ("bar.sync 1;\n", ""), ("st.shared.b32 [%r1], %r7;", "st.shared.b16 [%r1 + 2], %h0;"))
    assert hazard(over, threads=64, shared=128, seed=seed).kind == "race"


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_values_of_several_warps_in_any_order(seed):
    same = "mov.b32 %r0, global_smem;\nmov.b32 %r1, 7;\nst.shared.b32 [%r0], %r1;\nbra NEXT;\nNEXT:\n"
    run(same + "st.shared.b32 [%r0], %r1;", threads=128, shared=16, seed=seed)


OF_LAST_WRITER = changed(
    HALVES.split("bar.sync 1;")[0] + "END:\n",
    ("bar.sync 0;\n", "setp.lt.u32 %p0, %tid, 32;\n@%p0 bra END;\n"),
)


def test_the_last_writer_of_a_word_did_not_write_all_of_it():
    """Warp 1 writes its halves last, and reads the other's without a barrier: as words, or as halves."""
    assert hazard(OF_LAST_WRITER, threads=64, shared=128).kind == "race"
    half = changed(OF_LAST_WRITER, ("ld.shared.b32 %r3, [%r1];\n", ""))
    run(half, threads=64, shared=128)
    assert hazard(changed(half, ("%r6, [%r2];", "%r6, [%r1];")), threads=64, shared=128).kind == "race"


def test_a_read_is_remembered_while_halves_are_written():
    """Warp 0 reads words; warp 1, which knows, writes the first halves; warp 2, which does not, the second."""
    program = """mov.b32 %r0, global_smem;
and.b32 %r4, %tid, 31;
mad.lo.s32 %r1, %r4, 4, %r0;
cvt.u16.u32 %h0, 4660;
st.shared.b32 [%r1], %tid;
bar.sync 0;
setp.ge.u32 %p0, %tid, 64;
@%p0 bra SECOND;
setp.ge.u32 %p1, %tid, 32;
@%p1 bra FIRST;
ld.shared.b32 %r3, [%r1];
bar.sync 1, 64;
bra END;
FIRST:
bar.sync 1, 64;
st.shared.b16 [%r1], %h0;
bra END;
SECOND:
st.shared.b16 [%r1 + 2], %h0;
END:
"""
    program = changed(program, ("st.shared.b32 [%r1], %tid;", "st.shared.b32 [%r1], 7;"))
    assert hazard(program, threads=96, shared=128).kind == "race"
    run(changed(program, ("SECOND:\n", "SECOND:\nbar.sync 1, 96;\n"), ("ld.shared.b32 %r3, [%r1];\nbar.sync 1, 64;",
        "ld.shared.b32 %r3, [%r1];\nbar.sync 1, 96;"), ("FIRST:\nbar.sync 1, 64;", "FIRST:\nbar.sync 1, 96;")),
        threads=96, shared=128)  # fmt: skip
