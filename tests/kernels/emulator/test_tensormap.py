"""Tensor maps that a kernel makes, field by field: a clean program, and that program with one fault each."""

import numpy as np
import pytest

from tests.support.emulated_ptx import aligned, changed, each_way, fault, run
from tests.support.emulator.bulk_copies import WAIT, dump, slow_box


def replaced(field: str, value: object, ordinal: int | None = None, bits: int = 32) -> str:
    """PTX by which thread 0 sets a field of the map at shared byte 0; ``value``: a number, or an array's register."""
    order = "" if ordinal is None else f" {ordinal},"
    return f"@%p0 tensormap.replace.tile.{field}.shared::cta.b1024.b{bits} [%r0],{order} {value};"


FIELDS = "\n".join(
    [
        replaced("global_address", "%a0", bits=64),
        replaced("rank", 1),
        replaced("box_dim", 16, 0),
        replaced("box_dim", 8, 1),
        replaced("global_dim", 24, 0),
        replaced("global_dim", 6, 1),
        replaced("global_stride", 64, 0, 64),
        replaced("element_stride", 1, 0),
        replaced("element_stride", 1, 1),
        replaced("elemtype", 10),
        replaced("interleave_layout", 0),
        replaced("swizzle_mode", 1),
        replaced("fill_mode", 0),
    ]
)
# Warp 0 makes the map at shared byte 0 and copies it out; thread 32 loads a box by it.
MADE = f"""mov.b32 %r0, global_smem;
setp.eq.u32 %p0, %tid, 0;
setp.lt.u32 %p2, %tid, 32;
setp.eq.u32 %p3, %tid, 32;
mad.lo.s32 %r1, %tid, 4, %r0;
mov.b32 %r2, 0;
@%p2 st.shared.b32 [%r1], %r2;
@%p0 mbarrier.init.shared::cta.b64 [%r0 + 1024], 1;
fence.proxy.async.shared::cta;
bar.sync 0;
{FIELDS}
bar.warp.sync -1;
@%p2 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%a2], [%r0], 128;
@%p2 fence.proxy.tensormap::generic.acquire.gpu [%a2], 128;
bar.sync 0;
add.s32 %r0, %r0, 1024;
mov.b32 %r10, 12;
mov.b32 %r11, -2;
@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 256;
@%p3 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r0 + 128], [%a2, {{%r10, %r11}}], [%r0];
{WAIT}
{dump(1, 128, 64, 64)}"""


def made() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A tensor of 6 rows of 32 elements, what is loaded, and memory for a map."""
    x = aligned((6, 32), np.uint16)
    x[:] = np.arange(192).reshape(6, 32)
    return x, np.zeros(64, np.uint32), aligned((128,), np.uint8)


@each_way
def test_a_kernel_makes_its_own_map(options):
    x, out, scratch = made()
    run(MADE, x, out, scratch, threads=64, shared=4096, **options)
    want = np.zeros(256, np.uint8)
    for at, source, _ in slow_box(x, (24, 6), (2, 64), (16, 8), (12, -2), "bf16", 1152, 32, bytes(8)):
        want[at - 1152] = 0 if source is None else x.view(np.uint8).reshape(-1)[source]
    assert (out.view(np.uint8) == want).all() and want.any()


@each_way
@pytest.mark.parametrize(
    ("kinds", "old", "new"),
    [
        ({"proxy"}, "@%p2 fence.proxy.tensormap::generic.acquire.gpu [%a2], 128;", ""),
        ({"proxy", "race", "address"}, "acquire.gpu [%a2], 128;\nbar.sync 0;", "acquire.gpu [%a2], 128;"),
        ({"address"}, replaced("rank", 1), ""),  # a map of one dimension
        ({"address"}, replaced("box_dim", 16, 0), replaced("box_dim", 12, 0)),  # no multiple of 16 bytes
        ({"race", "uninitialised"}, replaced("fill_mode", 0), replaced("fill_mode", 0).replace("%p0", "%p3")),
    ],
)
def test_faults_of_a_map_that_a_kernel_makes(kinds, old, new, options):
    assert fault(changed(MADE, (old, new)), *made(), threads=64, shared=4096, **options) in kinds
