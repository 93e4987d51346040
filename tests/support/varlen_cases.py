"""Calls of packed attention for its tests: inputs, a loop of fixed-length calls, and the comparison with fp64."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusemesh import Origin, flash_attention, flash_attention_varlen
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.testing.attention import Expected, check, expected
from tests.support.attention_cases import TABLE, TABLE_MOD

LENS_Q, LENS_K = (17, 0, 1, 40, 3), (23, 5, 9, 40, 0)
GAP = 3  # rows of padding before the first sequence and after the last
B, H, HKV, D, DV, MAX = len(LENS_Q), 4, 2, 16, 24, 40
CU_Q, CU_K = ([GAP + sum(lens[:b]) for b in range(B + 1)] for lens in (LENS_Q, LENS_K))
TOTAL_Q, TOTAL_K = CU_Q[-1] + GAP, CU_K[-1] + GAP

# One feature each: options of the call; mask, bias and slopes by the dims out of "bhmn" in which they are not 1.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_top_left": {"causal": True, "align": "top_left"},
    "causal_bottom_right": {"causal": True, "align": "bottom_right"},
    "window": {"window": (9, 3), "align": "bottom_right"},
    "window_left": {"window": (6, None), "align": "top_left"},
    "mask": {"mask": "bhmn"},
    "mask_over_keys": {"mask": "bn"},
    "bias": {"bias": "bhmn"},
    "bias_summed_over_batches": {"bias": "hmn", "causal": True, "align": "bottom_right", "dropout_p": 0.25, "seed": 6},
    "bias_summed_over_heads": {"bias": "bmn"},
    "bias_over_keys": {"bias": "bn"},
    "bias_over_queries": {"bias": "hm"},
    "bias_over_queries_and_sinks": {"bias": "bm", "sinks": True},
    "bias_of_heads": {"bias": "h"},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "h", "align": "bottom_right"},
    "alibi_of_sequences": {"alibi": "bh", "align": "top_left"},
    "score_mod": {"mod": True, "align": "bottom_right"},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7},
    "everything": {
        "causal": True,
        "align": "bottom_right",
        "window": (25, None),
        "mask": "mn",
        "bias": "hmn",
        "softcap": 3.0,
        "alibi": "h",
        "mod": True,
        "sinks": True,
        "dropout_p": 0.15,
        "seed": -5,
    },
}
IN_HALF_PRECISION = ("causal_bottom_right", "bias_summed_over_batches", "bias_over_queries", "everything")


class Inputs:
    """Tensors of one call; q, k, v, do and dlse hold NaN in the padding, and a bias where no sequence reaches."""

    def __init__(self, feature: str, dtype: torch.dtype, *, mod: bool = True) -> None:
        self.options = dict({**FEATURES[feature], **({} if mod else {"mod": False})})
        generator = torch.Generator().manual_seed(1234)

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def shape(dims: str) -> list[int]:
            return [size if name in dims else 1 for name, size in zip("bhmn", (B, H, MAX, MAX), strict=True)]

        self.tensors = {
            "q": new(TOTAL_Q, H, D),
            "k": new(TOTAL_K, HKV, D),
            "v": new(TOTAL_K, HKV, DV),
            "do": new(TOTAL_Q, H, DV),
        }
        for x in self.tensors.values():
            x[:GAP] = x[-GAP:] = math.nan
        wide = torch.promote_types(dtype, torch.float32)
        self.dlse = torch.randn(H, TOTAL_Q, generator=generator).to(wide)
        self.dlse[:, :GAP] = self.dlse[:, -GAP:] = math.nan
        if "bias" in self.options:
            dims = self.options["bias"]
            self.tensors["bias"] = new(*shape(dims))
            if dims == "bhmn":
                for b in range(B):
                    self.tensors["bias"][b, :, LENS_Q[b] :] = math.nan
                    self.tensors["bias"][b, :, :, LENS_K[b] :] = math.nan
        if self.options.pop("sinks", False):
            self.tensors["sinks"] = new(H)
        if "mask" in self.options:
            self.options["mask"] = torch.rand(shape(self.options["mask"]), generator=generator) > 0.3
        if "alibi" in self.options:
            dims = self.options.pop("alibi")
            self.options["alibi_slopes"] = torch.rand((B, H) if "b" in dims else (H,), generator=generator) / 8
        if self.options.pop("mod", False):
            self.options["score_mod"] = TABLE_MOD(torch.randn(TABLE, generator=generator), weight=0.25)

    @property
    def names(self) -> list[str]:
        """The tensors that have a gradient."""
        return [name for name in self.tensors if name != "do"]

    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name].clone().requires_grad_() for name in self.names}

    def run(self, backend: str, index_dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
        """Outputs and every gradient of flash_attention_varlen."""
        x = self.leaves()
        out, lse = flash_attention_varlen(
            *(x[name] for name in "qkv"),
            torch.tensor(CU_Q, dtype=index_dtype),
            torch.tensor(CU_K, dtype=index_dtype),
            MAX,
            MAX,
            **{**self.options, **{name: x[name] for name in ("bias", "sinks") if name in x}},
            return_lse=True,
            backend=backend,
        )
        gradients = torch.autograd.grad([out, lse], list(x.values()), [self.tensors["do"], self.dlse])
        return {"out": out, "lse": lse, **{f"d{name}": g for name, g in zip(x, gradients, strict=True)}}

    def options_of(self, b: int) -> dict[str, Any]:
        """The options of flash_attention for sequence ``b`` alone."""
        options = {name: value for name, value in self.options.items() if name not in ("align", "bias", "mask")}
        ahead = LENS_K[b] - LENS_Q[b] if self.options.get("align") == "bottom_right" else 0
        options["origin"] = Origin(q=ahead, batch=b)
        if options.get("alibi_slopes", torch.empty(0)).dim() == 2:
            options["alibi_slopes"] = options["alibi_slopes"][b]
        if "mask" in self.options:
            options["mask"] = of_sequence(self.options["mask"], b)
        return options


def of_sequence(x: torch.Tensor, b: int) -> torch.Tensor:
    """The part of a mask or bias that belongs to the scores of sequence ``b``."""
    if x.shape[0] > 1:
        x = x[b : b + 1]
    if x.shape[2] > 1:
        x = x[:, :, : LENS_Q[b]]
    return x[..., : LENS_K[b]] if x.shape[3] > 1 else x


def rows_of(b: int) -> slice:
    return slice(CU_Q[b], CU_Q[b + 1])


def keys_of(b: int) -> slice:
    return slice(CU_K[b], CU_K[b + 1])


def batched(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)[None]


def by_loop(inputs: Inputs) -> dict[str, torch.Tensor]:
    """What a loop of fixed-length calls gives; in the padding out is 0, lse -inf, gradients 0."""
    x = inputs.leaves()
    out = torch.zeros(TOTAL_Q, H, DV, dtype=torch.float64)
    lse = torch.full((H, TOTAL_Q), -math.inf, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        options = inputs.options_of(b)
        if "bias" in x:
            options["bias"] = of_sequence(x["bias"], b)
        if "sinks" in x:
            options["sinks"] = x["sinks"]
        q, k, v = (batched(x[name][where]) for name, where in zip("qkv", (rows_of(b), keys_of(b), keys_of(b))))  # noqa: B905
        one, one_lse = flash_attention(q, k, v, **options, return_lse=True, backend="reference")
        out[rows_of(b)], lse[:, rows_of(b)] = one[0].transpose(0, 1).detach(), one_lse[0].detach()
        total = total + (one * batched(inputs.tensors["do"][rows_of(b)])).sum()
        sees = one_lse > -math.inf
        total = total + (one_lse[sees] * inputs.dlse[None, :, rows_of(b)][sees]).sum()
    gradients = torch.autograd.grad(total, list(x.values()))
    return {"out": out, "lse": lse, **{f"d{name}": g for name, g in zip(x, gradients, strict=True)}}


def expectation(inputs: Inputs) -> Expected:
    """The sequences' expectations side by side as the packed call returns them."""
    packed: list[dict[str, torch.Tensor]] = []
    parts = []
    for b in range(B):
        x = {
            name: inputs.tensors[name][rows_of(b) if name in ("q", "do") else keys_of(b)]
            for name in ("q", "k", "v", "do")
        }
        options = dict(inputs.options_of(b))
        origin = options.pop("origin")
        bound = []
        if "softcap" in options:
            bound.append(score_mods.softcap(options["softcap"]))
        if "alibi_slopes" in options:
            bound.append(score_mods.alibi(options["alibi_slopes"], batched(x["q"])))
        if "score_mod" in options:
            bound.append(options["score_mod"])
        left, right = options.get("window", (None, None))
        spec = AttentionSpec(
            D**-0.5,
            left,
            0 if options.get("causal") else right,
            origin_q=origin.q,
            origin_batch=origin.batch,
            mods=tuple(part.mod.name for part in bound),
            params=tuple(number for part in bound for number in part.params),
            dropout_p=options.get("dropout_p", 0.0),
        )
        bias = inputs.tensors.get("bias")
        parts.append(
            expected(
                *(batched(x[name]) for name in "qkv"),
                Call(
                    spec,
                    mask=options.get("mask"),
                    bias=None if bias is None else of_sequence(bias, b),
                    aux=tuple(tensor for part in bound for tensor in part.aux),
                    sinks=inputs.tensors.get("sinks"),
                    seed=torch.tensor([options["seed"]]) if "seed" in options else None,
                ),
                do=batched(x["do"]),
                dlse=inputs.dlse[None, :, rows_of(b)],
            )
        )
    for kind in ("exact", "eager", "absolute"):
        values: dict[str, torch.Tensor] = {}
        for name in getattr(parts[0], kind):
            of_name = [getattr(part, kind)[name] for part in parts]
            if name == "dbias":
                values[name] = torch.zeros(inputs.tensors["bias"].shape, dtype=of_name[0].dtype)
                for b, part in enumerate(of_name):
                    of_sequence(values[name], b).add_(part)
            elif name == "dsinks":
                values[name] = torch.stack(of_name).sum(0)
            else:
                values[name] = torch.cat(of_name, 2)
        packed.append(values)
    return Expected(*packed)


def check_packed(inputs: Inputs, found: dict[str, torch.Tensor]) -> None:
    """Assert that results are within the budget, and 0 (lse: -inf) in the padding."""
    inside: dict[str, torch.Tensor] = {}
    for name, value in found.items():
        if name in ("dbias", "dsinks"):
            inside[name] = value
        elif name == "lse":
            assert (value[:, :GAP] == -math.inf).all() and (value[:, -GAP:] == -math.inf).all()
            inside[name] = value[None, :, GAP:-GAP]
        else:
            assert not value[:GAP].any() and not value[-GAP:].any(), f"{name}: padding is not 0"
            inside[name] = batched(value[GAP:-GAP])
    check(inside, expectation(inputs))
