"""MultiheadAttention for its tests: beside torch.nn's with the same parameters, its inputs, and its formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fusemesh import MultiheadAttention

E, H, B, L, S = 64, 4, 2, 7, 19
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 24, "vdim": 40, "batch_first": True},
    "kdim_no_bias": {"kdim": 24, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 24},
}
# kind of attn_mask, its dims, kind of key_padding_mask
MASKS: dict[str, tuple[str | None, int, str | None]] = {
    "nothing": (None, 0, None),
    "bool": ("bool", 2, None),
    "bool_3d": ("bool", 3, None),
    "float": ("float", 2, None),
    "float_3d": ("float", 3, None),
    "padding": (None, 0, "bool"),
    "float_padding": (None, 0, "float"),
    "bool_and_padding": ("bool", 2, "bool"),
    "bool_3d_and_padding": ("bool", 3, "bool"),
    "float_and_padding": ("float", 2, "bool"),
    "bool_and_float_padding": ("bool", 2, "float"),
    "float_and_float_padding": ("float", 2, "float"),
    "float_3d_and_float_padding": ("float", 3, "float"),
}


def pair(*, dtype: torch.dtype = torch.float64, backend: str = "reference", **options: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mine = MultiheadAttention(E, H, dtype=dtype, backend=backend, **options)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def inputs(module: Any, how: str = "cross", dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """query, key, value: ``self`` is one tensor three times (where the module takes that), ``single`` has no batch."""

    def new(length: int, features: int) -> torch.Tensor:
        shape = (length, features) if how == "single" else (length, B, features)
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        return (x.transpose(0, 1).contiguous() if module.batch_first and how != "single" else x).requires_grad_()

    if how == "self" and module.kdim == module.vdim == E:
        return [new(S, E)] * 3
    key = new(S, module.kdim)
    return [new(L, E), key, key if how == "key_is_value" and module.kdim == module.vdim else new(S, module.vdim)]


def masks(name: str, how: str, length: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    """attn_mask and key_padding_mask; key 0 is seen by everyone, since torch's rows without a key are NaN."""
    kind, dims, padding = MASKS[name]
    batch = 1 if how == "single" else B

    def new(kind: str | None, *shape: int) -> torch.Tensor | None:
        if kind is None:
            return None
        if kind == "float":
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        return hidden

    return {
        "attn_mask": new(kind, *([batch * H] if dims == 3 else []), length, S),
        "key_padding_mask": new(padding, *([] if how == "single" else [batch]), S),
    }


def everything(module: Any, qkv: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Output, weights, and the gradients of inputs, float masks and parameters for one scalar of both."""
    out, weights = module(*qkv, **options)
    generator = torch.Generator().manual_seed(7)

    def random_like(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    loss = (out * random_like(out)).sum()
    if weights is not None:
        loss = loss + (weights * random_like(weights)).sum()
    wanted = {name: x for name, x in zip(("query", "key", "value"), qkv, strict=True) if x.requires_grad}
    wanted |= {name: x for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    wanted |= dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    found = {"out": out.detach()} | ({} if weights is None else {"weights": weights.detach()})
    return found | {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Each of the same shape, dtype and within 1e-12 of the largest element."""
    assert mine.keys() == theirs.keys()
    for name, want in theirs.items():
        atol = 1e-12 * want.abs().max().item()
        torch.testing.assert_close(mine[name], want, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def formula(
    module: Any, qkv: list[torch.Tensor], seen: torch.Tensor | None = None, distance: torch.Tensor | None = None
) -> Any:
    """Output and weights [B, H, L, S] of a batch_first module, by loops over heads and nothing of ours."""
    D, Hkv = E // H, module.num_kv_heads
    wq, wk, wv = module.in_proj_weight.split([E, Hkv * D, Hkv * D])
    bq, bk, bv = module.in_proj_bias.split([E, Hkv * D, Hkv * D])
    q, k, v = (x @ w.T + b for x, w, b in zip(qkv, (wq, wk, wv), (bq, bk, bv), strict=True))
    outs, weights = [], []
    for h in range(H):
        kv = slice(h * Hkv // H * D, h * Hkv // H * D + D)
        s = q[..., h * D : h * D + D] @ k[..., kv].mT / math.sqrt(D)
        if module.softcap is not None:
            s = module.softcap * torch.tanh(s / module.softcap)
        if module.alibi_slopes is not None:
            assert distance is not None
            s = s - module.alibi_slopes[h].to(s.dtype) * distance.abs()
        if seen is not None:
            s = s.masked_fill(~seen, -math.inf)
        if module.sinks is not None:
            s = torch.cat([s, module.sinks[h].expand(*s.shape[:2], 1)], -1)
        p = s.softmax(-1)[..., : k.shape[1]]
        outs.append(p @ v[..., kv])
        weights.append(p)
    return module.out_proj(torch.cat(outs, -1)), torch.stack(weights, 1)


class Formula(nn.Module):
    """:func:`formula` with a module's parameters, under their names."""

    def __init__(self, module: MultiheadAttention, average: bool, *args: Any) -> None:
        super().__init__()
        self.module, self.average, self.args = module, average, args

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def forward(self, *qkv: torch.Tensor) -> Any:
        out, weights = formula(self.module, list(qkv), *self.args)
        return out, weights.mean(1) if self.average else weights


def check_rows_without_a_key(how: str, backend: str, dtype: torch.dtype) -> None:
    theirs, mine = pair(dtype=dtype, backend=backend, batch_first=True)
    qkv = inputs(theirs, dtype=dtype)
    attn_mask, padding = torch.zeros(L, S, dtype=torch.bool), torch.zeros(B, S, dtype=torch.bool)
    empty = torch.zeros(B, L, dtype=torch.bool)
    if how in ("attn_mask", "float"):
        attn_mask[2], empty[:, 2] = True, True
    elif how == "padding":
        padding[1], empty[1] = True, True
    else:
        attn_mask[3, 2:], padding[1, :2], empty[1, 3] = True, True, True
    options: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": None if how == "float" else padding}
    if how == "float":
        options["attn_mask"] = torch.zeros(L, S, dtype=dtype).masked_fill(attn_mask, -math.inf).requires_grad_()
    for need_weights in (False, True)[: 1 if backend == "torch" else 2]:
        got = everything(mine, qkv, need_weights=need_weights, **options)
        assert all(x.isfinite().all() for x in got.values())
        assert torch.equal(got["out"][empty], mine.out_proj.bias.detach().expand(int(empty.sum()), E))
        assert (got["d query"][empty] == 0).all() and (got["d query"][~empty] != 0).any(-1).all()
        want = theirs(*qkv, **options)
        assert want[0][empty].isnan().all()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got["out"][~empty], want[0][~empty], rtol=tolerance, atol=tolerance)
        if need_weights:
            assert (got["weights"][empty] == 0).all()
            torch.testing.assert_close(got["weights"][~empty], want[1][~empty], rtol=tolerance, atol=tolerance)
