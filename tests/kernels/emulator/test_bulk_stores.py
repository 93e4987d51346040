"""Bulk stores: a clean program, and that program with one fault each, early and late.

Warp 0 writes 512 bytes of shared memory, thread 0 stores them.
"""

import numpy as np
import pytest

from tests.support.emulated_ptx import aligned, changed, each_way, fault, run

STORES = """mov.b32 %r0, global_smem;
setp.eq.u32 %p0, %tid, 0;
setp.lt.u32 %p2, %tid, 32;
mad.lo.s32 %r1, %tid, 16, %r0;
@%p2 st.shared.v4.b32 [%r1], {%tid, %tid, %tid, %tid};
fence.proxy.async.shared::cta;
bar.sync 0;
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r0], 512;
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group.read 0;
"""
STORE_FAULTS = {
    "no proxy fence": ("proxy", ("fence.proxy.async.shared::cta;", "")),
    "the fence after the barrier, of others": (
        "proxy",
        ("fence.proxy.async.shared::cta;\nbar.sync 0;", "bar.sync 0;\n@!%p2 fence.proxy.async.shared::cta;"),
    ),
    "no wait before the end": ("async", ("@%p0 cp.async.bulk.wait_group.read 0;", "")),
    "no commit": ("async", ("@%p0 cp.async.bulk.commit_group;", "")),
    "a wait for too little": ("async", ("wait_group.read 0;", "wait_group.read 1;")),
    "a wait by another thread": (
        "async",
        ("@%p0 cp.async.bulk.wait_group.read 0;", "@!%p0 cp.async.bulk.wait_group.read 0;"),
    ),
    "the source is written under way": (
        "async",
        (
            "@%p0 cp.async.bulk.wait_group.read 0;",
            "@%p0 st.shared.b32 [%r0 + 508], %r0;\ncp.async.bulk.wait_group.read 0;",
        ),
    ),
    "the source is written by who did not wait": (
        "race",
        ("wait_group.read 0;", "wait_group.read 0;\nbar.warp.sync -1;\n@!%p2 st.shared.b32 [%r0 + 508], %r0;"),
    ),
    "the target is read under way": (
        "async",
        ("wait_group.read 0;", "wait_group.read 0;\n@%p0 ld.global.b32 %r5, [%a0 + 64];"),
    ),
    "the target is written under way": (
        "async",
        ("wait_group.read 0;", "wait_group.read 0;\n@%p0 st.global.b32 [%a0 + 64], %r0;"),
    ),
}


@each_way
def test_bulk_stores_that_are_waited_for(options):
    want = np.repeat(np.arange(32, dtype=np.uint32), 4)
    for change in (
        ("wait_group.read 0;", "wait_group.read 0;"),
        ("wait_group.read 0;", "wait_group 0;\n@%p0 ld.global.b32 %r5, [%a0 + 64];"),
        ("wait_group.read 0;", "wait_group.read 0;\n@%p0 st.shared.b32 [%r0], %r0;"),
        ("wait_group.read 0;", "wait_group.read 0;\nbar.sync 0;\n@!%p2 st.shared.b32 [%r1], %r0;"),
        ("fence.proxy.async.shared::cta;\nbar.sync 0;", "bar.sync 0;\nfence.proxy.async.shared::cta;"),
    ):
        out = aligned((128,), np.uint32)
        run(changed(STORES, change), out, threads=64, shared=2048, **options)
        assert (out == want).all()


@each_way
@pytest.mark.parametrize("name", STORE_FAULTS)
def test_faults_of_bulk_stores(name, options):
    kind, change = STORE_FAULTS[name]
    program = changed(STORES, change)
    assert fault(program, aligned((128,), np.uint32), threads=64, shared=2048, **options) == kind
