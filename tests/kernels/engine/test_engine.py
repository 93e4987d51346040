"""Layer: kernels, on one process. The C++ engine's numbers: right by the error budget, and equal to the bit whatever
the threads and strides."""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fusemesh
from fusemesh.kernels import backends, engine
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.engine import dense as cpu
from fusemesh.kernels.testing import attention as expectations
from fusemesh.kernels.testing.poison import poisoned_empty, surround
from tests.support import fresh_process
from tests.support.engine_required import require_engine

require_engine()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    batch: int, heads: int, kv_heads: int, sq: int, sk: int, dim: int, dim_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(batch, heads, sq, dim, seed=1),
        normal(batch, kv_heads, sk, dim, seed=2),
        normal(batch, kv_heads, sk, dim_v, seed=3),
    )


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's forward, its outputs checked against the budget; inputs lie in NaN, outputs start as NaN."""
    hidden = [surround(x).view for x in (q, k, v)]
    with poisoned_empty():
        out, lse = cpu.forward(*hidden, Call(spec, mask=mask, bias=bias, origin=origin))
    want = expectations.expected(q, k, v, Call(spec, mask=mask, bias=bias, origin=origin))
    expectations.check({"out": out, "lse": lse}, want)
    return out, lse


# (batch, heads, kv_heads, Sq, Sk, D, Dv)
SHAPES = [
    (1, 1, 1, 1, 1, 16, 16),
    (2, 4, 4, 17, 17, 64, 64),
    (1, 6, 2, 113, 203, 80, 48),
    (2, 4, 1, 203, 113, 192, 128),
    (1, 2, 2, 1, 203, 256, 256),
    (1, 2, 1, 203, 1, 33, 17),
    (1, 8, 2, 65, 640, 128, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("positions", ["open", "causal", "bottom_right", "window", "far"])
def test_forward_within_budget(shape: tuple[int, ...], positions: str) -> None:
    q, k, v = inputs(*shape)
    sq, sk = shape[3], shape[4]
    scale = 1 / math.sqrt(shape[5])
    spec = {
        "open": AttentionSpec(scale),
        "causal": AttentionSpec(scale, window_right=0),
        "bottom_right": AttentionSpec(scale, window_right=0, origin_q=sk - sq),
        "window": AttentionSpec(0.3, window_left=9, window_right=4, origin_q=3, origin_k=-2),
        # Positions where 32-bit arithmetic is long over; the window hides all but a few keys, and for some rows all.
        "far": AttentionSpec(scale, window_left=5, window_right=0, origin_q=2**40 + 8, origin_k=2**40),
    }[positions]
    _, lse = run(q, k, v, spec)
    if positions == "far" and sq > sk + 8:
        assert torch.isneginf(lse).any(), "rows without a key were meant to be among the cases"


@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 1), (2, 4, 37, 70), (1, 4, 1, 70), (2, 1, 37, 1)], ids=str)
@pytest.mark.parametrize("mask_shape", [None, (1, 1, 37, 70), (2, 4, 1, 70)], ids=str)
def test_mask_and_bias(bias_shape: tuple[int, ...], mask_shape: tuple[int, ...] | None) -> None:
    q, k, v = inputs(2, 4, 2, 37, 70, 24, 40)
    bias = normal(*bias_shape, seed=4)
    mask = None if mask_shape is None else normal(*mask_shape, seed=5) > 0.5
    if mask is not None:
        mask[..., 0, :] = False
    out, lse = run(q, k, v, AttentionSpec(0.2, window_right=3, origin_q=11), mask, bias)
    if mask is not None:
        empty = torch.isneginf(lse)
        assert empty.any()
        assert (out[empty] == 0).all()


def test_origin_tensor_adds_to_spec() -> None:
    q, k, v = inputs(1, 2, 2, 19, 31, 16, 16)
    whole = AttentionSpec(0.25, window_left=6, window_right=1, origin_q=9, origin_k=2)
    part = AttentionSpec(0.25, window_left=6, window_right=1, origin_q=4, origin_k=5)
    out, lse = run(q, k, v, part, origin=torch.tensor([5, -3, 0, 0]))
    expected_out, expected_lse = cpu.forward(q, k, v, Call(whole))
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("seed", range(60))
def test_random_specs(seed: int) -> None:
    """Sizes, strides, windows, masks and biases drawn at random; tiles (64 keys) are crossed often."""
    draw = np.random.default_rng(seed)
    kv_heads, group = int(draw.integers(1, 4)), int(draw.integers(1, 4))
    batch, heads = int(draw.integers(1, 3)), kv_heads * group
    sq, sk = (int(draw.integers(1, 200)) for _ in range(2))
    q, k, v = inputs(batch, heads, kv_heads, sq, sk, int(draw.integers(1, 70)), int(draw.integers(1, 70)))
    full = (batch, heads, sq, sk)
    shapes = [tuple(1 if draw.random() < 0.5 else size for size in full) for _ in range(2)]
    mask = torch.from_numpy(draw.random(shapes[0]) < 0.7) if draw.random() < 0.5 else None
    bias = normal(*shapes[1], seed=seed) if draw.random() < 0.5 else None
    sides = [None if draw.random() < 0.5 else int(draw.integers(0, 100)) for _ in range(2)]
    origins = [int(draw.integers(-100, 100)) for _ in range(2)]
    run(q, k, v, AttentionSpec(float(draw.normal()), *sides, *origins), mask, bias)


def test_scores_of_any_size() -> None:
    """Scores near +-1000 overflow exp unless the maximum is taken off first."""
    q, k, v = inputs(1, 2, 2, 50, 150, 32, 32)
    run(q * 30, k * 10, v, AttentionSpec(1.0))
    run(q, k, v, AttentionSpec(1.0), bias=torch.full((1, 1, 1, 1), -1e4))


@pytest.mark.parametrize("dims", ["heads last", "reversed", "every second", "broadcast batch"])
def test_any_strides(dims: str) -> None:
    spec = AttentionSpec(0.2, window_right=0, origin_q=3)
    q, k, v = inputs(2, 4, 2, 29, 83, 40, 24)
    change: Callable[[torch.Tensor], torch.Tensor] = {
        "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "every second": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2],
        "broadcast batch": lambda x: x[:1].expand(2, -1, -1, -1),
    }[dims]
    changed = [change(x) for x in (q, k, v)]
    assert dims == "heads last" or all(x.stride() != y.stride() for x, y in zip(changed, (q, k, v), strict=True))
    plain = [x.contiguous() for x in changed]
    out, lse = cpu.forward(*changed, Call(spec))
    expected_out, expected_lse = run(*plain, spec)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


def test_negative_strides() -> None:
    q, k, v = (x.numpy() for x in inputs(1, 2, 2, 20, 30, 16, 16))
    flipped = engine.attention(q[:, :, ::-1, ::-1], k[..., ::-1], v)
    plain = engine.attention(q[:, :, ::-1, ::-1].copy(), k[..., ::-1].copy(), v)
    assert np.array_equal(flipped[0], plain[0])
    assert np.array_equal(flipped[1], plain[1])


def test_offsets_beyond_32_bits() -> None:
    """Keys 2^31 elements apart: memory that is reserved and hardly touched."""
    no_reserve = 0x4000  # MAP_NORESERVE on Linux, which Python names from 3.13 on
    far, size, dim = 2**31, 3, 8
    if sys.platform != "linux":
        pytest.skip("needs Linux's MAP_NORESERVE")
    memory = mmap.mmap(-1, 4 * (far * (size - 1) + dim), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    spread = np.lib.stride_tricks.as_strided(
        np.frombuffer(memory, np.float32), (1, 1, size, dim), (4, 4, 4 * far, 4), writeable=True
    )
    q, k, v = (x.numpy() for x in inputs(1, 1, 1, 4, size, dim, dim))
    spread[...] = k
    for arguments, plain in (((q, spread, v), (q, k, v)), ((spread, k, spread), (k, k, k))):
        for actual, expected in zip(engine.attention(*arguments), engine.attention(*plain), strict=True):
            assert np.array_equal(actual, expected)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 2, 3, 3, 4, 4), (2, 0, 0, 3, 3, 4, 4), (2, 2, 2, 0, 3, 4, 4), (2, 2, 2, 3, 0, 4, 4), (2, 2, 2, 3, 3, 4, 0)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_sizes_of_zero(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(*shape)
    with poisoned_empty():
        out, lse = cpu.forward(q, k, v, Call(AttentionSpec(1.0)))
    assert out.shape == (*shape[:2], shape[3], shape[6])
    assert lse.shape == (*shape[:2], shape[3])
    if shape[4] == 0:
        assert (out == 0).all()
        assert torch.isneginf(lse).all()
    elif shape[6] == 0:
        assert lse.isfinite().all()


def test_unseen_keys_leave_no_trace() -> None:
    """A key that no one sees may hold anything, NaN included; a NaN that is seen is passed on."""
    q, k, v = inputs(1, 1, 1, 5, 90, 16, 16)
    mask = torch.ones(1, 1, 1, 90, dtype=torch.bool)
    mask[..., 70:] = False
    k[:, :, 70:], v[:, :, 70:] = math.nan, 1e30
    spec = AttentionSpec(0.25)
    out, lse = cpu.forward(q, k, v, Call(spec, mask=mask))
    short = cpu.forward(q, k[:, :, :70], v[:, :, :70], Call(spec))
    torch.testing.assert_close(out, short[0])
    torch.testing.assert_close(lse, short[1])
    q[0, 0, 2, 3] = math.nan
    out, lse = cpu.forward(q, k, v, Call(spec, mask=mask))
    assert out[0, 0, 2].isnan().all()
    assert lse.isnan().sum() == 1
    assert out[0, 0, [0, 1, 3, 4]].isfinite().all()


def test_bits_do_not_depend_on_threads_or_repeats() -> None:
    q, k, v = (x.numpy() for x in inputs(2, 6, 3, 113, 203, 48, 40))
    bias = normal(1, 6, 113, 203, seed=6).numpy()
    first = engine.attention(q, k, v, bias=bias, window=(90, 0), origin=(90, 0), threads=1)
    for repeat in range(50):
        again = engine.attention(q, k, v, bias=bias, window=(90, 0), origin=(90, 0), threads=1 + repeat % 4)
        for one, other in zip(first, again, strict=True):
            assert one.tobytes() == other.tobytes(), f"repeat {repeat}"


def test_calls_from_several_threads() -> None:
    """Calls share nothing, and each thread reads its own error."""
    q, k, v = (x.numpy() for x in inputs(1, 4, 4, 60, 60, 16, 16))
    expected = engine.attention(q, k, v, threads=1)[0]
    failures: list[str] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(engine.attention(q, k, v, threads=2)[0], expected):
                failures.append("different bits")
            try:
                engine.attention(q, k, v, threads=-number)
            except ValueError as error:
                if f"received {-number}" not in str(error):
                    failures.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_numpy_and_torch_agree() -> None:
    q, k, v = inputs(2, 4, 2, 30, 40, 16, 24)
    mask, bias = normal(30, 40, seed=7) > 0, normal(4, 1, 40, seed=8)
    out, lse = engine.attention(*(x.numpy() for x in (q, k, v)), mask=mask.numpy(), bias=bias.numpy(), window=(None, 5))
    spec = AttentionSpec(0.25, window_right=5)
    expected = cpu.forward(q, k, v, Call(spec, mask=mask[None, None], bias=bias[None]))
    assert torch.equal(torch.from_numpy(out), expected[0])
    assert torch.equal(torch.from_numpy(lse), expected[1])


def test_wrong_tensors() -> None:
    q, k, v = inputs(1, 2, 2, 5, 5, 8, 8)
    spec = AttentionSpec(1.0)
    call = Call(spec)
    with pytest.raises(ValueError, match=r"k: expected torch.bfloat16 with backend 'cpu', received torch.float32"):
        cpu.forward(q.bfloat16(), k, v, call)
    with pytest.raises(ValueError, match=r"q: expected float32, bfloat16 or float16 .* received torch.float64"):
        cpu.forward(q.double(), k, v, call)
    with pytest.raises(ValueError, match=r"bias: expected a CPU tensor of a dtype .* received torch.float64 on cpu"):
        cpu.forward(q, k, v, Call(spec, bias=torch.zeros(1, 1, 1, 1).double()))
    with pytest.raises(ValueError, match=r"k: expected a CPU tensor of a dtype .* received torch.float32 on meta"):
        cpu.forward(q, k.to("meta"), v, call)


def test_by_name_through_the_public_functions() -> None:
    q, k, v = inputs(2, 4, 2, 19, 31, 16, 24)
    options = {"causal": True, "align": "bottom_right", "bias": normal(1, 4, 1, 31, seed=9)}
    spec = AttentionSpec(0.25, window_right=0, origin_q=12)
    want = expectations.expected(q, k, v, Call(spec, bias=options["bias"]))
    backends.reset_call_counts()
    out, lse = fusemesh.flash_attention(q, k, v, **options, return_lse=True, backend="cpu")
    expectations.check({"out": out, "lse": lse}, want)
    out, lse = fusemesh.attention_forward(q, k, v, **options, backend="cpu")
    expectations.check({"out": out, "lse": lse}, want)
    with fusemesh.use_backend("cpu"):
        heads_last = q.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(fusemesh.flash_attention(heads_last, k, v, **options), out)
    assert backends.call_counts() == {("attention_forward", "cpu"): 3}


def test_auto_chooses_the_engine() -> None:
    """Everything that it computes goes to it; fp64 and the user's own mods do not."""
    q, k, v = inputs(1, 2, 2, 9, 9, 16, 16)
    mod = fusemesh.register_score_mod(
        fusemesh.ScoreMod("of test_cpu_engine", None, None, lambda s, i_b, i_h, i_q, i_k: s + i_h)
    )
    cu = torch.tensor([0, 4, 9])
    packed = [x[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    backends.reset_call_counts()
    fusemesh.flash_attention(q, k, v)
    fusemesh.flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=(3, 0), dropout_p=0.5)
    fusemesh.attention_forward(q, k, v)
    fusemesh.flash_attention_varlen(*packed, cu, cu, 5, 5).sum().backward()
    fusemesh.flash_attention_decode(q[:, :, :1], k, v, cache_lens=torch.tensor([7]))
    fusemesh.flash_attention(*(x.double() for x in (q, k, v)))
    fusemesh.flash_attention(q, k, v, score_mod=mod())
    assert backends.call_counts() == {
        ("attention_forward", "cpu"): 3,
        ("attention_varlen_forward", "cpu"): 1,
        ("attention_varlen_backward", "cpu"): 1,
        ("attention_decode", "cpu"): 1,
        ("attention_forward", "torch"): 1,
        ("attention_forward", "reference"): 1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_the_public_functions(dtype: torch.dtype) -> None:
    """On PyTorch's tape, by hand, and a second time by the reference's formulas."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs(2, 4, 2, 19, 31, 16, 24)]
    options = {"causal": True, "align": "bottom_right", "softcap": 5.0}
    backends.reset_call_counts()
    out, lse = fusemesh.flash_attention(*leaves, **options, return_lse=True, backend="cpu")
    do = normal(*out.shape, seed=8).to(dtype)
    mine = torch.autograd.grad(out, leaves, do, create_graph=True)
    assert backends.call_counts() == {("attention_forward", "cpu"): 1, ("attention_backward", "cpu"): 1}
    by_hand = fusemesh.attention_backward(do, *leaves, out, lse, **options, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(mine, by_hand, strict=False))
    second = torch.autograd.grad(sum(x.float().square().sum() for x in mine), leaves)
    assert all(x.isfinite().all() for x in second)


def test_what_it_has_not_is_refused() -> None:
    q, k, v = (x.double() for x in inputs(1, 2, 2, 9, 9, 16, 16))
    with pytest.raises(ValueError, match=r"^q: expected float32, bfloat16 or float16 .*received torch.float64"):
        fusemesh.flash_attention(q, k, v, backend="cpu")


def test_lengths_beyond_the_tensors_are_found() -> None:
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    for cu in (torch.tensor([0, 10]), torch.tensor([5, 4]), torch.tensor([-1, 3])):
        with pytest.raises(ValueError, match="cu_seqlens_q: expected numbers that never fall"):
            fusemesh.flash_attention_varlen(q, k, v, cu, cu, 20, 20, backend="cpu")


def test_each_instruction_set_by_the_environment() -> None:
    code = "from fusemesh.kernels import engine; print(engine.build_info()['isa'])"
    for isa in engine.isas():
        assert fresh_process.run(code, env={"FUSEMESH_CPU_ISA": isa}).strip() == isa
    refused = "from fusemesh.kernels import engine; print(engine.why_unavailable())"
    assert "FUSEMESH_CPU_ISA: expected one of" in fresh_process.run(refused, env={"FUSEMESH_CPU_ISA": "avx1024"})
