"""Layer: kernels, Triton's interpreter. MultiheadAttention on the Triton backend by the error budget.

Exact is the same module in fp64 on the reference; eager is torch.nn.MultiheadAttention, or the formula written out, in
the tested dtype.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fusemesh import MultiheadAttention, use_backend
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget
from tests.support.attention_modules import (
    CONSTRUCTORS,
    Formula,
    H,
    L,
    S,
    check_rows_without_a_key,
    everything,
    inputs,
    masks,
    pair,
)

pytestmark = pytest.mark.interpreter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RAN_ONCE = {("attention_forward", "triton"): 1, ("attention_backward", "triton"): 1}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    backends.reset_call_counts()


class Eager(nn.Module):
    """torch's module by its formula of matmul, softmax and matmul, whether or not the weights are wanted."""

    def __init__(self, module: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.module, self.need_weights = module, need_weights

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_parameters()

    def forward(self, *qkv: torch.Tensor, **options: Any) -> Any:
        out, weights = self.module(*qkv, **{**options, "need_weights": True})
        return out, weights if self.need_weights else None


def in_fp64(x: Any) -> Any:
    return x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(mine: MultiheadAttention, eager: nn.Module, qkv: list[torch.Tensor], **options: Any) -> None:
    """One forward and one backward by the Triton kernels; every result within its budget."""
    got = everything(mine, qkv, **options)
    assert backends.call_counts() == RAN_ONCE
    exact = copy.deepcopy(mine).double()
    exact.backend = "reference"
    twins = {id(x): in_fp64(x) for x in qkv}
    want = everything(exact, [twins[id(x)] for x in qkv], **{name: in_fp64(x) for name, x in options.items()})
    plain = everything(eager, qkv, **(options if isinstance(eager, Eager) else {}))
    assert got.keys() == want.keys() == plain.keys()
    for name, value in got.items():
        budget.check(name, value, want[name], plain[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("constructor", "how", "mask", "options"),
    [
        ("batch_first", "self", "nothing", {"need_weights": False}),
        ("plain", "cross", "bool_and_padding", {"need_weights": False}),
        ("kdim_vdim", "cross", "float_and_padding", {}),
        ("no_bias", "single", "float_3d", {"average_attn_weights": False}),
        ("bias_kv_zero_attn", "cross", "bool_3d_and_padding", {}),
        ("zero_attn", "cross", "float_3d_and_float_padding", {"need_weights": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchs_arguments(constructor: str, how: str, mask: str, options: dict[str, Any], dtype: str) -> None:
    theirs, mine = pair(dtype=DTYPES[dtype], backend="triton", **CONSTRUCTORS[constructor])
    qkv = inputs(mine, how, DTYPES[dtype])
    length = S if how == "self" else L
    check(
        mine,
        Eager(theirs, options.get("need_weights", True)),
        qkv,
        **options,
        **masks(mask, how, length, DTYPES[dtype]),
    )


FEATURES: dict[str, dict[str, Any]] = {
    "causal_gqa": {"num_kv_heads": 2},
    "window": {"window": (3, 2)},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_more_than_torch(feature: str, dtype: str) -> None:
    """With the weights, so that gradients flow through the log-sum-exp, too."""
    module = MultiheadAttention(64, H, batch_first=True, dtype=DTYPES[dtype], backend="triton", **FEATURES[feature])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    causal = feature == "causal_gqa"
    distance = torch.arange(S) - torch.arange(L)[:, None] - (S - L)
    seen = (distance <= 0) if causal else torch.ones(L, S, dtype=torch.bool)
    if module.window is not None:
        seen = (distance >= -3) & (distance <= 2)
    qkv = inputs(module, dtype=DTYPES[dtype])
    eager = Formula(module, True, seen, distance.to(DTYPES[dtype]))
    check(module, eager, qkv, causal=causal, align="bottom_right")


@pytest.mark.parametrize("how", ["attn_mask", "float", "padding", "both"])
def test_rows_without_a_key(how: str) -> None:
    check_rows_without_a_key(how, "triton", torch.float32)


def test_dropout() -> None:
    """Kernels and weights drop the same elements: the output is that of the returned weights."""
    module = MultiheadAttention(64, H, 0.4, batch_first=True, num_kv_heads=2, backend="triton")
    qkv = inputs(module, dtype=torch.float32)
    out, weights = module(*qkv, average_attn_weights=False)
    v = module._project(*qkv)[2].repeat_interleave(2, 1)
    want = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert 0.5 < (weights != 0).double().mean() < 0.7


def test_use_backend_and_compile() -> None:
    theirs, mine = pair(dtype=torch.float32, batch_first=True, backend="auto")
    qkv = inputs(mine, "self", torch.float32)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    with use_backend("triton"):
        got = everything(compiled, qkv, need_weights=False)
    assert backends.call_counts() == RAN_ONCE
    want = everything(theirs, qkv, need_weights=False)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-5)
