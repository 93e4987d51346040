"""Layer: application. What other libraries' functions take as a number, a flag or a pair ours take, to the same result.

Whether they take it is asked of them: PyTorch's function and module, transformers' two attention functions, and, since
flash-attn needs a GPU to be imported, an operator of PyTorch with flash-attn's types of arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusemesh import MultiheadAttention
from fusemesh.integrations.flash_attn import functions as flash_attn
from fusemesh.integrations.pytorch.sdpa import scaled_dot_product_attention
from fusemesh.integrations.transformers import interface
from tests.support import spellings

# numpy's, of arrays of one element that the other libraries take.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
HEADS_THIRD = Q.transpose(1, 2)
Call = Callable[[Any], torch.Tensor]


def attempt(call: Call, value: Any) -> torch.Tensor | None:
    """The call's result with the same random numbers every time, or None if it does not take the value."""
    torch.manual_seed(3)
    try:
        return call(value)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None


def takes_the_same(theirs: Call, ours: Call, spelled: dict[str, Any], plain: Any, most: int, named: str) -> None:
    """Ours take each value that theirs take, as they take the plain one; and refuse by name what is no such value.

    Args:
        most: how many of the spellings theirs take at least, so that the comparison is not an empty one.
    """
    want = attempt(ours, plain)
    assert want is not None
    taken = {name: value for name, value in spelled.items() if attempt(theirs, value) is not None}
    assert len(taken) >= most, taken
    for name, value in spelled.items():
        found = attempt(ours, value)
        if name in taken:
            assert found is not None, f"{named}: {name} is not taken"
        if found is not None:
            assert torch.equal(found, want), f"{named}: {name}"
    torch.manual_seed(3)
    wrong = spellings.WRONG_PAIRS if isinstance(plain, tuple) else spellings.WRONG_NUMBERS
    for value in wrong.values():
        if attempt(theirs, value) is None:
            with pytest.raises(ValueError, match=f"^{named}: expected "):
                ours(value)


@pytest.mark.parametrize(
    "argument, value",
    [("scale", 0.5), ("scale", 1), ("scale", -0.5), ("dropout_p", 0.25), ("dropout_p", 0), ("dropout_p", 1)],
)
def test_scaled_dot_product_attention(argument: str, value: float) -> None:
    def of(function: Any) -> Call:
        return lambda x: function(Q, Q, Q, **{argument: x})

    theirs, ours = of(F.scaled_dot_product_attention), of(scaled_dot_product_attention)
    takes_the_same(theirs, ours, spellings.numbers(value), value, 6, argument)
    if value != 0.25:
        torch.testing.assert_close(ours(value), theirs(value))


def test_scaled_dot_product_attention_takes_a_gradient_no_more_than_pytorch() -> None:
    learnt = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError):
        F.scaled_dot_product_attention(Q, Q, Q, scale=learnt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^scale: .*received a tensor of shape \(\), torch.float32, requires_grad"):
        scaled_dot_product_attention(Q, Q, Q, scale=learnt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^softmax_scale: .*requires_grad"):
        flash_attn.flash_attn_func(Q, Q, Q, softmax_scale=learnt)  # type: ignore[arg-type]
    with torch.no_grad():  # where there is no gradient to lose
        assert torch.equal(
            scaled_dot_product_attention(Q, Q, Q, scale=learnt), scaled_dot_product_attention(Q, Q, Q, scale=0.5)
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["embed_dim", "num_heads", "dropout", "need_weights", "average_attn_weights"])
def test_multihead_attention(argument: str) -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    values = {"embed_dim": 8, "num_heads": 2, "dropout": 0.25, "need_weights": 1, "average_attn_weights": 0}

    def of(module: Any) -> Call:
        def call(value: Any) -> torch.Tensor:
            arguments = {"embed_dim": 8, "num_heads": 2, "dropout": 0.0, argument: value}
            made = module(*(arguments.pop(name) for name in ("embed_dim", "num_heads", "dropout")))
            out, weights = made(x, x, x, **arguments)
            return out if weights is None else weights

        return call

    value = values[argument]
    takes_the_same(of(nn.MultiheadAttention), of(MultiheadAttention), spellings.numbers(value), value, 6, argument)


def test_a_dropout_of_one_drops_all() -> None:
    x = torch.randn(3, 2, 8)
    for module in (nn.MultiheadAttention(8, 2, dropout=1.0), MultiheadAttention(8, 2, dropout=1.0)):
        out, weights = module(x, x, x)
        assert weights is not None and not weights.any()
        assert torch.equal(out, module.out_proj.bias.expand_as(out))


class Layer(nn.Module):
    """A layer as transformers' functions see one."""

    num_key_value_groups, head_dim, is_causal = 1, 16, False


# transformers' sdpa has no softcap.
OF_TRANSFORMERS = [
    *((name, argument, n) for name in ("sdpa", "eager") for argument, n in (("scaling", 0.5), ("scaling", 2))),
    *((name, "dropout", n) for name in ("sdpa", "eager") for n in (0.25, 1)),
    ("eager", "softcap", 1.5),
]


@pytest.mark.parametrize("name, argument, value", OF_TRANSFORMERS)
def test_transformers(name: str, argument: str, value: float) -> None:
    if name == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as function
    else:
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as function
    layer = Layer().train()

    def of(attention: Any) -> Call:
        return lambda x: attention(layer, Q, Q, Q, None, **{argument: x})[0]

    theirs, ours = of(function), of(interface.attention)
    takes_the_same(theirs, ours, spellings.numbers(value), value, 5, argument)
    if value != 0.25:
        torch.testing.assert_close(ours(value), theirs(value))


def test_transformers_windows_and_flags() -> None:
    """As flash-attn takes them, through transformers' flash_attention_2."""
    layer = Layer()
    layer.config = type("Config", (), {"sliding_window": spellings.integers(3)["np.int64"]})()  # type: ignore[assignment]

    def attend(**options: Any) -> torch.Tensor:
        return interface.attention(layer, Q, Q, Q, None, is_causal=options.pop("is_causal", True), **options)[0]

    want = attend(sliding_window=3)
    for name, value in spellings.integers(3).items():
        assert torch.equal(attend(sliding_window=value), want), name
    for name, value in spellings.integers(1).items():
        assert torch.equal(attend(sliding_window=3, is_causal=value), want), name
    for value in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match=r"^sliding_window: expected an int above 0"):
            attend(sliding_window=value)
    with pytest.raises(ValueError, match=r"^is_causal: expected True or False, received 'no'"):
        attend(sliding_window=3, is_causal="no")
    with pytest.raises(ValueError, match=r"^sliding_window: expected the window of 3 keys"):
        attend()  # the config's number is a window too, if it is numpy's


LIBRARY = torch.library.Library("fusemesh_tests", "FRAGMENT")
LIBRARY.define("arguments(float dropout_p, float softmax_scale, bool causal, int left, int right, float softcap) -> ()")
LIBRARY.impl("arguments", lambda *arguments: None, "CompositeExplicitAutograd")


def flash_attns(
    dropout_p: Any = 0.0, softmax_scale: Any = 1.0, causal: Any = False, window_size: Any = (-1, -1), softcap: Any = 0.0
) -> torch.Tensor:
    """Raise if flash-attn's functions would not take the arguments."""
    left, right = window_size[0], window_size[1]
    softmax_scale = 1.0 if softmax_scale is None else softmax_scale
    torch.ops.fusemesh_tests.arguments(dropout_p, softmax_scale, causal, left, right, softcap)
    return Q


@pytest.mark.parametrize(
    "argument, value",
    [
        ("softmax_scale", 0.5),
        ("softmax_scale", 2),
        ("dropout_p", 0.25),
        ("dropout_p", 0),
        ("softcap", 1.5),
        ("causal", 1),
    ],
)
def test_flash_attns_numbers(argument: str, value: float) -> None:
    theirs: Call = lambda x: flash_attns(**{argument: x})  # noqa: E731
    spelled = spellings.numbers(value)

    def ours(x: Any) -> torch.Tensor:
        return flash_attn.flash_attn_func(HEADS_THIRD, HEADS_THIRD, HEADS_THIRD, **{argument: x})  # type: ignore[return-value]

    takes_the_same(theirs, ours, spelled, value, 12, argument)


@pytest.mark.parametrize("sides", [(2, 1), (0, 3), (-1, 2), (-1, -1)], ids=str)
def test_flash_attns_windows(sides: tuple[int, int]) -> None:
    x = HEADS_THIRD
    flat, cu = x[0], torch.tensor([0, 2, 5], dtype=torch.int32)
    calls: list[Call] = [
        lambda w: flash_attn.flash_attn_func(x, x, x, window_size=w),
        lambda w: flash_attn.flash_attn_varlen_func(flat, flat, flat, cu, cu, 3, 3, window_size=w),
        lambda w: flash_attn.flash_attn_with_kvcache(x, x, x, window_size=w),
    ]
    for ours in calls:
        takes_the_same(lambda w: flash_attns(window_size=w), ours, spellings.pairs(*sides), sides, 9, "window_size")


def test_flash_attns_lengths_and_flags() -> None:
    x, flat = HEADS_THIRD, HEADS_THIRD[0]
    cu, pages = torch.tensor([0, 2, 5], dtype=torch.int32), flat.reshape(5, 1, 2, 16)
    table = torch.tensor([[0, 1, 0], [2, 3, 4]], dtype=torch.int32)
    want = flash_attn.flash_attn_varlen_func(flat, flat, flat, cu, cu, 3, 3)
    cached = flash_attn.flash_attn_with_kvcache(x, x, x, cache_seqlens=3)
    for name, n in spellings.integers(3).items():
        assert torch.equal(flash_attn.flash_attn_varlen_func(flat, flat, flat, cu, cu, n, n), want), name
        paged = flash_attn.flash_attn_varlen_func(flat, pages, pages, cu, cu, n, n, block_table=table)
        assert torch.equal(paged, want), name
        if not isinstance(n, torch.Tensor):
            assert torch.equal(flash_attn.flash_attn_with_kvcache(x, x, x, cache_seqlens=n), cached), name
        flash_attn.flash_attn_with_kvcache(x, x, x, num_splits=n)
    for name, flag in spellings.integers(1).items():
        assert len(flash_attn.flash_attn_func(x, x, x, deterministic=flag, return_attn_probs=flag)) == 3, name
        assert len(flash_attn.flash_attn_with_kvcache(x, x, x, return_softmax_lse=flag)) == 2, name
    for name in ("deterministic", "return_attn_probs"):
        with pytest.raises(ValueError, match=f"^{name}: expected True or False"):
            flash_attn.flash_attn_func(x, x, x, **{name: "yes"})
    for name in ("return_softmax_lse", "rotary_interleaved"):
        with pytest.raises(ValueError, match=f"^{name}: expected True or False"):
            flash_attn.flash_attn_with_kvcache(x, x, x, **{name: "yes"})
    with pytest.raises(ValueError, match=r"^num_splits: expected an int"):
        flash_attn.flash_attn_with_kvcache(x, x, x, num_splits="4")
    with pytest.raises(ValueError, match=r"^max_seqlen_k: expected an int of at least 0, received 2.5"):
        flash_attn.flash_attn_varlen_func(flat, flat, flat, cu, cu, 3, 2.5)
    with pytest.raises(ValueError, match=r"^max_seqlen_k: expected an int of at least 0, received \d+, beyond 64 bits"):
        flash_attn.flash_attn_varlen_func(flat, flat, flat, cu, cu, 3, 2**70)
    with pytest.raises(ValueError, match=r"^window_size: expected two ints .*beyond 64 bits"):
        flash_attn.flash_attn_func(x, x, x, window_size=(2**70, 1))
    with pytest.raises(ValueError, match=r"^softmax_scale: expected a number that is finite in fp32"):
        flash_attn.flash_attn_func(x, x, x, softmax_scale=1e39)


def test_numbers_of_accelerated_functions() -> None:
    import fusemesh

    want = scaled_dot_product_attention(Q, Q, Q, scale=0.5, dropout_p=0.0)
    with fusemesh.accelerate("cpu"):
        for name, value in spellings.numbers(0.5).items():
            if name.startswith(("float", "np", "0-d ")) and "array" not in name:
                assert torch.equal(F.scaled_dot_product_attention(Q, Q, Q, scale=value), want), name
        dropped = F.scaled_dot_product_attention(Q, Q, Q, dropout_p=torch.tensor(0.5))  # type: ignore[arg-type]
    assert not torch.equal(dropped, want)
