"""Layer: one process, CPU, no Triton. Wrong calls of the kernels: each a ValueError that says what to change."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh import Origin
from fusemesh.kernels import backends

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 7, 16, 8


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K, V = t(B, H, SQ, D), t(B, HKV, SK, D), t(B, HKV, SK, DV)

# name in the message, what differs from a right call, what the message must say was expected and received
ATTENTION: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "q_not_a_tensor": ("q", {"q": [[1.0]]}, "a torch.Tensor", "list"),
    "q_three_dims": ("q", {"q": t(H, SQ, D)}, "4 dimensions [B, H, Sq, D]", "(4, 5, 16)"),
    "k_five_dims": ("k", {"k": t(1, B, HKV, SK, D)}, "4 dimensions [B, Hkv, Sk, D]", "(1, 2, 2, 7, 16)"),
    "v_three_dims": ("v", {"v": t(HKV, SK, D)}, "4 dimensions [B, Hkv, Sk, D]", "(2, 7, 16)"),
    "q_integer": ("q", {"q": t(B, H, SQ, D, dtype=torch.int64)}, "float32, bfloat16, float16, float64", "torch.int64"),
    "q_complex": ("q", {"q": t(B, H, SQ, D, dtype=torch.complex64)}, "float32", "torch.complex64"),
    "q_sparse": ("q", {"q": Q.to_sparse()}, "a dense tensor", "torch.sparse_coo"),
    "k_other_dtype": ("k", {"k": K.half()}, "q's dtype torch.float32", "torch.float16"),
    "v_other_dtype": ("v", {"v": V.bfloat16()}, "q's dtype torch.float32", "torch.bfloat16"),
    "k_other_device": ("k", {"k": t(B, HKV, SK, D, device="meta")}, "q's device cpu", "meta"),
    "k_other_batch": ("k", {"k": t(3, HKV, SK, D)}, "q's batch size 2", "3 (shape (3, 2, 7, 16))"),
    "v_other_batch": ("v", {"v": t(1, HKV, SK, DV)}, "q's batch size 2", "1 (shape (1, 2, 7, 8))"),
    "k_other_head_dim": ("k", {"k": t(B, HKV, SK, 8)}, "q's head dim 16", "8 (shape (2, 2, 7, 8))"),
    "v_other_heads": ("v", {"v": t(B, 4, SK, DV)}, "k's 2 heads", "4 (shape (2, 4, 7, 8))"),
    "v_other_length": ("v", {"v": t(B, HKV, 6, DV)}, "k's length 7", "6 (shape (2, 2, 6, 8))"),
    "heads_no_multiple": ("k", {"k": t(B, 3, SK, D), "v": t(B, 3, SK, DV)}, "divides q's 4", "3 (shape (2, 3, 7, 16))"),
    "more_key_heads": ("k", {"k": t(B, 8, SK, D), "v": t(B, 8, SK, DV)}, "divides q's 4", "8 (shape (2, 8, 7, 16))"),
    "no_key_heads": ("k", {"k": t(B, 0, SK, D), "v": t(B, 0, SK, DV)}, "divides q's 4", "0 (shape"),
    "head_dim_zero": ("q", {"q": t(B, H, SQ, 0), "k": t(B, HKV, SK, 0)}, "a head dim of at least 1", "0"),
    "causal_a_tensor": ("causal", {"causal": t(1)}, "True or False", "tensor"),
    "causal_a_string": ("causal", {"causal": "yes"}, "True or False", "'yes'"),
    "causal_unaligned": ("align, origin", {"causal": True}, "one of them", "neither, with Sq=5 and Sk=7"),
    "window_unaligned": ("align, origin", {"window": (2, None)}, "one of them", "neither, with Sq=5 and Sk=7"),
    "align_and_origin": (
        "align, origin",
        {"causal": True, "align": "top_left", "origin": Origin(q=1)},
        "at most one of them",
        "align='top_left' and Origin(q=1, k=0, head=0, batch=0)",
    ),
    "align_unknown": ("align", {"align": "left"}, "one of ('top_left', 'bottom_right')", "'left'"),
    "window_an_int": ("window", {"window": 3}, "(left, right), each None or an int >= 0", "3"),
    "window_of_three": ("window", {"window": (1, 2, 3)}, "(left, right)", "(1, 2, 3)"),
    "window_negative": ("window", {"window": (-1, 0)}, "an int >= 0", "(-1, 0)"),
    "window_beyond_64_bits": ("window", {"window": (2**63, 1)}, "an int >= 0", f"({2**63}, 1), beyond 64 bits"),
    "origin_beyond_64_bits": ("origin.q", {"origin": Origin(q=2**70)}, "an int, or", f"{2**70}, beyond 64 bits"),
    "origin_far": ("origin.k", {"origin": Origin(k=-(2**61))}, "a position within +-2^60", str(-(2**61))),
    "softcap_beyond_fp32": ("softcap", {"softcap": 1e39}, "above 0 and finite in fp32", "1e+39"),
    "softcap_below_fp32": ("softcap", {"softcap": 1e-46}, "above 0 and finite in fp32", "1e-46"),
    "scale_beyond_fp32": ("scale", {"scale": -1e39}, "finite in fp32", "-1e+39"),
    "window_of_floats": ("window", {"window": (1.5, 0)}, "an int >= 0", "(1.5, 0)"),
    "mask_floating": ("mask", {"mask": t(SQ, SK)}, "a torch.bool tensor", "torch.float32"),
    "mask_a_list": ("mask", {"mask": [True]}, "a torch.bool tensor", "[True]"),
    "mask_shape": ("mask", {"mask": t(SK, SQ, dtype=torch.bool)}, "[B, H, Sq, Sk] = (2, 4, 5, 7)", "(7, 5)"),
    "mask_kv_heads": ("mask", {"mask": t(B, HKV, SQ, SK, dtype=torch.bool)}, "(2, 4, 5, 7)", "(2, 2, 5, 7)"),
    "mask_padding_2d": ("mask", {"mask": t(B, SK, dtype=torch.bool)}, "(2, 4, 5, 7)", "(2, 7)"),
    "mask_other_device": ("mask", {"mask": t(SQ, SK, dtype=torch.bool, device="meta")}, "q's device cpu", "meta"),
    "bias_boolean": ("bias", {"bias": t(SQ, SK, dtype=torch.bool)}, "q's dtype torch.float32", "torch.bool"),
    "bias_other_dtype": ("bias", {"bias": t(SQ, SK, dtype=torch.float16)}, "q's dtype torch.float32", "torch.float16"),
    "bias_a_number": ("bias", {"bias": 1.0}, "a tensor of q's dtype", "1.0"),
    "bias_shape": ("bias", {"bias": t(B, H, SQ, SK - 1)}, "[B, H, Sq, Sk] = (2, 4, 5, 7)", "(2, 4, 5, 6)"),
    "bias_five_dims": ("bias", {"bias": t(1, B, H, SQ, SK)}, "(2, 4, 5, 7)", "(1, 2, 4, 5, 7)"),
    "scale_nan": ("scale", {"scale": float("nan")}, "a finite number or None", "nan"),
    "scale_a_tensor": ("scale", {"scale": t(1)}, "a finite number or None", "a tensor of shape (1,), torch.float32"),
    "origin_a_tuple": ("origin", {"origin": (0, 2)}, "a fusemesh.Origin or None", "(0, 2)"),
    "origin_of_floats": ("origin.q", {"origin": Origin(q=0.5)}, "an int, or an integer tensor", "0.5"),
    "origin_tensor_of_two": (
        "origin.k",
        {"origin": Origin(k=t(2, dtype=torch.int64))},
        "an integer tensor with one element",
        "a tensor of shape (2,), torch.int64 on cpu",
    ),
    "origin_tensor_floating": ("origin.q", {"origin": Origin(q=t(1))}, "an integer tensor", "torch.float32 on cpu"),
    "origin_tensor_elsewhere": (
        "origin.q",
        {"origin": Origin(q=t(1, dtype=torch.int64, device="meta"))},
        "with one element on cpu",
        "on meta",
    ),
    "dropout_above_one": ("dropout_p", {"dropout_p": 1.5}, "a number in [0, 1)", "1.5"),
    "softcap_zero": ("softcap", {"softcap": 0}, "a finite number above 0", "0"),
    "softcap_infinite": ("softcap", {"softcap": float("inf")}, "a finite number above 0", "inf"),
    "softcap_a_tensor": ("softcap", {"softcap": t(1)}, "a finite number above 0", "tensor"),
    "alibi_a_list": ("alibi_slopes", {"alibi_slopes": [0.5] * H, "align": "top_left"}, "a float tensor [H]", "list"),
    "alibi_shape": ("alibi_slopes", {"alibi_slopes": t(H + 1), "align": "top_left"}, "a float tensor", f"({H + 1},)"),
    "alibi_with_gradient": (
        "alibi_slopes",
        {"alibi_slopes": t(H).requires_grad_(), "align": "top_left"},
        "without gradient",
        "requires_grad=True",
    ),
    "alibi_without_align": ("align, origin", {"alibi_slopes": t(H)}, "alibi_slopes or score_mod is given", "neither"),
    "score_mod_a_function": ("score_mod", {"score_mod": abs}, "a registered mod with its arguments", "abs"),
    "sinks_shape": ("sinks", {"sinks": t(H + 1)}, f"a tensor [H] = [{H}]", f"({H + 1},)"),
    "sinks_dtype": ("sinks", {"sinks": t(H).double()}, f"a tensor [H] = [{H}]", "torch.float64"),
    "sinks_a_float": ("sinks", {"sinks": 0.5}, f"a tensor [H] = [{H}]", "0.5"),
    "seed_a_float": ("seed", {"dropout_p": 0.1, "seed": 1.5}, "an int of 64 bits", "1.5"),
    "seed_an_int32_tensor": (
        "seed",
        {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int32)},
        "an int64 tensor with one element",
        "torch.int32",
    ),
    "deterministic_a_number": ("deterministic", {"deterministic": 0}, "True or False", "0"),
    "dropout_one": ("dropout_p", {"dropout_p": 1}, "a number in [0, 1)", "1"),
    "deterministic_none": ("deterministic", {"deterministic": None}, "True or False", "None"),
    "return_lse_a_string": ("return_lse", {"return_lse": "lse"}, "True or False", "'lse'"),
    "backend_unknown": ("backend", {"backend": "cuda"}, "'reference', 'torch', 'cpu', 'triton'", "'cuda'"),
    "torch_has_no_lse": ("backend", {"backend": "torch", "return_lse": True}, "can do this call", "(return_lse)"),
    "torch_has_no_window": (
        "backend",
        {"backend": "torch", "window": (3, 0), "align": "top_left"},
        "can do this call",
        "does not express window",
    ),
    "triton_fp64": (
        "q",
        {"backend": "triton", "q": Q.double(), "k": K.double(), "v": V.double()},
        "float32, bfloat16 or float16 for backend='triton'",
        "torch.float64",
    ),
    "cpu_fp64": (
        "q",
        {"backend": "cpu", "q": Q.double(), "k": K.double(), "v": V.double()},
        "for backend='cpu'",
        "torch.float64",
    ),
    "triton_head_dim_small": (
        "q",
        {"backend": "triton", "q": t(B, H, SQ, 8), "k": t(B, HKV, SK, 8)},
        "a head dim from 16 to 256 for backend='triton'",
        "8",
    ),
    "triton_head_dim_large": (
        "v",
        {"backend": "triton", "v": t(B, HKV, SK, 512)},
        "a head dim from 16 to 256 for backend='triton'",
        "512",
    ),
}


def assert_says(error: ValueError, name: str, expected: str, received: str) -> None:
    """The message has the form ``name: expected ..., received ...; what to do``, with these pieces in their places."""
    match = re.fullmatch(r"(.+?): expected (.+), received (.+?)[;.] ?(.+)", str(error), re.DOTALL)
    assert match is not None, str(error)
    assert match[1] == name, str(error)
    assert expected in match[2], str(error)
    assert received in str(error).partition(", received ")[2], str(error)
    assert len(match[4]) > 3, f"no remedy: {error}"


@pytest.mark.parametrize("case", ATTENTION)
def test_flash_attention_refuses(case: str) -> None:
    name, changes, expected, received = ATTENTION[case]
    backends.reset_call_counts()
    with pytest.raises(ValueError) as caught:
        fusemesh.flash_attention(**{"q": Q, "k": K, "v": V, **changes})
    if case == "backend_unknown":
        assert str(caught.value).startswith("backend: expected one of ") and received in str(caught.value)
    else:
        assert_says(caught.value, name, expected, received)
    assert not backends.call_counts(), "something ran before the call was refused"


ONLY_TAPED = ("return_lse_a_string", "torch_has_no_lse", "backend_unknown")
SHARED = [case for case in ATTENTION if case not in ONLY_TAPED]


@pytest.mark.parametrize("case", SHARED)
def test_attention_forward_and_backward_refuse_the_same(case: str) -> None:
    name, changes, expected, received = ATTENTION[case]
    arguments = {"q": Q, "k": K, "v": V, **changes}
    with pytest.raises(ValueError) as caught:
        fusemesh.attention_forward(**arguments)
    if changes.get("backend") != "torch":  # which is refused for its missing lse first
        assert_says(caught.value, name, expected, received)
    if not {"q", "v"} & set(changes):  # do, out and lse have their shapes and dtypes
        with pytest.raises(ValueError) as caught:
            fusemesh.attention_backward(do=t(B, H, SQ, DV), out=t(B, H, SQ, DV), lse=t(B, H, SQ), **arguments)
        if changes.get("backend") != "torch":
            assert_says(caught.value, name, expected, received)


BACKWARD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "do_shape": ("do", {"do": t(B, H, SQ, D)}, "[B, H, Sq, Dv] = (2, 4, 5, 8)", "(2, 4, 5, 16)"),
    "do_dtype": ("do", {"do": t(B, H, SQ, DV, dtype=torch.float16)}, "dtype torch.float32", "torch.float16"),
    "out_missing": ("out", {"out": None}, "a torch.Tensor", "NoneType"),
    "out_device": ("out", {"out": t(B, H, SQ, DV, device="meta")}, "q's device cpu", "meta"),
    "lse_shape": ("lse", {"lse": t(B, SQ, H)}, "[B, H, Sq] = (2, 4, 5)", "(2, 5, 4)"),
    "lse_dtype": ("lse", {"lse": t(B, H, SQ, dtype=torch.float64)}, "dtype torch.float32", "torch.float64"),
    "dlse_shape": ("dlse", {"dlse": t(B, H, SQ, 1)}, "[B, H, Sq] = (2, 4, 5)", "(2, 4, 5, 1)"),
    "bias_grad_without_bias": ("bias_grad", {"bias_grad": True}, "False without bias", "True"),
    "bias_grad_a_number": ("bias_grad", {"bias_grad": 1}, "True or False", "1"),
    "backend_torch": ("backend", {"backend": "torch"}, "can do this call", "'torch'"),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_attention_backward_refuses(case: str) -> None:
    name, changes, expected, received = BACKWARD[case]
    right = {"do": t(B, H, SQ, DV), "q": Q, "k": K, "v": V, "out": t(B, H, SQ, DV), "lse": t(B, H, SQ)}
    with pytest.raises(ValueError) as caught:
        fusemesh.attention_backward(**{**right, **changes})
    assert_says(caught.value, name, expected, received)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_refused_by_name() -> None:
    jagged = torch.nested.nested_tensor([t(H, 3, D), t(H, 4, D)])
    with pytest.raises(NotImplementedError, match=r"^q: jagged"):
        fusemesh.flash_attention(jagged, jagged, jagged)


X, W = t(3, 8), t(5, 8)
LINEAR: dict[str, tuple[str, Callable[[], object], str]] = {
    "x_not_a_tensor": ("x", lambda: fusemesh.fused_linear([1.0], W), "list"),
    "x_integer": ("x", lambda: fusemesh.fused_linear(X.long(), W.long()), "torch.int64"),
    "w_three_dims": ("w", lambda: fusemesh.fused_linear(X, t(1, 5, 8)), "(1, 5, 8)"),
    "w_transposed": ("w", lambda: fusemesh.fused_linear(X, t(8, 5)), "(8, 5)"),
    "w_other_dtype": ("w", lambda: fusemesh.fused_linear(X, W.half()), "torch.float16"),
    "bias_shape": ("bias", lambda: fusemesh.fused_linear(X, W, t(8)), "(8,)"),
    "w_up_shape": ("w_up", lambda: fusemesh.fused_linear(X, W, activation="silu", w_up=t(6, 8)), "(6, 8)"),
    "w_up_without_activation": ("w_up", lambda: fusemesh.fused_linear(X, W, w_up=W), "activation=None"),
    "activation_unknown": ("activation", lambda: fusemesh.fused_linear(X, W, activation="swish"), "'swish'"),
    "backend_unknown": ("backend", lambda: fusemesh.fused_linear(X, W, backend="cuda"), "'cuda'"),
}


@pytest.mark.parametrize("case", LINEAR)
def test_fused_linear_refuses(case: str) -> None:
    name, call, received = LINEAR[case]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "expected" in message, message
    assert received in message.partition("received")[2], message


def test_the_table_is_as_long_as_promised() -> None:
    assert len(ATTENTION) >= 30


def _turned() -> dict[str, Any]:
    """Return calls whose tensors, or some of them, have heads where lengths belong; by name."""
    q, k = torch.randn(2, 12, 6, 16), torch.randn(2, 12, 3, 16)  # [B, S, H, D] and [B, S, Hkv, D]
    Q, K = q.transpose(1, 2), k.transpose(1, 2).contiguous()
    p, x, cu = q[0].transpose(0, 1), k[0].transpose(0, 1), torch.tensor([0, 5, 12])  # [H, total, D]
    lens = torch.full((2,), 10)
    out, lse = fusemesh.attention_forward(Q, K, K)

    def packed(q: Any, k: Any, v: Any) -> Any:
        return fusemesh.flash_attention_varlen(q, k, v, cu, cu, 7, 7)

    def decode(q: Any, k: Any, v: Any, **new: Any) -> Any:
        return fusemesh.flash_attention_decode(q, k, v, cache_lens=lens, **new)

    return {
        "causal": lambda: fusemesh.flash_attention(q, k, k, causal=True),
        "window": lambda: fusemesh.flash_attention(q, k, k, window=(2, 0)),
        "multi-query": lambda: fusemesh.flash_attention(q, k[:, :, :1], k[:, :, :1], causal=True),
        "slopes": lambda: fusemesh.flash_attention(q, q, q, alibi_slopes=torch.ones(6)),
        "sinks": lambda: fusemesh.flash_attention(q, k, k, sinks=torch.ones(6)),
        "mask": lambda: fusemesh.flash_attention(q, k, k, mask=torch.ones(12, 12, dtype=torch.bool)),
        "bias": lambda: fusemesh.flash_attention(q, q, q, bias=torch.ones(2, 1, 1, 12)),
        "keys": lambda: fusemesh.flash_attention(Q, k, k),
        "values": lambda: fusemesh.flash_attention(Q, K, k),
        "out": lambda: fusemesh.attention_backward(q, Q, K, K, out, lse),
        "lse": lambda: fusemesh.attention_backward(Q, Q, K, K, out, lse.transpose(1, 2)),
        "cache": lambda: decode(Q[:, :, :1], k, k),
        "cached values": lambda: decode(Q[:, :, :1], K, k),
        "decode's queries": lambda: decode(q[:, :1], K, K),
        "new keys": lambda: decode(Q[:, :, :2], K, K, k_new=k[:, :2], v_new=k[:, :2]),
        "packed": lambda: packed(p, x, x),
        "packed keys": lambda: packed(q[0], x, x),
        "packed values": lambda: packed(q[0], k[0], x),
    }


@pytest.mark.parametrize("name", list(_turned()))
def test_heads_that_stand_where_lengths_belong(name: str) -> None:
    packed = name.startswith("packed")
    with pytest.raises(ValueError, match=r"heads stand second, \[") as caught:
        _turned()[name]()
    assert ("pass x.transpose(0, 1)" if packed else "pass x.transpose(1, 2)") in str(caught.value)
    assert not str(caught.value).startswith("align")


def test_lengths_that_could_be_heads_keep_their_advice() -> None:
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match="if 6 and 3 are lengths, pass align='top_left'"):
        fusemesh.flash_attention(q, k, k, causal=True)
