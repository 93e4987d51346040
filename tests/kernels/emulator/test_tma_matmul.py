"""Products that Triton pipelines over bulk copies of tensors, with edges inside tiles, and reductions by maps."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import fusemesh

pytestmark = pytest.mark.aot

M, N, K, TILE = 100, 72, 200, 64


@triton.jit
def product_kernel(a, b, c, K, TILE: tl.constexpr, TIMES: tl.constexpr):
    row, column = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, K, TILE):
        acc = tl.dot(a.load([row, k]), b.load([k, column]), acc)
    for _ in tl.static_range(TIMES):
        c.atomic_add([row, column], acc.to(tl.bfloat16))
    if TIMES == 0:
        c.store([row, column], acc.to(tl.bfloat16))


@triton.jit
def made_maps_kernel(p_a, p_b, p_c, M, N, K, TILE: tl.constexpr):
    a = tl.make_tensor_descriptor(p_a, [M, K], [K, 1], [TILE, TILE])
    b = tl.make_tensor_descriptor(p_b, [K, N], [N, 1], [TILE, TILE])
    c = tl.make_tensor_descriptor(p_c, [M, N], [N, 1], [TILE, TILE])
    row, column = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, K, TILE):
        acc = tl.dot(a.load([row, k]), b.load([k, column]), acc)
    c.store([row, column], acc.to(tl.bfloat16))


@pytest.mark.parametrize(("copies", "seed"), [("late", None), ("early", None), ("random", 1)])
@pytest.mark.parametrize(("times", "stages"), [(0, 1), (0, 3), (2, 3), (None, 3)])
def test_products_over_tensor_descriptors(times, stages, copies, seed):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=g).bfloat16(), torch.randn(K, N, generator=g).bfloat16()
    c, grid = torch.zeros(M, N, dtype=torch.bfloat16), (triton.cdiv(M, TILE), triton.cdiv(N, TILE))
    with fusemesh.emulate("sm_90", copies=copies, seed=seed):
        if times is None:
            made_maps_kernel[grid](a, b, c, M, N, K, TILE=TILE, num_stages=stages)
        else:
            maps = [TensorDescriptor.from_tensor(x, [TILE, TILE]) for x in (a, b, c)]
            product_kernel[grid](*maps, K, TILE=TILE, TIMES=times, num_stages=stages)
    want = a.double() @ b.double() * (times or 1)
    assert float((c.double() - want).norm() / want.norm()) < 3e-3
