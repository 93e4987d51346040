"""A warp-specialised attention forward in Gluon for Hopper: one warp loads by TMA, two warpgroups multiply by wgmma.

Dense and causal, for lengths that fit its tiles; it is here to run in the emulator. Consumers issue the product with a
tile of keys before they wait for that with the values before.
"""

import math
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusemesh.kernels.emulator.launch.launching import Bound
from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.runtime.launch import TARGETS

# Their names since triton 3.9, and those before.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
ROWS, KEYS, D, STAGES = 64, 64, 64, 2  # rows of a consumer, tile of keys, head dim, tiles under way
CONSUMERS = 2


@gluon.jit
def _producer(d_q, d_k, d_v, q_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, S):
    rows: gl.constexpr = q_s.shape[1]
    keys: gl.constexpr = k_s.shape[1]
    depth: gl.constexpr = q_s.shape[2]
    stages: gl.constexpr = k_s.shape[0]
    consumers: gl.constexpr = q_s.shape[0]
    i_m, first = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1) * S  # the longest rows first
    n = gl.cdiv((i_m + 1) * rows * consumers, keys)
    for w in gl.static_range(consumers):
        mbarrier.expect(q_full.index(w), rows * depth * 2)
        at = first + (i_m * consumers + w) * rows
        load_box(d_q, [at, 0], q_full.index(w), q_s.index(w))
    for i in range(n):
        stage, phase = i % stages, (i // stages) & 1
        at = first + (n - 1 - i) * keys
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), keys * depth * 2)
        load_box(d_k, [at, 0], k_full.index(stage), k_s.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), keys * depth * 2)
        load_box(d_v, [at, 0], v_full.index(stage), v_s.index(stage))


@gluon.jit
def _consumer(d_o, q_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, scale, S, W: gl.constexpr):
    rows: gl.constexpr = q_s.shape[1]
    keys: gl.constexpr = k_s.shape[1]
    depth: gl.constexpr = q_s.shape[2]
    stages: gl.constexpr = k_s.shape[0]
    consumers: gl.constexpr = q_s.shape[0]
    s_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, keys, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, depth, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_l, k_width=2)
    row_l: gl.constexpr = gl.SliceLayout(1, s_l)
    out_l: gl.constexpr = gl.SliceLayout(1, o_l)
    i_b = gl.num_programs(0) - 1 - gl.program_id(0)
    i_m = i_b * consumers + W
    n = gl.cdiv((i_b + 1) * rows * consumers, keys)
    q = q_s.index(W)
    zero = gl.zeros([rows, keys], gl.float32, s_l)
    acc = gl.zeros([rows, depth], gl.float32, o_l)
    o_m = i_m * rows + gl.arange(0, rows, row_l)
    o_n = (n - 1) * keys + gl.arange(0, keys, gl.SliceLayout(0, s_l))
    mbarrier.wait(q_full.index(W), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    s = gl.where(o_n[None, :] <= o_m[:, None], s, -float("inf"))
    top = gl.max(s, 1)
    safe = gl.where(top == -float("inf"), 0.0, top) * scale
    p = gl.exp2(s * scale - safe[:, None])
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(d_o.dtype), p_l)
    shrink = gl.full([rows], 1.0, gl.float32, row_l)
    acc = warpgroup_mma_init(acc)
    used = weights  # of the product with values under way, whose registers must stay until its wait
    for i in range(1, n):
        stage, phase = i % stages, (i // stages) & 1
        before, before_phase = (i - 1) % stages, ((i - 1) // stages) & 1
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        acc, used = warpgroup_mma_wait(1, deps=(acc, used))
        mbarrier.arrive(k_empty.index(before), count=1)
        mbarrier.arrive(v_empty.index((i + stages - 2) % stages), count=1, pred=i >= 2)
        acc = acc * gl.convert_layout(shrink, out_l)[:, None]
        mbarrier.wait(v_full.index(before), before_phase)
        acc = warpgroup_mma(weights, v_s.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        s = gl.where(o_n[None, :] - i * keys <= o_m[:, None], s, -float("inf"))
        new_top = gl.maximum(top, gl.max(s, 1))
        safe = gl.where(new_top == -float("inf"), 0.0, new_top) * scale
        shrink = gl.exp2(top * scale - safe)
        p = gl.exp2(s * scale - safe[:, None])
        total = total * shrink + gl.sum(p, 1)
        top = new_top
        used = weights
        weights = gl.convert_layout(p.to(d_o.dtype), p_l)
    acc, used = warpgroup_mma_wait(0, deps=(acc, used))
    last = (n - 1) % stages
    acc = acc * gl.convert_layout(shrink, out_l)[:, None]
    mbarrier.wait(v_full.index(last), ((n - 1) // stages) & 1)
    acc = warpgroup_mma(weights, v_s.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    acc = acc / gl.convert_layout(total, out_l)[:, None]
    q.store(acc.to(d_o.dtype))
    fence_async_shared()
    store_box(d_o, [gl.program_id(1) * S + i_m * rows, 0], q)
    tma.store_wait(0)


@gluon.jit
def gluon_forward_kernel(
    d_q,
    d_k,
    d_v,
    d_o,
    scale,
    S,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    D: gl.constexpr,
):
    q_s = gl.allocate_shared_memory(d_q.dtype, [CONSUMERS, ROWS, D], d_q.layout)
    k_s = gl.allocate_shared_memory(d_k.dtype, [STAGES, KEYS, D], d_k.layout)
    v_s = gl.allocate_shared_memory(d_v.dtype, [STAGES, KEYS, D], d_v.layout)
    bar_l: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar_l)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_l)
    for w in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(w), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (d_o, q_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, scale, S, 0)),
            (_consumer, (d_o, q_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, scale, S, 1)),
            (_producer, (d_q, d_k, d_v, q_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, S)),
        ],
        [4, 1],
        [232, 40],
    )


class Run:
    """The kernel bound to random inputs for sm_90, with no GPU."""

    def __init__(self, S: int, heads: int) -> None:
        g = torch.Generator().manual_seed(S)
        self.S, self.heads = S, heads
        self.q, self.k, self.v = (torch.randn(heads * S, D, generator=g).bfloat16() for _ in range(3))
        self.out = torch.full_like(self.q, math.nan)
        s = (self.head(self.q) @ self.head(self.k).mT) * D**-0.5
        s = s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
        self.want = s.softmax(-1) @ self.head(self.v)
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        descriptors = [
            TensorDescriptor.from_tensor(x, [rows, D], layout)
            for x, rows in ((self.q, ROWS), (self.k, KEYS), (self.v, KEYS), (self.out, ROWS))
        ]
        self.bound = Bound(
            TARGETS["sm_90"],
            gluon_forward_kernel,
            (S // (ROWS * CONSUMERS), heads),
            (*descriptors, D**-0.5 * math.log2(math.e), S),
            {"STAGES": STAGES, "CONSUMERS": CONSUMERS, "ROWS": ROWS, "KEYS": KEYS, "D": D, "num_warps": 4},
        )

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of each head, in fp64."""
        return x.double().view(self.heads, self.S, D)

    def __call__(
        self, text: str | None = None, ctas: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, Machine]:
        """The output and the machine after all CTAs, or the first ``ctas``, of the kernel or of another text ran."""
        self.out.fill_(math.nan)
        machine = self.bound.machine(text, **options)
        machine.strict = True
        self.bound.run(machine, ctas)
        return self.out.clone(), machine
