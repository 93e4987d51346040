"""Bulk copies: boxes of tensors against loops over their elements, copies of bytes, reductions, and their rules."""

import numpy as np
import pytest

from fusemesh.kernels.emulator.hazard import Hazard, UnknownInstruction
from fusemesh.kernels.emulator.shared_memory import Shared
from fusemesh.kernels.emulator.tensor_maps import TensorMap
from tests.support.emulated_ptx import aligned, run
from tests.support.emulator.bulk_copies import (
    SIZES,
    WAIT,
    coordinates,
    dump,
    fill,
    make_map,
    prologue,
    slow_box,
    tensor,
)

ASYNCHRONY = [{"asynchrony": "late"}, {"asynchrony": "early"}, {"asynchrony": "random", "seed": 1}]
CASES = [
    # element, shape, box, origin, swizzle
    ("f32", (40,), (32,), (4,), 0),
    ("bf16", (64, 24), (64, 8), (0, 8), 128),
    ("bf16", (64, 24), (64, 16), (0, -3), 128),
    ("bf16", (100, 24), (32, 16), (80, 16), 64),
    ("f16", (50, 9), (16, 8), (-5, 3), 32),
    ("u8", (77, 5), (32, 4), (60, -1), 32),
    ("f32", (20, 6, 5), (8, 4, 3), (-2, 3, 3), 0),
    ("f32", (32, 6, 5), (32, 4, 3), (0, -1, 1), 128),
    ("f64", (12, 3, 4, 3), (4, 2, 3, 2), (10, 2, -1, 2), 0),
    ("bf16", (40, 3, 2, 3, 2), (32, 2, 2, 2, 1), (16, 2, -1, 1, 1), 64),
    ("u16", (24, 4, 3, 2, 3), (8, 3, 2, 1, 4), (20, -1, 2, 1, -1), 0),
]


@pytest.mark.parametrize("options", ASYNCHRONY, ids=["late", "early", "random"])
@pytest.mark.parametrize(("element", "shape", "box", "origin", "swizzle"), CASES)
def test_boxes_are_loaded_as_the_map_says(element, shape, box, origin, swizzle, options):
    data, strides = tensor(shape, element, extra=32)
    box_map = make_map(data, shape, strides, box, element, swizzle=swizzle)
    words = -(-box_map.nbytes // 128) * 32
    start, out = 1024, np.zeros(words, np.uint32)
    moves, vector = coordinates(origin)
    # Bytes that the copy must not touch are zero before it, and stay so.
    run(
        f"""{fill(1, start, words)}
{prologue(box_map.nbytes)}
{moves}
@%p0 cp.async.bulk.tensor.{len(shape)}d.shared::cluster.global.mbarrier::complete_tx::bytes
 [%r0 + {start}], [%a0, {vector}], [%r0];
{WAIT}
{dump(1, start, words)}""",
        box_map,
        out,
        memory=(data,),
        shared=64 * 1024,
        **options,
    )
    want = np.zeros(words * 4, np.uint8)
    for at, source, filled in slow_box(data, shape, strides, box, origin, element, start, swizzle, bytes(8)):
        want[at - start] = filled if source is None else data[source]
    assert (out.view(np.uint8) == want).all()


@pytest.mark.parametrize("options", ASYNCHRONY, ids=["late", "early", "random"])
@pytest.mark.parametrize(("element", "shape", "box", "origin", "swizzle"), CASES)
def test_boxes_are_stored_as_the_map_says(element, shape, box, origin, swizzle, options):
    data, strides = tensor(shape, element, extra=16)
    box_map = make_map(data, shape, strides, box, element, swizzle=swizzle)
    words, start, before = -(-box_map.nbytes // 128) * 32, 1024, data.copy()
    source = np.random.default_rng(2).integers(0, 1 << 32, words, dtype=np.uint32)
    moves, vector = coordinates(origin)
    run(
        f"""{fill(1, start, words)}
{moves}
@%p0 cp.async.bulk.tensor.{len(shape)}d.global.shared::cta.bulk_group [%a0, {vector}], [%r0 + {start}];
@%p0 cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;""",
        box_map,
        source,
        memory=(data,),
        shared=64 * 1024,
        **options,
    )
    for at, target, _ in slow_box(data, shape, strides, box, origin, element, start, swizzle, bytes(8)):
        if target is not None:
            before[target] = source.view(np.uint8)[at - start]
    assert (data == before).all()


@pytest.mark.parametrize(("element", "nan"), [("bf16", 0x7FFF), ("f16", 0x7FFF), ("f32", 0x7FFFFFFF)])
def test_nan_lies_outside_where_the_map_asks_for_it(element, nan):
    data, strides = tensor((8, 2), element)
    box_map = make_map(data, (8, 2), strides, (8, 4), element, nan=True)
    words, out = 32, np.zeros(32, np.uint32)
    run(
        f"""{fill(1, 1024, words)}
{prologue(box_map.nbytes)}
mov.b32 %r10, 0;
@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r0 + 1024],
 [%a0, {{%r10, %r10}}], [%r0];
{WAIT}
{dump(1, 1024, words)}""",
        box_map,
        out,
        memory=(data,),
        shared=4096,
    )
    got = out.view(f"u{SIZES[element]}")[:32].reshape(4, 8)
    assert (got[2:] == nan).all() and (got[:2].view(np.uint8).reshape(-1) == data[: 16 * SIZES[element]]).all()


@pytest.mark.parametrize("options", ASYNCHRONY, ids=["late", "early", "random"])
def test_bytes_are_copied_both_ways(options):
    source, target = aligned((64,), np.uint32), aligned((64,), np.uint32)
    source[:] = np.arange(64) + 7
    run(
        f"""{prologue(256)}
@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 128], [%a0], 256, [%r0];
{WAIT}
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%a1], [%r0 + 128], 256;
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group 0;""",
        source,
        target,
        shared=1024,
        **options,
    )
    assert (target == source).all()


REDUCTIONS = [
    ("add", "f32", np.float32),
    ("add.noftz", "f16", np.float16),
    ("add", "u32", np.uint32),
    ("add", "u64", np.uint64),
    ("min", "s32", np.int32),
    ("max", "s64", np.int64),
    ("max", "f16", np.float16),
    ("and", "b32", np.uint32),
    ("or", "b64", np.uint64),
    ("xor", "b32", np.uint32),
]


@pytest.mark.parametrize("options", ASYNCHRONY, ids=["late", "early", "random"])
@pytest.mark.parametrize(("operation", "element", "dtype"), REDUCTIONS, ids=[f"{x[0]}.{x[1]}" for x in REDUCTIONS])
def test_reductions_of_bytes(operation, element, dtype, options):
    rng = np.random.default_rng(3)
    old, new = aligned((256 // np.dtype(dtype).itemsize,), dtype), aligned((256 // np.dtype(dtype).itemsize,), dtype)
    for x in (old, new):
        if np.issubdtype(dtype, np.floating):
            x[:] = rng.standard_normal(x.shape) * 3
        else:
            x.view(np.uint8)[:] = rng.integers(0, 256, 256)
    function = {
        "add": lambda a, b: a + b,
        "min": lambda a, b: a if a < b else b,
        "max": lambda a, b: a if a > b else b,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }[operation.split(".")[0]]
    with np.errstate(over="ignore"):
        want = np.array([function(function(a, b), b) for a, b in zip(old, new, strict=True)], dtype)
    once = f"@%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}.{element} [%a0], [%r0 + 128], 256;"
    run(
        f"""{fill(1, 128, 64)}
{once}
{once}
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group 0;""",
        old,
        new.view(np.uint32),
        shared=1024,
        **options,
    )
    assert (old.view(np.uint8) == want.view(np.uint8)).all()


def test_a_box_is_added_to_a_tensor_of_bf16():
    # 256 + 1 is a tie that rounds to even; 1 + 2^-8 one that rounds down.
    old = aligned((2, 16), np.uint16)
    old[:] = np.array([0x4380, 0x3F80] * 8, np.uint16)
    new = np.array([0x3F80, 0x3B80] * 8, np.uint16).repeat(1)
    source = np.concatenate([new, new, new, new]).view(np.uint32)
    box_map = TensorMap("bf16", old.ctypes.data, (16, 2), (32,), (16, 4))
    run(
        f"""{fill(1, 128, 32)}
mov.b32 %r10, 0;
@%p0 cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%a0, {{%r10, %r10}}], [%r0 + 128];
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group.read 0;""",
        box_map,
        source,
        memory=(old,),
        shared=1024,
    )
    assert (old == np.array([0x4380, 0x3F80] * 8, np.uint16)).all()
    new[:] = 0x4000  # 2
    run(
        f"""{fill(1, 128, 32)}
mov.b32 %r10, 0;
@%p0 cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%a0, {{%r10, %r10}}], [%r0 + 128];
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group.read 0;""",
        box_map,
        np.concatenate([new, new, new, new]).view(np.uint32),
        memory=(old,),
        shared=1024,
    )
    assert (old == np.array([0x4381, 0x4040] * 8, np.uint16)).all()


def test_a_map_survives_packing():
    made = TensorMap(
        "f16", 1 << 40, (5, 6, 7, 8, 1 << 32), (16, 96, 1 << 35, (1 << 40) - 16), (8, 2, 3, 4, 256), 64, True
    )
    assert len(made.pack()) == 128 and TensorMap.unpack(made.pack()) == made
    with pytest.raises(ValueError, match="no tensor map"):
        TensorMap.unpack(bytes(128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "multiple of 16"),
        ({"strides": (40,)}, "strides"),
        ({"shape": (0, 4)}, "sizes"),
        ({"box": (8, 257)}, "1 to 256"),
        ({"box": (7, 4)}, "multiple of 16 bytes"),
        ({"box": (64, 4), "swizzle": 64}, "no wider than the swizzle"),
        ({"swizzle": 16}, "swizzle of"),
        ({"strides": ()}, "one stride less"),
        ({"box": (8,)}, "as many dimensions"),
        ({"element": "u16", "nan": True}, "numbers"),
    ],
)
def test_maps_that_cannot_be_encoded(change, message):
    fields = {"element": "bf16", "address": 0, "shape": (64, 4), "strides": (128,), "box": (8, 4)} | change
    with pytest.raises(ValueError, match=message):
        TensorMap(**fields)


COPY = "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


@pytest.mark.parametrize(
    ("copy", "kind"),
    [
        (f"{COPY} [%r0 + 192], [%a0, {{%r10, %r10}}], [%r0];", "alignment"),
        (f"{COPY} [%r0 + 3968], [%a0, {{%r10, %r10}}], [%r0];", "address"),
        (f"{COPY} [%r0], [%a0, {{%r10, %r10}}], [%r0];", "mbarrier"),
        (f"{COPY} [%r0 + 128], [%a0, {{%r10, %r10}}], [%r0 + 8];", "mbarrier"),
        (f"{COPY.replace('2d', '1d')} [%r0 + 128], [%a0, {{%r10}}], [%r0];", "address"),
        (f"{COPY} [%r0 + 128], [%a1, {{%r10, %r10}}], [%r0];", "address"),
        (
            "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 128], [%a1], 24, [%r0];",
            "alignment",
        ),
        (
            "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 128], [%a1 + 4], 16, [%r0];",
            "alignment",
        ),
        (
            "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0 + 128], [%a1], 1040, [%r0];",
            "address",
        ),
    ],
)
def test_copies_that_break_a_rule(copy, kind):
    data = aligned((8, 64), np.uint16)
    box_map = TensorMap("bf16", data.ctypes.data, (64, 8), (128,), (64, 8), 128)
    with pytest.raises(Hazard) as error:
        run(
            f"{prologue(1024)}\nmov.b32 %r10, 0;\n{copy}\n{WAIT}",
            box_map,
            aligned((256,), np.uint32),
            memory=(data,),
            shared=4096,
        )
    assert error.value.kind == kind


@pytest.mark.parametrize(
    "opcode",
    [
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster",
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes",
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask",
    ],
)
def test_what_clusters_need_is_refused_by_name(opcode):
    with pytest.raises(UnknownInstruction, match=opcode.replace(".", r"\.")):
        run(f"{opcode} [%r0], [%r1], 16, [%r0];", shared=1024)


def test_prefetches_change_nothing():
    data = aligned((8, 64), np.uint16)
    box_map = TensorMap("bf16", data.ctypes.data, (64, 8), (128,), (64, 8), 128)
    run(
        """mov.b32 %r10, 0;
prefetch.tensormap [%a0];
cp.async.bulk.prefetch.tensor.2d.L2.global [%a0, {%r10, %r10}];
cp.async.bulk.prefetch.L2.global [%a1], 16;""",
        box_map,
        data,
        shared=0,
    )
    assert Shared.BASE % 1024 == 0  # on which the addresses of these tests count
