"""Layer: kernels, Triton's interpreter. Scores up to the largest finite numbers: out, lse and gradients stay finite.

A mask is often written as a bias of the dtype's lowest number. Half precision works in base 2, and such a number times
log2(e) is infinite; a row of them is nevertheless a row of equal scores, whose output is the mean of v.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fusemesh
from fusemesh.kernels.attention.gpu import decode_tiles, tiles

pytestmark = pytest.mark.interpreter

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.bfloat16, torch.float16, torch.float32)}
# dtype of q, dtype of the bias
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
]
SQ, SK = 8, 40


@triton.jit
def _replace(b_s, i_b, i_h, i_q, i_k, aux, numbers):  # type: ignore[no-untyped-def]
    return 0.0 * b_s + tl.cast(numbers[0], tl.float32)


@triton.jit
def _replace_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):  # type: ignore[no-untyped-def]
    return 0.0 * b_ds


def _replace_torch(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, *, number: float) -> torch.Tensor:
    return 0.0 * s + number


REPLACE = fusemesh.register_score_mod(
    fusemesh.ScoreMod("a number of the tests", _replace, _replace_backward, _replace_torch, num_params=1)
)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v and do."""
    generator = torch.Generator().manual_seed(3)
    lengths = (SQ, SK, SK, SQ)
    return tuple(torch.randn(1, 2, n, 16, generator=generator).to(dtype) for n in lengths)


def rows_of(name: str, dtype: torch.dtype) -> torch.Tensor:
    """A bias [1, 1, SQ, SK], of which the first four rows are large and the others as usual."""
    low = LOWEST[dtype]
    bias = torch.randn(1, 1, SQ, SK, generator=torch.Generator().manual_seed(4))
    if name == "lowest":
        bias[:, :, :4] = low
    elif name == "highest":
        bias[:, :, :4] = -low
    elif name == "two_sizes":
        # Both are infinite times log2(e), and only the keys of the larger one count.
        bias[:, :, :4] = low
        bias[:, :, :4, 5::3] = 0.75 * low
    elif name == "first_tile_is_lowest":
        bias[:, :, :4, :32] = low
    elif name == "some_keys":
        bias[..., ::2] = low
    else:
        bias[:, :, :4] = float(name)
    return bias.to(dtype)


def assert_like(found: Any, want: Any, dtype: torch.dtype) -> None:
    """Finite, and as close as two roundings of the dtype."""
    eps = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for name in want._fields:
        x, exact = getattr(found, name), getattr(want, name)
        if exact is not None:
            assert x.isfinite().all(), name
            size = max(float(exact.abs().max()), 1.0)
            torch.testing.assert_close(x.float(), exact.float(), rtol=eps, atol=eps * size, msg=lambda m, n=name: n + m)


ROWS = ("lowest", "highest", "two_sizes", "first_tile_is_lowest", "some_keys", "-1e9", "-10000")


# float16 has no -1e9.
@pytest.mark.parametrize(
    ("rows", "dtypes"),
    [(rows, dtypes) for rows in ROWS for dtypes in DTYPES if (rows, dtypes[1]) != ("-1e9", torch.float16)],
    ids=str,
)
def test_bias(rows: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Forward as reference and engine, gradients as the formulas of the reference's backward, from one out and lse."""
    dtype, bias_dtype = dtypes
    q, k, v, do = inputs(dtype)
    bias = rows_of(rows, bias_dtype)
    with tiles.force(tiles.Tile(16, 16, num_warps=4, num_stages=1)):
        out, lse = fusemesh.attention_forward(q, k, v, bias=bias, backend="triton")
        for backend in ("reference", "cpu"):
            want, want_lse = fusemesh.attention_forward(q, k, v, bias=bias, backend=backend)
            torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
            torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)
        assert out.isfinite().all() and lse.isfinite().all()
        if rows in ("lowest", "highest") and bias_dtype != torch.float16:
            mean = v.float().mean(2, keepdim=True).expand(1, 2, 4, 16)
            torch.testing.assert_close(out[:, :, :4].float(), mean, rtol=0.01, atol=0.005)
        found, exact = (
            fusemesh.attention_backward(do, q, k, v, out, lse, bias=bias, bias_grad=True, backend=backend)
            for backend in ("triton", "reference")
        )
    assert_like(found, exact, dtype)


@pytest.mark.parametrize("number", [LOWEST[torch.float32], -LOWEST[torch.float32], -1e30, 5000.0])
def test_score_mod(number: float) -> None:
    """What a user's mod returns may be any finite number, too."""
    q, k, v, do = inputs(torch.bfloat16)
    mod: dict[str, Any] = {"score_mod": REPLACE(number=number), "align": "top_left"}
    out, lse = fusemesh.attention_forward(q, k, v, **mod, backend="triton")
    want, want_lse = fusemesh.attention_forward(q, k, v, **mod, backend="reference")
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-4)
    found, exact = (
        fusemesh.attention_backward(do, q, k, v, out, lse, **mod, backend=backend)
        for backend in ("triton", "reference")
    )
    assert_like(found, exact, torch.bfloat16)


@pytest.mark.parametrize("sink", [0.5, LOWEST[torch.float32], -LOWEST[torch.float32]])
def test_sinks(sink: float) -> None:
    """A sink far above such a row leaves nothing of it, one far below changes nothing, an equal one counts."""
    q, k, v, _ = inputs(torch.bfloat16)
    bias, sinks = rows_of("lowest", torch.float32), torch.full((2,), sink)
    found, want = (
        fusemesh.attention_forward(q, k, v, bias=bias, sinks=sinks, backend=backend)
        for backend in ("triton", "reference")
    )
    for x, exact in zip(found, want, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "sink", "rows"),
    [
        *((dtype, sink, "") for dtype in (torch.bfloat16, torch.float16, torch.float32) for sink in (80.0, 110.0)),
        (torch.bfloat16, 1.0, "lowest"),
        (torch.bfloat16, 1.0, "-10000"),
        (torch.float32, 1.0, "-10000"),
    ],
)
def test_the_gradient_of_the_lse_far_below_a_sink(dtype: torch.dtype, sink: float, rows: str) -> None:
    """The LSE leaves the sink out, and so does its gradient, even where the sink leaves no probability."""
    q, k, v, do = inputs(dtype)
    bias = rows_of(rows, dtype) if rows else None
    sinks = torch.tensor([sink, 1.0], dtype=dtype)
    dlse = torch.randn(1, 2, SQ, generator=torch.Generator().manual_seed(6))
    out, lse = fusemesh.attention_forward(q, k, v, bias=bias, sinks=sinks, backend="reference")
    found, exact = (
        fusemesh.attention_backward(do, q, k, v, out, lse, dlse, bias=bias, sinks=sinks, backend=backend)
        for backend in ("triton", "reference")
    )
    assert all(exact.dq[:, :, :4].abs().amax(3).flatten() > 1e-3)
    assert_like(found, exact, dtype)


def test_packed() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(30, 2, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    cu = torch.tensor([0, 13, 30], dtype=torch.int32)
    bias = torch.full((2, 1, 17, 17), LOWEST[torch.bfloat16], dtype=torch.bfloat16)
    bias[1] = 0.5
    results = {}
    for backend in ("triton", "reference", "cpu"):
        results[backend] = fusemesh.flash_attention_varlen(
            q, k, v, cu, cu, 17, 17, bias=bias, return_lse=True, backend=backend
        )
    out, lse = results["triton"]
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert out.isfinite().all() and lse.isfinite().all() and all(g.isfinite().all() for g in grads)
    for backend in ("reference", "cpu"):
        torch.testing.assert_close(out, results[backend][0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse, results[backend][1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", ["lowest", "highest", "first_tile_is_lowest", "two_sizes"])
def test_decode(rows: str, splits: int) -> None:
    """Splits of which some hold only such scores are combined."""
    q, k, v, _ = inputs(torch.bfloat16)
    bias = rows_of(rows, torch.bfloat16)
    results = {}
    for backend in ("triton", "reference", "cpu"):
        with decode_tiles.force(tile=tiles.Tile(16, 16, num_warps=4, num_stages=1), splits=splits):
            results[backend] = fusemesh.flash_attention_decode(
                q, k, v, cache_lens=torch.tensor([SK]), bias=bias, return_lse=True, backend=backend
            )
    out, lse = results["triton"]
    assert out.isfinite().all() and lse.isfinite().all()
    for backend in ("reference", "cpu"):
        torch.testing.assert_close(out, results[backend][0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse, results[backend][1], rtol=1e-5, atol=1e-4)


def test_what_is_hidden_stays_hidden() -> None:
    """-inf is no finite number: rows of it are empty, beside rows of the lowest one."""
    q, k, v, _ = inputs(torch.bfloat16)
    bias = rows_of("lowest", torch.bfloat16)
    bias[:, :, 2] = -math.inf
    out, lse = fusemesh.attention_forward(q, k, v, bias=bias, backend="triton")
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    assert lse[:, :, :2].isfinite().all() and lse[:, :, 3:].isfinite().all()
