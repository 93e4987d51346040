"""Kernels that write something wrong, for proofs at first use to find: each kernel, and a call that launches it."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.measure.cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase, VocabLossCase
from tests.support.interpreted_device import Spoil

DENSE = AttentionCase("fp32", B=1, H=2, Hkv=1, Sq=33, Sk=40, D=16, Dv=16, causal=True, align="bottom_right")
MASKED = AttentionCase("bf16", B=1, H=2, Hkv=2, Sq=33, Sk=40, mask="mn", bias="hmn", sinks=True, dlse=True)
PACKED = PackedCase("fp32", lens_q=(9, 0, 20), lens_k=(9, 4, 33), H=2, Hkv=1, causal=True, align="top_left")
STEP = DecodeCase("fp32", capacity=600, lens=(500, 33), added=1, causal=True)
LAYER = LinearCase("fp32", 17, 16, 24, "gelu")
LOSS = VocabLossCase("bf16", 17, 24, 70, has_bias=True)
GATED = LinearCase("bf16", 17, 16, 24, "silu", gated=True)


def add(argument: str, at: int | None = None, value: float = 1.0, where: Any = -1) -> Spoil:
    """Return a fault: ``value`` is added to an element of a tensor that a launch wrote.

    Args:
        argument: its name in the kernel's signature.
        at: the tensor's place, where the argument is a tuple.
        where: the element, by default the last one.
    """

    def spoil(args: dict[str, Any]) -> None:
        tensor = args[argument] if at is None else args[argument][at]
        index = tuple([where] * tensor.dim()) if isinstance(where, int) else where
        if tensor.numel():
            tensor[index] += value

    return spoil


def no_number_without_keys(args: dict[str, Any]) -> None:
    """Make a forward divide zero by zero in rows without a key."""
    out, lse = args["views"][12], args["p_lse"]
    out[(lse == -torch.inf).view(out.shape[:3])] = torch.nan


def wrong_over_many_blocks(args: dict[str, Any]) -> None:
    """Make dk wrong where the loop over queries takes more than two steps of 32."""
    if args["Sq"] > 64:
        add("views", 20)(args)


def delta_of_out_alone(args: dict[str, Any]) -> None:
    """Make delta what it would be without the rest of the output."""
    do, rest = args["views"][0], args["views"][8]
    args["values"].p_delta[:, :, : do.shape[2]] -= (do.float() * rest.float()).sum(-1)


def a_column_is_missing(args: dict[str, Any]) -> None:
    """Leave out of each sum one column in a thousand."""
    args["p_total"].mul_(0.999)


# Each kernel, a call that launches it, a fault of it, and the results that the fault makes wrong.
FAULTS: dict[str, tuple[str, Case, Spoil]] = {
    "forward": ("attention_forward_kernel", DENSE, add("views", 12)),
    "forward's lse": ("attention_forward_kernel", DENSE, add("p_lse", where=0)),
    "forward, NaN": ("attention_forward_kernel", MASKED, add("views", 12, float("nan"), 0)),
    "forward, NaN without keys": ("attention_forward_kernel", DENSE, no_number_without_keys),
    "forward, packed": ("attention_forward_kernel", PACKED, add("views", 12, where=(0, 0, 4, 1))),
    "forward's rest": ("attention_forward_kernel", MASKED, lambda args: args["views"][16].zero_()),
    "delta without the rest": ("attention_delta_kernel", MASKED, delta_of_out_alone),
    "delta": ("attention_delta_kernel", DENSE, lambda args: args["values"].p_delta.add_(0.5)),
    "dk and dv": ("attention_dkdv_kernel", DENSE, add("views", 20)),
    "dk and dv of many queries": ("attention_dkdv_kernel", DENSE, wrong_over_many_blocks),
    "dq": ("attention_dq_kernel", DENSE, add("views", 16)),
    "dq, packed": ("attention_dq_kernel", PACKED, add("views", 16, where=(0, 0, 4, 1))),
    "dbias": ("attention_dbias_kernel", MASKED, add("views", 16, 4.0)),
    "mask": ("attention_mask_tiles_kernel", MASKED, lambda args: args["p_tiles"].zero_()),
    "append": ("decode_append_kernel", STEP, add("views", 4, where=(0, 0, 5, 3))),
    "split": ("decode_split_kernel", STEP, lambda args: args["results"].p_part[0].mul_(1.01)),
    "combine": ("decode_combine_kernel", STEP, add("out", 0)),
    "linear": ("linear_forward_kernel", LAYER, add("p_y")),
    "linear's slope": ("linear_forward_kernel", LAYER, add("p_slope")),
    "dgrad": ("linear_dgrad_kernel", LAYER, add("p_dx", where=0)),
    "wgrad": ("linear_wgrad_kernel", GATED, add("p_dw_up")),
    "loss": ("vocab_loss_forward_kernel", LOSS, a_column_is_missing),
    "loss's own logit": ("vocab_loss_forward_kernel", LOSS, add("p_own", value=1e-3)),
    "loss's dz": ("vocab_loss_dz_kernel", LOSS, lambda args: args["p_dz"][3].mul_(1.05)),
    "loss's dbias": ("vocab_loss_dz_kernel", LOSS, add("p_dbias", value=0.1, where=0)),
}
