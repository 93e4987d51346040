"""mbarriers and the bulk copies that they wait for: clean programs, and those with one fault each, early and late.

Thread 0 loads two ranges of 512 bytes, each by an mbarrier; both warps read the second.
"""

import numpy as np
import pytest

from tests.support.emulated_ptx import aligned, changed, each_way, fault, run, store

BULK = """mov.b32 %r0, global_smem;
setp.eq.u32 %p0, %tid, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
@%p0 mbarrier.init.shared::cta.b64 [%r0 + 8], 1;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 512;
@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 128], [%a0], 512, [%r0];
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0 + 8], 512;
@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 640], [%a0 + 512], 512, [%r0 + 8];
FIRST:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0;
@!%p1 bra FIRST;
SECOND:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0 + 8], 0;
@!%p1 bra SECOND;
mad.lo.s32 %r1, %tid, 4, %r0;
ld.shared.b32 %r10, [%r1 + 640];
mul.wide.u32 %d1, %tid, 4;
add.s64 %d1, %d1, %a1;
st.global.b32 [%d1], %r10;
"""
SECOND_WAIT = "SECOND:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0 + 8], 0;\n@!%p1 bra SECOND;\n"
FIRST_WAIT = "FIRST:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0;\n@!%p1 bra FIRST;\n"
SECOND_EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0 + 8], 512;"
SECOND_COPY = "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 640]"
THIRD_WAIT = FIRST_WAIT.replace("FIRST", "THIRD")
BULK_FAULTS = {
    "no wait": ({"async", "race", "uninitialised"}, (SECOND_WAIT, "")),
    "the wait for another mbarrier": ({"async", "race"}, (SECOND_WAIT, SECOND_WAIT.replace(" + 8", ""))),
    "a read before the wait, after that for another mbarrier": (
        {"async", "race"},
        ("SECOND:\n", "mad.lo.s32 %r1, %tid, 4, %r0;\nld.shared.b32 %r10, [%r1 + 640];\nSECOND:\n"),
    ),
    "a wait for the phase before": ({"async", "race", "deadlock"}, (SECOND_WAIT, SECOND_WAIT.replace("0;", "1;"))),
    "no proxy fence": ({"proxy"}, ("fence.proxy.async.shared::cta;", "")),
    "no barrier after init": ({"race", "mbarrier"}, ("bar.sync 0;", "")),
    "half of the bytes": ({"deadlock", "async", "race"}, (SECOND_EXPECT, SECOND_EXPECT.replace("512", "256"))),
    "too many bytes": ({"deadlock"}, (SECOND_EXPECT, SECOND_EXPECT.replace("512", "528"))),
    "no arrival": (
        {"deadlock"},
        (SECOND_EXPECT, SECOND_EXPECT.replace("arrive.expect_tx", "expect_tx").replace("_, ", "")),
    ),
    "no copy": ({"deadlock"}, (f"{SECOND_COPY}, [%a0 + 512], 512, [%r0 + 8];", "")),
    "one arrival more": ({"deadlock"}, ("[%r0 + 8], 1;", "[%r0 + 8], 2;")),
    "two arrivals for one": (
        {"mbarrier"},
        (SECOND_WAIT, SECOND_WAIT + "mbarrier.arrive.shared::cta.b64 _, [%r0 + 8], 2;\n"),
    ),
    "no initialisation": ({"mbarrier"}, ("@%p0 mbarrier.init.shared::cta.b64 [%r0 + 8], 1;", "")),
    "a second initialisation": (
        {"mbarrier"},
        (SECOND_WAIT, SECOND_WAIT + "mbarrier.init.shared::cta.b64 [%r0 + 8], 1;\n"),
    ),
    "an end before the data": ({"async"}, (SECOND_WAIT, "ret;\n")),
    "invalidated under way": (
        {"mbarrier"},
        (SECOND_WAIT, "@%p0 mbarrier.inval.shared::cta.b64 [%r0 + 8];\n" + SECOND_WAIT),
    ),
    "used after inval": (
        {"mbarrier", "race"},
        (SECOND_WAIT, SECOND_WAIT + "@%p0 mbarrier.inval.shared::cta.b64 [%r0];\n" + THIRD_WAIT),
    ),
    "a store over an mbarrier": ({"mbarrier"}, ("mad.lo.s32", "st.shared.b32 [%r0 + 4], %tid;\nmad.lo.s32")),
    "a load of an mbarrier": ({"mbarrier"}, ("mad.lo.s32", "ld.shared.b64 %d20, [%r0];\nmad.lo.s32")),
    "an unfenced store before": ({"proxy"}, ("bar.sync 0;", "@%p0 st.shared.b32 [%r0 + 640], %tid;\nbar.sync 0;")),
    "a count of zero": ({"mbarrier"}, ("[%r0 + 8], 1;", "[%r0 + 8], 0;")),
    "a store to the source": ({"async"}, (FIRST_WAIT, "@%p0 st.global.b32 [%a0 + 1020], %tid;\n" + FIRST_WAIT)),
    "more bytes than it counts": (
        {"mbarrier"},
        (SECOND_EXPECT, SECOND_EXPECT + "\n@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0 + 8], 1048575;"),
    ),
    "an end with bytes expected": (
        {"async"},
        (SECOND_WAIT, SECOND_WAIT + "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0 + 8], 16;\n"),
    ),
    "an end with bytes that nobody expected": (
        {"async"},
        (SECOND_WAIT, SECOND_WAIT + "@%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0 + 8], 16;\n"),
    ),
    "a store into the target": (
        {"async", "race"},
        (FIRST_WAIT, "@%p0 st.shared.b32 [%r0 + 640], %tid;\n" + FIRST_WAIT),
    ),
}


def loaded() -> tuple[np.ndarray, np.ndarray]:
    source = aligned((256,), np.uint32)
    source[:] = np.arange(256) + 5
    return source, aligned((64,), np.uint32)


@each_way
def test_bulk_copies_that_are_waited_for(options):
    source, out = loaded()
    run(BULK, source, out, threads=64, shared=4096, **options)
    assert (out == source[128:192]).all()
    source, out = loaded()
    fence = changed(BULK, ("fence.proxy.async.shared::cta;", "fence.mbarrier_init.release.cluster;"))
    run(fence, source, out, threads=64, shared=4096, **options)
    assert (out == source[128:192]).all()
    # Triton issues no fence here.
    source, out = loaded()
    bare = changed(BULK, ("fence.proxy.async.shared::cta;", ""))
    run(bare, source, out, threads=64, shared=4096, strict=False, **options)
    assert (out == source[128:192]).all()


@each_way
@pytest.mark.parametrize("name", BULK_FAULTS)
def test_faults_of_bulk_copies_and_mbarriers(name, options):
    kinds, change = BULK_FAULTS[name]
    assert fault(changed(BULK, change), *loaded(), threads=64, shared=4096, **options) in kinds


@each_way
def test_an_mbarrier_may_be_made_anew_after_inval(options):
    again = f"""bar.sync 0;
@%p0 mbarrier.inval.shared::cta.b64 [%r0 + 8];
@%p0 mbarrier.init.shared::cta.b64 [%r0 + 8], 1;
fence.proxy.async.shared::cta;
bar.sync 0;
{SECOND_EXPECT}
{SECOND_COPY}, [%a0 + 256], 512, [%r0 + 8];
{SECOND_WAIT.replace("SECOND", "THIRD")}"""
    program = changed(BULK, (SECOND_WAIT, SECOND_WAIT + again))
    source, out = loaded()
    run(program, source, out, threads=64, shared=4096, **options)
    assert (out == source[64:128]).all()
    early = changed(program, (SECOND_WAIT.replace("SECOND", "THIRD"), ""))
    assert fault(early, *loaded(), threads=64, shared=4096, **options) in ("async", "race")
    race = program.replace("bar.sync 0;\n@%p0 mbarrier.inval", "@%p0 mbarrier.inval")
    assert fault(race, *loaded(), threads=64, shared=4096, **options) in ("race", "mbarrier", "deadlock")


# --- arrivals, and other ways to wait: 64 threads, an mbarrier of 3 arrivals at shared byte 0

PHASES = """mov.b32 %r0, global_smem;
setp.eq.u32 %p0, %tid, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r0], 3;
bar.sync 0;
"""


def words_of(program: str, count: int, **options) -> list[int]:
    """The words %r100, %r101, ... of thread 0 at the end of a program."""
    out = np.zeros((64, count), np.uint32)
    given = "".join(f"mov.b32 %r{100 + n}, 0;\n" for n in range(count))
    run(PHASES + given + program + store(0, 100, count), out, threads=64, shared=256, **options)
    return out[0].tolist()


@each_way
def test_states_say_what_is_missing_and_which_phase(options):
    program = """@!%p0 bra OTHERS;
mbarrier.arrive.shared::cta.b64 %d10, [%r0];
mbarrier.pending_count.b64 %r100, %d10;
mbarrier.test_wait.shared::cta.b64 %p1, [%r0], %d10;
selp.b32 %r101, 1, 0, %p1;
mbarrier.arrive.release.cta.shared::cta.b64 %d11, [%r0], 2;
mbarrier.pending_count.b64 %r102, %d11;
mbarrier.test_wait.shared::cta.b64 %p1, [%r0], %d11;
selp.b32 %r103, 1, 0, %p1;
mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r0], 1;
selp.b32 %r104, 1, 0, %p1;
OTHERS:
"""
    # 3 are missing before the first arrival, 2 before the second, which completes phase 0; phase 1 is under way.
    assert words_of(program, 5, **options) == [3, 0, 2, 1, 0]


@each_way
def test_who_drops_out_is_not_expected_again(options):
    program = """@!%p0 bra OTHERS;
mbarrier.arrive_drop.shared::cta.b64 _, [%r0];
mbarrier.arrive.noComplete.shared::cta.b64 %d9, [%r0], 1;
mbarrier.arrive.shared::cta.b64 _, [%r0];
mbarrier.arrive.shared::cta.b64 %d10, [%r0];
mbarrier.pending_count.b64 %r100, %d10;
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 48;
mbarrier.arrive.shared::cta.b64 %d11, [%r0];
mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 1;
selp.b32 %r101, 1, 0, %p1;
mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0], 48;
mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 1;
selp.b32 %r102, 1, 0, %p1;
OTHERS:
"""
    assert words_of(program, 3, **options) == [2, 0, 1]
    wrong = program.replace(
        "arrive.noComplete.shared::cta.b64 %d9, [%r0], 1;", "arrive.noComplete.shared::cta.b64 %d9, [%r0], 2;"
    )
    assert fault(PHASES + wrong, np.zeros(1, np.uint32), threads=64, shared=256, **options) == "mbarrier"


@each_way
def test_asking_again_and_again_sees_the_other_warp(options):
    program = """setp.lt.u32 %p2, %tid, 32;
@%p2 bra ASK;
setp.eq.u32 %p3, %tid, 32;
st.shared.b32 [%r0 + 8], %tid;
@%p3 mbarrier.arrive.shared::cta.b64 _, [%r0], 3;
bra DONE;
ASK:
mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;
@!%p1 bra ASK;
ld.shared.b32 %r100, [%r0 + 8];
DONE:
"""
    program = program.replace("st.shared.b32", "@%p3 st.shared.b32")
    assert words_of(program, 1, **options) == [32]
    relaxed = program.replace("parity.shared", "parity.relaxed.cta.shared")
    assert fault(PHASES + relaxed, np.zeros(1, np.uint32), threads=64, shared=256, **options) == "race"
    relaxed = program.replace("arrive.shared", "arrive.relaxed.cta.shared")
    assert fault(PHASES + relaxed, np.zeros(1, np.uint32), threads=64, shared=256, **options) == "race"
    forgotten = program.replace("[%r0], 3;\nbra", "[%r0], 2;\nbra")
    assert fault(PHASES + forgotten, np.zeros(1, np.uint32), threads=64, shared=256, **options) == "deadlock"
