"""Calls of packed attention for its tests: one feature each, and a loop of fixed-length calls to compare with."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusemesh import Origin, flash_attention
from fusemesh.kernels.measure.cases import PackedCase
from fusemesh.kernels.measure.cases.common import table_mod

# Sequences of no queries, of no keys and of one query are among the case's own.
FEATURES = {
    "plain": PackedCase(),
    "causal_top_left": PackedCase(causal=True, align="top_left"),
    "causal_bottom_right": PackedCase(causal=True, align="bottom_right"),
    "window": PackedCase(window=(9, 3), align="bottom_right"),
    "window_left": PackedCase(window=(6, None), align="top_left"),
    "mask": PackedCase(mask="bhmn"),
    "mask_over_keys": PackedCase(mask="bn"),
    "bias": PackedCase(bias="bhmn"),
    "bias_summed_over_batches": PackedCase(bias="hmn", causal=True, align="bottom_right", dropout=0.25, seed=6),
    "bias_summed_over_heads": PackedCase(bias="bmn"),
    "bias_over_keys": PackedCase(bias="bn"),
    "bias_over_queries": PackedCase(bias="hm"),
    "bias_over_queries_and_sinks": PackedCase(bias="bm", sinks=True),
    "bias_of_heads": PackedCase(bias="h"),
    "softcap": PackedCase(softcap=1.5),
    "alibi": PackedCase(alibi="h", align="bottom_right"),
    "alibi_of_sequences": PackedCase(alibi="bh", align="top_left"),
    "score_mod": PackedCase(mod=True, align="bottom_right"),
    "sinks": PackedCase(sinks=True),
    "dropout": PackedCase(dropout=0.3),
    "everything": PackedCase(
        causal=True,
        align="bottom_right",
        window=(25, None),
        mask="mn",
        bias="hmn",
        softcap=3.0,
        alibi="h",
        mod=True,
        sinks=True,
        dropout=0.15,
        seed=-5,
    ),
}
IN_HALF_PRECISION = ("causal_bottom_right", "bias_summed_over_batches", "bias_over_queries", "everything")


def run_and_compare(case: PackedCase, backend: str, index_dtype: torch.dtype = torch.int32) -> None:
    """Compute the case and assert that its results are within the error budget."""
    x = case.inputs(index_dtype=index_dtype)
    case.check(case.compute(x, backend), case.expected(x))


def by_loop(case: PackedCase, x: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the results of a loop of fixed-length calls; in the padding out is 0, lse -inf, gradients 0."""
    leaves = {name: x[name].clone().requires_grad_() for name in case.leaves(x)}
    x = {**x, **leaves}
    rows = x["q"].shape[0]
    out = torch.zeros(rows, case.H, case.Dv, dtype=torch.float64)
    lse = torch.full((case.H, rows), -math.inf, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(case.lens_q)):
        part = case.sequence(x, b)
        options: dict[str, Any] = {name: part.get(name) for name in ("mask", "bias")}
        options |= {"alibi_slopes": part.get("slopes"), "sinks": x["sinks"], "softcap": case.softcap}
        options |= {"causal": case.causal, "window": case.window, "origin": Origin(q=case.ahead(b), batch=b)}
        options |= {"dropout_p": case.dropout, "seed": case.seed if case.dropout else None}
        options["score_mod"] = None if x["table"] is None else table_mod(x["table"])
        q, k, v = part["q"], part["k"], part["v"]
        one, one_lse = flash_attention(q, k, v, **options, return_lse=True, backend="reference")
        where = slice(case.starts[0][b], case.starts[0][b + 1])
        out[where], lse[:, where] = one[0].transpose(0, 1).detach(), one_lse[0].detach()
        total = total + (one * part["do"]).sum()
        sees = one_lse > -math.inf
        total = total + (one_lse[sees] * part["dlse"][sees]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out, "lse": lse, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}
