"""Registers that nothing wrote: a clean program for each way in which they may be around, and one fault each."""

import numpy as np
import pytest

from tests.support.emulated_ptx import aligned, changed, fault, run

# Of each warp lane 0 loads; a shuffle hands lane 0's number to all.
CLEAN = """and.b32 %r1, %tid, 31;
setp.eq.s32 %p1, %r1, 0;
mul.wide.u32 %d1, %tid, 4;
add.s64 %d2, %d1, %a0;
add.s64 %d3, %d1, %a1;
@%p1 ld.global.b32 %r2, [%d2];
add.s32 %r3, %r2, 1;
shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;
st.global.b32 [%d3], %r4;
"""
FAULTS = {
    "a half that is packed and used": (
        "st.global.b32 [%d3], %r4",
        "mov.b32 {%h1, %h2}, %r4;\nmov.b32 %r5, {%h1, %h3};\nmov.b32 {%h4, %h5}, %r5;\n"
        "mov.b32 %r7, {%h4, %h5};\nst.global.b32 [%d3], %r7",
    ),
    "a lane that has no number": ("%r3, 0, 31, -1", "%r3, 1, 31, -1"),
    "a store of the sum": ("[%d3], %r4", "[%d3], %r3"),
    "a store of the register": ("[%d3], %r4", "[%d3], %r2"),
    "through a conversion": (
        "shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;",
        "cvt.rn.f32.s32 %r5, %r3;\nmov.b32 %r4, %r5;",
    ),
    "a choice that takes it": (
        "shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;",
        "setp.ne.s32 %p2, %r1, 0;\nselp.b32 %r4, %r3, 7, %p2;",
    ),
    "a choice by it": (
        "shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;",
        "setp.ne.s32 %p2, %r3, 0;\nselp.b32 %r4, 1, 7, %p2;",
    ),
    "a guard": ("st.global", "setp.ne.s32 %p2, %r3, 0;\n@%p2 st.global"),
    "a branch": ("st.global", "setp.ne.s32 %p2, %r3, 0;\n@%p2 bra OVER;\nOVER:\nst.global"),
    "an address": ("st.global.b32 [%d3]", "mul.wide.s32 %d4, %r3, 0;\nadd.s64 %d3, %d3, %d4;\nst.global.b32 [%d3]"),
    "a register that is never written": ("[%d3], %r4", "[%d3], %r9"),
    "a member mask": ("0, 31, -1", "0, 31, %r3"),
    "bytes that are chosen": ("st.global.b32 [%d3], %r4", "prmt.b32 %r5, %r4, %r9, 0x7210;\nst.global.b32 [%d3], %r5"),
}
HARMLESS = {
    "a half that is packed and not used": (
        "st.global.b32 [%d3], %r4",
        "mov.b32 {%h1, %h2}, %r4;\nmov.b32 %r5, {%h1, %h3};\nmov.b32 %r6, {%h2, %h3};\n"
        "mov.b32 {%h4, _}, %r5;\nmov.b32 {%h5, _}, %r6;\nmov.b32 %r7, {%h4, %h5};\nst.global.b32 [%d3], %r7",
    ),
    "bytes that are not chosen": (
        "st.global.b32 [%d3], %r4",
        "prmt.b32 %r5, %r4, %r9, 0x3210;\nprmt.b32 %r6, %r9, %r5, 0x7654;\nst.global.b32 [%d3], %r6",
    ),
    "a choice that leaves it": (
        "shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;",
        "selp.b32 %r4, %r3, 7, %p1;",
    ),
    "a store by those who have it": ("st.global.b32 [%d3], %r4", "@%p1 st.global.b32 [%d3], %r3"),
    "written on both ways of a branch": (
        "add.s32 %r3, %r2, 1;",
        "@%p1 bra HAS;\nmov.b32 %r2, 5;\nHAS:\nadd.s32 %r3, %r2, 1;",
    ),
}


def arrays() -> tuple[np.ndarray, np.ndarray]:
    source = aligned((64,), np.uint32)
    source[:] = np.arange(64) + 100
    return source, aligned((64,), np.uint32)


def test_lanes_without_a_number_may_compute():
    source, out = arrays()
    run(CLEAN, source, out, threads=64)
    assert (out == np.repeat(source[::32] + 1, 32)).all()


@pytest.mark.parametrize("name", HARMLESS)
def test_what_comes_of_nothing_is_harmless(name):
    run(changed(CLEAN, HARMLESS[name]), *arrays(), threads=64)


@pytest.mark.parametrize("name", FAULTS)
def test_what_gets_out_is_found(name):
    assert fault(changed(CLEAN, FAULTS[name]), *arrays(), threads=64) == "uninitialised"
