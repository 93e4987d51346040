"""cp.async: a clean program, and that program with one fault each, early and late.

64 threads copy 16 bytes each, and read what the thread of the other warp copied.
"""

import numpy as np
import pytest

from tests.support.emulated_ptx import aligned, changed, each_way, fault, run

CP_ASYNC = """mov.b32 %r0, global_smem;
mul.wide.u32 %d1, %tid, 16;
add.s64 %d2, %d1, %a0;
add.s64 %d3, %d1, %a1;
mad.lo.s32 %r1, %tid, 16, %r0;
xor.b32 %r2, %tid, 32;
mad.lo.s32 %r2, %r2, 16, %r0;
cp.async.cg.shared.global [%r1], [%d2], 16;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r2];
st.global.v4.b32 [%d3], {%r10, %r11, %r12, %r13};
"""
CP_ASYNC_FAULTS = {
    "no wait": ("async", ("cp.async.wait_group 0;", "")),
    "a wait for too little": ("async", ("wait_group 0", "wait_group 1")),
    "no commit": ("async", ("cp.async.commit_group;", "")),
    "no barrier": ("race", ("bar.sync 0;", "")),
    "a store to the target": ("async", ("cp.async.commit_group;", "st.shared.b32 [%r1], %r0;\ncp.async.commit_group;")),
    "a second copy to the target": (
        "async",
        ("cp.async.commit_group;", "cp.async.ca.shared.global [%r1], [%d2], 4;\ncp.async.commit_group;"),
    ),
    "a store to the source": (
        "async",
        ("cp.async.commit_group;", "st.global.b32 [%d2 + 8], %r0;\ncp.async.commit_group;"),
    ),
    "a copy that nobody waits for": (
        "async",
        ("bar.sync 0;", "bar.sync 0;\ncp.async.cg.shared.global [%r1 + 1024], [%d2], 16;"),
    ),
    "the wait of some lanes": (
        "async",
        ("cp.async.wait_group 0;", "and.b32 %r5, %tid, 16;\nsetp.eq.s32 %p2, %r5, 0;\n@%p2 cp.async.wait_group 0;"),
    ),
    "a target off its boundary": ("alignment", ("[%r1], [%d2], 16", "[%r1 + 8], [%d2], 16")),
    "a source off its boundary": (
        "alignment",
        ("cg.shared.global [%r1], [%d2], 16", "ca.shared.global [%r1], [%d2 + 4], 8"),
    ),
    "more bytes than the size": ("address", ("[%r1], [%d2], 16;", "[%r1], [%d2], 16, 17;")),
}


def copied() -> tuple[np.ndarray, np.ndarray]:
    source = aligned((64, 4), np.uint32)
    source[:] = np.arange(256).reshape(64, 4)
    return source, aligned((64, 4), np.uint32)


@each_way
def test_copies_that_are_waited_for(options):
    source, out = copied()
    run(CP_ASYNC, source, out, threads=64, shared=4096, **options)
    assert (out == np.roll(source, 32, 0)).all()


@each_way
@pytest.mark.parametrize("name", CP_ASYNC_FAULTS)
def test_faults_of_cp_async(name, options):
    kind, change = CP_ASYNC_FAULTS[name]
    assert fault(changed(CP_ASYNC, change), *copied(), threads=64, shared=4096, **options) == kind


def test_late_and_early_are_different_executions():
    # Unchecked, who does not wait finds the data or does not.
    program = changed(CP_ASYNC, ("cp.async.wait_group 0;", ""), ("bar.sync 0;", "bar.sync 0;"))
    program = changed(program, ("st.global.v4", "cp.async.wait_all;\nst.global.v4"))
    seen = {}
    for asynchrony in ("late", "early"):
        source, out = copied()
        run(program, source, out, threads=64, shared=4096, check=False, asynchrony=asynchrony)
        seen[asynchrony] = (out == np.roll(source, 32, 0)).all()
    assert seen == {"late": False, "early": True}


@each_way
def test_groups_are_counted_by_each_thread(options):
    # Lanes below 16 close their first copy and have two groups, the others one; all wait for all but their last.
    program = changed(
        CP_ASYNC,
        (
            "cp.async.commit_group;\ncp.async.wait_group 0;",
            """and.b32 %r5, %tid, 16;
setp.eq.s32 %p2, %r5, 0;
@%p2 cp.async.commit_group;
cp.async.cg.shared.global [%r1 + 1024], [%d2], 16;
cp.async.commit_group;
cp.async.wait_group 1;""",
        ),
        ("ld.shared", "@%p2 ld.shared"),
        ("st.global", "@%p2 st.global"),
    )
    program += "cp.async.wait_all;"
    source, out = copied()
    run(program, source, out, threads=64, shared=4096, **options)
    low = np.arange(64) & 16 == 0
    assert (out[low] == np.roll(source, 32, 0)[low]).all() and (out[~low] == 0).all()
    # The others may not read.
    assert fault(program.replace("@%p2 ld", "@!%p2 ld"), *copied(), threads=64, shared=4096, **options) == "async"


@each_way
@pytest.mark.parametrize("count", [0, 1, 5, 12, 16])
def test_what_is_not_copied_is_zero(count, options):
    source, out = copied()
    program = changed(CP_ASYNC, ("[%r1], [%d2], 16;", "[%r1], [%d2], 16, %r9;"))
    program = changed(program, ("mov.b32 %r0, global_smem;", f"mov.b32 %r0, global_smem;\nmov.b32 %r9, {count};"))
    run(program, source, out, threads=64, shared=4096, **options)
    want = np.roll(source, 32, 0).view(np.uint8).copy()
    want[:, count:] = 0
    assert (out.view(np.uint8) == want).all()


@each_way
@pytest.mark.parametrize(("size", "words"), [(4, 1), (8, 2), (16, 4)])
def test_sizes_and_ignored_sources(size, words, options):
    source, out = copied()
    program = changed(
        CP_ASYNC,
        ("cp.async.cg.shared.global [%r1], [%d2], 16;", f"cp.async.ca.shared.global [%r1], [%d2], {size}, %p3;"),
        ("mov.b32 %r0, global_smem;", "mov.b32 %r0, global_smem;\nsetp.lt.u32 %p3, %tid, 8;"),
        ("ld.shared.v4.b32 {%r10, %r11, %r12, %r13}", "mov.b32 %r11, 0;\nld.shared.b32 %r10"),
        ("st.global.v4.b32 [%d3], {%r10, %r11, %r12, %r13}", "st.global.b32 [%d3], %r10"),
    )
    run(program, source, out, threads=64, shared=4096, **options)
    want = source[:, 0].copy()
    want[:8] = 0
    assert (out[:, 0] == np.roll(want, 32)).all()
    late = changed(program, ("ld.shared.b32 %r10, [%r2]", f"ld.shared.b32 %r10, [%r2 + {4 * words - 4}]"))
    run(late, source, out, threads=64, shared=4096, **options)
    assert (out[8:32, 0] == source[40:, words - 1]).all()


MBARRIER_OF_COPIES = changed(
    CP_ASYNC,
    (
        "cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;",
        """cp.async.mbarrier.arrive.noinc.shared.b64 [%r0 + 2048];
WAIT:
mbarrier.try_wait.parity.shared.b64 %p1, [%r0 + 2048], 0;
@!%p1 bra WAIT;""",
    ),
    (
        "mul.wide.u32 %d1",
        """setp.eq.s32 %p0, %tid, 0;
@%p0 mbarrier.init.shared.b64 [%r0 + 2048], 64;
bar.sync 0;
mul.wide.u32 %d1""",
    ),
)


COPIES_WAIT = "WAIT:\nmbarrier.try_wait.parity.shared.b64 %p1, [%r0 + 2048], 0;\n@!%p1 bra WAIT;\n"


@each_way
def test_an_mbarrier_waits_for_the_copies_of_threads(options):
    source, out = copied()
    run(MBARRIER_OF_COPIES, source, out, threads=64, shared=4096, **options)
    assert (out == np.roll(source, 32, 0)).all()
    # Without .noinc the arrivals of the copies are none of those that the mbarrier counts.
    program = changed(
        MBARRIER_OF_COPIES,
        ("arrive.noinc.shared", "arrive.shared"),
        ("WAIT:", "mbarrier.arrive.shared.b64 _, [%r0 + 2048];\nWAIT:"),
    )
    source, out = copied()
    run(program, source, out, threads=64, shared=4096, **options)
    assert (out == np.roll(source, 32, 0)).all()


@each_way
@pytest.mark.parametrize(
    ("kinds", "change"),
    [
        ({"async", "race", "uninitialised"}, (COPIES_WAIT, "")),
        ({"mbarrier", "race", "async", "deadlock"}, ("2048], 64;", "2048], 32;")),
        ({"deadlock"}, ("2048], 64;", "2048], 65;")),
        ({"race"}, ("2048], 64;\nbar.sync 0;", "2048], 64;")),
    ],
)
def test_faults_of_an_mbarrier_of_copies(kinds, change, options):
    assert fault(changed(MBARRIER_OF_COPIES, change), *copied(), threads=64, shared=4096, **options) in kinds
