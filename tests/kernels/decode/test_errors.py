"""Layer: one process, CPU, no Triton. Wrong calls of decode: each a ValueError that says what to change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusemesh import flash_attention_decode
from fusemesh.kernels import backends, env

B, H, HKV, SQ, S, D, DV = 2, 4, 2, 3, 9, 16, 8


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def index(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return t(*shape, dtype=dtype)


RIGHT = {"q": t(B, H, SQ, D), "k_cache": t(B, HKV, S, D), "v_cache": t(B, HKV, S, DV), "cache_lens": index(B)}
PAGED = {"k_cache": t(5, HKV, 4, D), "v_cache": t(5, HKV, 4, DV), "block_table": index(B, 3)}
NEW = {"k_new": t(B, HKV, 1, D), "v_new": t(B, HKV, 1, DV)}
LATENT = {"v_cache": None, "v_dim": 8}

# name in the message, what differs from a right call, what the message must say was expected and received
WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "q_a_list": ("q", {"q": [1.0]}, "a torch.Tensor", "list"),
    "q_three_dims": ("q", {"q": t(H, SQ, D)}, "[B, H, Sq, D]", "(4, 3, 16)"),
    "q_integers": ("q", {"q": t(B, H, SQ, D, dtype=torch.int64)}, "torch.float32", "torch.int64"),
    "cache_dtype": ("k_cache", {"k_cache": RIGHT["k_cache"].half()}, "q's dtype", "torch.float16"),
    "cache_device": ("v_cache", {"v_cache": RIGHT["v_cache"].to("meta")}, "on cpu", "on meta"),
    "cache_three_dims": ("k_cache", {"k_cache": t(HKV, S, D)}, "[B, Hkv, S, D]", "(2, 9, 16)"),
    "pages_three_dims": ("v_cache", {**PAGED, "v_cache": t(5, 4, DV)}, "pages [N, Hkv, page, Dv]", "(5, 4, 8)"),
    "cache_stride": ("k_cache", {"k_cache": t(B, HKV, D, S).mT}, "stride 1", "(288, 144, 1, 9)"),
    "cache_batch": ("k_cache", {"k_cache": t(3, HKV, S, D), "v_cache": t(3, HKV, S, DV)}, "batch size 2", "3 (shape"),
    "cache_head_dim": ("k_cache", {"k_cache": t(B, HKV, S, 8)}, "q's head dim 16", "(2, 2, 9, 8)"),
    "cache_empty_dim": ("v_cache", {"v_cache": t(B, HKV, S, 0)}, "a head dim of at least 1", "0"),
    "cache_heads": ("k_cache", {"k_cache": t(B, 3, S, D), "v_cache": t(B, 3, S, DV)}, "divides q's 4", "3 (shape"),
    "cache_lengths": ("v_cache", {"v_cache": t(B, HKV, 7, DV)}, "(2, 2, 9)", "(2, 2, 7, 8)"),
    "pages_of_none": (
        "k_cache",
        {**PAGED, "k_cache": t(5, HKV, 0, D), "v_cache": t(5, HKV, 0, DV)},
        "at least one",
        "0",
    ),
    "lens_an_int": ("cache_lens", {"cache_lens": 3}, "int32 or int64 tensor [B] with B = 2", "int"),
    "lens_floats": ("cache_lens", {"cache_lens": t(B)}, "int32 or int64", "torch.float32"),
    "lens_shape": ("cache_lens", {"cache_lens": index(B, 1)}, "[B]", "(2, 1)"),
    "lens_device": ("cache_lens", {"cache_lens": index(B).to("meta")}, "on cpu", "on meta"),
    "table_shape": ("block_table", {**PAGED, "block_table": index(3, 3)}, "B = 2", "(3, 3)"),
    "table_flat": ("block_table", {**PAGED, "block_table": index(B)}, "[B, pages of a sequence]", "(2,)"),
    "starts_dtype": ("cache_starts", {"cache_starts": t(B, dtype=torch.int16)}, "int32 or int64", "torch.int16"),
    "no_values": ("v_cache, v_dim", {"v_cache": None}, "one of them", "neither"),
    "two_values": ("v_cache, v_dim", {"v_dim": 8}, "one of them", "both"),
    "v_dim_large": ("v_dim", {"v_cache": None, "v_dim": 17}, "an int from 1 to k_cache's 16", "17"),
    "v_dim_a_float": ("v_dim", {"v_cache": None, "v_dim": 8.0}, "an int", "8.0"),
    "only_v_new": ("v_new", {"v_new": NEW["v_new"]}, "None without k_new", "Tensor"),
    "only_k_new": ("v_new", {"k_new": NEW["k_new"]}, "beside k_new", "None"),
    "latent_v_new": ("v_new", {**LATENT, **NEW}, "None without v_cache", "Tensor"),
    "new_three_dims": ("k_new", {**NEW, "k_new": t(B, HKV, D)}, "[B, Hkv, Sn, D]", "(2, 2, 16)"),
    "new_shape": ("k_new", {**NEW, "k_new": t(B, H, 1, D)}, "(2, 2, 1, 16)", "(2, 4, 1, 16)"),
    "new_lengths": ("v_new", {**NEW, "v_new": t(B, HKV, 2, DV)}, "(2, 2, 1, 8)", "(2, 2, 2, 8)"),
    "new_dtype": ("v_new", {**NEW, "v_new": NEW["v_new"].half()}, "torch.float32", "torch.float16"),
    "new_too_long": ("k_new", {"k_new": t(B, HKV, 10, D), "v_new": t(B, HKV, 10, DV)}, "at most 9 tokens", "10"),
    "causal_a_string": ("causal", {"causal": "yes"}, "True or False", "'yes'"),
    "lse_a_string": ("return_lse", {"return_lse": "yes"}, "True or False", "'yes'"),
    "causal_unaligned": ("align", {"causal": True}, "'bottom_right' with causal", "None"),
    "window_unaligned": ("align", {"window": (3, None)}, "'bottom_right' with causal, window", "None"),
    "alibi_unaligned": ("align", {"alibi_slopes": t(H)}, "or alibi_slopes", "None"),
    "top_left": ("align", {"causal": True, "align": "top_left"}, "'bottom_right'", "'top_left'"),
    "window_negative": ("window", {"window": (-1, 0), "align": "bottom_right"}, "an int >= 0", "(-1, 0)"),
    "mask_floats": ("mask", {"mask": t(SQ, S)}, "a torch.bool tensor", "torch.float32"),
    "mask_shape": ("mask", {"mask": t(SQ, S + 1, dtype=torch.bool)}, "= (2, 4, 3, 9)", "(3, 10)"),
    "mask_of_pages": ("mask", {**PAGED, "mask": t(SQ, S, dtype=torch.bool)}, "= (2, 4, 3, 12)", "(3, 9)"),
    "bias_dtype": ("bias", {"bias": t(SQ, S, dtype=torch.float16)}, "torch.float32", "torch.float16"),
    "alibi_shape": ("alibi_slopes", {"alibi_slopes": t(HKV), "align": "bottom_right"}, "[H] = [4]", "(2,)"),
    "softcap_zero": ("softcap", {"softcap": 0.0}, "above 0", "0.0"),
    "sinks_shape": ("sinks", {"sinks": t(HKV)}, "[H] = [4]", "(2,)"),
    "scale_nan": ("scale", {"scale": math.nan}, "a finite number", "nan"),
    "q_gradient": ("q", {"q": t(B, H, SQ, D).requires_grad_()}, "requires no gradient", "requires_grad=True"),
    "sinks_gradient": ("sinks", {"sinks": t(H).requires_grad_()}, "requires no gradient", "requires_grad=True"),
    "new_gradient": ("v_new", {**NEW, "v_new": t(B, HKV, 1, DV).requires_grad_()}, "no gradient", "requires_grad=True"),
    "torch_backend": ("backend", {"backend": "torch"}, "(reference, cpu, triton)", "'torch'"),
    "triton_v_dim": ("v_dim", {"backend": "triton"}, "a head dim from 16 to 512 for backend='triton'", "8"),
    "triton_head_dim": (
        "q",
        {"backend": "triton", "q": t(B, H, SQ, 600), "k_cache": t(B, HKV, S, 600), "v_cache": t(B, HKV, S, 16)},
        "a head dim from 16 to 576 for backend='triton'",
        "600",
    ),
    "triton_fp64": (
        "q",
        {"backend": "triton", **{n: RIGHT[n].double() for n in ("q", "k_cache", "v_cache")}},
        "float32, bfloat16 or float16 for backend='triton'",
        "torch.float64",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    name, changes, expected, received = WRONG[case]
    backends.reset_call_counts()
    with pytest.raises(ValueError) as caught:
        flash_attention_decode(**{**RIGHT, **changes})
    text = str(caught.value)
    assert text.startswith(f"{name}: expected ") and "; " in text, text
    assert expected in text.partition(", received ")[0] and received in text.partition(", received ")[2], text
    assert not backends.call_counts(), "something ran before the call was refused"


def test_auto_takes_the_engine_on_the_cpu() -> None:
    backends.reset_call_counts()
    flash_attention_decode(**RIGHT)
    assert backends.call_counts() == {("attention_decode", "cpu"): 1}


def test_parameters_pass_without_a_tape() -> None:
    """Sinks of a model are parameters; under no_grad nothing asks for their gradient."""
    sinks = torch.zeros(H, requires_grad=True)
    with torch.no_grad():
        out = flash_attention_decode(**RIGHT, sinks=sinks)
    assert not out.requires_grad


CONTENTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "length_too_large": ("cache_lens[1]", {"cache_lens": torch.tensor([9, 10])}, "from 0 to 9", "10"),
    "length_negative": ("cache_lens[0]", {"cache_lens": torch.tensor([-1, 3])}, "from 0 to 9", "-1"),
    "no_room": ("cache_lens[0]", {**NEW, "cache_lens": torch.tensor([9, 3])}, "9 slots less 1 new", "9"),
    "start_beyond": (
        "cache_starts[1]",
        {"cache_lens": torch.tensor([3, 4]), "cache_starts": torch.tensor([3, 5])},
        "from 0 to the sequence's length 4",
        "5",
    ),
    "page_beyond": (
        "block_table[1, 1]",
        {**PAGED, "cache_lens": torch.tensor([1, 5]), "block_table": torch.tensor([[4, 9, 9], [0, 5, 9]])},
        "a page from 0 to 4",
        "5",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_are_checked_when_asked_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, expected, received = CONTENTS[case]
    monkeypatch.setattr(env, "CHECK", True)
    with pytest.raises(ValueError) as caught:
        flash_attention_decode(**{**RIGHT, **changes})
    text = str(caught.value)
    assert text.startswith(f"{name}: expected ") and expected in text, text
    assert received in text.partition(", received ")[2], text
    monkeypatch.setattr(env, "CHECK", False)
    flash_attention_decode(**{**RIGHT, **changes})
